"""Start and end messages, metrics and figures of plug-ins, logged and stored beside the metrics of the run."""

from __future__ import annotations

import json
import platform
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Literal
from weakref import WeakKeyDictionary

import torch
from lightning.fabric.utilities.cloud_io import get_filesystem
from lightning.pytorch import Trainer
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.utilities import rank_zero_info

from lightning_sgd._validation import warn_at_user_line

FILE = "findings.json"
PACKAGES = "lightning-sgd", "lightning", "torch", "torchmetrics", "numpy"

# Weak, so that a record does not keep a trainer alive; and not an attribute of the trainer, which is pickled for
# `spawn`.
_RECORDS: WeakKeyDictionary[Trainer, dict[str, Any]] = WeakKeyDictionary()
_WARNED: WeakKeyDictionary[Trainer, set[str]] = WeakKeyDictionary()


def announce(trainer: Trainer, plugin: str, moment: Literal["start", "end"], sentence: str) -> None:
    """Print one line on rank 0, and store it for ``lightning-sgd report``.

    Args:
        trainer: Knows where the metrics go; without a ``CSVLogger`` nothing is stored.
        plugin: Name of the class.
        moment: Whether training starts or ends.
        sentence: What it does, or what it found.
    """
    rank_zero_info(f"{plugin}: {sentence}")
    record = _record(trainer)
    record["plugins"].setdefault(plugin, {})[moment] = sentence
    record["run"] |= {f"{moment}ed": datetime.now(timezone.utc).isoformat(timespec="seconds")}
    _write(trainer, record)


def log_metrics(trainer: Trainer, values: Mapping[str, float], num_uncounted: int = 0) -> None:
    """Log values that all ranks agree on, now, to the loggers and to ``callback_metrics``.

    The x axis is Lightning's own: values after the k-th step stand beside its loss of the k-th step, at k - 1; values
    from before the first step stand at 0. Not by ``LightningModule.log``, which would reduce over ranks once more, and
    which would drop what does not fall on ``log_every_n_steps``.

    Args:
        trainer: Knows the loggers.
        values: By key.
        num_uncounted: 1 in the hooks of a batch that stepped, which Lightning counts only after them.
    """
    step = max(0, trainer.fit_loop.epoch_loop._batches_that_stepped + num_uncounted - 1)
    for logger in trainer.loggers:
        with reporting(trainer, f"{type(logger).__name__} did not take metrics"):
            logger.log_metrics(dict(values), step=step)
    # Tensors, because EarlyStopping and ModelCheckpoint compare with functions of torch.
    trainer.callback_metrics.update({key: torch.tensor(value) for key, value in values.items()})


def logger_names(trainer: Trainer) -> str:
    """Name the loggers, for a sentence that says where values go."""
    return ", ".join(type(logger).__name__ for logger in trainer.loggers) or "no logger"


@contextmanager
def reporting(trainer: Trainer, failure: str) -> Iterator[None]:
    """Turn every error of the block into one warning per training: a report may never end a training.

    Args:
        trainer: The training that goes on.
        failure: What has not been done in this case, as the beginning of the warning.
    """
    try:
        yield
    except Exception as error:  # loggers and remote file systems raise errors of their own
        warned = _WARNED.setdefault(trainer, set())
        if failure not in warned:
            warned.add(failure)
            reason = " ".join(str(error).split())
            warn_at_user_line(f"{failure}; training goes on. {type(error).__name__}: {reason}")


def log_folder(trainer: Trainer) -> str:
    """Return the folder or URL for files of this run; to be called on all ranks: a logger may ask the first one."""
    # Lightning broadcasts `log_dir` from rank 0, a collective: hence on all ranks.
    return str(trainer.log_dir or trainer.default_root_dir)


def save_file(folder: str, name: str, content: bytes) -> str:
    """Write a file as a whole or not at all, make its folder if needed, and return its path.

    Args:
        folder: Local, or the URL of a file system that fsspec knows.
        name: Name of the file.
        content: What to write.

    Raises:
        OSError: If that is not possible; remote file systems may raise other errors.
    """
    if is_remote(folder):
        files, path = get_filesystem(folder), f"{folder.rstrip('/')}/{name}"
        files.makedirs(folder, exist_ok=True)
        files.pipe_file(path, content)
        return path
    local = Path(folder)
    local.mkdir(parents=True, exist_ok=True)
    # Written beside and renamed: who reads while training goes on never sees half a file.
    part = local / f"{name}.part"
    try:
        part.write_bytes(content)
        part.replace(local / name)
    finally:
        with suppress(OSError):
            part.unlink(missing_ok=True)
    return str(local / name)


def is_remote(folder: str) -> bool:
    """Return whether a folder is the URL of a file system, such as ``s3://bucket/run``."""
    return "://" in folder


def record_figure(trainer: Trainer, key: str, file: str) -> None:
    """Store where a figure is; to be called on rank 0.

    Args:
        trainer: Knows where the metrics go.
        key: Name of the figure in a logger, which begins like the metrics that it belongs to.
        file: Path or URL of the figure.
    """
    record = _record(trainer)
    record["figures"][key] = file if is_remote(file) else str(Path(file).absolute())
    _write(trainer, record)


def _record(trainer: Trainer) -> dict[str, Any]:
    """Return the record of this trainer; what another one left in the folder is no longer true."""
    if trainer not in _RECORDS:
        _RECORDS[trainer] = {
            "versions": _versions(),
            "run": {
                "ranks": trainer.world_size,
                "device": str(trainer.strategy.root_device),
                "precision": str(trainer.precision),
            },
            "plugins": {},
            "figures": {},
        }
    return _RECORDS[trainer]


def _versions() -> dict[str, str]:
    found = {"Python": platform.python_version(), "system": platform.platform(terse=True)}
    for name in PACKAGES:
        with suppress(PackageNotFoundError):
            found[name] = version(name)
    if torch.cuda.is_available():
        found["GPU"] = torch.cuda.get_device_name()
    return found


def _write(trainer: Trainer, record: dict[str, Any]) -> None:
    loggers = [logger for logger in trainer.loggers if isinstance(logger, CSVLogger)]
    if not (loggers and trainer.is_global_zero):
        return
    folder = loggers[0].log_dir
    if is_remote(folder):  # the report reads local files
        return
    text = json.dumps(record, indent=1, ensure_ascii=False) + "\n"
    with reporting(trainer, f"{FILE} cannot be written to {folder}"):
        save_file(folder, FILE, text.encode())
