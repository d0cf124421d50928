"""Find the losses of the samples in a training step that returns their mean, weight them, and measure scores."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from collections.abc import Set as AbstractSet
from contextlib import contextmanager
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor
from torch.autograd.graph import Node
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


class NeedsGraph(Exception):  # noqa: N818  # a signal, not an error
    """Raised where a score needs gradients that are switched off."""


class LossRecorder:
    """Record the losses of one training step.

    Args:
        num_samples: Rows of the batch [b].
        score: What to measure; ``rho`` is the loss here, the table is subtracted elsewhere.
        weights: Of the samples, of shape (b,), float32; ``None`` leaves the step as it is, to the last bit.
        batch: What a score function gets first.
        params: For ``grad_norm``.
        logged: Numbers of the losses, in the order of the step, that only go to a log: they get no weights.
    """

    def __init__(
        self,
        num_samples: int,
        score: ScoreName | ScoreFunction,
        weights: Tensor | None = None,
        batch: Any = None,
        params: Sequence[Tensor] = (),
        logged: AbstractSet[int] = frozenset(),
    ) -> None:
        self.num_samples, self.score, self.weights = num_samples, score, weights
        self.batch, self.params, self.logged = batch, list(params), logged
        self.classes: Tensor | None = None
        self.unreached: set[int] = set()
        self.inputs: list[Tensor] = []
        self.was_missed = False
        self.other_rows: set[int] = set()
        self._found: dict[int, Tensor] = {}
        self._results: list[Node | None] = []
        self._unreduced: dict[int, tuple[Tensor, LossFunction, LossRule, Arguments]] = {}
        self._linear: tuple[Tensor, Tensor, bool] | None = None

    @property
    def scores(self) -> Tensor | None:
        """The score of each sample, of shape (b,), float32; several losses add up, gradients as if orthogonal."""
        found = list(self._found.values())
        if len(found) <= 1:
            return found[0] if found else None
        stacked = torch.stack(found)
        adds_up = callable(self.score) or self.score in ("loss", "rho")
        return stacked.sum(0) if adds_up else stacked.square().sum(0).sqrt()

    @property
    def num_losses(self) -> int:
        """The number of losses that count."""
        return len(self._found)

    def drop_unreached(self, output: Any) -> None:
        """Forget losses that the training step does not return, alone or as a term, because it only logs them."""
        loss = output.get("loss") if isinstance(output, Mapping) else output
        if not isinstance(loss, Tensor) or loss.grad_fn is None:
            return  # in manual optimization a step may return nothing
        targets = {node for node in self._results if node is not None}
        ends = {tensor.grad_fn for tensor in self.inputs if tensor.grad_fn is not None}
        reached = _reached(loss.grad_fn, targets, ends)
        self.unreached = {k for k, node in enumerate(self._results) if node not in reached}
        self._found = {k: score for k, score in self._found.items() if k not in self.unreached}
        # It got no weights, although it is trained on.
        self.was_missed |= not self.logged <= self.unreached

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
        """Compute ``function(*args, **kwargs)`` with weights, and the scores of the samples."""
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
        if len(self._results) in self.logged:
            return self._returned(function(*args, **kwargs))
        apart = self._apart(function, rule, arguments)
        self._note(function, rule, arguments, apart)
        if self.weights is None or apart is None:
            return self._returned(function(*args, **kwargs))
        return self._returned(apart.reduced(self._weights_on(apart.losses), reduction))

    def mean(self, losses: Tensor, outputs: Tensor | None) -> Tensor:
        """Compute :func:`priority_mean` within a training step."""
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
        weighted = losses if self.weights is None else self._weights_on(losses) * losses
        return self._returned(weighted.mean())

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
        self._found[len(self._results)] = score.detach().float()

    def _returned(self, result: Tensor) -> Tensor:
        self._results.append(result.grad_fn)
        return result

    def _weights_on(self, like: Tensor) -> Tensor:
        assert self.weights is not None
        return self.weights.to(like.device, non_blocking=True)


def _reached(start: Node, targets: set[Node], ends: set[Node]) -> set[Node]:
    """Search the graph of a loss for nodes, without going beyond others, which are the outputs of the network."""
    reached: set[Node] = set()
    seen, stack = {start}, [start]
    while stack and len(reached) < len(targets):
        node = stack.pop()
        if node in targets:
            reached.add(node)
        elif node not in ends:
            following = {after for after, _ in node.next_functions if after is not None} - seen
            seen |= following
            stack.extend(following)
    return reached


class LossInterceptor(TorchFunctionMode):
    """Pass the losses of torch's functions to a recorder while the mode is on.

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
        """Call anything but a loss as it is."""
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
    """An output of a network: losses of it, and of what is computed from it, go to the recorder of the step.

    Everything else in the step is as fast as without.
    """

    @classmethod
    def __torch_function__(
        cls,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Call anything but a loss as it is."""
        rule = RULES.get(func)
        if rule is None or not _ACTIVE:
            default: Any = super().__torch_function__
            return default(func, types, args, dict(kwargs or {}))
        with torch._C.DisableTorchFunctionSubclass():
            return _ACTIVE[-1].call(func, rule, args, kwargs or {})


@contextmanager
def recording(recorder: LossRecorder) -> Iterator[None]:
    """Set the recorder for :func:`priority_mean` and tracked tensors."""
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
