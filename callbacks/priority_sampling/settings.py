"""Settings of priority sampling that cannot be meant, and trainings that it cannot serve."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities.signature_utils import is_param_in_hook_signature
from torch import Tensor

from lightning_sgd._validation import (
    expect,
    expect_one_of,
    warn_no_effect,
    warn_outside_intended_use,
)
from lightning_sgd.functional.sampling.priority_sampling import WeightNorm
from lightning_sgd.sampling.loss_recorder import ScoreName

_SAFE_MIX = 0.3
_AT_LEAST_ONE = {
    "refresh_every_n_epochs": "Leave it out.",
    "pressure_end": "1 ends with uniform draws.",
}
_WITHOUT_SELECTION = {
    "beta": 0.5,
    "beta_end": None,
    "uniform_mix": 0.3,
    "alpha": 1.0,
    "order": "proportional",
    "pressure_end": None,
    "weight_norm": "none",
}
"""Settings that a selection overrides, with their defaults."""


def check_settings(given: Mapping[str, Any]) -> None:
    """Refuse values that are out of range or contradict each other; the sampler knows its own conditions.

    Args:
        given: All settings of the callback, by name.

    Raises:
        ValueError: Says which and what to do.
    """
    score = given["score"]
    if not callable(score):
        remedy = (
            "Give one of them or a function, or leave it out for the bound of the gradient norm."
        )
        expect_one_of(score, ScoreName, "score", remedy)
    for name in ("beta", "beta_end"):
        value = given[name]
        remedy = "1 is unbiased, 0 without weights."
        expect(value is None or 0 <= value <= 1, name, "in [0, 1]", value, remedy)
    expect_one_of(given["weight_norm"], WeightNorm, "weight_norm")
    for name, remedy in _AT_LEAST_ONE.items():
        value = given[name]
        expect(value is None or value >= 1, name, "at least 1", value, remedy)
    losses = given["irreducible_losses"]
    expect(
        (score == "rho") == (losses is not None),
        "irreducible_losses",
        "given with score='rho', and only then",
        losses,
        "Write them with torch.save.",
    )


def warn_of_settings(given: Mapping[str, Any]) -> None:
    """Warn of settings that change nothing, and of such that may diverge.

    Args:
        given: All settings of the callback, by name.
    """
    mix, beta = given["uniform_mix"], max(given["beta"], given["beta_end"] or 0.0)
    if given["selection"] is not None:
        idle = [name for name, default in _WITHOUT_SELECTION.items() if given[name] != default]
        if idle:
            warn_no_effect(f"`selection` draws uniformly, so {', '.join(idle)} has no effect.")
    elif mix == 1 or (given["alpha"] == 0 and given["order"] == "proportional"):
        warn_no_effect("Priorities have no effect with `uniform_mix` 1 or `alpha` 0.")
    elif beta == 1 and mix < _SAFE_MIX:
        warn_outside_intended_use(
            f"With beta=1 and uniform_mix={mix:g} a sample that is drawn rarely takes steps up to "
            f"{1 / mix if mix else math.inf:g} times as large, which may diverge. Set uniform_mix to 0.5."
        )


def refuse_unsupported(trainer: Trainer, pl_module: LightningModule) -> None:
    """Refuse trainings whose batches cannot be drawn here.

    Args:
        trainer: About to train.
        pl_module: The module.

    Raises:
        ValueError: Says why and what to do.
    """
    expect(
        trainer.overfit_batches == 0,  # type: ignore[attr-defined]  # set by a connector
        "overfit_batches",
        "0 beside PrioritySampling",
        trainer.overfit_batches,  # type: ignore[attr-defined]  # set by a connector
        "Lightning replaces the sampler for it.",
    )
    ranks = (trainer.distributed_sampler_kwargs or {"num_replicas": 1})["num_replicas"]
    expect(
        ranks == trainer.world_size,
        "strategy",
        "one that deals the data out to all ranks",
        type(trainer.strategy).__name__,
        "Use one GPU, or a strategy such as ddp.",
    )
    if is_param_in_hook_signature(pl_module.training_step, "dataloader_iter", explicit=True):
        raise ValueError(
            "Expected `training_step` to take a batch for PrioritySampling, got one that takes an iterator. Write "
            "training_step(self, batch, batch_idx)."
        )


def load_losses(path: str, num_samples: int) -> Tensor:
    """Read one number for each sample.

    Args:
        path: File of ``torch.save``.
        num_samples: Size of the data set.

    Raises:
        ValueError: If it holds something else.
    """
    losses = torch.load(path, weights_only=True)
    shape = tuple(getattr(losses, "shape", ()))
    expect(
        shape == (num_samples,),
        "irreducible_losses",
        f"a tensor of shape ({num_samples},), one for each sample",
        shape,
        "Write it with torch.save.",
    )
    table: Tensor = losses.float()
    return table
