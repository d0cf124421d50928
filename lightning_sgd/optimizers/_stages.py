"""The base of both trajectory-regularised optimizers: stages, anchors and the pull towards them."""

from __future__ import annotations

from abc import abstractmethod
from typing import NamedTuple

import torch
from torch import Tensor
from torch.optim.optimizer import StateDict

from lightning_sgd._validation import expect, expect_one_of, is_finite_at_least, warn_no_effect
from lightning_sgd.functional.optim.tra import (
    InnerDecay,
    inner_step_size,
    next_position,
    pull_strength,
    regularized_gradients,
)
from lightning_sgd.optimizers._base import GroupwiseOptimizer, ParamGroup, lr_on
from lightning_sgd.optimizers._tensors import TensorType, portions, tensors_by_type


class Portion(NamedTuple):
    """The tensors of one call of a kernel, with step size and counts.

    Attributes:
        tensors: Parameters, regularised gradients, and the states in the order of ``state_names``.
        lr: Step size at this position of the stage.
        steps: Number of steps of each parameter, this one included.
    """

    tensors: tuple[list[Tensor], ...]
    lr: float | Tensor
    steps: list[int]


class StagedOptimizer(GroupwiseOptimizer):
    """An optimizer that cuts training into stages and passes gradients with a pull to the anchor to :meth:`update`.

    A parameter that gets its first gradient in the middle of a stage has its anchor there. A group counts the steps in
    which it has a gradient at all. Position and number of the stage are in the group, so a checkpoint holds them.
    """

    suggested_lr = "Try 0.1 for SGD, 1e-3 for Adam."

    @abstractmethod
    def update(self, group: ParamGroup, kind: TensorType, portion: Portion) -> None:
        """Make the step with tensors of one type, or pieces of them."""

    def count(self, params: list[Tensor]) -> list[int]:
        """Count this step for each parameter, and return the number of its steps so far."""
        for param in params:
            # A Python number: the bias corrections need its value, and a tensor on a GPU would have to be waited for.
            self.state[param]["step"] = self.state[param].get("step", 0) + 1
        return [self.state[param]["step"] for param in params]

    def add_param_group(self, param_group: ParamGroup) -> None:
        """Add a group, which may set any of the constructor's arguments for itself."""
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        if group["lambda_w"] is None:
            # The authors' default, a tenth of the initial step size. Fixed here: it must not follow a schedule.
            group["lambda_w"] = 0.1 * float(group["lr"])
        # In the group, hence in checkpoints. The authors count in their training loop, and a resumed run starts a new
        # stage.
        group.setdefault("position", 0)
        group.setdefault("stage", 0)

    def load_state_dict(self, state_dict: StateDict) -> None:
        """Continue from a saved state, which is neither kept nor changed.

        Args:
            state_dict: What ``state_dict`` of an optimizer gave.
        """
        super().load_state_dict(state_dict)
        for state in self.state.values():
            if "step" in state:
                state["step"] = int(state["step"])  # torch's own optimizers keep a tensor

    def reset_stage(self) -> None:
        """Let the next step start a new stage, with an anchor where the parameters are then.

        Call it after weights were exchanged from outside, and, to repeat the authors' code, at every start of an epoch.
        """
        for group in self.param_groups:
            group["position"] = 0
            group["stage"] += 1

    def step_group(self, group: ParamGroup) -> None:
        """Make the step of one parameter group."""
        _refuse_capture(type(self).__name__)
        largest = ("max_exp_avg_sq",) if group.get("amsgrad") else ()
        by_type = tensors_by_type(self, group, "anchor", *self.state_names, *largest)
        for kind, lists in by_type.items():
            # Before the update: at position 0 the anchor is where the parameters are now.
            self._move_anchors(group, lists[0], lists[2])
            lr = lr_on(kind.device, group["lr"])
            counts = self.count(lists[0])
            for indices, (params, grads, anchors, *states) in portions(lists):
                pulled = _directions(group, params, grads, anchors, lr)
                # The pull takes the step size of the schedule and the step the smaller one: so the pull fades within a
                # stage.
                inner_lr = inner_step_size(lr, group["position"], group["inner_lr_decay"])
                steps = [counts[index] for index in indices]
                self.update(group, kind, Portion((params, pulled, *states), inner_lr, steps))
        if by_type:
            # A group without gradients has made no step, so its stage does not advance either.
            group["position"] = next_position(group["position"], group["inner_steps"])
            group["stage"] += group["position"] == 0

    def _move_anchors(self, group: ParamGroup, params: list[Tensor], anchors: list[Tensor]) -> None:
        """Set the anchors that this stage does not have yet."""
        stage = group["stage"]
        # A parameter whose first gradient comes within a stage gets its anchor then. In the authors' code it would be
        # pulled towards zeros until the next stage.
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
        super().check_group(group)
        lambda_w, remedy = group["lambda_w"], "Leave it out for a tenth of `lr`."
        fits = lambda_w is None or is_finite_at_least(lambda_w, 0)
        expect(fits, "lambda_w", "a number ≥ 0", lambda_w, remedy)
        check_stages(group["inner_steps"], group["inner_lr_decay"], lambda_w)


def _directions(
    group: ParamGroup,
    params: list[Tensor],
    raw: list[Tensor],
    anchors: list[Tensor],
    lr: float | Tensor,
) -> list[Tensor]:
    # Only the loss is to be maximized: the pull comes after the sign and always points to the anchor.
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
    expect_one_of(inner_lr_decay, InnerDecay, "inner_lr_decay", "Leave it at 'harmonic'.")
    if inner_steps == 1 and lambda_w:
        warn_no_effect(
            "`lambda_w` has no effect with stages of one step: the anchor is where w is."
        )


def _refuse_capture(name: str) -> None:
    if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
        raise RuntimeError(
            f"Expected `step` of {name} not to be captured in a CUDA graph, got a capturing stream. "
            "Capture forward and backward only: the position in the stage is counted on the host."
        )
