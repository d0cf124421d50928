"""``lightning-sgd doctor``: one line per finding on versions, known problems, this machine, and a config."""

from __future__ import annotations

import contextlib
import os
import platform
import re
import shutil
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Literal, TypeAlias

import torch
from rich.console import Console

from lightning_sgd.catalogue import plugins
from lightning_sgd.cli.errors import UsageError

if TYPE_CHECKING:
    from lightning.pytorch import Trainer

    from lightning_sgd.cli.training import CommandLine

Level: TypeAlias = Literal["ok", "warning", "problem"]

ADVISORY = "GHSA-w37p-236h-pfx3"
MALICIOUS = ((2, 6, 2), (2, 6, 3))
SAFE_CHECKPOINTS = (2, 6, 6)
STYLES: dict[Level, str] = {"ok": "green", "warning": "yellow", "problem": "bold red"}
SHARED_MEMORY = Path("/dev/shm")  # noqa: S108 - looked at, not written to
ENOUGH_SHARED_MEMORY = 2**30


@dataclass(frozen=True, slots=True)
class Finding:
    """One line of the examination.

    Attributes:
        level: ``problem`` stops a training or endangers its user; ``warning`` may cost something.
        subject: What was examined.
        text: What was found, and the remedy.
    """

    level: Level
    subject: str
    text: str


def examine(config: str | None = None) -> None:
    """Print the findings.

    Args:
        config: A file for ``lightning-sgd fit --config``, examined too.

    Raises:
        SystemExit: With code 1 if there is a problem.
    """
    console, problems = Console(), 0
    for finding in [*examine_machine(), *(examine_config(config) if config else ())]:
        style = STYLES[finding.level]
        console.print(f"[{style}]{finding.level:8}[/]", end=" ")
        console.print(
            f"{finding.subject}: {finding.text}", markup=False, highlight=False, soft_wrap=True
        )
        problems += finding.level == "problem"
    if problems:
        raise SystemExit(1)


def examine_machine() -> Iterator[Finding]:
    """Examine versions, advisories, GPU and shared memory."""
    names = ("torch", "lightning", "lightning-sgd")
    versions = [f"python {platform.python_version()}", *(f"{n} {version(n)}" for n in names)]
    yield Finding("ok", "versions", ", ".join(versions))
    yield about_lightning(version("lightning"))
    yield _about_gpus()
    free = shutil.disk_usage(SHARED_MEMORY).free if SHARED_MEMORY.exists() else None
    yield about_shared_memory(free)


def about_lightning(installed: str) -> Finding:
    """Look a version of lightning up in the advisories.

    Args:
        installed: The version, such as ``2.6.6``.

    Example:
        >>> about_lightning("2.6.2").level, about_lightning("2.6.6").level
        ('problem', 'ok')
    """
    number = tuple(map(int, re.findall(r"\d+", installed)[:3]))
    if number in MALICIOUS:
        text = (
            f"lightning {installed} is a malicious release that steals credentials ({ADVISORY}): uninstall it, and "
            "replace every secret that this machine holds"
        )
        return Finding("problem", "advisories", text)
    if number < SAFE_CHECKPOINTS:
        text = (
            f"lightning {installed} can run code from a checkpoint in `load_from_checkpoint`: load only checkpoints "
            "that you trust, or upgrade to 2.6.6"
        )
        return Finding("warning", "advisories", text)
    return Finding("ok", "advisories", f"none that we know of for lightning {installed}")


def _about_gpus() -> Finding:
    if not torch.cuda.is_available():
        return Finding("ok", "GPU", "none; training runs on the CPU")
    properties = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
    each = ", ".join(f"{p.name} ({p.total_memory / 2**30:.0f} GiB)" for p in properties)
    return Finding("ok", "GPU", each)


def about_shared_memory(free: int | None) -> Finding:
    """Judge the free space through which processes pass tensors to each other.

    Args:
        free: Bytes; ``None`` where the system has no ``/dev/shm``.

    Example:
        >>> about_shared_memory(64 * 2**20).level
        'warning'
    """
    if free is None:
        return Finding("ok", "shared memory", f"this system has no {SHARED_MEMORY}")
    size = f"{free / 2**30:.1f} GiB free in {SHARED_MEMORY}"
    if free >= ENOUGH_SHARED_MEMORY:
        return Finding("ok", "shared memory", size)
    text = f"{size}; workers of data loaders may crash: in Docker pass `--shm-size=8g`"
    return Finding("warning", "shared memory", text)


