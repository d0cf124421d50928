"""The base of schedules that say how long a step is, not by which factor it changes."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any
from weakref import ref

from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from lightning_sgd._validation import expect, warn_outside_intended_use


class PlannedLR(LRScheduler):
    """Sets step sizes that a theory gives, instead of scaling those of the optimizer.

    Of the optimizer's own ``lr`` only the ratio between parameter groups counts: the group with the largest gets the
    planned step, the others their share of it. A factor that something else puts on a step size, a second schedule in
    ``ChainedScheduler`` for example, stays on it.

    A subclass says how long the next step is (:meth:`plan`), and what it forgets when it begins (:meth:`begin`).

    Lightning calls a schedule once per epoch unless it is told otherwise. Calls that are missing since the last one are
    made up for, so that the plan stays at the optimizer step that training has reached, and a warning says so once.

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
        # Set before torch's constructor, which makes the first call of `step` itself.
        self._num_steps_since_call, self._num_calls_due, self._has_told = 0, 1, False
        super().__init__(optimizer, last_epoch)
        # Weakly, because the optimizer may live longer than a schedule that was replaced.
        own = ref(self)

        def count(*_: Any) -> None:
            if (schedule := own()) is not None:
                schedule._num_steps_since_call += 1

        optimizer.register_step_post_hook(count)

    def step(self, epoch: int | None = None) -> None:
        """Move on by one call, or by all that are due since the last one.

        Args:
            epoch: As in torch: the number of calls to jump to.
        """
        if not self._is_initial and epoch is None:
            self._num_calls_due = max(self._num_steps_since_call // self.num_steps_per_call, 1)
            # torch's `step` adds the last of the calls that are due.
            self.last_epoch += self._num_calls_due - 1
            if self._num_calls_due > 1 and not self._has_told:
                self._has_told = True
                warn_outside_intended_use(
                    f"{type(self).__name__} was called once after {self._num_steps_since_call} optimizer steps instead "
                    f"of {self.num_steps_per_call}: all are counted, but the step size stood still in between. Set "
                    "`interval: step` where Lightning configures the schedule, or `num_steps_per_call`."
                )
        self._num_steps_since_call = 0
        super().step(epoch)
        self._num_calls_due = 1

    def state_dict(self) -> dict[str, Any]:
        """Return the settings and the place in the plan; what was counted since the last call stays here."""
        passing = ("_num_steps_since_call", "_num_calls_due", "_has_told")
        return {key: value for key, value in super().state_dict().items() if key not in passing}

    @abstractmethod
    def plan(self) -> float:
        """Return the step size from now on; ``last_epoch`` is the number of calls of :meth:`step` so far."""

    def begin(self) -> None:
        """Prepare for the first call, or for a jump to ``last_epoch``."""

    def get_lr(self) -> list[float | Tensor]:
        """Return the planned step size, group by group."""
        self._adopt_new_groups()
        if self._is_initial:
            self.begin()
            self._factors = [1.0] * len(self.base_lrs)
        # What stands in a group and not in our own record, somebody else has multiplied.
        # `_is_initial` and `_last_lr` are torch's own names for "in the constructor" and "what I set last".
        ours = self.base_lrs if self._is_initial else self._last_lr
        groups = self.optimizer.param_groups
        self._factors = [
            factor * _ratio(float(group["lr"]), float(lr))
            for factor, group, lr in zip(self._factors, groups, ours, strict=True)
        ]
        return self._shared_out(self.plan())

    def _get_closed_form_lr(self) -> list[float | Tensor]:
        """Jump to ``last_epoch``, as ``SequentialLR`` does when the turn comes to a schedule; the name is torch's."""
        self._num_steps_since_call = 0
        self._adopt_new_groups()
        self.begin()
        self._factors = [1.0] * len(self.base_lrs)
        return self._shared_out(self.plan())

    def _adopt_new_groups(self) -> None:
        """Include groups that were added to the optimizer later, as fine-tuning callbacks do."""
        for group in self.optimizer.param_groups[len(self.base_lrs) :]:
            # The key is torch's: schedulers that are built later read it, too.
            self.base_lrs.append(group.setdefault("initial_lr", float(group["lr"])))
            self._factors.append(1.0)
            if not self._is_initial:
                self._last_lr.append(group["lr"])

    def _shared_out(self, step_size: float) -> list[float | Tensor]:
        base_lrs = [float(lr) for lr in self.base_lrs]
        largest = max(base_lrs)
        shares = [lr / largest if largest > 0 else 1.0 for lr in base_lrs]
        pairs = zip(shares, self._factors, strict=True)
        return [step_size * share * factor for share, factor in pairs]


def _ratio(now: float, before: float) -> float:
    # From a step size of zero no factor can be read.
    return now / before if before > 0 else 1.0
