"""Losses of ``torch.nn.functional`` sample by sample: losses, masses, scores and weighted reductions."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.nn import functional

from lightning_sgd.functional.sampling import sample_scores as scores

Arguments: TypeAlias = Mapping[str, Any]
LossFunction: TypeAlias = Callable[..., Tensor]


@dataclass(frozen=True, slots=True)
class LossRule:
    """The properties of a loss function that are needed to compute it by sample.

    Attributes:
        arguments: Names of its arguments, in order, without the outdated ones.
        score: The score of each sample in closed form, from the arguments; ``None`` for automatic differentiation.
        mass: What each sample adds to the denominator of the mean, if that is not the same for all.
    """

    arguments: tuple[str, ...]
    score: Callable[[Arguments], Tensor] | None = None
    mass: Callable[[Arguments], Tensor] | None = None


@dataclass(slots=True)
class SampleLosses:
    """The losses of the samples of a batch, reduced over the positions of each.

    Attributes:
        losses: Of shape (b,), with a graph.
        masses: Of shape (b,), or ``None`` for ones.
    """

    losses: Tensor
    masses: Tensor | None = None

    def reduced(self, weights: Tensor, reduction: str) -> Tensor:
        """Compute the weighted sum or mean.

        Where masses differ, as by class weights or masked positions, the weighted mean is a ratio as torch's own mean
        is, with a bias of the order of one over the batch size; where they are all 1 it is divided by their number.

        Args:
            weights: Of shape (b,).
            reduction: ``sum``, ``mean``, or ``batchmean``, the sum divided by the number of samples.
        """
        if self.masses is None and reduction == "mean" and self.losses.dtype == weights.dtype:
            return torch.dot(weights / len(weights), self.losses)  # the usual case, in one step
        weighted = (weights * self.losses).sum()
        if reduction == "sum":
            return weighted.to(self.losses.dtype)
        num = len(self.losses)
        if self.masses is None or reduction == "batchmean":
            return (weighted / num).to(self.losses.dtype)
        tiny = torch.finfo(weights.dtype).tiny
        mean_mass = (weights * self.masses).sum() / weights.sum().clamp(min=tiny)
        return (weighted / (num * mean_mass).clamp(min=tiny)).to(self.losses.dtype)


def bound(rule: LossRule, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Return the arguments by name."""
    return {**dict(zip(rule.arguments, args, strict=False)), **kwargs}


def sample_losses(function: LossFunction, rule: LossRule, arguments: Arguments) -> SampleLosses:
    """Compute a loss sample by sample.

    Args:
        function: From ``torch.nn.functional``.
        rule: What is known about it.
        arguments: Of the call, by name.
    """
    losses = function(**{**arguments, "reduction": "none"})
    if rule.mass is _cross_entropy_mass and losses.ndim == 1 and all_alike(arguments):
        return SampleLosses(losses)
    rows = losses.flatten(1) if losses.ndim > 1 else losses.unsqueeze(1)
    reduction = arguments.get("reduction", "mean")
    masses = None if rule.mass is None else rule.mass(arguments)
    if rule.mass is None and reduction == "mean":
        return SampleLosses(rows.mean(1))
    return SampleLosses(rows.sum(1), masses)


def sample_scores(function: LossFunction, rule: LossRule, arguments: Arguments) -> Tensor:
    """Compute the norm of each loss's gradient with respect to its row of the input; no graph is needed.

    Args:
        function: From ``torch.nn.functional``.
        rule: What is known about it.
        arguments: Of the call, by name.
    """
    outputs = arguments["input"].detach()
    if rule.score is not None:
        with torch.no_grad():
            return rule.score({**arguments, "input": outputs})
    with torch.enable_grad():
        leaf = outputs.requires_grad_()
        found = sample_losses(function, rule, {**arguments, "input": leaf})
        score = scores.output_gradient_score(found.losses, leaf)
    return score if rule.mass is None else score / max(1, outputs[0].numel())