def examine_config(file: str) -> Iterator[Finding]:
    """Build everything that a config names, without training, and examine it.

    Args:
        file: The config.
    """
    try:
        built = _build(file)
    except UsageError as error:
        yield Finding("problem", "config", str(error))
        return
    except UnicodeDecodeError as error:
        yield Finding("problem", "config", f"{file} is not UTF-8 text: {error}")
        return
    yield Finding("ok", "config", f"{file} builds a {type(built.model).__name__}")
    yield _about_loader(built)
    yield about_strategy(built.trainer)


def _build(file: str) -> CommandLine:
    from lightning_sgd.cli.training import CommandLine

    class Built(Exception):  # noqa: N818 - it is no error: it ends the command before training
        pass

    class Builder(CommandLine):
        def before_fit(self) -> None:
            super().before_fit()
            built.append(self)
            raise Built

    built: list[CommandLine] = []
    with contextlib.suppress(Built), warnings.catch_warnings():
        # It thinks that the words of this command were meant for it.
        warnings.filterwarnings("ignore", "LightningCLI's args parameter")
        Builder(args=["fit", "--config", file])
    return built[0]


def _about_loader(built: CommandLine) -> Finding:
    """Say whether the training loader can continue in the middle of an epoch."""
    from lightning.pytorch.utilities.combined_loader import CombinedLoader

    from lightning_sgd.callbacks import PrioritySampling

    source = built.datamodule or built.model
    try:
        if built.datamodule is not None:
            built.datamodule.prepare_data()
            built.datamodule.setup("fit")
        loaders = CombinedLoader(source.train_dataloader()).flattened
    # Code of the user: whatever it raises is the finding, also `sys.exit`.
    except (Exception, SystemExit) as error:
        text = (
            f"`train_dataloader` of {type(source).__name__} fails: {type(error).__name__}: {error}"
        )
        return Finding("problem", "data", text)
    if any(isinstance(callback, PrioritySampling) for callback in built.trainer.callbacks):  # type: ignore[attr-defined]
        return Finding("ok", "data", "PrioritySampling resumes its draws in the middle of an epoch")
    forgetful = [type(loader).__name__ for loader in loaders if not _keeps_position(loader)]
    if not forgetful:
        return Finding("ok", "data", "the training loader resumes in the middle of an epoch")
    text = (
        f"{forgetful[0]} forgets its position: a training that is resumed in the middle of an epoch sees samples "
        "twice or never; use `lightning_sgd.ResumableDataLoader`"
    )
    return Finding("warning", "data", text)


def _keeps_position(loader: object) -> bool:
    return all(callable(getattr(loader, name, None)) for name in ("state_dict", "load_state_dict"))


def about_strategy(trainer: Trainer) -> Finding:
    """Say whether the strategy of a trainer suits its number of ranks and its devices.

    Args:
        trainer: As it would train.
    """
    from lightning.pytorch.accelerators import CPUAccelerator

    from lightning_sgd.strategies import ByzantineStrategy, GossipPGAStrategy

    strategy, ranks = trainer.strategy, trainer.world_size
    name, cores = type(strategy).__name__, os.cpu_count() or 1
    count = f"{ranks} rank{'s' if ranks > 1 else ''}"
    alone = ranks == 1
    try:
        if isinstance(strategy, ByzantineStrategy):
            alone = ranks == 1 and strategy.workers == "rank"
            per_rank = 1 if strategy.workers == "rank" else trainer.accumulate_grad_batches
            strategy.rule.check(ranks * per_rank)
        if isinstance(strategy, GossipPGAStrategy) and not alone:
            strategy.topology.on(ranks)
    except ValueError as error:
        return Finding("problem", "strategy", f"{name} on {count}: {error}")
    if alone and name in {plugin.name for plugin in plugins("strategy")}:
        text = f"{name} on one rank has nothing to exchange with: raise `trainer.devices` or `num_nodes`"
        return Finding("warning", "strategy", text)
    if isinstance(trainer.accelerator, CPUAccelerator) and trainer.num_devices > cores:
        text = f"{name} starts {trainer.num_devices} processes on {cores} CPU cores: they wait for each other"
        return Finding("warning", "strategy", text)
    return Finding("ok", "strategy", f"{name} on {count}")
