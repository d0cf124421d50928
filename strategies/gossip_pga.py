"""Gossip SGD with periodic or adaptive global averages."""

from __future__ import annotations

import math
from collections.abc import Sequence
from datetime import timedelta
from typing import Any, ClassVar, Literal

import torch
from lightning.pytorch import Trainer
from torch import Tensor

from lightning_sgd._validation import expect, warn_no_effect
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
from lightning_sgd.strategies._comm.in_flight import Swap


class GossipPGAStrategy(ParameterAveragingStrategy):
    r"""Each rank trains on its own and mixes its model with its neighbours' after every step, now and then with all.

    After every step of its own optimizer rank i goes on from

    .. math::
        x_i \leftarrow \sum_j w_{ij}\, x_j,

    where j are its neighbours in a graph and W is doubly stochastic, and after every H-th step from the mean of all
    ranks. A step then costs one message to each neighbour instead of an all-reduce, and the global averages keep ranks
    together however sparse the graph is. H = 1 is parallel SGD, no gossip Local SGD, H = ∞ gossip SGD.

    With ``order="overlap"`` the mixing of a model goes on during the next step,
    :math:`x_i^{k+1} = \sum_j w_{ij} x_j^k - \gamma\, g_i(x_i^k)`: what the neighbours send is waited for only after
    that step. It bears somewhat smaller steps.

    With ``adaptive`` the period grows as the loss falls,
    :math:`H = \lceil (F_0/F)^{1/4} H_0 \rceil`; the loss travels with the global average, so that all ranks agree.

    Cost per rank and step: as many messages as the graph has neighbours, each of the bytes of the parameters (32 bits
    or more, or 16), and every H steps an all-reduce instead; a copy of the parameters in memory, one more for what is
    sent and one for each neighbour.

    Args:
        topology: Who gossips with whom: ``ring``, ``torus``, ``exponential``, ``one_peer_exponential``, ``hypercube``,
            ``complete``, or a graph with settings of its own such as ``FromGraph``.
        period: Optimizer steps from one global average to the next [H]; null for gossip alone. With ``adaptive``, where
            it starts [H₀].
        adaptive: Let the period grow as the loss falls.
        adaptive_warmup_steps: So many steps at first the period stays where it starts, and the losses at global
            averages make the reference [F₀]. A twentieth of all steps is a good choice.
        min_period: Lower bound of the adaptive period.
        max_period: Upper bound of the adaptive period.
        loss_smoothing: Weight of the past in the moving average of the losses of a rank, in [0, 1).
        order: ``adapt_then_combine`` steps, then mixes what came of it; ``overlap`` mixes what was before the step,
            during it.
        wire_dtype: Type in which neighbours send: ``full``, or ``bfloat16`` for half the bytes. Then ranks cannot come
            closer to each other by gossip than about 2⁻⁸ of the largest weight; the mean stays exact, and so do global
            averages.
        buffers: What becomes of floating-point buffers, such as the statistics of batch normalisation, at global
            averages: ``average`` them too, leave each rank its own (``local``), or take those of ``rank0``.
        optimizer_state: What becomes of each rank's optimizer state, such as momentum, at global averages: ``keep`` it,
            ``reset`` it, or ``average`` it too.
        initial_weights: ``broadcast`` those of rank 0, or only ``verify`` that all ranks have the same.
        sigterm_every_n_batches: How often all ranks agree whether to stop on SIGTERM. Lightning does before every
            batch, which keeps the ranks in lock-step; 0 for never.
        process_group_backend: As of ``DDPStrategy``; by default NCCL on GPUs and gloo elsewhere.
        timeout: How long a rank waits for the others before it gives up.
        start_method: How processes are started on one machine; ``popen`` for scripts, ``fork`` for notebooks.

    Raises:
        ValueError: If an argument is out of range, or at the start of a training, if the graph does not exist for so
            many ranks.

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
        order: Literal["adapt_then_combine", "overlap"] = "adapt_then_combine",
        wire_dtype: Literal["full", "bfloat16"] = "full",
        buffers: BufferPolicy = "average",
        optimizer_state: OptimizerStatePolicy = "keep",
        initial_weights: InitialWeights = "broadcast",
        sigterm_every_n_batches: int = 1,
        process_group_backend: str | None = None,
        timeout: timedelta = timedelta(minutes=30),
        start_method: StartMethod = "popen",
    ) -> None:
        super().__init__(
            buffers,
            optimizer_state,
            initial_weights,
            sigterm_every_n_batches,
            process_group_backend,
            timeout,
            start_method,
        )
        known = isinstance(topology, Topology) or topology in NAMED
        remedy = (
            f"Choose one of {', '.join(NAMED)}, or give a graph such as lightning_sgd.FromGraph."
        )
        expect(known, "topology", "a graph or the name of one", topology, remedy)
        self.topology = NAMED[topology]() if isinstance(topology, str) else topology
        valid = period is None or period >= 1
        expect(valid, "period", "at least 1", period, "null means never; 6 is the default.")
        remedy = "Give the period where it starts, such as 4."
        expect(not adaptive or period is not None, "period", "a number", period, remedy)
        remedy = "0 takes the last loss alone, 0.9 is the default."
        expect(0 <= loss_smoothing < 1, "loss_smoothing", "in [0, 1)", loss_smoothing, remedy)
        self.period, self.adaptive, self.loss_smoothing = period, adaptive, loss_smoothing
        self._warned = False
        self.in_background = order == "overlap"
        self.wire_dtype = torch.bfloat16 if wire_dtype == "bfloat16" else None
        self._bounds = (adaptive_warmup_steps, min_period, max_period)
        if adaptive:
            self._adaptive_period()
        self._forget()

    def describe(self) -> str:
        """When models are averaged, and who gossips in between."""
        start = "at first " if self.adaptive else ""
        often = "at the end" if self.period is None else f"{start}every {self.period} steps"
        beta = f", β = {self.mixing.beta:.3g}" if self.exchange is not None else ""
        when = " during the next step" if self.in_background else ""
        return f"averaged {often}, else mixed over {self.topology}{when}{beta}"

    def setup(self, trainer: Trainer) -> None:
        """Make the graph for the ranks that there are, or say why it does not exist."""
        self.mixing = self.topology.on(self.world_size)
        super().setup(trainer)
        self._forget()
        if self.exchange is None:
            return
        for replica in self.replicas:
            self._mixers.append(Mixer(self.exchange, self.mixing, replica, self.wire_dtype))
            self._losses.append(Smoothed(self.loss_smoothing))
            if self.adaptive:
                self._periods.append(self._adaptive_period())
                replica.passengers = [replica.flat.buffers[0].new_zeros(1)]

    def after_step(self, replica: Replica) -> None:
        """Average if it is time to, else gossip."""
        if not self._mixers:
            return
        if self.adaptive and replica.loss is not None:
            self._losses[replica.index].update(replica.loss)
        mixer = self._mixers[replica.index]
        if self._is_due(replica, replica.num_since):
            self._average(replica)
        else:
            if not self.in_background:
                mixer.start()
            mixer.finish()
        # What is shared need not be mixed, and what is averaged after the next step need not be mixed before.
        apart = not replica.is_shared and not self._is_due(replica, replica.num_since + 1)
        if self.in_background and apart:
            mixer.start()

    def _is_due(self, replica: Replica, num_since: int) -> bool:
        period = self._periods[replica.index].value if self.adaptive else self.period
        return period is not None and num_since >= period

    def _average(self, replica: Replica) -> None:
        for passenger in replica.passengers:
            passenger.copy_(self._losses[replica.index].value)
        moved = self.average(replica, measure=True)
        assert moved is not None
        self._moved[replica.index] = moved
        for passenger in replica.passengers:
            self._adapt(replica, float(passenger))

    def _adapt(self, replica: Replica, loss: float) -> None:
        if replica.loss is None and not self._warned:
            self._warned = True
            warn_no_effect(
                "adaptive=True needs the losses, which manual optimization does not return; the period stays. "
                "Give a closure that returns the loss to `step`."
            )
        self._periods[replica.index].update(replica.num_steps, loss)

    def on_train_end(self) -> None:
        """Wait for what is in flight: a rank that leaves before would hang up on its neighbours."""
        for mixer in self._mixers:
            mixer.finish()
        super().on_train_end()

    def own_metrics(self) -> dict[str, float]:
        """How far this rank was from the mean at the last global average, and the adaptive period."""
        metrics = {}
        if self._moved:
            metrics["gossip/consensus_distance"] = math.hypot(*map(float, self._moved.values()))
        if self.adaptive:
            metrics["gossip/period"] = float(self._periods[0].value)
        return metrics

    def own_state(self) -> dict[str, Any]:
        """Rounds, adaptive periods and losses; what is in flight is waited for, and kept."""
        if not self._has_failed:
            for mixer in self._mixers:
                mixer.arrive()
        return {
            "mixers": [mixer.state_dict() for mixer in self._mixers],
            "periods": [period.state_dict() for period in self._periods],
            "losses": [loss.value for loss in self._losses],
        }

    def load_own_state(self, state: dict[str, Any]) -> None:
        """Go on with rounds, periods and losses."""
        for mixer, saved in zip(self._mixers, state["mixers"], strict=True):
            mixer.load_state_dict(saved)
        for period, saved in zip(self._periods, state["periods"], strict=True):
            period.load_state_dict(saved)
        for loss, value in zip(self._losses, state["losses"], strict=True):
            loss.value = value

    def _adaptive_period(self) -> AdaptivePeriod:
        assert self.period is not None
        return AdaptivePeriod(self.period, *self._bounds)

    def _forget(self) -> None:
        self._mixers: list[Mixer] = []
        self._losses: list[Smoothed] = []
        self._periods: list[AdaptivePeriod] = []
        self._moved: dict[int, Tensor] = {}


class Mixer:
    """Mixes one replica; in the background if the training goes on between :meth:`start` and :meth:`finish`.

    Args:
        exchange: Between the ranks.
        mixing: Who sends what to whom.
        replica: What one optimizer trains.
        wire_dtype: Type in which numbers are sent; ``None`` for that in which they are added.

    Attributes:
        num_rounds: Rounds so far, which a graph that changes goes by.
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
        self._swap: Swap | None = None
        self._weights: list[float] = []
        self._outgoing: list[Tensor] = []
        self._incoming: list[list[Tensor]] = []
        self._change: list[Tensor] | None = None

    def start(self) -> None:
        """Send the parameters as they are now to the neighbours of this round."""
        rank, number = self.exchange.rank, self.num_rounds
        self._flat = self.replica.flat
        self._flat.pack()
        self._outgoing = self._copied(self._flat.buffers)
        receive = self.mixing.receive(rank, number)
        self._weights = list(receive.values())
        self._swap = self.exchange.start_swap(
            self._outgoing,
            self.mixing.send(rank, number),
            dict(zip(receive, self._places(len(receive)), strict=True)),
            self.replica.num_steps,
        )
        self.num_rounds += 1

    def arrive(self) -> None:
        """Wait for the round that is in flight; the parameters stay as they are."""
        if self._swap is None or self._flat is None:
            return
        self.exchange.finish_swap(self._swap)
        received = list(self._swap.receive.values())
        self._swap = None
        self._change = [
            weighted_differences(sent, [each[i] for each in received], self._weights, buffer.dtype)
            for i, (sent, buffer) in enumerate(zip(self._outgoing, self._flat.buffers, strict=True))
        ]

    def finish(self) -> None:
        """Wait for the round that is in flight, if one is, and add what it changes to the parameters."""
        self.arrive()
        if self._change is None or self._flat is None:
            return
        self._flat.pack()
        for buffer, change in zip(self._flat.buffers, self._change, strict=True):
            buffer.add_(change)
        self._flat.unpack()
        self._change = None

    def state_dict(self) -> dict[str, Any]:
        """Number of rounds, and what a round that has arrived is going to change."""
        return {"num_rounds": self.num_rounds, "change": self._change}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from :meth:`state_dict`.

        Args:
            state: What it returned.
        """
        self.num_rounds, self._flat = state["num_rounds"], self.replica.flat
        if state["change"] is not None:
            pairs = zip(state["change"], self._flat.buffers, strict=True)
            self._change = [change.to(buffer.device) for change, buffer in pairs]

    def _copied(self, buffers: Sequence[Tensor]) -> list[Tensor]:
        """A copy of our own, because a global average may go on in the buffers meanwhile."""
        if not _fit(self._outgoing, buffers):
            self._outgoing = self._like(buffers)
        for outgoing, buffer in zip(self._outgoing, buffers, strict=True):
            outgoing.copy_(buffer)
        return self._outgoing

    def _places(self, num_peers: int) -> list[list[Tensor]]:
        self._incoming = [each for each in self._incoming if _fit(each, self._outgoing)]
        while len(self._incoming) < num_peers:
            self._incoming.append(self._like(self._outgoing))
        return self._incoming[:num_peers]

    def _like(self, buffers: Sequence[Tensor]) -> list[Tensor]:
        return [
            torch.empty_like(buffer, dtype=self.wire_dtype or buffer.dtype) for buffer in buffers
        ]


def _fit(buffers: Sequence[Tensor], others: Sequence[Tensor]) -> bool:
    shapes = [(tensor.shape, tensor.device) for tensor in buffers]
    return shapes == [(tensor.shape, tensor.device) for tensor in others]
