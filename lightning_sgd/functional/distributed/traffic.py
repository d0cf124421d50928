"""What an exchange costs: bytes and messages that a rank sends, and the time it stands still."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(slots=True)
class Traffic:
    """What one rank has sent and waited, in so many optimizer steps.

    Attributes:
        num_bytes: Sent by this rank; received are as many.
        num_messages: Sent by this rank to another; NaN, like the others, where that is not known.
        seconds: Time in which this rank waited for an exchange.
        num_steps: Optimizer steps in which all this happened.
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
        """Means over the steps, by metric key.

        Example:
            >>> Traffic(num_bytes=4000.0, num_messages=4, seconds=0.5, num_steps=2).per_step()
            {'comm/bytes_per_step': 2000.0, 'comm/messages_per_step': 2.0, 'comm/blocked_seconds_per_step': 0.25}
        """
        steps = max(self.num_steps, 1)
        return {
            "comm/bytes_per_step": self.num_bytes / steps,
            "comm/messages_per_step": self.num_messages / steps,
            "comm/blocked_seconds_per_step": self.seconds / steps,
        }


def all_reduce_traffic(num_bytes: int, num_ranks: int) -> tuple[float, int]:
    """Bytes and messages that each rank sends in a ring all-reduce, which gloo and NCCL use.

    Args:
        num_bytes: Size of the tensor.
        num_ranks: Number of ranks [n]; each sends 2(n − 1) parts of an n-th.

    Example:
        >>> all_reduce_traffic(4000, 4)
        (6000.0, 6)
    """
    num_messages = 2 * (num_ranks - 1)
    return num_messages * num_bytes / num_ranks, num_messages


def send_traffic(num_bytes: int, num_receivers: int) -> tuple[float, int]:
    """Bytes and messages of a rank that sends to some others.

    Args:
        num_bytes: Size of the tensor.
        num_receivers: Number of ranks that get all of it.

    Example:
        >>> send_traffic(4000, 2)
        (8000.0, 2)
    """
    return float(num_bytes * num_receivers), num_receivers


def broadcast_traffic(num_bytes: int, num_ranks: int) -> tuple[float, int]:
    """Bytes and messages that a rank sends in a broadcast along a tree, the mean over the ranks rounded up.

    Args:
        num_bytes: Size of the tensor.
        num_ranks: Number of ranks [n]; n − 1 of them get it, each once.

    Example:
        >>> broadcast_traffic(4000, 4)
        (3000.0, 1)
    """
    return (num_ranks - 1) * num_bytes / num_ranks, int(num_ranks > 1)


def blocked_share(traffic: Traffic, seconds: float) -> float:
    """Part of the time in which a rank waited.

    Args:
        traffic: What it waited.
        seconds: The time.

    Example:
        >>> blocked_share(Traffic(seconds=0.5), 2.0)
        0.25
    """
    return traffic.seconds / seconds if seconds > 0 else 0.0 * traffic.seconds
