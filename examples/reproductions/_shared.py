"""What the reproductions share: handwritten digits, arguments, Markdown tables, the style of figures."""

from __future__ import annotations

import argparse
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from rich.box import MARKDOWN
from rich.console import Console
from torch import Tensor

if TYPE_CHECKING:
    from rich.table import Table

Samples: TypeAlias = tuple[Tensor, Tensor]


def load_digits() -> Samples:
    """Load all 1797 images, 64 pixels between 0 and 1 each, and their labels, in scikit-learn's order."""
    from sklearn import datasets

    pixels, labels = datasets.load_digits(return_X_y=True)
    return torch.from_numpy(pixels).float() / 16, torch.from_numpy(labels)


def shuffled_digits(seed: int = 0) -> Samples:
    """Load the digits in a random order."""
    x, y = load_digits()
    order = torch.randperm(len(y), generator=torch.Generator().manual_seed(seed))
    return x[order], y[order]


@cache
def split_digits() -> tuple[Samples, Samples]:
    """Load 1297 shuffled digits to train with, and the other 500 to test with."""
    x, y = shuffled_digits()
    return (x[500:], y[500:]), (x[:500], y[:500])


def arguments(
    description: str, folder: str, *, quick: str, seeds: int | None = None
) -> argparse.ArgumentParser:
    """Make a parser with ``--output``, ``--quick`` and, with a default number of ``seeds``, ``--seeds``."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--output", type=Path, default=Path("runs") / folder, metavar="DIR")
    parser.add_argument("--quick", action="store_true", help=quick)
    if seeds is not None:
        help_text = f"how many (default: {seeds})"
        parser.add_argument("--seeds", type=int, default=seeds, help=help_text)
    return parser


def save_table(path: Path, table: Table, width: int = 120) -> None:
    """Write the table as Markdown that the documentation can include; ``width`` in characters."""
    table.box, table.padding = MARKDOWN, (0, 1)
    console = Console(width=width)
    with console.capture() as lines:
        console.print(table)
    path.write_text("\n".join(map(str.rstrip, lines.get().strip().splitlines())) + "\n")


def svg_style(salt: str, font_size: float = 9) -> dict[str, Any]:
    """Make the settings of matplotlib; the ``salt`` gives an SVG the same bytes every time."""
    return {
        "font.size": font_size,
        "svg.hashsalt": salt,
        "axes.spines.top": False,
        "axes.spines.right": False,
    }
