"""What a training did, written down at every hook, so that two of them can be compared bit by bit."""

from __future__ import annotations

import logging
import random
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from lightning.pytorch import Callback
from lightning.pytorch.loggers.logger import Logger
from lightning.pytorch.utilities.rank_zero import rank_zero_only
from torch.utils._pytree import tree_leaves

NOT_WATCHED = {"on_exception", "on_save_checkpoint", "on_load_checkpoint"}
HOOKS = [name for name in vars(Callback) if name.startswith("on_") and name not in NOT_WATCHED]


@dataclass
class Record:
    """What one rank did.

    Attributes:
        trace: After every hook, the name of the hook and the state of the training.
        entries: What reached the logger: step, key, value, and whether that was in the sanity check.
        lines: What was said with ``rank_zero_info``, each with the number of batches trained by then.
        bar: Keys that were on the progress bar at any time.
        metrics: Keys that were in ``trainer.callback_metrics`` at any time.
    """

    trace: list[tuple[str, dict[str, Any]]] = field(default_factory=list)
    entries: list[tuple[int, str, float, bool]] = field(default_factory=list)
    lines: list[tuple[int, str]] = field(default_factory=list)
    bar: set[str] = field(default_factory=set)
    metrics: set[str] = field(default_factory=set)

    @property
    def keys(self) -> set[str]:
        """Every key that was logged."""
        return {key for _, key, *_ in self.entries}


def snapshot(module, optimizers=(), values=()):
    """Everything that a callback could disturb, by name."""
    params = dict(module.named_parameters())
    names = {param: name for name, param in params.items()}
    return {
        "weights": {name: _copy(param) for name, param in params.items()},
        "gradients": {name: _copy(param.grad) for name, param in params.items()},
        "requires_grad": {name: param.requires_grad for name, param in params.items()},
        "buffers": {name: _copy(buffer) for name, buffer in module.named_buffers()},
        "training mode": {name: part.training for name, part in module.named_modules()},
        "optimizer state": {
            names[param]: {key: _copy(value) for key, value in state.items()}
            for optimizer in optimizers
            for param, state in optimizer.state.items()
        },
        "settings of the optimizer": [
            {key: value for key, value in group.items() if key != "params"}
            for optimizer in optimizers
            for group in optimizer.param_groups
        ],
        "loss and batch": [_copy(value) for value in tree_leaves(values) if torch.is_tensor(value)],
        "random state": random_states(),
        "settings of torch": settings_of_torch(),
    }


def random_states():
    """The global generators."""
    _, numbers, position, *_ = np.random.get_state()  # noqa: NPY002  # what others may disturb
    return {
        "torch": torch.get_rng_state(),
        "numpy": (numbers.tobytes(), position),
        "python": random.getstate(),
    }


def settings_of_torch():
    """What a look may switch off for itself and must switch on again."""
    return {
        "gradients enabled": torch.is_grad_enabled(),
        "inference mode": torch.is_inference_mode_enabled(),
        "autocast": torch.is_autocast_enabled("cpu"),
        "default type": str(torch.get_default_dtype()),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "threads": torch.get_num_threads(),
    }


def num_hooks(module):
    """How many hooks every sub-module and parameter has; nobody may leave one behind."""
    kinds = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    owners = {**dict(module.named_modules()), **dict(module.named_parameters())}
    return {
        f"{name}.{kind}": len(getattr(owner, kind, None) or {})
        for name, owner in owners.items()
        for kind in (*kinds, "_post_accumulate_grad_hooks")
    }


def _copy(value):
    return value.detach().clone() if torch.is_tensor(value) else value


class Watcher(Callback):
    """Takes a snapshot in every hook.

    Args:
        record: Where they go.
        file: Where the record of each rank goes, if there are several.
    """

    def __init__(self, record, file=None):
        self.record, self.file = record, file

    def watch(self, hook, trainer, module, values):
        optimizers = trainer.optimizers if trainer.state.fn == "fit" else ()
        self.record.trace.append((hook, snapshot(module, optimizers, values)))
        if hook in ("on_train_batch_end", "on_train_epoch_end", "on_train_end"):
            self.record.bar |= trainer.progress_bar_metrics.keys()
            self.record.metrics |= trainer.callback_metrics.keys()

    def teardown(self, trainer, pl_module, stage):
        if self.file is not None and trainer.world_size > 1:
            torch.save(self.record, f"{self.file}.{trainer.global_rank}")


def _watching(hook):
    def watch(self, trainer, pl_module, *args, **kwargs):
        self.watch(hook, trainer, pl_module, (args, kwargs))

    return watch


for _hook in HOOKS:
    setattr(Watcher, _hook, _watching(_hook))


class Journal(Logger):
    """Writes down what is logged, on rank 0 as every logger does."""

    name, version = "journal", 0

    def __init__(self, record):
        super().__init__()
        self.record, self.trainer = record, None

    @rank_zero_only
    def log_metrics(self, metrics, step=None):
        checking = self.trainer.sanity_checking
        self.record.entries += [(step, key, float(v), checking) for key, v in metrics.items()]

    def log_hyperparams(self, params, *args, **kwargs):
        pass


class Lines(logging.Handler):
    """Writes down what is said, on every rank.

    Args:
        record: Where the lines go.
    """

    logger = logging.getLogger("lightning.pytorch.utilities.rank_zero")

    def __init__(self, record):
        super().__init__()
        self.record = record

    def emit(self, record):
        num_batches = sum(hook == "on_train_batch_end" for hook, _ in self.record.trace)
        self.record.lines.append((num_batches, record.getMessage()))

    def __enter__(self):
        self.logger.addHandler(self)

    def __exit__(self, *_):
        self.logger.removeHandler(self)


def differences(a, b, place=""):
    """The places at which two nested values are not equal to the last bit and in type."""
    if type(a) is not type(b):
        yield f"{place}: {type(a).__name__} instead of {type(b).__name__}"
    elif isinstance(a, (dict, list, tuple)):
        a, b = (v if isinstance(v, dict) else dict(enumerate(v)) for v in (a, b))
        for key in a.keys() ^ b.keys():
            yield f"{place}/{key}: on one side only"
        for key in a.keys() & b.keys():
            yield from differences(a[key], b[key], f"{place}/{key}" if place else str(key))
    elif not (_equal if isinstance(a, torch.Tensor) else _alike)(a, b):
        yield place


def _equal(a, b):
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    return bool(((a == b) | ((a != a) & (b != b))).all())  # NaN equals NaN


def _alike(a, b):
    return repr(a) == repr(b)  # NaN equals NaN


def assert_equal(a, b, what):
    """Equal to the last bit, or the first few places where not."""
    found = sorted(set(differences(a, b)))
    assert not found, f"{what} differs: {', '.join(found[:5])}"


def assert_same_trace(ours, expected, complete=True):
    """Bit by bit the same training, as far as it got."""
    for index, ((hook, a), (other, b)) in enumerate(zip(ours, expected, strict=False)):
        assert hook == other, f"hook {index} is {hook} instead of {other}"
        assert_equal(a, b, f"the training after {hook}, hook {index},")
    assert len(ours) == len(expected) or not complete, f"{len(ours)} hooks not {len(expected)}"
