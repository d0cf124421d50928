"""Communication that has been started and not been waited for yet."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch.distributed as dist
from torch import Tensor

from lightning_sgd.functional.distributed.flat_buffers import FlatBuffers


@dataclass(eq=False, kw_only=True)
class InFlight:
    """Asynchronous operations that belong together.

    Attributes:
        step: Optimizer steps when they were started.
        works: Handles to wait for.
    """

    step: int
    works: list[dist.Work] = field(default_factory=list)

    def wait(self) -> None:
        """Wait until all operations have finished."""
        # The list is emptied first: a failed operation that stays referenced keeps its connections open.
        works, self.works = self.works, []
        for work in works:
            work.wait()


@dataclass(eq=False, kw_only=True)
class PendingSendRecv(InFlight):
    """Messages to and from neighbours; ``receive`` holds the buffers by source rank."""

    receive: Mapping[int, Sequence[Tensor]]


@dataclass(eq=False, kw_only=True)
class PendingMean(InFlight):
    """A mean over all ranks in ``flat``, which must not be touched meanwhile."""

    flat: FlatBuffers


def start_messages(
    send: Mapping[int, Sequence[Tensor]],
    receive: Mapping[int, Sequence[Tensor]],
    group: dist.ProcessGroup,
    first_tag: int = 0,
) -> list[dist.Work]:
    """Start all receives, then all sends.

    Args:
        send: Buffers by destination rank.
        receive: Buffers by source rank.
        group: Process group of all ranks.
        first_tag: Tag of the first message of each pair; gloo matches messages by tag.
    """
    # Receives first: gloo tells the sender that a receiver is ready, and that notice would queue behind the
    # receiver's own sends. The two directions would then take turns.
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
