"""Exchanges that have been started and not yet waited for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch.distributed as dist
from torch import Tensor

from lightning_sgd.functional.distributed.flat_buffers import FlatBuffers


@dataclass(eq=False, kw_only=True)
class InFlight:
    """What has been started.

    Attributes:
        step: Optimizer steps when it was started.
        works: What to wait for.
    """

    step: int
    works: list[dist.Work] = field(default_factory=list)

    def wait(self) -> None:
        """Wait for all of it."""
        # What has failed must not be held on to: it holds on to the connections.
        works, self.works = self.works, []
        for work in works:
            work.wait()


@dataclass(eq=False, kw_only=True)
class Swap(InFlight):
    """Messages to and from neighbours.

    Attributes:
        receive: Buffers by the rank that they come from.
    """

    receive: Mapping[int, Sequence[Tensor]]


@dataclass(eq=False, kw_only=True)
class PendingMean(InFlight):
    """A mean over all ranks.

    Attributes:
        flat: What becomes of it; nobody touches it meanwhile.
    """

    flat: FlatBuffers


def start_messages(
    outgoing: Sequence[Tensor],
    send: Sequence[int],
    receive: Mapping[int, Sequence[Tensor]],
    group: dist.ProcessGroup,
) -> list[dist.Work]:
    """Post all receives, then all sends.

    In this order, because the word of gloo that a receiver is ready would wait behind what it sends itself, and the
    exchange would go one way at a time.

    Args:
        outgoing: Buffers.
        send: To whom.
        receive: From whom, and where to.
        group: Of all ranks.
    """
    return start_letters(dict.fromkeys(send, outgoing), receive, group)


def start_letters(
    send: Mapping[int, Sequence[Tensor]],
    receive: Mapping[int, Sequence[Tensor]],
    group: dist.ProcessGroup,
    first_tag: int = 0,
) -> list[dist.Work]:
    """The same with other buffers for every receiver.

    Args:
        send: To whom, and what.
        receive: From whom, and where to.
        group: Of all ranks.
        first_tag: Number of the first message; gloo keeps those of different numbers apart.
    """
    operations = [
        dist.P2POp(dist.irecv, buffer, peer, group, tag)
        for peer, buffers in receive.items()
        for tag, buffer in enumerate(buffers, first_tag)
    ]
    operations += [
        dist.P2POp(dist.isend, buffer, peer, group, tag)
        for peer, buffers in send.items()
        for tag, buffer in enumerate(buffers, first_tag)
    ]
    works: list[dist.Work] = dist.batch_isend_irecv(operations) if operations else []
    return works
