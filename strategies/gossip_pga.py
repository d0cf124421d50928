"""Gossip SGD with periodic or adaptive global averages."""

from __future__ import annotations

import math
from collections.abc import Sequence
from datetime import timedelta
from typing import Any, ClassVar, Literal, TypeAlias

import torch
from lightning.pytorch import Trainer
from torch import Tensor

from lightning_sgd._validation import (
    expect,
    expect_one_of,
    expect_whole,
    plain_number,
    warn_no_effect,
)
from lightning_sgd.functional.distributed.flat_buffers import FlatBuffers
from lightning_sgd.functional.distributed.gossip_pga import (
    AdaptivePeriod,
    Smoothed,
    weighted_differences,
)
from lightning_sgd.functional.distributed.mixing import Mixing
from lightning_sgd.functional.distributed.topologies import NAMED, Topology
from lightning_sgd.strategies._base.common_model import BufferPolicy, OptimizerStatePolicy
from lightning_sgd.strategies._base.parameter_averaging import (
    InitialWeights,
    ParameterAveragingStrategy,
    StartMethod,
)
from lightning_sgd.strategies._base.replica import Replica
from lightning_sgd.strategies._comm.collectives import Collectives
from lightning_sgd.strategies._comm.in_flight import PendingSendRecv

MixingOrder: TypeAlias = Literal["adapt_then_combine", "overlap"]
WireType: TypeAlias = Literal["full", "bfloat16"]

BOUNDS = ("adaptive_warmup_steps", "min_period", "max_period")


