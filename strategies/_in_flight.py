"""Exchanges that have been started and not yet waited for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch.distributed as dist
from torch import Tensor


@dataclass(eq=False)
class Swap:
    """Messages to and from neighbours.

    Attributes:
        receive: Buffers by the rank that they come from.
        step: Optimizer steps when it was started.
        works: One for each message.
    """

    receive: Mapping[int, Sequence[Tensor]]
    step: int
    works: list[dist.Work] = field(default_factory=list)

    def wait(self) -> None:
        """Wait for all messages."""
        # What has failed must not be held on to: it holds on to the connections.
        works, self.works = self.works, []
        for work in works:
            work.wait()


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
    operations = [
        dist.P2POp(dist.irecv, buffer, peer, group, tag)
        for peer, buffers in receive.items()
        for tag, buffer in enumerate(buffers)
    ]
    operations += [
        dist.P2POp(dist.isend, buffer, peer, group, tag)
        for peer in send
        for tag, buffer in enumerate(outgoing)
    ]
    works: list[dist.Work] = dist.batch_isend_irecv(operations) if operations else []
    return works
