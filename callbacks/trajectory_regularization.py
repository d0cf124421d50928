"""Trajectory regularisation of any optimizer."""

from __future__ import annotations

from functools import partial
from itertools import chain
from typing import Any
from weakref import WeakKeyDictionary

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor
from torch.nn.parameter import is_lazy
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from lightning_sgd._run_log import announce
from lightning_sgd._validation import expect, is_finite_at_least
from lightning_sgd.functional.optim.tra import (
    InnerDecay,
    inner_step_size,
    next_position,
    pull_strength,
    regularized_gradients,
)
from lightning_sgd.optimizers._stages import StagedOptimizer, check_stages
from lightning_sgd.optimizers._tensors import refuse_sharded, refuse_sparse


class TrajectoryRegularization(Callback):
    r"""Cuts training into stages, each with a pull towards its start and falling steps, for very small batches.

    What :class:`~lightning_sgd.TRSGD` is for SGD, for any optimizer: a stage has ``inner_steps`` [S] optimizer steps,
    k = 0, …, S − 1. With a, the parameters w at the start of the stage, the optimizer gets

    .. math:: g + \frac{2\lambda_w}{\eta}\,(w - a) \quad\text{and}\quad \frac{\eta}{k+1}

    in place of the gradient g and the step size η of its schedule; ``lambda_w`` is :math:`\lambda_w`. Schedules and
    monitors see η. A step that a GradScaler skips is not counted; with gradient accumulation a step is an optimizer
    step.

    With ``torch.optim.SGD`` it makes the steps of ``TRSGD``, with one difference: clipping comes after the pull
    and clips it too. Every callback after this one and all loggers of gradients see the gradient with the pull.

    A parameter group may carry a ``lambda_w`` of its own. If weights are exchanged from outside within a stage, call
    :meth:`reset_stage`. Several optimizers are staged each for itself.

    Cost: one copy of the parameters, and per step three passes over parameters and gradients, except in the first step
    of a stage. The anchors are in the checkpoint, so training resumes exactly at any position.

    Args:
        lambda_w: Strength of the pull per unit of step size [λ_w]; by default a tenth of the initial step size of each
            group.
        inner_steps: Steps of a stage [S].
        inner_lr_decay: ``harmonic`` divides the step size by k + 1 within a stage, ``none`` leaves it.
        reset_each_epoch: Start a stage with every epoch, as the authors' code does.

    Raises:
        ValueError: If an argument is out of range, the optimizer is staged already, or parameters are sharded or
            gradients sparse.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> trainer = Trainer(callbacks=[TrajectoryRegularization(inner_steps=10)], logger=False)

    Reference:
        Yikai Zhang, Hui Qu, Chao Chen, Dimitris Metaxas. Taming the Noisy Gradient: Train Deep Neural Networks with
        Small Batch Sizes. IJCAI 2019.
    """

    def __init__(
        self,
        lambda_w: float | None = None,
        inner_steps: int = 10,
        inner_lr_decay: InnerDecay = "harmonic",
        reset_each_epoch: bool = False,
    ) -> None:
        expect(
            lambda_w is None or is_finite_at_least(lambda_w, 0),
            "lambda_w",
            "a number ≥ 0",
            lambda_w,
            "Leave it out for a tenth of the step size.",
        )
        check_stages(inner_steps, inner_lr_decay, lambda_w)
        self.lambda_w, self.inner_steps = lambda_w, inner_steps
        self.inner_lr_decay: InnerDecay = inner_lr_decay
        self.reset_each_epoch = reset_each_epoch
        self._restored: list[dict[str, Any]] | None = None
        self._loops: list[InnerLoop] = []
        self._handles: list[RemovableHandle] = []

    @property
    def state_key(self) -> str:
        """Tells instances with different settings apart in a checkpoint."""
        return self._generate_state_key(
            lambda_w=self.lambda_w,
            inner_steps=self.inner_steps,
            inner_lr_decay=self.inner_lr_decay,
            reset_each_epoch=self.reset_each_epoch,
        )

    def reset_stage(self) -> None:
        """Start a new stage at the next step of every optimizer, anchored where the parameters are then."""
        for loop in self._loops:
            loop.restart()

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Discard what an earlier run restored: Lightning restores callbacks after this hook, in a test too."""
        self._restored = None

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Refuse staged optimizers and sharded parameters."""
        for optimizer in trainer.optimizers:
            if isinstance(optimizer, StagedOptimizer):
                raise ValueError(
                    "Expected the optimizer beside TrajectoryRegularization to be one without stages, got "
                    f"{type(optimizer).__name__}. Leave the callback out, or use torch's SGD or Adam."
                )
            for group in optimizer.param_groups:
                refuse_sharded(group["params"], "TrajectoryRegularization")

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Attach an inner loop to every optimizer, restore it, and announce the settings."""
        self._loops = [InnerLoop(optimizer, self.lambda_w) for optimizer in trainer.optimizers]
        for loop, state in zip(self._loops, self._restored or [], strict=False):
            loop.load_state_dict(state)
        self._restored = None
        for loop in self._loops:
            before, after = partial(self._before_step, loop), partial(self._after_step, loop)
            self._handles += [
                # Hooks of the optimizer: schedules and loggers, which run outside of its step, see the step size of the
                # schedule.
                loop.optimizer.register_step_pre_hook(before),
                loop.optimizer.register_step_post_hook(after),
            ]
        announce(trainer, "TrajectoryRegularization", "start", self._announcement())

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Start a stage with the first batch of an epoch if ``reset_each_epoch``."""
        # Not in `on_train_epoch_start`, which Lightning leaves out after some interruptions.
        if self.reset_each_epoch and batch_idx == 0:
            self.reset_stage()

    def on_before_optimizer_step(
        self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer
    ) -> None:
        """Add the pull to the gradients."""
        for loop in self._loops:
            if loop.optimizer is optimizer:
                for group in optimizer.param_groups:
                    refuse_sparse(group["params"], "TrajectoryRegularization")
                loop.add_pull()

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Detach from the optimizers, and announce how many stages there were."""
        self._release()
        steps = sum(loop.num_steps for loop in self._loops)
        stages = sum(loop.number + (loop.position > 0) for loop in self._loops)
        announce(trainer, "TrajectoryRegularization", "end", f"{steps} steps in {stages} stages.")

    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        """Detach from the optimizers."""
        self._release()

    def state_dict(self) -> dict[str, Any]:
        """Return positions, strengths and anchors."""
        # Restored and not begun yet: a checkpoint written now must pass the state on.
        if self._restored is not None:
            return {"stages": list(self._restored)}
        return {"stages": [loop.state_dict() for loop in self._loops]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keep the state until the optimizers exist."""
        self._restored = list(state_dict["stages"])

    def __getstate__(self) -> dict[str, Any]:
        """Leave out what belongs to one training: inner loops and hooks."""
        # `ddp_spawn` pickles callbacks; loops and hooks would bring optimizers along.
        return {**self.__dict__, "_loops": [], "_handles": []}

    def _before_step(self, loop: InnerLoop, *_: Any) -> None:
        loop.set_inner_lr(self.inner_lr_decay)

    def _after_step(self, loop: InnerLoop, *_: Any) -> None:
        restore_lr(loop.optimizer)
        loop.advance(self.inner_steps)

    def _release(self) -> None:
        for loop in self._loops:
            restore_lr(loop.optimizer)
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def _announcement(self) -> str:
        strengths = dict.fromkeys(f"{s:g}" for loop in self._loops for s in loop.strengths)
        params = [param for loop in self._loops for param in loop.params]
        memory = "as many bytes as the parameters will have"  # lazy modules have no shapes yet
        if not any(map(is_lazy, params)):
            memory = f"{sum(p.numel() * p.element_size() for p in params) / 2**20:.1f} MiB"
        decay = "falling as 1/(k + 1)" if self.inner_lr_decay == "harmonic" else "constant"
        return (
            f"stages of {self.inner_steps} optimizer steps with step sizes {decay} and a pull of strength "
            f"{', '.join(strengths)}; {memory} for the anchors."
        )