def all_alike(arguments: Arguments) -> bool:
    """Return whether every sample is known to have mass one, without a wait for a GPU.

    Args:
        arguments: Of a cross-entropy.
    """
    target = arguments["target"]
    return (
        arguments.get("weight") is None
        and arguments.get("ignore_index", -100) < 0
        and target.device.type == "cpu"
        and not target.is_floating_point()
        and int(target.numpy().min()) >= 0
    )


def classes_of(arguments: Arguments) -> Tensor | None:
    """Return the class of each sample, where the target is one."""
    target = arguments.get("target")
    is_class = isinstance(target, Tensor) and target.ndim == 1 and not target.is_floating_point()
    return target if is_class else None


def _cross_entropy_mass(arguments: Arguments) -> Tensor:
    target, weight = arguments["target"], arguments.get("weight")
    if target.is_floating_point():  # probabilities of shape (b, C, …): every position counts
        num_positions = target[0, 0].numel()
        return torch.full((len(target),), float(num_positions), device=target.device)
    counts = target != arguments.get("ignore_index", -100)
    masses = counts.float() if weight is None else weight[target.where(counts, 0)] * counts
    total: Tensor = masses.reshape(len(target), -1).sum(1)
    return total


def _weighted_mass(arguments: Arguments) -> Tensor:
    weight, outputs = arguments.get("weight"), arguments["input"]
    if weight is None:
        return torch.full((len(outputs),), float(outputs[0].numel()), device=outputs.device)
    total: Tensor = weight.expand_as(outputs).reshape(len(outputs), -1).sum(1)
    return total


def _pick(arguments: Arguments, *names: str) -> dict[str, Any]:
    return {name: arguments[name] for name in names if name in arguments}


def _score_with(function: Callable[..., Tensor], *names: str) -> Callable[[Arguments], Tensor]:
    def score(arguments: Arguments) -> Tensor:
        return function(arguments["input"], arguments["target"], **_pick(arguments, *names))

    return score


def _kl_score(arguments: Arguments) -> Tensor:
    target = arguments["target"].exp() if arguments.get("log_target") else arguments["target"]
    return scores.nll_score(arguments["input"], target)


def _mse_score(arguments: Arguments) -> Tensor:
    return scores.mse_score(arguments["input"], arguments["target"], arguments.get("weight"))


_PLAIN = ("input", "target")

RULES: dict[LossFunction, LossRule] = {
    functional.cross_entropy: LossRule(
        (*_PLAIN, "weight"),
        _score_with(scores.cross_entropy_score, "weight", "ignore_index", "label_smoothing"),
        _cross_entropy_mass,
    ),
    functional.nll_loss: LossRule(
        (*_PLAIN, "weight"),
        _score_with(scores.nll_score, "weight", "ignore_index"),
        _cross_entropy_mass,
    ),
    functional.binary_cross_entropy_with_logits: LossRule(
        (*_PLAIN, "weight"),
        _score_with(scores.binary_cross_entropy_with_logits_score, "weight", "pos_weight"),
    ),
    functional.binary_cross_entropy: LossRule(
        (*_PLAIN, "weight"), _score_with(scores.binary_cross_entropy_score, "weight")
    ),
    functional.mse_loss: LossRule(_PLAIN, _mse_score, mass=_weighted_mass),
    functional.kl_div: LossRule(_PLAIN, _kl_score),  # of a log-softmax
    functional.l1_loss: LossRule(_PLAIN, mass=_weighted_mass),
    functional.smooth_l1_loss: LossRule(_PLAIN),
    functional.huber_loss: LossRule(_PLAIN),
    functional.gaussian_nll_loss: LossRule((*_PLAIN, "var")),
    functional.poisson_nll_loss: LossRule(_PLAIN),
}
"""The loss functions that can be computed by sample."""

NAMES = ", ".join(function.__name__ for function in RULES)
