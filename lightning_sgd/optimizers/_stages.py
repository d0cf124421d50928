"""What the two trajectory-regularised optimizers share: stages, anchors and the way through a step."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from typing import Any, ClassVar, NamedTuple, TypeAlias, get_args, overload

import torch
from torch import Tensor
from torch.optim.optimizer import Optimizer

from lightning_sgd._validation import expect, is_finite_at_least, warn_no_effect
from lightning_sgd.functional.optim.tra import (
    InnerDecay,
    inner_step_size,
    next_position,
    pull_strength,
    regularized_gradients,
)
from lightning_sgd.optimizers._tensors import (
    TensorType,
    portions,
    refuse_complex,
    tensors_by_type,
)

ParamGroup: TypeAlias = dict[str, Any]


class Portion(NamedTuple):
    """What one call of a step works on.

    Attributes:
        tensors: Parameters, regularised gradients, and the states in the order of ``state_names``.
        lr: Step size at this position of the stage.
        steps: Number of steps of each parameter, this one included.
    """

    tensors: tuple[list[Tensor], ...]
    lr: float | Tensor
    steps: list[int]


class StagedOptimizer(Optimizer):
    """Cuts training into stages, keeps an anchor per parameter, and hands regularised gradients to :meth:`update`.

    A parameter that gets its first gradient in the middle of a stage has its anchor there. A group counts the steps in
    which it has a gradient at all. Position and number of the stage are in the group, so a checkpoint holds them.
    """

    state_names: ClassVar[tuple[str, ...]]
    """Keys of further states of the parameters' shapes."""

    @abstractmethod
    def update(self, group: ParamGroup, kind: TensorType, portion: Portion) -> None:
        """Make the step with tensors of one type, or pieces of them."""

    def count(self, params: list[Tensor]) -> list[int]:
        """Number of steps of each parameter, this one included."""
        for param in params:
            self.state[param]["step"] = self.state[param].get("step", 0) + 1
        return [self.state[param]["step"] for param in params]

    def add_param_group(self, param_group: ParamGroup) -> None:
        """Add a group, which may set any of the constructor's arguments for itself."""
        settings = {**self.defaults, **param_group}
        self.check_group(settings)
        if settings["lambda_w"] is None:
            param_group["lambda_w"] = 0.1 * float(settings["lr"])
        super().add_param_group(param_group)
        refuse_complex(self.param_groups[-1]["params"], type(self).__name__)
        self.param_groups[-1].setdefault("position", 0)
        self.param_groups[-1].setdefault("stage", 0)

    def reset_stage(self) -> None:
        """Let the next step start a new stage, with an anchor where the parameters are then.

        Call it after weights were exchanged from outside, and, to repeat the authors' code, at every start of an epoch.
        """
        for group in self.param_groups:
            group["position"] = 0
            group["stage"] += 1

    @overload
    def step(self, closure: None = None) -> None: ...
    @overload
    def step(self, closure: Callable[[], float]) -> float: ...

    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Make one step.

        Args:
            closure: Re-evaluates the model and returns the loss; called once, before gradients are read.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        _refuse_capture(type(self).__name__)
        with torch.no_grad():
            for group in self.param_groups:
                self._step_group(group)
        return loss

    def _step_group(self, group: ParamGroup) -> None:
        largest = ("max_exp_avg_sq",) if group.get("amsgrad") else ()
        by_type = tensors_by_type(self, group, "anchor", *self.state_names, *largest)
        for kind, lists in by_type.items():
            self._move_anchors(group, lists[0], lists[2])
            lr = group["lr"].to(kind.device) if isinstance(group["lr"], Tensor) else group["lr"]
            counts = self.count(lists[0])
            for indices, (params, grads, anchors, *states) in portions(lists):
                pulled = _directions(group, params, grads, anchors, lr)
                inner_lr = inner_step_size(lr, group["position"], group["inner_lr_decay"])
                steps = [counts[index] for index in indices]
                self.update(group, kind, Portion((params, pulled, *states), inner_lr, steps))
        if by_type:
            group["position"] = next_position(group["position"], group["inner_steps"])
            group["stage"] += group["position"] == 0

    def _move_anchors(self, group: ParamGroup, params: list[Tensor], anchors: list[Tensor]) -> None:
        """Put the anchors of this stage where they are not yet."""
        stage = group["stage"]
        late = [i for i, p in enumerate(params) if self.state[p].get("stage") != stage]
        if not late:
            return
        torch._foreach_copy_([anchors[i] for i in late], [params[i] for i in late])
        for i in late:
            self.state[params[i]]["stage"] = stage
            if group.get("reset_momentum"):
                self.state[params[i]]["momentum_buffer"].zero_()

    def check_group(self, group: ParamGroup) -> None:
        """Raise where a setting that both optimizers have is out of range."""
        lr, lambda_w, decay = group["lr"], group["lambda_w"], group["weight_decay"]
        if isinstance(lr, Tensor):
            expect(
                lr.numel() == 1, "lr", "a tensor of one element", lr.shape, "Use one lr per group."
            )
        else:
            expect(
                is_finite_at_least(lr, 0),
                "lr",
                "a number ≥ 0",
                lr,
                "Try 0.1 for SGD, 1e-3 for Adam.",
            )
        expect(
            lambda_w is None or is_finite_at_least(lambda_w, 0),
            "lambda_w",
            "a number ≥ 0",
            lambda_w,
            "Leave it out for a tenth of `lr`.",
        )
        expect(
            is_finite_at_least(decay, 0), "weight_decay", "a number ≥ 0", decay, "Use 0 for none."
        )
        check_stages(group["inner_steps"], group["inner_lr_decay"], lambda_w)
        expect(
            not (group["foreach"] and group["fused"]),
            "foreach",
            "None or False beside `fused=True`",
            True,
            "Choose one implementation, or leave both to the default.",
        )


