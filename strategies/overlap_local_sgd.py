"""Local SGD that averages models during the next round."""

from __future__ import annotations

import math
from datetime import timedelta
from typing import Any, ClassVar, Literal, TypeAlias

import torch
from lightning.pytorch import Trainer
from torch import Tensor

from lightning_sgd._validation import expect, expect_one_of, expect_whole, plain_number
from lightning_sgd.functional.distributed.flat_buffers import FlatBuffers, distance
from lightning_sgd.functional.distributed.overlap_local_sgd import (
    effective_step,
    move_anchor_,
    pull_back_,
    velocity_scale,
)
from lightning_sgd.strategies._base.common_model import BufferPolicy
from lightning_sgd.strategies._base.parameter_averaging import (
    InitialWeights,
    ParameterAveragingStrategy,
    StartMethod,
    average_gradients,
    describe_warm_up,
)
from lightning_sgd.strategies._base.replica import Replica
from lightning_sgd.strategies._comm.collectives import Collectives, Purpose
from lightning_sgd.strategies._comm.in_flight import PendingMean

EvaluatedModel: TypeAlias = Literal["mean", "anchor", "local"]


class OverlapLocalSGDStrategy(ParameterAveragingStrategy):
    r"""Trains a model on each rank; every ``period`` steps it is pulled towards a mean computed in the background.

    After every τ steps of its own optimizer rank i is pulled back towards the anchor,

    .. math::
        x_i \leftarrow (1-\alpha)\, x_i + \alpha z,

    and continues at once, while the mean of the pulled-back models is computed in the background. At the next boundary

    .. math::
        v \leftarrow \beta v + (\bar x - z), \qquad z \leftarrow z + v

    moves the anchor. No rank waits as long as an average takes less time than τ steps, and a rank that is late once
    delays no other. A rank that is always slow still sets the pace.

    In the long run a step moves the mean by only (1 − α)/(1 − αβ) of its size, 0.69 by default: raise the step size, or
    set ``lr_compensation``. On one rank nothing is exchanged and nothing is pulled.

    Cost per rank: 2(n − 1)/n times the bytes of the parameters (32 bits or more) every τ steps, in the background;
    three copies of the parameters in memory, one more while all ranks are evaluated.

    Logged every ``log_every_n_steps`` batches that stepped:

    =================================  ==================================================================
    Key                                Meaning, for the logging rank
    =================================  ==================================================================
    ``comm/bytes_per_step``            bytes sent, per batch that stepped
    ``comm/messages_per_step``         messages sent to other ranks, per batch that stepped
    ``comm/blocked_seconds_per_step``  seconds spent waiting for communication, per batch that stepped
    ``overlap/anchor_distance``        distance of this rank's model from the anchor at the last boundary
    =================================  ==================================================================

    Args:
        period: Optimizer steps from one boundary to the next [τ].
        pullback: Share of the way back to the anchor [α], in (0, 1).
        anchor_momentum: Momentum of the anchor [β], in [0, 1).
        lr_compensation: Take steps that are larger by (1 − αβ)/(1 − α), 1.45 by default. The step size that schedulers
            and loggers see stays as it is.
        scale_velocity_with_lr: Keep the velocity of the anchor in proportion to the step size (that of the first
            parameter group), so that a drop of the step size slows the anchor too.
        warmup_steps: Number of first steps in which gradients are averaged, as in DDP; the anchor starts
            from their result.
        overlap: Average during the next round. Otherwise every rank waits, and the training is the same bit by bit, for
            finding out what waiting costs and for debugging.
        eval_model: The model for validation, for checkpoints and at the end: the ``mean`` of the models, or
            the ``anchor``, which lags one round behind. With ``local`` each rank validates its own model, and
            checkpoints and the end are as with ``mean``.
        buffers: What happens to floating-point buffers, such as the statistics of batch normalisation, for validation,
            checkpoints and at the end: ``average`` them too, keep each rank's own (``local``), or take those of
            ``rank0``.
        initial_weights: ``broadcast`` those of rank 0, or only ``verify`` that all ranks have the same.
        sigterm_every_n_batches: How often all ranks agree whether to stop on SIGTERM. Lightning does before every
            batch, which keeps the ranks in lock-step; 0 for never, without which no rank can run ahead.
        process_group_backend: As of ``DDPStrategy``; by default NCCL on GPUs and gloo elsewhere.
        timeout: How long a rank waits for the others before it gives up.
        start_method: How processes are started on one machine; ``popen`` for scripts, ``fork`` for notebooks.

    Raises:
        ValueError: If an argument is out of range.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> strategy = OverlapLocalSGDStrategy(period=2, lr_compensation=True)
        >>> trainer = Trainer(strategy=strategy, accelerator="cpu", devices=2, logger=False)

    Reference:
        Jianyu Wang, Hao Liang, Gauri Joshi. Overlap Local-SGD: An Algorithmic Approach to Hide Communication Delays in
        Distributed SGD. ICASSP 2020.
    """

    metric_keys: ClassVar[tuple[str, ...]] = (
        "comm/bytes_per_step",
        "comm/messages_per_step",
        "comm/blocked_seconds_per_step",
        "overlap/anchor_distance",
    )

    def __init__(
        self,
        period: int = 2,
        pullback: float = 0.6,
        anchor_momentum: float = 0.7,
        lr_compensation: bool = False,
        scale_velocity_with_lr: bool = True,
        warmup_steps: int = 0,
        overlap: bool = True,
        eval_model: EvaluatedModel = "mean",
        buffers: BufferPolicy = "average",
        initial_weights: InitialWeights = "broadcast",
        sigterm_every_n_batches: int = 1,
        process_group_backend: str | None = None,
        timeout: timedelta = timedelta(minutes=30),
        start_method: StartMethod = "popen",
    ) -> None:
        super().__init__(
            buffers=buffers,
            optimizer_state="keep",
            initial_weights=initial_weights,
            sigterm_every_n_batches=sigterm_every_n_batches,
            process_group_backend=process_group_backend,
            timeout=timeout,
            start_method=start_method,
        )
        expect_one_of(eval_model, EvaluatedModel, "eval_model")
        period, warmup_steps = plain_number(period), plain_number(warmup_steps)
        pullback, anchor_momentum = plain_number(pullback), plain_number(anchor_momentum)
        expect_whole(period, 1, "period", "The default is 2.")
        remedy = "With 1 training stands still, with 0 ranks never meet; 0.6 is the default."
        expect(0 < pullback < 1, "pullback", "in (0, 1)", pullback, remedy)
        remedy = "0 is no momentum, 0.7 is the default."
        valid = 0 <= anchor_momentum < 1
        expect(valid, "anchor_momentum", "in [0, 1)", anchor_momentum, remedy)
        expect_whole(warmup_steps, 0, "warmup_steps", "The default is 0.")
        self.period, self.pullback, self.anchor_momentum = period, pullback, anchor_momentum
        self.lr_compensation, self.scale_velocity_with_lr = lr_compensation, scale_velocity_with_lr
        self.warmup_steps, self.in_background = warmup_steps, overlap
        self.eval_model = eval_model
        self._reset()

    def describe(self) -> str:
        """Describe when models are pulled back, and how that changes the step size."""
        effective = effective_step(self.pullback, self.anchor_momentum)
        steps = "compensated" if self.lr_compensation else f"counting {effective:.2f} of their size"
        begin = describe_warm_up(self.warmup_steps)
        waits = "" if self.in_background else ", without overlap"
        return f"{begin}pulled towards their mean of one round ago every {self.period} steps{waits}, steps {steps}"

    def setup(self, trainer: Trainer) -> None:
        """Prepare the training, with an anchor for each optimizer."""
        super().setup(trainer)
        self._reset()
        if self.exchange is None:
            return
        for replica in self.replicas:
            anchor = Anchor(
                self.exchange,
                replica,
                self.pullback,
                self.anchor_momentum,
                scales_with_lr=self.scale_velocity_with_lr,
            )
            self._anchors.append(anchor)

    def before_step(self, replica: Replica) -> None:
        """Average gradients during the warm-up; after it initialize anchors of new parameters, and enlarge the step."""
        if self.exchange is None:
            return
        if replica.num_steps < self.warmup_steps:
            average_gradients(self.exchange, replica)
            return
        self._anchors[replica.index].initialize()
        if self.lr_compensation and replica.index not in self._scheduled_lrs:
            groups = replica.optimizer.param_groups
            self._scheduled_lrs[replica.index] = [group["lr"] for group in groups]
            factor = 1 / effective_step(self.pullback, self.anchor_momentum)
            for group in groups:
                group["lr"] = group["lr"] * factor

    def after_step(self, replica: Replica) -> None:
        """Restore the step size; at a boundary, pull the model back and start the next average."""
        lrs = self._scheduled_lrs.pop(replica.index, None)
        if lrs is not None:
            for group, lr in zip(replica.optimizer.param_groups, lrs, strict=True):
                group["lr"] = lr
        num_steps = replica.num_steps - self.warmup_steps
        if num_steps <= 0:
            replica.share()
        elif self._anchors and num_steps % self.period == 0:
            self._anchors[replica.index].start_round()
            if not self.in_background:
                self._anchors[replica.index].finish_round()

    def model_to_average(self, replica: Replica) -> list[Tensor] | None:
        """Return the anchor, if that is to be evaluated."""
        if self.eval_model != "anchor" or not self._anchors:
            return None
        anchor = self._anchors[replica.index]
        anchor.finish_round()
        return None if anchor.anchor is None else anchor.anchor.views

    def on_validation_start(self) -> None:
        """Finish pending averages, and validate the common model unless each rank is to validate its own."""
        self._finish_rounds()
        if self.eval_model != "local":
            super().on_validation_start()

    def on_train_end(self) -> None:
        """Finish pending averages, then leave the common model on every rank."""
        # A rank that ended earlier would close the connections of the others.
        self._finish_rounds()
        super().on_train_end()

    def own_metrics(self) -> dict[str, float]:
        """Return the distance of this rank's model from the anchor at the last boundary."""
        moved = [float(anchor.moved) for anchor in self._anchors if anchor.moved is not None]
        return {"overlap/anchor_distance": math.hypot(*moved)} if moved else {}

    def own_state(self) -> dict[str, Any]:
        """Finish pending averages, and return anchors with their velocities."""
        if not self._has_failed:
            self._finish_rounds()
        return {"anchors": [anchor.state_dict() for anchor in self._anchors]}

    def load_own_state(self, state: dict[str, Any]) -> None:
        """Restore anchors and velocities."""
        for anchor, saved in zip(self._anchors, state["anchors"], strict=True):
            anchor.load_state_dict(saved)

    def _finish_rounds(self) -> None:
        for anchor in self._anchors:
            anchor.finish_round()

    def _reset(self) -> None:
        self._anchors: list[Anchor] = []
        self._scheduled_lrs: dict[int, list[Any]] = {}


