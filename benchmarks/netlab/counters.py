"""The kernel's counters of what a network interface has sent."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

HEADERS = 66
"""Bytes of a packet that are not payload: Ethernet 14, IPv4 20, TCP with timestamps 32."""


@dataclass(frozen=True)
class Sent:
    """Counters since the interface came up.

    Attributes:
        num_bytes: With all headers.
        num_packets: As the interface sees them; the kernel may hand over several segments at once.
    """

    num_bytes: int
    num_packets: int

    def __sub__(self, other: Sent) -> Sent:
        return Sent(self.num_bytes - other.num_bytes, self.num_packets - other.num_packets)

    @property
    def payload(self) -> int:
        """Bytes without headers; pure acknowledgements have none."""
        return self.num_bytes - HEADERS * self.num_packets


def parse(text: str, interface: str) -> Sent:
    """Read the format of ``/proc/net/dev``.

    Args:
        text: Of the file.
        interface: Name of the interface.

    Raises:
        ValueError: If it is not there.
    """
    for line in text.splitlines():
        name, _, numbers = line.partition(":")
        if name.strip() == interface:
            fields = [int(number) for number in numbers.split()]
            return Sent(fields[8], fields[9])
    raise ValueError(f"Expected `interface` to be one of this host, got {interface!r}.")


def read(interface: str) -> Sent:
    """Read what this process's network namespace has sent over the interface."""
    return parse(Path("/proc/self/net/dev").read_text(), interface)
