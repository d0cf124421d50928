"""Simulated hosts: network namespaces on one switch, with rate-limited links.

The switch is a bridge in a namespace of its own: nothing is added to the network of the machine itself, and deleting
the namespaces deletes everything.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass

Command = list[str]

INTERFACE = "eth0"
TOOLS = ("ip", "tc")
BURST = "64kb"
SEGMENT = 32768
"""Bytes that a sender passes on in one piece. `tbf` cuts what exceeds the bucket into packets of 1500 bytes, and waking
up the receiver for each of them takes ten times the work of the exchange itself."""


@dataclass(frozen=True)
class Network:
    """Names and addresses.

    Attributes:
        prefix: What the names of the namespaces begin with.
        num_hosts: Number of hosts.
    """

    prefix: str
    num_hosts: int

    @property
    def switch(self) -> str:
        """Name of the bridge's namespace."""
        return f"{self.prefix}-switch"

    @property
    def hosts(self) -> list[str]:
        """Names of the hosts' namespaces."""
        return [f"{self.prefix}-{index}" for index in range(self.num_hosts)]

    @property
    def namespaces(self) -> list[str]:
        """Names of all namespaces."""
        return [self.switch, *self.hosts]

    @staticmethod
    def address(index: int) -> str:
        """Return the address of a host in the subnet of the bridge."""
        return f"10.77.0.{index + 1}"

    def commands(self) -> list[Command]:
        """Return the commands that build the network, without limits."""
        made = [
            f"ip netns add {self.switch}",
            f"ip -n {self.switch} link add bridge type bridge",
            f"ip -n {self.switch} link set bridge up",
        ]
        for index, host in enumerate(self.hosts):
            port = f"port{index}"
            made += [
                f"ip netns add {host}",
                f"ip -n {self.switch} link add {port} type veth peer name {INTERFACE} netns {host}",
                f"ip -n {self.switch} link set {port} master bridge up",
                f"ip -n {host} address add {self.address(index)}/24 dev {INTERFACE}",
                f"ip -n {host} link set lo up",
                f"ip -n {host} link set {INTERFACE} up gso_max_size {SEGMENT}",
            ]
        return [line.split() for line in made]

    def limits(self, rate: str | None) -> list[Command]:
        """Return the commands that limit the rate of every host; none for ``None``."""
        if rate is None:
            return []
        shape = f"root tbf rate {rate} burst {BURST} latency 200ms"
        return [
            f"tc -n {host} qdisc replace dev {INTERFACE} {shape}".split() for host in self.hosts
        ]


def inside(host: str, command: Command) -> Command:
    """Return a command as it is run on a host."""
    return ["ip", "netns", "exec", host, *command]


def why_not() -> str | None:
    """Say what is missing for the lab and how to get it; ``None`` if it can be built."""
    if not sys.platform.startswith("linux"):
        return f"The network lab needs Linux, this is {sys.platform}: run it in a virtual machine."
    lacking = [tool for tool in TOOLS if shutil.which(tool) is None]
    if lacking:
        return (
            f"The network lab needs {' and '.join(lacking)}, which come with iproute2: "
            "`apt-get install iproute2` or the like."
        )
    if os.geteuid() != 0:
        return "The network lab needs root to make network namespaces: `sudo make netlab`."
    try:
        with running(Network(f"sgdtry{os.getpid()}", 1), "1gbit"):
            return None
    except subprocess.CalledProcessError as error:
        return (
            f"The network lab needs a kernel that lets it run `{' '.join(error.cmd)}`, which said "
            f"{error.stderr.strip()!r}: in a container, start it with --privileged or --cap-add=NET_ADMIN,SYS_ADMIN."
        )


@contextmanager
def running(network: Network, rate: str | None) -> Iterator[Network]:
    """Build the network, and remove it with everything that runs in it, whatever happens.

    Args:
        network: What to build.
        rate: How fast every host may send, as ``tc`` spells it.
    """
    try:
        for command in network.commands() + network.limits(rate):
            subprocess.run(command, check=True, capture_output=True, text=True)
        yield network
    finally:
        remove(network)


def remove(network: Network) -> None:
    """End what runs in the namespaces and delete them; a second Ctrl-C has to wait for that."""
    before = {sign: signal.signal(sign, signal.SIG_IGN) for sign in (signal.SIGINT, signal.SIGTERM)}
    try:
        there = set(existing()) & set(network.namespaces)
        for name in there:
            _end_processes(name)
            subprocess.run(["ip", "netns", "delete", name], check=False, capture_output=True)
    finally:
        for sign, handler in before.items():
            signal.signal(sign, handler)


def existing() -> list[str]:
    """List the named namespaces."""
    listed = subprocess.run(["ip", "netns", "list"], check=True, capture_output=True, text=True)
    return [line.split()[0] for line in listed.stdout.splitlines() if line]


def _end_processes(name: str, seconds: float = 3.0) -> None:
    end = time.monotonic() + seconds
    sign = signal.SIGTERM
    while pids := processes(name):
        for pid in pids:
            with suppress(ProcessLookupError):
                os.kill(pid, sign)
        time.sleep(0.1)
        if time.monotonic() > end:
            sign = signal.SIGKILL
        if time.monotonic() > end + seconds:
            return


def processes(name: str) -> list[int]:
    """List the processes in a namespace, all of which the lab has started."""
    found = subprocess.run(
        ["ip", "netns", "pids", name], check=False, capture_output=True, text=True
    )
    return [int(pid) for pid in found.stdout.split()]
