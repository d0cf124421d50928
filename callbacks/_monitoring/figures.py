"""Save figures of plug-ins in the log folder, and hand them to loggers that take figures."""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec
from io import BytesIO
from typing import TYPE_CHECKING

from lightning.pytorch import Trainer
from lightning.pytorch.loggers import Logger

from lightning_sgd._run_log import is_remote, log_folder, record_figure, reporting, save_file

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def publish_if_possible(
    trainer: Trainer, draw: Callable[[], Figure], stem: str, key: str, word: str = "figure"
) -> str:
    """Draw and publish a figure on rank 0; to be called on all ranks.

    Whatever goes wrong is a warning: by now the training is done.

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
    said = f" No {word}: see the warning."
    with reporting(trainer, f"The {word} {key} was not drawn"):
        path = publish(draw(), folder, trainer, stem, key)
        said = f" {word.capitalize()}: {path}" if path else said
    return said  # noqa: RET504  # the block before may end early


def publish(figure: Figure, folder: str, trainer: Trainer, stem: str, key: str) -> str | None:
    """Save a figure as PNG and SVG, hand it to the loggers, and return the path of the PNG, if it was saved."""
    path = None
    with reporting(trainer, f"{stem}.png and {stem}.svg cannot be written to {folder}"):
        path = save_file(folder, f"{stem}.png", _rendered(figure, "png"))
        record_figure(trainer, key, save_file(folder, f"{stem}.svg", _rendered(figure, "svg")))
    for logger in trainer.loggers:
        with reporting(trainer, f"{type(logger).__name__} did not take the figure {key}"):
            _hand_over(figure, logger, path, trainer.global_step, key)
    return path


def _rendered(figure: Figure, kind: str) -> bytes:
    buffer = BytesIO()
    figure.savefig(buffer, dpi=150 if kind == "png" else "figure", format=kind)
    return buffer.getvalue()


def _hand_over(figure: Figure, logger: Logger, path: str | None, step: int, key: str) -> None:
    add_figure = getattr(getattr(logger, "experiment", None), "add_figure", None)
    if add_figure is not None:  # TensorBoard
        add_figure(key, figure, step)
    elif hasattr(logger, "log_image"):  # Weights & Biases
        image = figure if path is None or is_remote(path) else path
        logger.log_image(key, [image], step=step)