class InnerLoop:
    """The current stage of one optimizer: position, and anchors of its parameters.

    Args:
        optimizer: The optimizer.
        lambda_w: Strength for groups that have no ``lambda_w`` of their own; ``None`` for a tenth of their step size.
    """

    def __init__(self, optimizer: Optimizer, lambda_w: float | None) -> None:
        self.optimizer = optimizer
        self.position, self.number, self.num_steps = 0, 0, 0
        self.lambda_w = lambda_w
        self.strengths: list[float] = []
        self.anchors: list[Tensor | None] = []
        self.anchored_in: list[int] = []  # the number of the stage at whose start each was set
        self._adopt_new_groups()

    @property
    def params(self) -> list[Tensor]:
        """The parameters of all groups, in order."""
        return list(chain.from_iterable(g["params"] for g in self.optimizer.param_groups))

    @torch.no_grad()
    def add_pull(self) -> None:
        """Set the anchors that this stage does not have yet, and add the pull towards them to the gradients."""
        self._adopt_new_groups()
        self._move_anchors()
        # Anchors are where the parameters are, so there is no pull.
        if self.position == 0:
            return
        anchors, lrs = iter(self.anchors), scheduled_lrs(self.optimizer)
        for group, lambda_w, lr in zip(
            self.optimizer.param_groups, self.strengths, lrs, strict=True
        ):
            rows = [
                (param, param.grad, anchor)
                # The parameters go first: `zip` must not take an anchor from the next group.
                for param, anchor in zip(group["params"], anchors, strict=False)
                if param.grad is not None and anchor is not None
            ]
            if rows and lambda_w:
                own, grads, targets = (list(column) for column in zip(*rows, strict=True))
                pulled = regularized_gradients(own, grads, targets, pull_strength(lambda_w, lr))
                # Into `p.grad`, unlike TRSGD: that is where any optimizer looks for gradients.
                torch._foreach_copy_(grads, pulled)

    def set_inner_lr(self, inner_lr_decay: InnerDecay) -> None:
        """Set the step sizes of this position, until :func:`restore_lr`."""
        groups = self.optimizer.param_groups
        # The first instance of the callback keeps them: what a second one finds in the groups is a step size of the
        # first.
        _scheduled_lrs.setdefault(self.optimizer, [group["lr"] for group in groups])
        for group in groups:
            group["lr"] = inner_step_size(group["lr"], self.position, inner_lr_decay)

    def advance(self, inner_steps: int) -> None:
        """Count an optimizer step."""
        self.num_steps += 1
        self.position = next_position(self.position, inner_steps)
        self.number += self.position == 0

    def restart(self) -> None:
        """Start a new stage at the next step."""
        self.position, self.number = 0, self.number + 1

    def state_dict(self) -> dict[str, Any]:
        """Return everything that the next step depends on."""
        return {
            "position": self.position,
            "number": self.number,
            "num_steps": self.num_steps,
            "strengths": list(self.strengths),
            "anchors": list(self.anchors),
            "anchored_in": list(self.anchored_in),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the stage; anchors are copied to the device and type of the parameters."""
        self.position, self.number = state["position"], state["number"]
        self.num_steps, self.strengths = state["num_steps"], list(state["strengths"])
        self.anchored_in = list(state["anchored_in"])
        self.anchors = [
            None if anchor is None else anchor.to(param.device, param.dtype, copy=True)
            for anchor, param in zip(state["anchors"], self.params, strict=True)
        ]

    def _adopt_new_groups(self) -> None:
        """Include groups that were added to the optimizer later, as when layers are unfrozen."""
        new = self.optimizer.param_groups[len(self.strengths) :]
        self.strengths += [_strength(group, self.lambda_w) for group in new]
        num_new = len(self.params) - len(self.anchors)
        self.anchors += [None] * num_new
        self.anchored_in += [-1] * num_new

    def _move_anchors(self) -> None:
        for index, param in enumerate(self.params):
            # A parameter whose first gradient comes within a stage gets its anchor then, as in TRSGD.
            if param.grad is None or self.anchored_in[index] == self.number:
                continue
            anchor = self.anchors[index]
            self.anchors[index] = (
                param.detach().clone() if anchor is None else anchor.copy_(param.detach())
            )
            self.anchored_in[index] = self.number


_scheduled_lrs: WeakKeyDictionary[Optimizer, list[Any]] = WeakKeyDictionary()
"""Step sizes of the schedule while an optimizer steps with others; shared by all instances of the callback."""


def scheduled_lrs(optimizer: Optimizer) -> list[float | Tensor]:
    """Return the step sizes of the schedule, also while the optimizer steps with others."""
    return _scheduled_lrs.get(optimizer) or [group["lr"] for group in optimizer.param_groups]


def restore_lr(optimizer: Optimizer) -> None:
    """Set the step sizes of the schedule again; without effect if they are set."""
    # Not strict: without an entry there is nothing to set, and a group may have been added meanwhile.
    for group, lr in zip(optimizer.param_groups, _scheduled_lrs.pop(optimizer, []), strict=False):
        group["lr"] = lr


def _strength(group: dict[str, Any], lambda_w: float | None) -> float:
    own = group.get("lambda_w", lambda_w)
    # A warm-up has lowered `lr` by the time that training starts; `initial_lr` is what torch's schedulers keep of it.
    return 0.1 * float(group.get("initial_lr", group["lr"])) if own is None else float(own)
