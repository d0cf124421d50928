"""Local SGD, and one-shot averaging at the end."""

from __future__ import annotations

from datetime import timedelta
from typing import Any, ClassVar, Literal, TypeAlias

from lightning.pytorch import Trainer
from torch import Tensor

from lightning_sgd._validation import expect, expect_one_of, expect_whole, is_whole, plain_number
from lightning_sgd.functional.distributed.local_sgd import PeriodSchedule, RunningMean
from lightning_sgd.strategies._base.common_model import BufferPolicy, OptimizerStatePolicy
from lightning_sgd.strategies._base.parameter_averaging import (
    InitialWeights,
    ParameterAveragingStrategy,
    StartMethod,
    average_gradients,
    describe_warm_up,
)
from lightning_sgd.strategies._base.replica import Replica

WhatToAverage: TypeAlias = Literal["last", "tail"]


class LocalSGDStrategy(ParameterAveragingStrategy):
    r"""Trains a model on each rank; every ``period`` steps all ranks continue from the mean of their models.

    Between two averages rank i takes H steps of its own optimizer on its own data, then
    :math:`x_i \leftarrow \frac1n \sum_j x_j`. Gradients are never exchanged, so that a rank sends an H-th of what DDP
    sends, and waits for the others an H-th as often. With H = 1, SGD with momentum and weight decay trains as with DDP.

    The user's module, optimizer, clipping, accumulation and precision stay as they are; clipping sees this rank's
    gradient. Validation, checkpoints and the end of training use the mean of the models. Log metrics that callbacks
    monitor with ``sync_dist=True``, as with DDP.

    Cost per rank: 2(n − 1)/n times the bytes of the parameters (32 bits or more) per average, for n ranks; one copy of
    the parameters in memory, one more during validation, and for ``average="tail"`` one more throughout.

    Logged every ``log_every_n_steps`` batches that stepped:

    =================================  ===============================================================
    Key                                Meaning, for the logging rank
    =================================  ===============================================================
    ``comm/bytes_per_step``            bytes sent, per batch that stepped
    ``comm/messages_per_step``         messages sent to other ranks, per batch that stepped
    ``comm/blocked_seconds_per_step``  seconds spent waiting for communication, per batch that stepped
    =================================  ===============================================================

    Args:
        period: Optimizer steps from one average to the next [H]; or a table of periods by the step from which they
            hold, such as ``{0: 1, 1000: 8}``; null averages once, at the end.
        warmup_steps: Number of first steps in which gradients are averaged, as in DDP, instead of models.
        average: With ``period`` null, what enters the one average: the ``last`` model of each rank, or the ``tail``,
            the mean of its models from ``tail_start`` on.
        tail_start: Where the tail begins: a step, or a share of all steps.
        buffers: What happens to floating-point buffers, such as the statistics of batch normalisation, when models are
            averaged: ``average`` them too, keep each rank's own (``local``), or take those of ``rank0``.
        optimizer_state: What happens to each rank's optimizer state, such as momentum, when models are averaged during
            training: ``keep`` it, ``reset`` it, or ``average`` it too.
        initial_weights: ``broadcast`` those of rank 0, or only ``verify`` that all ranks have the same, which saves
            the traffic if all ranks build the model from one seed.
        sigterm_every_n_batches: How often all ranks agree whether to stop on SIGTERM. Lightning does before every
            batch, which keeps the ranks in lock-step; 0 for never.
        process_group_backend: As of ``DDPStrategy``; by default NCCL on GPUs and gloo elsewhere.
        timeout: How long a rank waits for the others before it gives up.
        start_method: How processes are started on one machine; ``popen`` for scripts, ``fork`` for notebooks.

    Raises:
        ValueError: If an argument is out of range, or arguments contradict each other.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> trainer = Trainer(strategy=LocalSGDStrategy(period=8), accelerator="cpu", devices=2, logger=False)

    Reference:
        Sebastian U. Stich. Local SGD Converges Fast and Communicates Little. ICLR 2019.
        Prateek Jain, Sham M. Kakade, Rahul Kidambi, Praneeth Netrapalli, Aaron Sidford. Parallelizing Stochastic
        Gradient Descent for Least Squares Regression. JMLR 18, 2018 (one-shot averaging of tails).
    """

    metric_keys: ClassVar[tuple[str, ...]] = (
        "comm/bytes_per_step",
        "comm/messages_per_step",
        "comm/blocked_seconds_per_step",
    )

    def __init__(
        self,
        period: int | dict[int, int] | None = 8,
        warmup_steps: int = 0,
        average: WhatToAverage = "last",
        tail_start: int | float = 0.5,
        buffers: BufferPolicy = "average",
        optimizer_state: OptimizerStatePolicy = "keep",
        initial_weights: InitialWeights = "broadcast",
        sigterm_every_n_batches: int = 1,
        process_group_backend: str | None = None,
        timeout: timedelta = timedelta(minutes=30),
        start_method: StartMethod = "popen",
    ) -> None:
        super().__init__(
            buffers=buffers,
            optimizer_state=optimizer_state,
            initial_weights=initial_weights,
            sigterm_every_n_batches=sigterm_every_n_batches,
            process_group_backend=process_group_backend,
            timeout=timeout,
            start_method=start_method,
        )
        expect_one_of(average, WhatToAverage, "average", "The default is 'last'.")
        self.schedule = PeriodSchedule(period)
        self.period, self.average_of = plain_number(period), average
        warmup_steps, tail_start = plain_number(warmup_steps), plain_number(tail_start)
        expect_whole(warmup_steps, 0, "warmup_steps", "The default is 0.")
        remedy = "Set period to null, or average to 'last'."
        expect(
            average == "last" or period is None, "average", "'last' with a period", average, remedy
        )
        is_share = isinstance(tail_start, float)
        valid = 0 <= tail_start < 1 if is_share else is_whole(tail_start)
        remedy = "0.5 is half of all steps, 500 is step 500."
        expect(valid, "tail_start", "a step or a share in [0, 1)", tail_start, remedy)
        self.warmup_steps, self.tail_start = warmup_steps, tail_start
        self._first_step_of_tail = 0
        self._tails: list[RunningMean] = []

    def describe(self) -> str:
        """Describe when models are averaged."""
        begin = describe_warm_up(self.warmup_steps)
        if self.period is None:
            what = (
                "models"
                if self.average_of == "last"
                else f"tails from step {self._first_step_of_tail}"
            )
            return f"{begin}averaged once, as {what}, at the end"
        every = "step" if self.period == 1 else f"{self.period} steps"
        if isinstance(self.period, dict):
            every = ", ".join(f"{h} steps from step {k}" for k, h in self.schedule.table.items())
        return f"{begin}averaged every {every}"

    def setup(self, trainer: Trainer) -> None:
        """Prepare the training, without a tail."""
        self._tails = []
        super().setup(trainer)

    def on_train_start(self) -> None:
        """Compute where the tail begins; only now the length of the training is known."""
        if self.average_of == "tail":
            self._first_step_of_tail = self._tail_in_steps(self._trainer)
        super().on_train_start()

    def before_step(self, replica: Replica) -> None:
        """Average gradients during the warm-up."""
        if replica.num_steps < self.warmup_steps and self.exchange is not None:
            average_gradients(self.exchange, replica)

    def after_step(self, replica: Replica) -> None:
        """Average models if a period has ended, and update the tail."""
        if replica.num_steps <= self.warmup_steps:
            replica.share()
        elif self.schedule.is_due(replica.num_steps, replica.num_since):
            self.average(replica)
        if self.average_of == "tail" and replica.num_steps > self._first_step_of_tail:
            self._tail(replica).update(replica.tensors)

    def model_to_average(self, replica: Replica) -> list[Tensor] | None:
        """Return the mean of this rank's models since the tail began."""
        is_in_tail = self.average_of == "tail" and replica.num_steps > self._first_step_of_tail
        return self._tail(replica).values if is_in_tail else None

    def own_state(self) -> dict[str, Any]:
        """Return the tails."""
        return {"tails": [tail.state_dict() for tail in self._tails]}

    def load_own_state(self, state: dict[str, Any]) -> None:
        """Restore the tails."""
        for replica, saved in zip(self.replicas, state["tails"], strict=False):
            self._tail(replica).load_state_dict(saved)

    def _tail(self, replica: Replica) -> RunningMean:
        if not self._tails:
            self._tails = [RunningMean(each.tensors) for each in self.replicas]
        return self._tails[replica.index]

    def _tail_in_steps(self, trainer: Trainer) -> int:
        if not isinstance(self.tail_start, float):
            return self.tail_start
        num_steps = trainer.estimated_stepping_batches
        remedy = "Give tail_start as a number of steps, or max_epochs or max_steps to the Trainer."
        known = num_steps != float("inf")
        expected = "a step where the length of training is unknown"
        expect(known, "tail_start", expected, self.tail_start, remedy)
        return int(self.tail_start * num_steps)