class GossipPGAStrategy(ParameterAveragingStrategy):
    r"""Trains a model on each rank and mixes it with the neighbours' after every step, and with all from time to time.

    After every step of its own optimizer rank i continues from

    .. math::
        x_i \leftarrow \sum_j w_{ij}\, x_j,

    where j are its neighbours in a graph and W is doubly stochastic, and after every H-th step from the mean of all
    ranks. A step then costs one message to each neighbour instead of an all-reduce, and the global averages keep ranks
    together however sparse the graph is. H = 1 is parallel SGD, no gossip Local SGD, H = ∞ gossip SGD.

    With ``order="overlap"`` models are mixed during the next step,
    :math:`x_i^{k+1} = \sum_j w_{ij} x_j^k - \gamma\, g_i(x_i^k)`: a rank waits for its
    neighbours' messages only after that step. The largest stable step size is somewhat smaller.

    With ``adaptive`` the period grows as the loss falls,
    :math:`H = \lceil (F_0/F)^{1/4} H_0 \rceil`; the loss is averaged together with the models, so that all ranks agree.

    Cost per rank and step: as many messages as the graph has neighbours, each of the bytes of the parameters (32 bits
    or more, or 16), and every H steps an all-reduce instead; a copy of the parameters in memory, one more for what is
    sent and one for each neighbour.

    Logged every ``log_every_n_steps`` batches that stepped:

    =================================  ======================================================================
    Key                                Meaning, for the logging rank
    =================================  ======================================================================
    ``comm/bytes_per_step``            bytes sent, per batch that stepped
    ``comm/messages_per_step``         messages sent to other ranks, per batch that stepped
    ``comm/blocked_seconds_per_step``  seconds spent waiting for communication, per batch that stepped
    ``gossip/consensus_distance``      distance of this rank's model from the mean at the last global average
    ``gossip/period``                  period until the next global average, with ``adaptive``
    =================================  ======================================================================

    Args:
        topology: Which ranks exchange models: ``ring``, ``torus``, ``exponential``, ``one_peer_exponential``,
            ``hypercube``, ``complete``, or a graph object such as ``FromGraph``.
        period: Optimizer steps from one global average to the next [H]; null for gossip alone. With ``adaptive``, where
            it starts [H₀].
        adaptive: Let the period grow as the loss falls.
        adaptive_warmup_steps: Number of first steps in which the period stays as it is, and the losses at global
            averages make the reference [F₀]. A twentieth of all steps is a good choice.
        min_period: Lower bound of the adaptive period.
        max_period: Upper bound of the adaptive period.
        loss_smoothing: Weight of the past in the moving average of the losses of a rank, in [0, 1).
        order: ``adapt_then_combine`` mixes the models after the step; ``overlap`` mixes the models before the step,
            during it.
        wire_dtype: Type of messages between neighbours: ``full``, or ``bfloat16`` for half the bytes. Gossip then
            brings models no closer to each other than about 2⁻⁸ of the largest weight; the mean and global averages
            stay exact.
        buffers: What happens to floating-point buffers, such as the statistics of batch normalisation, at global
            averages: ``average`` them too, keep each rank's own (``local``), or take those of ``rank0``.
        optimizer_state: What happens to each rank's optimizer state, such as momentum, at global averages: ``keep`` it,
            ``reset`` it, or ``average`` it too.
        initial_weights: ``broadcast`` those of rank 0, or only ``verify`` that all ranks have the same.
        sigterm_every_n_batches: How often all ranks agree whether to stop on SIGTERM. Lightning does before every
            batch, which keeps the ranks in lock-step; 0 for never.
        process_group_backend: As of ``DDPStrategy``; by default NCCL on GPUs and gloo elsewhere.
        timeout: How long a rank waits for the others before it gives up.
        start_method: How processes are started on one machine; ``popen`` for scripts, ``fork`` for notebooks.

    Raises:
        ValueError: If an argument is out of range; at the start of training, if the graph does not exist for the number
            of ranks.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> strategy = GossipPGAStrategy("ring", period=6)
        >>> trainer = Trainer(strategy=strategy, accelerator="cpu", devices=4, logger=False)

    Reference:
        Yiming Chen, Kun Yuan, Yingya Zhang, Pan Pan, Yinghui Xu, Wotao Yin. Accelerating Gossip SGD with Periodic
        Global Averaging. ICML 2021.
    """

    metric_keys: ClassVar[tuple[str, ...]] = (
        "comm/bytes_per_step",
        "comm/messages_per_step",
        "comm/blocked_seconds_per_step",
        "gossip/consensus_distance",
        "gossip/period",
    )

    def __init__(
        self,
        topology: Topology | str = "one_peer_exponential",
        period: int | None = 6,
        adaptive: bool = False,
        adaptive_warmup_steps: int = 0,
        min_period: int = 1,
        max_period: int = 64,
        loss_smoothing: float = 0.9,
        order: MixingOrder = "adapt_then_combine",
        wire_dtype: WireType = "full",
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
        expect_one_of(order, MixingOrder, "order")
        expect_one_of(wire_dtype, WireType, "wire_dtype")
        known = isinstance(topology, Topology) or topology in NAMED
        remedy = (
            f"Choose one of {', '.join(NAMED)}, or give a graph such as lightning_sgd.FromGraph."
        )
        expect(known, "topology", "a graph or the name of one", topology, remedy)
        self.topology = NAMED[topology]() if isinstance(topology, str) else topology
        period, loss_smoothing = plain_number(period), plain_number(loss_smoothing)
        if period is not None:
            expect_whole(period, 1, "period", "null means never; 6 is the default.")
        remedy = "Give the period where it starts, such as 4."
        expect(not adaptive or period is not None, "period", "a number", period, remedy)
        remedy = "0 takes the last loss alone, 0.9 is the default."
        expect(0 <= loss_smoothing < 1, "loss_smoothing", "in [0, 1)", loss_smoothing, remedy)
        self.period, self.adaptive, self.loss_smoothing = period, adaptive, loss_smoothing
        self._warned = False
        self.in_background = order == "overlap"
        self.wire_dtype = torch.bfloat16 if wire_dtype == "bfloat16" else None
        self._bounds = plain_number((adaptive_warmup_steps, min_period, max_period))
        for name, bound in zip(BOUNDS, self._bounds, strict=True):
            expect_whole(bound, 0, name, "Leave it out.")
        if adaptive:
            self._adaptive_period()
        self._reset()

    def describe(self) -> str:
        """Describe when models are averaged, and how they are mixed in between."""
        start = "at first " if self.adaptive else ""
        often = "at the end" if self.period is None else f"{start}every {self.period} steps"
        beta = f", β = {self.mixing.beta:.3g}" if self.exchange is not None else ""
        when = " during the next step" if self.in_background else ""
        return f"averaged {often}, else mixed over {self.topology}{when}{beta}"

    def setup(self, trainer: Trainer) -> None:
        """Create the mixing matrices, or raise if the graph does not exist for this number of ranks."""
        self.mixing = self.topology.on(self.world_size)
        super().setup(trainer)
        self._reset()
        if self.exchange is None:
            return
        for replica in self.replicas:
            self._mixers.append(Mixer(self.exchange, self.mixing, replica, self.wire_dtype))
            self._losses.append(Smoothed(self.loss_smoothing))
            if self.adaptive:
                self._periods.append(self._adaptive_period())
                replica.extra_tensors = [replica.flat.buffers[0].new_zeros(1)]

    def after_step(self, replica: Replica) -> None:
        """Average over all ranks if a period has ended, else mix with the neighbours."""
        if not self._mixers:
            return
        if self.adaptive and replica.loss is not None:
            self._losses[replica.index].update(replica.loss)
        mixer = self._mixers[replica.index]
        if self._is_due(replica, replica.num_since):
            self._average(replica)
        else:
            if not self.in_background:
                mixer.send()
            mixer.apply()
        # Equal models need not be mixed, nor models that are averaged after the next step.
        is_useful = not replica.is_shared and not self._is_due(replica, replica.num_since + 1)
        if self.in_background and is_useful:
            mixer.send()

    def _is_due(self, replica: Replica, num_since: int) -> bool:
        period = self._periods[replica.index].value if self.adaptive else self.period
        return period is not None and num_since >= period

    def _average(self, replica: Replica) -> None:
        for tensor in replica.extra_tensors:
            tensor.copy_(self._losses[replica.index].value)
        moved = self.average(replica, measure=True)
        assert moved is not None
        self._moved[replica.index] = moved
        for tensor in replica.extra_tensors:
            self._adapt(replica, float(tensor))

    def _adapt(self, replica: Replica, loss: float) -> None:
        if replica.loss is None and not self._warned:
            self._warned = True
            warn_no_effect(
                "adaptive=True needs the losses, which manual optimization does not return; the period stays. "
                "Give a closure that returns the loss to `step`."
            )
        self._periods[replica.index].update(replica.num_steps, loss)

    def on_train_end(self) -> None:
        """Apply pending messages, then leave the mean on every rank."""
        # A rank that ended earlier would close the connections of its neighbours.
        for mixer in self._mixers:
            mixer.apply()
        super().on_train_end()

    def own_metrics(self) -> dict[str, float]:
        """Return the distance from the mean at the last global average, and the adaptive period."""
        metrics = {}
        if self._moved:
            metrics["gossip/consensus_distance"] = math.hypot(*map(float, self._moved.values()))
        if self.adaptive:
            metrics["gossip/period"] = float(self._periods[0].value)
        return metrics

    def own_state(self) -> dict[str, Any]:
        """Return rounds with received messages, adaptive periods and losses."""
        if not self._has_failed:
            for mixer in self._mixers:
                mixer.receive()
        return {
            "mixers": [mixer.state_dict() for mixer in self._mixers],
            "periods": [period.state_dict() for period in self._periods],
            "losses": [loss.value for loss in self._losses],
        }

    def load_own_state(self, state: dict[str, Any]) -> None:
        """Restore rounds, periods and losses."""
        for mixer, saved in zip(self._mixers, state["mixers"], strict=True):
            mixer.load_state_dict(saved)
        for period, saved in zip(self._periods, state["periods"], strict=True):
            period.load_state_dict(saved)
        for loss, value in zip(self._losses, state["losses"], strict=True):
            loss.value = value

    def _adaptive_period(self) -> AdaptivePeriod:
        assert self.period is not None
        return AdaptivePeriod(self.period, *self._bounds)

    def _reset(self) -> None:
        self._mixers: list[Mixer] = []
        self._losses: list[Smoothed] = []
        self._periods: list[AdaptivePeriod] = []
        self._moved: dict[int, Tensor] = {}


class Mixer:
    """Mixes a replica with those of its neighbours; in the background if training continues after :meth:`send`.

    Attributes:
        num_rounds: Number of rounds so far, on which a graph that changes depends.
    """

    def __init__(
        self,
        exchange: Collectives,
        mixing: Mixing,
        replica: Replica,
        wire_dtype: torch.dtype | None,
    ) -> None:
        self.exchange, self.mixing, self.replica = exchange, mixing, replica
        self.wire_dtype = wire_dtype
        self.num_rounds = 0
        self._flat: FlatBuffers | None = None
        self._pending: PendingSendRecv | None = None
        self._weights: list[float] = []
        self._outgoing: list[Tensor] = []
        self._incoming: list[list[Tensor]] = []
        self._change: list[Tensor] | None = None

    def send(self) -> None:
        """Start sending the present parameters to the neighbours of this round, and receiving theirs."""
        rank, number = self.exchange.rank, self.num_rounds
        self._flat = self.replica.flat
        self._flat.pack()
        self._outgoing = self._copy(self._flat.buffers)
        receive = self.mixing.receive(rank, number)
        self._weights = list(receive.values())
        self._pending = self.exchange.send_recv_async(
            self._outgoing,
            self.mixing.send(rank, number),
            dict(zip(receive, self._receive_buffers(len(receive)), strict=True)),
            self.replica.num_steps,
        )
        self.num_rounds += 1

    def receive(self) -> None:
        """Wait for the messages of the pending round; the parameters stay as they are."""
        if self._pending is None or self._flat is None:
            return
        self.exchange.wait_send_recv(self._pending)
        received = list(self._pending.receive.values())
        self._pending = None
        self._change = [
            weighted_differences(sent, [each[i] for each in received], self._weights, buffer.dtype)
            for i, (sent, buffer) in enumerate(zip(self._outgoing, self._flat.buffers, strict=True))
        ]

    def apply(self) -> None:
        """Wait for the pending round, if there is one, and add its change to the parameters."""
        self.receive()
        if self._change is None or self._flat is None:
            return
        self._flat.pack()
        for buffer, change in zip(self._flat.buffers, self._change, strict=True):
            buffer.add_(change)
        self._flat.unpack()
        self._change = None

    def state_dict(self) -> dict[str, Any]:
        """Return the number of rounds, and the change that has been received but not been applied."""
        return {"num_rounds": self.num_rounds, "change": self._change}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore :meth:`state_dict`."""
        self.num_rounds, self._flat = state["num_rounds"], self.replica.flat
        if state["change"] is not None:
            pairs = zip(state["change"], self._flat.buffers, strict=True)
            self._change = [change.to(buffer.device) for change, buffer in pairs]

    def _copy(self, buffers: Sequence[Tensor]) -> list[Tensor]:
        # Not the buffers themselves: an evaluation may average in them while messages are pending.
        if not _have_same_shapes(self._outgoing, buffers):
            self._outgoing = self._like(buffers)
        for outgoing, buffer in zip(self._outgoing, buffers, strict=True):
            outgoing.copy_(buffer)
        return self._outgoing

    def _receive_buffers(self, num_peers: int) -> list[list[Tensor]]:
        self._incoming = [
            each for each in self._incoming if _have_same_shapes(each, self._outgoing)
        ]
        while len(self._incoming) < num_peers:
            self._incoming.append(self._like(self._outgoing))
        return self._incoming[:num_peers]

    def _like(self, buffers: Sequence[Tensor]) -> list[Tensor]:
        return [
            torch.empty_like(buffer, dtype=self.wire_dtype or buffer.dtype) for buffer in buffers
        ]


def _have_same_shapes(buffers: Sequence[Tensor], others: Sequence[Tensor]) -> bool:
    shapes = [(tensor.shape, tensor.device) for tensor in buffers]
    return shapes == [(tensor.shape, tensor.device) for tensor in others]
