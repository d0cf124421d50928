"""The heat map of a rank monitor: matrices by time."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from lightning.pytorch import Trainer
from lightning.pytorch.loggers import Logger
from torch import Tensor

from lightning_sgd._run_log import record_figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure

STEM = "rank_heat_map"


def draw_heat_map(title: str, names: Sequence[str], times: Sequence[int], shares: Tensor) -> Figure:
    """Draw one row per matrix, from 0 (dark) for rank nothing to 1 (bright) for full rank.

    Args:
        title: What the colours show.
        names: Names of the matrices, first on top.
        times: Steps at which the values were taken.
        shares: Values relative to the short side, shape (times, matrices).
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.0, 1.2 + 0.28 * max(2, len(names))), layout="constrained")
    axes = figure.subplots()
    # A look fills the time until the next one; nothing says how long the last one would.
    edges = [*times, times[-1] + max(1, (times[-1] - times[0]) // max(1, len(times) - 1))]
    rows = [index - 0.5 for index in range(len(names) + 1)]
    image = axes.pcolormesh(edges, rows, shares.T.numpy(), cmap="cividis", vmin=0, vmax=1)
    axes.set_yticks(range(len(names)), names)
    axes.invert_yaxis()
    axes.set_xlabel("optimizer step")
    axes.set_title(title, loc="left", fontsize="medium")
    figure.colorbar(image, ax=axes, label="share of full rank")
    return figure


def publish_if_possible(
    trainer: Trainer, draw: Callable[[], Figure], stem: str, key: str, word: str = "figure"
) -> str:
    """Draw a figure and publish it in the log folder; what to say about it, empty in a trial run.

    Args:
        trainer: Knows folder and loggers; all ranks come here.
        draw: Called on rank 0.
        stem: Name of the files.
        key: Name of the figure in a logger.
        word: What it is called.
    """
    if getattr(trainer, "fast_dev_run", False):
        return ""
    # On all ranks, because a logger may ask the first one for its folder.
    folder = Path(trainer.log_dir or trainer.default_root_dir)
    if not trainer.is_global_zero:
        return ""
    if find_spec("matplotlib") is None:
        return f" No {word}: pip install 'lightning-sgd[report]'."
    return f" {word.capitalize()}: {publish(draw(), folder, trainer, stem, key)}"


def publish(figure: Figure, folder: Path, trainer: Trainer, stem: str, key: str) -> Path:
    """Save a figure as PNG and SVG, and hand it to the loggers that take figures.

    Args:
        figure: The heat map.
        folder: Where the files go.
        trainer: Knows the loggers.
        stem: Name of the files.
        key: Name of the figure in a logger.

    Returns:
        The path of the PNG.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{stem}.png"
    figure.savefig(path, dpi=150)
    figure.savefig(path.with_suffix(".svg"))
    record_figure(trainer, key, path.with_suffix(".svg"))
    for logger in trainer.loggers:
        _hand_over(figure, logger, path, trainer.global_step, key)
    return path


def _hand_over(figure: Figure, logger: Logger, path: Path, step: int, key: str) -> None:
    add_figure = getattr(getattr(logger, "experiment", None), "add_figure", None)
    if add_figure is not None:  # TensorBoard
        add_figure(key, figure, step)
    elif hasattr(logger, "log_image"):  # Weights & Biases, Comet
        logger.log_image(key, [str(path)], step=step)
