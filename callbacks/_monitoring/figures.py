"""Save figures of plug-ins in the log folder, and hand them to loggers that take figures."""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec
from typing import TYPE_CHECKING

from lightning.pytorch import Trainer
from lightning.pytorch.loggers import Logger

from lightning_sgd._run_log import log_folder, record_figure

if TYPE_CHECKING:
    from pathlib import Path

    from matplotlib.figure import Figure


def publish_if_possible(
    trainer: Trainer, draw: Callable[[], Figure], stem: str, key: str, word: str = "figure"
) -> str:
    """Draw and publish a figure on rank 0; to be called on all ranks.

    Args:
        trainer: The trainer.
        draw: Makes the figure.
        stem: Name of the files, without suffix.
        key: Name of the figure in a logger.
        word: What the sentence calls it.

    Returns:
        A sentence with the path, or with the reason why there is no figure; empty with ``fast_dev_run``.
    """
    if getattr(trainer, "fast_dev_run", False):
        return ""
    folder = log_folder(trainer)
    if not trainer.is_global_zero:
        return ""
    if find_spec("matplotlib") is None:
        return f" No {word}: pip install 'lightning-sgd[report]'."
    return f" {word.capitalize()}: {publish(draw(), folder, trainer, stem, key)}"


def publish(figure: Figure, folder: Path, trainer: Trainer, stem: str, key: str) -> Path:
    """Save a figure as PNG and SVG, hand it to the loggers, and return the path of the PNG."""
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
