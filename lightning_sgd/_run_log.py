"""Start and end messages, metrics and figures of plug-ins, logged and stored beside the metrics of the run."""

from __future__ import annotations

import json
import platform
from collections.abc import Mapping
from contextlib import suppress
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Literal
from weakref import WeakKeyDictionary

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.utilities import rank_zero_info

FILE = "findings.json"
PACKAGES = "lightning-sgd", "lightning", "torch", "torchmetrics", "numpy"

_RECORDS: WeakKeyDictionary[Trainer, dict[str, Any]] = WeakKeyDictionary()


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
        logger.log_metrics(dict(values), step=step)
    trainer.callback_metrics.update({key: torch.tensor(value) for key, value in values.items()})


def logger_names(trainer: Trainer) -> str:
    """Name the loggers, for a sentence that says where values go."""
    return ", ".join(type(logger).__name__ for logger in trainer.loggers) or "no logger"


def log_folder(trainer: Trainer) -> Path:
    """Return the folder for files of this run; to be called on all ranks, because a logger may ask the first one."""
    return Path(trainer.log_dir or trainer.default_root_dir)


def record_figure(trainer: Trainer, key: str, file: Path) -> None:
    """Store where a figure is; to be called on rank 0.

    Args:
        trainer: Knows where the metrics go.
        key: Name of the figure in a logger, which begins like the metrics that it belongs to.
        file: Where it is.
    """
    record = _record(trainer)
    record["figures"][key] = str(file.absolute())
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
    folder = Path(loggers[0].log_dir)
    if "://" in loggers[0].log_dir:  # the report reads local files
        return
    folder.mkdir(parents=True, exist_ok=True)
    part = folder / f"{FILE}.part"
    part.write_text(json.dumps(record, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    part.replace(folder / FILE)
