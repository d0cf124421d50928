"""Local SGD whose exchange goes on during the next round."""

from __future__ import annotations

import math
from datetime import timedelta
from typing import Any, ClassVar, Literal

import torch
from lightning.pytorch import Trainer
from torch import Tensor

from lightning_sgd._validation import expect
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


class OverlapLocalSGDStrategy(ParameterAveragingStrategy):
    r"""Each rank trains on its own; every ``period`` steps it is pulled towards a mean that arrived in the background.

    After every τ steps of its own optimizer rank i is pulled back to the anchor that is there,

    .. math::
        x_i \leftarrow (1-\alpha)\, x_i + \alpha z,

    and goes on at once, while the mean of the pulled-back models travels. At the next boundary it has arrived, and

    .. math::
        v \leftarrow \beta v + (\bar x - z), \qquad z \leftarrow z + v

    moves the anchor. Nobody waits as long as an exchange takes less time than τ steps, and a rank that is late once
    holds nobody up. A rank that is always slow still sets the pace.

    In the long run a step counts for only (1 − α)/(1 − αβ) of its size, 0.69 by default: raise the step size, or set
    ``lr_compensation``. On one rank nothing is exchanged and nothing is pulled.

    Cost per rank: 2(n − 1)/n times the bytes of the parameters (32 bits or more) every τ steps, in the background;
    three copies of the parameters in memory, one more while all ranks are evaluated.

    Args:
        period: Optimizer steps from one boundary to the next [τ].
        pullback: Share of the way back to the anchor [α], in (0, 1).
        anchor_momentum: Momentum of the anchor [β], in [0, 1).
        lr_compensation: Take steps that are larger by (1 − αβ)/(1 − α), 1.45 by default. The step size that schedulers
            and loggers see stays as it is.
        scale_velocity_with_lr: Keep the velocity of the anchor in proportion to the step size (that of the first
            parameter group), so that after a drop it does not go on at the old speed.
        warmup_steps: So many steps at first exchange gradients, as DDP does; the anchor starts from what they lead to.
        overlap: Whether an exchange goes on during the next round. Without it every rank waits, and the training is the
            same bit by bit: what waiting costs can be seen, and trouble told apart.
        eval_model: What is validated, and what is in checkpoints and left at the end: the ``mean`` of the models, or
            the ``anchor``, which lags one round behind. With ``local`` each rank validates its own model, and
            checkpoints and the end are as with ``mean``.
        buffers: What becomes of floating-point buffers, such as the statistics of batch normalisation, for validation,
            checkpoints and at the end: ``average`` them too, leave each rank its own (``local``), or take those of
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
        eval_model: Literal["mean", "anchor", "local"] = "mean",
        buffers: BufferPolicy = "average",
        initial_weights: InitialWeights = "broadcast",
        sigterm_every_n_batches: int = 1,
        process_group_backend: str | None = None,
        timeout: timedelta = timedelta(minutes=30),
        start_method: StartMethod = "popen",
    ) -> None:
        super().__init__(
            buffers,
            "keep",
            initial_weights,
            sigterm_every_n_batches,
            process_group_backend,
            timeout,
            start_method,
        )
        expect(period >= 1, "period", "at least 1", period, "The default is 2.")
        remedy = "With 1 training stands still, with 0 ranks never meet; 0.6 is the default."
        expect(0 < pullback < 1, "pullback", "in (0, 1)", pullback, remedy)
        remedy = "0 is no momentum, 0.7 is the default."
        valid = 0 <= anchor_momentum < 1
        expect(valid, "anchor_momentum", "in [0, 1)", anchor_momentum, remedy)
        expect(warmup_steps >= 0, "warmup_steps", "at least 0", warmup_steps, "The default is 0.")
        self.period, self.pullback, self.anchor_momentum = period, pullback, anchor_momentum
        self.lr_compensation, self.scale_velocity_with_lr = lr_compensation, scale_velocity_with_lr
        self.warmup_steps, self.in_background = warmup_steps, overlap
        self.eval_model = eval_model
        self._forget()

    def describe(self) -> str:
        """When models are pulled together, and what that does to the step size."""
        effective = effective_step(self.pullback, self.anchor_momentum)
        steps = "compensated" if self.lr_compensation else f"counting {effective:.2f} of their size"
        begin = describe_warm_up(self.warmup_steps)
        waits = "" if self.in_background else ", without overlap"
        return (
            f"{begin}pulled towards their mean of one round ago every {self.period} steps{waits}, "
            f"steps {steps}"
        )

    def setup(self, trainer: Trainer) -> None:
        """Make an anchor for what each optimizer trains."""
        super().setup(trainer)
        self._forget()
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
        """Exchange gradients during the warm-up; after it give new parameters their anchor, and enlarge the step."""
        if self.exchange is None:
            return
        if replica.num_steps < self.warmup_steps:
            average_gradients(self.exchange, replica)
            return
        self._anchors[replica.index].settle()
        if self.lr_compensation and replica.index not in self._given:
            groups = replica.optimizer.param_groups
            self._given[replica.index] = [group["lr"] for group in groups]
            factor = 1 / effective_step(self.pullback, self.anchor_momentum)
            for group in groups:
                group["lr"] = group["lr"] * factor

    def after_step(self, replica: Replica) -> None:
        """Put the step size back; at a boundary, pull back and start the next exchange."""
        given = self._given.pop(replica.index, None)
        if given is not None:
            for group, lr in zip(replica.optimizer.param_groups, given, strict=True):
                group["lr"] = lr
        num_steps = replica.num_steps - self.warmup_steps
        if num_steps <= 0:
            replica.share()
        elif self._anchors and num_steps % self.period == 0:
            self._cross(self._anchors[replica.index])

    def _cross(self, anchor: Anchor) -> None:
        anchor.cross()
        if not self.in_background:
            anchor.arrive()

    def candidate(self, replica: Replica) -> list[Tensor] | None:
        """The anchor, if that is to be evaluated."""
        if self.eval_model != "anchor" or not self._anchors:
            return None
        anchor = self._anchors[replica.index]
        anchor.arrive()
        return None if anchor.place is None else anchor.place.views

    def on_validation_start(self) -> None:
        """Wait for what is on its way, and evaluate the mean unless each rank is to evaluate its own model."""
        self._drain()
        if self.eval_model != "local":
            super().on_validation_start()

    def on_train_end(self) -> None:
        """Wait for what is on its way: a rank that leaves before would hang up on the others."""
        self._drain()
        super().on_train_end()

    def own_metrics(self) -> dict[str, float]:
        """How far this rank was from the anchor at the last boundary."""
        moved = [float(anchor.moved) for anchor in self._anchors if anchor.moved is not None]
        return {"overlap/anchor_distance": math.hypot(*moved)} if moved else {}

    def own_state(self) -> dict[str, Any]:
        """Anchors and their velocities; what is on its way is waited for."""
        if not self._has_failed:
            self._drain()
        return {"anchors": [anchor.state_dict() for anchor in self._anchors]}

    def load_own_state(self, state: dict[str, Any]) -> None:
        """Go on with anchors and velocities."""
        for anchor, saved in zip(self._anchors, state["anchors"], strict=True):
            anchor.load_state_dict(saved)

    def _drain(self) -> None:
        for anchor in self._anchors:
            anchor.arrive()

    def _forget(self) -> None:
        self._anchors: list[Anchor] = []
        self._given: dict[int, list[Any]] = {}


class Anchor:
    """Pulls a replica back, and starts the exchange that is waited for one round later.

    Args:
        exchange: Between the ranks.
        replica: What one optimizer trains.
        pullback: Share of the way back to the anchor [α].
        momentum: Of the anchor [β].
        scales_with_lr: Whether the velocity stays in proportion to the step size.
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
        self.place: FlatBuffers | None = None
        self.velocity = self.travelling = FlatBuffers([])
        self.moved: Tensor | None = None
        self._lr, self._scale = 0.0, 1.0
        self._pending: PendingMean | None = None

    def settle(self) -> None:
        """Take the parameters as they are for the anchor, those that have none yet."""
        tensors = self.replica.tensors
        if self.place is not None and self.place.holds(tensors):
            return
        self.arrive()
        old = (self.place, self.velocity) if self.place is not None else ()
        self.place, self.velocity = FlatBuffers(tensors), FlatBuffers(tensors)
        self.travelling = FlatBuffers(tensors)
        self.place.pack()
        for before, after in zip(old, (self.place, self.velocity), strict=False):
            _carry_over(before, after)

    def cross(self) -> None:
        """At a boundary: pull the parameters back, and let them begin to travel."""
        self.settle()
        self.arrive()
        assert self.place is not None
        self.moved = distance(self.replica.tensors, self.place.views)
        self.travelling.pack()
        for model, anchor in zip(self.travelling.buffers, self.place.buffers, strict=True):
            pull_back_(model, anchor, self.pullback)
        self.travelling.unpack()
        self._take_lr()
        self._pending = self.exchange.start_mean(self.travelling, self.replica.num_steps)

    def arrive(self) -> None:
        """Wait for the mean that is on its way, and move the anchor; nothing of it is seen before the next boundary."""
        if self._pending is None or self.place is None:
            return
        pending, self._pending = self._pending, None
        self.exchange.finish_mean(pending)
        parts = (self.place.buffers, self.velocity.buffers, self.travelling.buffers)
        for anchor, velocity, mean in zip(*parts, strict=True):
            move_anchor_(anchor, velocity, mean, self.momentum * self._scale)

    def _take_lr(self) -> None:
        # Of the boundary where the exchange starts: when it is waited for depends on validation and checkpoints.
        lr = float(self.replica.optimizer.param_groups[0]["lr"])
        self._scale = velocity_scale(lr, self._lr) if self.scales_with_lr else 1.0
        self._lr = lr

    def state_dict(self) -> dict[str, Any]:
        """Anchor and velocity, which are the same on all ranks and so kept by rank 0 alone, and the step size."""
        has_anchor = self.place is not None
        state: dict[str, Any] = {"lr": self._lr, "has_anchor": has_anchor}
        if self.place is not None and self.exchange.rank == 0:
            state |= {"anchor": self.place.buffers, "velocity": self.velocity.buffers}
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from :meth:`state_dict`; on all ranks alike.

        Args:
            state: What it returned on this rank.
        """
        self._lr = state["lr"]
        if not state["has_anchor"]:
            return
        self.settle()
        assert self.place is not None
        for key, flat in (("anchor", self.place), ("velocity", self.velocity)):
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
