"""What the reproductions share: handwritten digits, arguments, Markdown tables, problems, the style of figures."""

from __future__ import annotations

import argparse
import math
from functools import cache
from io import StringIO
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from rich.box import MARKDOWN
from rich.console import Console
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

if TYPE_CHECKING:
    from collections.abc import Iterator

    from matplotlib.typing import RcKeyType
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
    description: str, folder: str | None, *, quick: str, seeds: int | None = None
) -> argparse.ArgumentParser:
    """Make a parser with ``--output``, ``--quick`` and, with a default number of ``seeds``, ``--seeds``.

    ``--output`` is ``runs/<folder>`` by default; without a ``folder`` nothing is written unless it is given.
    """
    parser = argparse.ArgumentParser(description=description)
    default = None if folder is None else Path("runs") / folder
    help_text = f"folder for tables, numbers and figures (default: {default or 'write nothing'})"
    parser.add_argument("--output", type=Path, default=default, metavar="DIR", help=help_text)
    parser.add_argument("--quick", action="store_true", help=quick)
    if seeds is not None:
        help_text = f"how many (default: {seeds})"
        parser.add_argument("--seeds", type=int, default=seeds, help=help_text)
    return parser


def markdown(table: Table, width: int = 120) -> str:
    """Format the table as Markdown that the documentation can include; ``width`` in characters."""
    table.box, table.padding = MARKDOWN, (0, 1)
    # A console of a file without colours: one of the terminal would add its codes for bold headings.
    lines = StringIO()
    Console(width=width, file=lines, color_system=None).print(table)
    return "\n".join(map(str.rstrip, lines.getvalue().strip().splitlines())) + "\n"


def save_table(path: Path, table: Table, width: int = 120) -> None:
    """Write the table as Markdown that the documentation can include; ``width`` in characters."""
    path.write_text(markdown(table, width))


def bias_free_mlp() -> nn.Sequential:
    """Make a 64-64-64-10 network of linear layers without biases."""
    blocks = [(nn.Linear(a, b, bias=False), nn.ReLU()) for a, b in pairwise((64, 64, 64, 10))]
    layers = [layer for block in blocks for layer in block]
    return nn.Sequential(*layers[:-1])


def sgd_steps(
    net: nn.Module, x: Tensor, y: Tensor, *, lr: float, batch_size: int, num_steps: int
) -> Iterator[int]:
    """Train by plain SGD on batches drawn with replacement; yield 0, 1, ... before each step."""
    optimizer = torch.optim.SGD(net.parameters(), lr)
    generator = torch.Generator().manual_seed(0)
    for step in range(num_steps):
        yield step
        batch = torch.randint(len(x), (batch_size,), generator=generator)
        optimizer.zero_grad()
        cross_entropy(net(x[batch]), y[batch]).backward()
        optimizer.step()


def batch_gradients(
    net: nn.Module, x: Tensor, y: Tensor, *, size: int, num: int, generator: torch.Generator
) -> Tensor:
    """Compute ``num`` gradients, one in each row, of batches of ``size`` samples drawn with replacement."""
    rows, params = [], list(net.parameters())
    for _ in range(num):
        batch = torch.randint(len(x), (size,), generator=generator)
        parts = torch.autograd.grad(cross_entropy(net(x[batch]), y[batch]), params)
        rows.append(torch.cat([part.flatten() for part in parts]))
    return torch.stack(rows)


def gaussian_like(rows: Tensor, generator: torch.Generator) -> Tensor:
    """Draw Gaussian rows with the covariance of these, dependence between coordinates included."""
    noise = rows - rows.mean(dim=0)
    mixing = torch.randn(len(rows), len(rows), generator=generator) / math.sqrt(len(rows))
    return mixing @ noise


class LogisticDigits:
    """Logistic regression on the digits, "below five" against the rest, with a squared norm as penalty.

    Args:
        penalty: Its factor, the strong convexity [μ].

    Attributes:
        rows: Images times labels ±1, of norm one each.
        optimum: Where the mean gradient vanishes, by Newton's method.
    """

    def __init__(self, penalty: float) -> None:
        from sklearn import datasets

        self.penalty = penalty
        pixels, digits = datasets.load_digits(return_X_y=True)
        images = torch.from_numpy(pixels)
        images = images - images.mean(dim=0)
        labels = 2.0 * torch.from_numpy(digits < 5) - 1
        self.rows: Tensor = images / images.norm(dim=1, keepdim=True) * labels[:, None]
        self.optimum = self._minimize()

    def gradients(self, w: Tensor, rows: Tensor) -> Tensor:
        """Compute one sample's gradient for each of several weight vectors; rows of both belong together."""
        return self.penalty * w - rows * torch.sigmoid(-(w * rows).sum(dim=-1, keepdim=True))

    def all_gradients(self, w: Tensor) -> Tensor:
        """Compute the gradients of all samples at one weight vector."""
        return self.gradients(w.expand_as(self.rows), self.rows)

    def _minimize(self) -> Tensor:
        rows, w = self.rows, torch.zeros(self.rows.shape[1], dtype=self.rows.dtype)
        for _ in range(30):
            p = torch.sigmoid(rows @ w)
            curvature = (rows.T * (p * (1 - p))) @ rows / len(rows)
            hessian = curvature + self.penalty * torch.eye(len(w))
            w = w - torch.linalg.solve(hessian, self.all_gradients(w).mean(dim=0))
        return w


def svg_style(salt: str, font_size: float = 9) -> dict[RcKeyType, Any]:
    """Make the settings of matplotlib; the ``salt`` gives an SVG the same bytes every time."""
    return {
        "font.size": font_size,
        "svg.hashsalt": salt,
        "axes.spines.top": False,
        "axes.spines.right": False,
    }