def _directions(
    group: ParamGroup,
    params: list[Tensor],
    raw: list[Tensor],
    anchors: list[Tensor],
    lr: float | Tensor,
) -> list[Tensor]:
    grads = list(torch._foreach_neg(raw)) if group["maximize"] else raw
    if not (group["position"] and group["lambda_w"]):
        return grads  # the anchor is where the parameters are
    return regularized_gradients(params, grads, anchors, pull_strength(group["lambda_w"], lr))


def check_stages(inner_steps: int, inner_lr_decay: InnerDecay, lambda_w: float | None) -> None:
    """Raise where a setting of the stages is out of range, warn where it does nothing.

    Args:
        inner_steps: Steps of a stage.
        inner_lr_decay: What happens to the step size within a stage.
        lambda_w: Strength, or ``None`` for the default.
    """
    is_count = isinstance(inner_steps, int) and inner_steps >= 1
    expect(is_count, "inner_steps", "an integer ≥ 1", inner_steps, "Try 10.")
    names = get_args(InnerDecay)
    expect(
        inner_lr_decay in names,
        "inner_lr_decay",
        f"one of {', '.join(names)}",
        inner_lr_decay,
        "Leave it at 'harmonic'.",
    )
    if inner_steps == 1 and lambda_w:
        warn_no_effect(
            "`lambda_w` has no effect with stages of one step: the anchor is where w is."
        )


def choose(
    steps: tuple[Callable[..., None], Callable[..., None], Callable[..., None]],
    group: ParamGroup,
    usable: bool,
) -> Callable[..., None]:
    """The fastest implementation that is allowed and works.

    Args:
        steps: By a loop, by multi-tensor operations, and by the fused kernel.
        group: Says which are allowed.
        usable: Whether the fused kernel can be used for these tensors.
    """
    for_loop, foreach, fused = steps
    if group["foreach"] is False and not group["fused"]:
        return for_loop
    if usable and not group["foreach"] and group["fused"] is not False:
        return fused
    if group["fused"] and not usable:
        warn_no_effect(
            "`fused=True` has no effect for some tensors: torch's kernel is not available for their type, or not made "
            "for gradients of other strides; multi-tensor operations are used instead."
        )
    return foreach


def _refuse_capture(name: str) -> None:
    if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
        raise RuntimeError(
            f"Expected `step` of {name} not to be captured in a CUDA graph, got a capturing stream. "
            "Capture forward and backward only: the position in the stage is counted on the host."
        )
