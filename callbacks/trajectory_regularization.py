"""Trajectory regularisation of any optimizer."""

from __future__ import annotations

from functools import partial
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from lightning_sgd._run_log import announce
from lightning_sgd._validation import expect, is_finite_at_least
from lightning_sgd.callbacks._stage import Stage, give_back
from lightning_sgd.functional.optim.tra import InnerDecay
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
        self._stages: list[Stage] = []
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
        """Let the next step of every optimizer start a new stage, with an anchor where the parameters are then."""
        for stage in self._stages:
            stage.restart()

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Expect a checkpoint after this, for this stage only: a test loads one too."""
        self._restored = None

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Refuse what cannot work."""
        for optimizer in trainer.optimizers:
            if isinstance(optimizer, StagedOptimizer):
                raise ValueError(
                    "Expected the optimizer beside TrajectoryRegularization to be one without stages, got "
                    f"{type(optimizer).__name__}. Leave the callback out, or use torch's SGD or Adam."
                )
            for group in optimizer.param_groups:
                refuse_sharded(group["params"], "TrajectoryRegularization")

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Take the stages up, and say what is going to happen."""
        self._stages = [Stage(optimizer, self.lambda_w) for optimizer in trainer.optimizers]
        for stage, state in zip(self._stages, self._restored or [], strict=False):
            stage.load_state_dict(state)
        self._restored = None
        for stage in self._stages:
            before, after = partial(self._before_step, stage), partial(self._after_step, stage)
            self._handles += [
                stage.optimizer.register_step_pre_hook(before),
                stage.optimizer.register_step_post_hook(after),
            ]
        announce(trainer, "TrajectoryRegularization", "start", self._announcement())

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Start a stage, if epochs do; Lightning's hook for epochs is left out after some interruptions."""
        if self.reset_each_epoch and batch_idx == 0:
            self.reset_stage()

    def on_before_optimizer_step(
        self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer
    ) -> None:
        """Add the pull to the gradients."""
        for stage in self._stages:
            if stage.optimizer is optimizer:
                for group in optimizer.param_groups:
                    refuse_sparse(group["params"], "TrajectoryRegularization")
                stage.add_pull()

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Let go of the optimizers, and say what was done."""
        self._release()
        steps = sum(stage.num_steps for stage in self._stages)
        numbers = sum(stage.number + (stage.position > 0) for stage in self._stages)
        announce(trainer, "TrajectoryRegularization", "end", f"{steps} steps in {numbers} stages.")

    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        """Let go of the optimizers."""
        self._release()

    def state_dict(self) -> dict[str, Any]:
        """Positions, strengths and anchors."""
        if self._restored is not None:
            return {"stages": list(self._restored)}
        return {"stages": [stage.state_dict() for stage in self._stages]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on as :meth:`state_dict` says, once there are optimizers."""
        self._restored = list(state_dict["stages"])

    def __getstate__(self) -> dict[str, Any]:
        """Copies begin anew: optimizers and hooks belong to one training."""
        return {**self.__dict__, "_stages": [], "_handles": []}

    def _before_step(self, stage: Stage, *_: Any) -> None:
        stage.lend(self.inner_lr_decay)

    def _after_step(self, stage: Stage, *_: Any) -> None:
        give_back(stage.optimizer)
        stage.advance(self.inner_steps)

    def _release(self) -> None:
        for stage in self._stages:
            give_back(stage.optimizer)
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def _announcement(self) -> str:
        strengths = dict.fromkeys(f"{s:g}" for stage in self._stages for s in stage.strengths)
        params = [
            param
            for stage in self._stages
            for group in stage.optimizer.param_groups
            for param in group["params"]
        ]
        mebibytes = sum(param.numel() * param.element_size() for param in params) / 2**20
        decay = "falling as 1/(k + 1)" if self.inner_lr_decay == "harmonic" else "constant"
        return (
            f"stages of {self.inner_steps} optimizer steps with step sizes {decay} and a pull of strength "
            f"{', '.join(strengths)}; {mebibytes:.1f} MiB for the anchors."
        )
