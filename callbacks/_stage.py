"""What the callback of trajectory regularisation keeps for one optimizer: stage, anchors, and the lent step sizes."""

from __future__ import annotations

from itertools import chain
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from torch.optim import Optimizer

from lightning_sgd.functional.optim.tra import (
    InnerDecay,
    inner_step_size,
    next_position,
    pull_strength,
    regularized_gradients,
)

_lent: WeakKeyDictionary[Optimizer, list[Any]] = WeakKeyDictionary()
"""Step sizes of the schedule, for as long as an optimizer steps with others; one place for all that change them."""


class Stage:
    """Position in the stage and anchors of the parameters of one optimizer.

    Args:
        optimizer: The optimizer.
        lambda_w: Strength for groups that have no ``lambda_w`` of their own; ``None`` for a tenth of their step size.
    """

    def __init__(self, optimizer: Optimizer, lambda_w: float | None) -> None:
        self.optimizer = optimizer
        self.position, self.number, self.num_steps = 0, 0, 0
        self.strengths = [_strength(group, lambda_w) for group in optimizer.param_groups]
        num = sum(len(group["params"]) for group in optimizer.param_groups)
        self.anchors: list[Tensor | None] = [None] * num
        self.anchored_in: list[int] = [-1] * num

    @torch.no_grad()
    def add_pull(self) -> None:
        """Add the pull towards the anchors to the gradients; first put the anchors of this stage where they are not."""
        params = list(chain.from_iterable(g["params"] for g in self.optimizer.param_groups))
        self._move_anchors(params)
        if self.position == 0:
            return
        anchors = iter(self.anchors)
        for group, lambda_w, lr in zip(
            self.optimizer.param_groups,
            self.strengths,
            true_step_sizes(self.optimizer),
            strict=True,
        ):
            rows = [
                (param, param.grad, anchor)
                for param, anchor in zip(group["params"], anchors, strict=False)
                if param.grad is not None and anchor is not None
            ]
            if rows and lambda_w:
                own, grads, targets = (list(column) for column in zip(*rows, strict=True))
                pulled = regularized_gradients(own, grads, targets, pull_strength(lambda_w, lr))
                torch._foreach_copy_(grads, pulled)

    def lend(self, inner_lr_decay: InnerDecay) -> None:
        """Give the optimizer the step sizes of this position, until :func:`give_back`."""
        groups = self.optimizer.param_groups
        _lent.setdefault(self.optimizer, [group["lr"] for group in groups])
        for group in groups:
            group["lr"] = inner_step_size(group["lr"], self.position, inner_lr_decay)

    def advance(self, inner_steps: int) -> None:
        """Count a step that was made."""
        self.num_steps += 1
        self.position = next_position(self.position, inner_steps)
        self.number += self.position == 0

    def restart(self) -> None:
        """Let the next step start a new stage."""
        self.position, self.number = 0, self.number + 1

    def state_dict(self) -> dict[str, Any]:
        """Everything that the next step depends on."""
        return {
            "position": self.position,
            "number": self.number,
            "num_steps": self.num_steps,
            "strengths": list(self.strengths),
            "anchors": list(self.anchors),
            "anchored_in": list(self.anchored_in),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on as :meth:`state_dict` says."""
        self.position, self.number = state["position"], state["number"]
        self.num_steps, self.strengths = state["num_steps"], list(state["strengths"])
        self.anchored_in = list(state["anchored_in"])
        params = chain.from_iterable(group["params"] for group in self.optimizer.param_groups)
        self.anchors = [
            None if anchor is None else anchor.to(param.device, param.dtype, copy=True)
            for anchor, param in zip(state["anchors"], params, strict=True)
        ]

    def _move_anchors(self, params: list[Tensor]) -> None:
        for index, param in enumerate(params):
            if param.grad is None or self.anchored_in[index] == self.number:
                continue
            anchor = self.anchors[index]
            self.anchors[index] = (
                param.detach().clone() if anchor is None else anchor.copy_(param.detach())
            )
            self.anchored_in[index] = self.number


def true_step_sizes(optimizer: Optimizer) -> list[float | Tensor]:
    """Step sizes of the schedule, also while the optimizer steps with others.

    Args:
        optimizer: The optimizer.
    """
    return _lent.get(optimizer) or [group["lr"] for group in optimizer.param_groups]


def give_back(optimizer: Optimizer) -> None:
    """Give the groups the step sizes of the schedule again.

    Args:
        optimizer: The optimizer; nothing happens if it has them.
    """
    for group, lr in zip(optimizer.param_groups, _lent.pop(optimizer, []), strict=False):
        group["lr"] = lr


def _strength(group: dict[str, Any], lambda_w: float | None) -> float:
    own = group.get("lambda_w", lambda_w)
    return 0.1 * float(group.get("initial_lr", group["lr"])) if own is None else float(own)
