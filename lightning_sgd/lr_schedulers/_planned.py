"""What schedules have in common that say how long a step is, not by which factor it changes."""

from __future__ import annotations

from abc import abstractmethod

from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from lightning_sgd._validation import expect


class PlannedLR(LRScheduler):
    """Sets step sizes that a theory gives, instead of scaling those of the optimizer.

    Of the optimizer's own ``lr`` only the ratio between parameter groups counts: the group with the largest gets the
    planned step, the others their share of it. A factor that something else puts on a step size, a second schedule in
    ``ChainedScheduler`` for example, stays on it.

    A subclass says how long the next step is (:meth:`plan`), and what it forgets when it begins (:meth:`begin`).

    Args:
        optimizer: The optimizer.
        num_steps_per_call: Optimizer steps between two calls of :meth:`step`.
        last_epoch: As in torch.

    Attributes:
        interval: How often :meth:`step` is to be called: after every optimizer step. ``lightning-sgd`` reads it.
    """

    interval = "step"

    def __init__(self, optimizer: Optimizer, num_steps_per_call: int, last_epoch: int) -> None:
        expect(
            num_steps_per_call >= 1,
            "num_steps_per_call",
            "at least 1",
            num_steps_per_call,
            "Use 1 where the schedule moves on after every optimizer step.",
        )
        self.num_steps_per_call = num_steps_per_call
        self._factors = [1.0] * len(optimizer.param_groups)
        super().__init__(optimizer, last_epoch)

    @abstractmethod
    def plan(self) -> float:
        """The step size from now on; ``last_epoch`` is the number of calls of :meth:`step` so far."""

    def begin(self) -> None:
        """The schedule begins, or jumps to ``last_epoch``, instead of going on by one call."""

    def get_lr(self) -> list[float | Tensor]:
        """The planned step size, group by group."""
        if self._is_initial:
            self.begin()
            self._factors = [1.0] * len(self.base_lrs)
        # What stands in a group and not in our own record, somebody else has multiplied.
        ours = self.base_lrs if self._is_initial else self._last_lr
        groups = self.optimizer.param_groups
        self._factors = [
            factor * _ratio(float(group["lr"]), float(lr))
            for factor, group, lr in zip(self._factors, groups, ours, strict=True)
        ]
        return self._shared_out(self.plan())

    def _get_closed_form_lr(self) -> list[float | Tensor]:
        """Torch's name for a jump, as ``SequentialLR`` makes it when the turn comes to a schedule."""
        self.begin()
        self._factors = [1.0] * len(self.base_lrs)
        return self._shared_out(self.plan())

    def _shared_out(self, step_size: float) -> list[float | Tensor]:
        base_lrs = [float(lr) for lr in self.base_lrs]
        largest = max(base_lrs)
        shares = [lr / largest if largest > 0 else 1.0 for lr in base_lrs]
        pairs = zip(shares, self._factors, strict=True)
        return [step_size * share * factor for share, factor in pairs]


def _ratio(now: float, before: float) -> float:
    return now / before if before > 0 else 1.0
