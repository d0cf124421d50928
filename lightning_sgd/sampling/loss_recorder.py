"""Finds the losses of the samples in a training step that returns their mean, weights them, and takes their scores."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from lightning_sgd._validation import expect
from lightning_sgd.functional.sampling.sample_losses import (
    RULES,
    Arguments,
    LossFunction,
    LossRule,
    SampleLosses,
    bound,
    classes_of,
    sample_losses,
    sample_scores,
)
from lightning_sgd.functional.sampling.sample_scores import (
    last_layer_score,
    output_gradient_score,
    parameter_gradient_score,
)

ScoreName: TypeAlias = Literal["grad_norm_bound", "last_layer", "loss", "grad_norm", "rho"]
ScoreFunction: TypeAlias = Callable[[Any, Tensor], Tensor]
SCORE_NAMES: tuple[ScoreName, ...] = ("grad_norm_bound", "last_layer", "loss", "grad_norm", "rho")


class NeedsGraph(Exception):  # noqa: N818  # a signal, not an error
    """Raised where a score needs gradients that are switched off."""


class LossRecorder:
    """Listens to one training step.

    Args:
        num_samples: Rows of the batch [b].
        score: What to measure; ``rho`` is the loss here, the table is subtracted elsewhere.
        weights: Of the samples, of shape (b,), float32; ``None`` leaves the step as it is, to the last bit.
        batch: What a score function gets first.
        params: For ``grad_norm``.
    """

    def __init__(
        self,
        num_samples: int,
        score: ScoreName | ScoreFunction,
        weights: Tensor | None = None,
        batch: Any = None,
        params: Sequence[Tensor] = (),
    ) -> None:
        self.num_samples, self.score, self.weights = num_samples, score, weights
        self.batch, self.params = batch, list(params)
        self.classes: Tensor | None = None
        self.num_losses = 0
        self.inputs: list[Tensor] = []
        self.was_missed = False
        self.other_rows: set[int] = set()
        self._found: list[Tensor] = []
        self._unreduced: dict[int, tuple[Tensor, LossFunction, LossRule, Arguments]] = {}
        self._linear: tuple[Tensor, Tensor, bool] | None = None

    @property
    def scores(self) -> Tensor | None:
        """The score of each sample, of shape (b,), float32; several losses add up, gradients as if orthogonal."""
        if not self._found:
            return None
        if len(self._found) == 1:
            return self._found[0]
        stacked = torch.stack(self._found)
        adds_up = callable(self.score) or self.score in ("loss", "rho")
        return stacked.sum(0) if adds_up else stacked.square().sum(0).sqrt()

    def note_linear(self, inputs: Tensor, outputs: Tensor, has_bias: bool) -> None:
        """Remember a linear layer, which may turn out to be the last one."""
        self._linear = (inputs, outputs, has_bias)

    def call(
        self,
        function: LossFunction,
        rule: LossRule,
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
    ) -> Tensor:
        """In place of ``function(*args, **kwargs)``."""
        arguments = bound(rule, args, kwargs)
        reduction = arguments.get("reduction", "mean")
        if not self._counts(arguments):
            return function(*args, **kwargs)
        if reduction == "none":
            losses = function(*args, **kwargs)
            self.inputs.append(arguments["input"])
            self._unreduced[id(losses)] = (losses, function, rule, arguments)
            return losses
        self.inputs.append(arguments["input"])
        apart = self._apart(function, rule, arguments)
        self._note(function, rule, arguments, apart)
        if self.weights is None or apart is None:
            return function(*args, **kwargs)
        return apart.reduced(self._weights_on(apart.losses), reduction)

    def mean(self, losses: Tensor, outputs: Tensor | None) -> Tensor:
        """What :func:`priority_mean` does within a training step."""
        expect(
            losses.shape == (self.num_samples,),
            "losses",
            f"of shape ({self.num_samples},), one for each sample",
            tuple(losses.shape),
            "Take the mean over the other dimensions first.",
        )
        known = self._unreduced.get(id(losses))
        if known is not None:
            self._note(*known[1:], SampleLosses(losses))
        else:
            self._append(self._score_of(losses, outputs))
        return losses.mean() if self.weights is None else (self._weights_on(losses) * losses).mean()

    def _counts(self, arguments: Arguments) -> bool:
        outputs = arguments["input"]
        if torch.is_grad_enabled() and not outputs.requires_grad:
            return False  # a metric
        if any(arguments.get(name) is not None for name in ("size_average", "reduce")):
            return False
        rows = outputs.shape[0] if outputs.ndim else 0
        if rows != self.num_samples:
            self.other_rows.add(rows)
        return bool(rows == self.num_samples)

    def _apart(
        self, function: LossFunction, rule: LossRule, arguments: Arguments
    ) -> SampleLosses | None:
        needs_losses = self.score in ("loss", "rho", "grad_norm")
        if self.weights is None and not needs_losses:
            return None
        return sample_losses(function, rule, arguments)

    def _note(
        self,
        function: LossFunction,
        rule: LossRule,
        arguments: Arguments,
        apart: SampleLosses | None,
    ) -> None:
        outputs = arguments["input"]
        classes = classes_of(arguments)
        self.classes = self.classes if classes is None else classes
        if self.score in ("grad_norm_bound", "last_layer"):
            score = sample_scores(function, rule, arguments)
            if self.score == "last_layer":
                score = self._with_inputs(score, outputs)
        else:
            losses = None if apart is None else apart.losses
            score = self._score_of(losses, outputs)
        self._append(score)

    def _score_of(self, losses: Tensor | None, outputs: Tensor | None) -> Tensor:
        if callable(self.score):
            assert outputs is not None
            with torch.no_grad():
                return self.score(self.batch, outputs.detach())
        assert losses is not None
        if self.score == "grad_norm":
            return parameter_gradient_score(losses, self.params)
        if self.score in ("loss", "rho") or outputs is None:
            return losses
        if not torch.is_grad_enabled():
            raise NeedsGraph
        score = output_gradient_score(losses, outputs)
        return self._with_inputs(score, outputs) if self.score == "last_layer" else score

    def _with_inputs(self, score: Tensor, outputs: Tensor) -> Tensor:
        linear = self._linear
        if linear is None or linear[1] is not outputs or linear[0].ndim != 2:
            raise RuntimeError(
                "Expected the loss to get what a linear layer returns for score='last_layer', got something else. "
                "Use score='grad_norm_bound'."
            )
        with torch.no_grad():
            return last_layer_score(score, linear[0], linear[2])

    def _append(self, score: Tensor) -> None:
        self.num_losses += 1
        self._found.append(score.detach().float())

    def _weights_on(self, like: Tensor) -> Tensor:
        assert self.weights is not None
        return self.weights.to(like.device, non_blocking=True)


class LossInterceptor(TorchFunctionMode):
    """While it is on, the loss functions of torch go through a recorder.

    Args:
        recorder: Of this step.
    """

    def __init__(self, recorder: LossRecorder) -> None:
        super().__init__()
        self.recorder = recorder

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Let everything but losses pass."""
        rule = RULES.get(func)
        if rule is not None:
            return self.recorder.call(func, rule, args, kwargs or {})
        result = func(*args, **kwargs) if kwargs else func(*args)
        if func is functional.linear:
            has_bias = (args[2] if len(args) > 2 else (kwargs or {}).get("bias")) is not None
            self.recorder.note_linear(args[0], result, has_bias)
        return result