class Anchor:
    """The anchor of one replica: the mean of the models one round ago, and the mean that is being computed.

    Args:
        exchange: Connects the ranks.
        replica: Parameters of one optimizer.
        pullback: Share of the way back to the anchor [α].
        momentum: Momentum of the anchor [β].
        scales_with_lr: Whether the velocity stays in proportion to the step size.

    Attributes:
        anchor: The anchor [z]; ``None`` before the first step.
        velocity: Its velocity [v].
        in_flight: The pulled-back models, whose mean is being computed.
        moved: Distance of the model from the anchor at the last boundary.
    """

    def __init__(
        self,
        exchange: Collectives,
        replica: Replica,
        pullback: float,
        momentum: float,
        *,
        scales_with_lr: bool,
    ) -> None:
        self.exchange, self.replica = exchange, replica
        self.pullback, self.momentum, self.scales_with_lr = pullback, momentum, scales_with_lr
        self.anchor: FlatBuffers | None = None
        self.velocity = self.in_flight = FlatBuffers([])
        self.moved: Tensor | None = None
        self._lr, self._scale = 0.0, 1.0
        self._pending: PendingMean | None = None

    def initialize(self) -> None:
        """Let the anchor of parameters that have none yet start from their present values."""
        tensors = self.replica.tensors
        if self.anchor is not None and self.anchor.holds(tensors):
            return
        self.finish_round()
        old = (self.anchor, self.velocity) if self.anchor is not None else ()
        self.anchor, self.velocity = FlatBuffers(tensors), FlatBuffers(tensors)
        self.in_flight = FlatBuffers(tensors)
        self.anchor.pack()
        for before, after in zip(old, (self.anchor, self.velocity), strict=False):
            _carry_over(before, after)

    def start_round(self) -> None:
        """At a boundary: pull the parameters back, and start averaging them."""
        self.initialize()
        self.finish_round()
        assert self.anchor is not None
        self.moved = distance(self.replica.tensors, self.anchor.views)
        self.in_flight.pack()
        for model, anchor in zip(self.in_flight.buffers, self.anchor.buffers, strict=True):
            pull_back_(model, anchor, self.pullback)
        self.in_flight.unpack()
        self._update_scale()
        self._pending = self.exchange.all_reduce_mean_async(self.in_flight, self.replica.num_steps)

    def finish_round(self) -> None:
        """Wait for the pending mean, if there is one, and move the anchor; the parameters stay as they are."""
        if self._pending is None or self.anchor is None:
            return
        pending, self._pending = self._pending, None
        self.exchange.wait_mean(pending)
        parts = (self.anchor.buffers, self.velocity.buffers, self.in_flight.buffers)
        for anchor, velocity, mean in zip(*parts, strict=True):
            move_anchor_(anchor, velocity, mean, self.momentum * self._scale)

    def _update_scale(self) -> None:
        # The step size at the start of a round: when it is finished depends on validation and checkpoints.
        lr = float(self.replica.optimizer.param_groups[0]["lr"])
        self._scale = velocity_scale(lr, self._lr) if self.scales_with_lr else 1.0
        self._lr = lr

    def state_dict(self) -> dict[str, Any]:
        """Return the step size, and on rank 0 anchor and velocity, which are the same on all ranks."""
        has_anchor = self.anchor is not None
        state: dict[str, Any] = {"lr": self._lr, "has_anchor": has_anchor}
        if self.anchor is not None and self.exchange.rank == 0:
            state |= {"anchor": self.anchor.buffers, "velocity": self.velocity.buffers}
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore :meth:`state_dict`; all ranks must call this together, because rank 0 sends anchor and velocity."""
        self._lr = state["lr"]
        if not state["has_anchor"]:
            return
        self.initialize()
        assert self.anchor is not None
        for key, flat in (("anchor", self.anchor), ("velocity", self.velocity)):
            if key in state:
                _fill(flat, state[key])
            self.exchange.broadcast(flat, Purpose.STATE, self.replica.num_steps)


@torch.no_grad()
def _carry_over(before: FlatBuffers, after: FlatBuffers) -> None:
    places = {id(tensor): view for tensor, view in zip(after.tensors, after.views, strict=True)}
    for tensor, view in zip(before.tensors, before.views, strict=True):
        if id(tensor) in places:
            places[id(tensor)].copy_(view)


@torch.no_grad()
def _fill(flat: FlatBuffers, buffers: list[Tensor]) -> None:
    for buffer, saved in zip(flat.buffers, buffers, strict=True):
        buffer.copy_(saved)
