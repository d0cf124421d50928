"""Cost of communication: bytes and messages that a rank sends, and the time for which it waits."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(slots=True)
class Traffic:
    """Counts of the communication of one rank.

    Attributes:
        num_bytes: Bytes that this rank sent; it received as many.
        num_messages: Messages that this rank sent to others; NaN, like the other counts, if unknown.
        seconds: Time for which this rank waited for communication.
        num_steps: Number of batches that stepped meanwhile.
    """

    num_bytes: float = 0.0
    num_messages: float = 0
    seconds: float = 0.0
    num_steps: int = 0

    def __sub__(self, other: Traffic) -> Traffic:
        return Traffic(
            self.num_bytes - other.num_bytes,
            self.num_messages - other.num_messages,
            self.seconds - other.seconds,
            self.num_steps - other.num_steps,
        )

    def __add__(self, other: Traffic) -> Traffic:
        return Traffic(
            self.num_bytes + other.num_bytes,
            self.num_messages + other.num_messages,
            self.seconds + other.seconds,
            self.num_steps + other.num_steps,
        )

    def per_step(self) -> dict[str, float]:
        """Return means over the steps, by name of the metric.

        Example:
            >>> Traffic(num_bytes=4000.0, num_messages=4, seconds=0.5, num_steps=2).per_step()
            {'bytes_per_step': 2000.0, 'messages_per_step': 2.0, 'blocked_seconds_per_step': 0.25}
        """
        steps = max(self.num_steps, 1)
        return {
            "bytes_per_step": self.num_bytes / steps,
            "messages_per_step": self.num_messages / steps,
            "blocked_seconds_per_step": self.seconds / steps,
        }


def all_reduce_traffic(num_bytes: int, num_ranks: int) -> tuple[float, int]:
    """Return bytes and messages that each rank sends in a ring all-reduce, as gloo and NCCL implement it.

    Args:
        num_bytes: Size of the tensor.
        num_ranks: Number of ranks [n]; each sends 2(n − 1) messages of an n-th of the tensor.

    Example:
        >>> all_reduce_traffic(4000, 4)
        (6000.0, 6)
    """
    num_messages = 2 * (num_ranks - 1)
    return num_messages * num_bytes / num_ranks, num_messages


def send_traffic(num_bytes: int, num_receivers: int) -> tuple[float, int]:
    """Return bytes and messages of a rank that sends a tensor to some others.

    Args:
        num_bytes: Size of the tensor.
        num_receivers: Number of ranks that receive the whole tensor.

    Example:
        >>> send_traffic(4000, 2)
        (8000.0, 2)
    """
    return float(num_bytes * num_receivers), num_receivers


def broadcast_traffic(num_bytes: int, num_ranks: int) -> tuple[float, int]:
    """Return bytes and messages per rank, on average, of a broadcast along a tree; messages are rounded up.

    Args:
        num_bytes: Size of the tensor.
        num_ranks: Number of ranks [n]; n − 1 of them receive the tensor once.

    Example:
        >>> broadcast_traffic(4000, 4)
        (3000.0, 1)
    """
    return (num_ranks - 1) * num_bytes / num_ranks, int(num_ranks > 1)


def blocked_share(traffic: Traffic, seconds: float) -> float:
    """Return the part of the time in which a rank waited.

    Args:
        traffic: What it waited.
        seconds: The time.

    Example:
        >>> blocked_share(Traffic(seconds=0.5), 2.0)
        0.25
    """
    # Times zero, so that an unknown time, which is NaN, stays unknown.
    return traffic.seconds / seconds if seconds > 0 else 0.0 * traffic.seconds
