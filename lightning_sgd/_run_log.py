"""What plug-ins say of a run: printed, and kept beside its metrics for ``lightning-sgd report``."""

from __future__ import annotations

import json
import platform
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


def say(trainer: Trainer, plugin: str, moment: Literal["start", "end"], sentence: str) -> None:
    """Print one line, on rank 0, and keep it.

    Args:
        trainer: Knows where the metrics go; without a ``CSVLogger`` nothing is kept.
        plugin: Name of the class that speaks.
        moment: Whether training starts or ends.
        sentence: What it does, or what it found.
    """
    rank_zero_info(f"{plugin}: {sentence}")
    record = _record(trainer)
    record["plugins"].setdefault(plugin, {})[moment] = sentence
    record["run"] |= {f"{moment}ed": datetime.now(timezone.utc).isoformat(timespec="seconds")}
    _write(trainer, record)


def keep_figure(trainer: Trainer, key: str, file: Path) -> None:
    """Remember a figure; to be called on rank 0.

    Args:
        trainer: Knows where the metrics go.
        key: Name of the figure in a logger, which begins like the metrics that it belongs to.
        file: Where it is.
    """
    record = _record(trainer)
    record["figures"][key] = str(file.absolute())
    _write(trainer, record)


def _record(trainer: Trainer) -> dict[str, Any]:
    """Of this trainer; what another one left in the folder is no longer true."""
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