_ACTIVE: list[LossRecorder] = []


class TrackedTensor(Tensor):
    """Outputs of a network on their way to a loss, which they take to the recorder of the step.

    What is computed from them is overheard too, and everything else as fast as ever.
    """

    @classmethod
    def __torch_function__(
        cls,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Let everything but losses pass."""
        rule = RULES.get(func)
        if rule is None or not _ACTIVE:
            default: Any = super().__torch_function__
            return default(func, types, args, dict(kwargs or {}))
        with torch._C.DisableTorchFunctionSubclass():
            return _ACTIVE[-1].call(func, rule, args, kwargs or {})


@contextmanager
def recording(recorder: LossRecorder) -> Iterator[None]:
    """Let :func:`priority_mean` find the recorder."""
    _ACTIVE.append(recorder)
    try:
        yield
    finally:
        _ACTIVE.pop()


def priority_mean(losses: Tensor, outputs: Tensor | None = None) -> Tensor:
    """The mean of the losses of a batch, with the weights of priority sampling where that is on.

    For training steps in which :class:`~lightning_sgd.PrioritySampling` cannot find the losses of the samples by
    itself. Everywhere else it is ``losses.mean()``.

    Args:
        losses: One for each sample, of shape (b,).
        outputs: What they were computed from, of shape (b, …), for scores by gradients; a sample's loss must depend on
            its own row only. Without it, and for losses that do not come from ``torch.nn.functional`` directly, the
            score is the loss.

    Example:
        >>> priority_mean(torch.tensor([1.0, 3.0]))
        tensor(2.)
    """
    return _ACTIVE[-1].mean(losses, outputs) if _ACTIVE else losses.mean()
