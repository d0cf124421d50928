"""The network lab: what it would run, what it reads, when it refuses, and, where that is allowed, the real thing."""

from __future__ import annotations

import importlib
import json
import math
import os
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from lightning.pytorch.strategies import Strategy

NETWORK, COUNTERS, LAUNCH, REPORT, STRATEGIES, LOSSES, MODEL, SIMULATION = (
    f"benchmarks.netlab.{name}"
    for name in (
        *("network", "counters", "launch", "report"),
        *("strategies", "losses", "model", "simulation"),
    )
)


@pytest.fixture(autouse=True)
def _path(monkeypatch, root):
    monkeypatch.syspath_prepend(str(root))


@pytest.fixture
def network():
    return importlib.import_module(NETWORK)


def row(**values):
    usual = {"rate": "200mbit", "straggles": False, "label": "DDP", "ms": 100.0, "compute_ms": 50.0}
    rest = {"counted_blocked_ms": math.nan, "counted_mb": 1.5, "interface_mb": 1.6}
    rest["curve"] = [(4, 1.0, 3.0), (8, 2.0, 2.0)]
    return {**usual, **rest, **values}


def test_the_network_is_built_from_these_commands(network):
    # All of it in namespaces: a command without one would touch the machine's own network.
    lab = network.Network("lab", 2)
    lines = [" ".join(command) for command in lab.commands()]
    assert lines[:3] == [
        "ip netns add lab-switch",
        "ip -n lab-switch link add bridge type bridge",
        "ip -n lab-switch link set bridge up",
    ]
    assert lines[9:] == [
        "ip netns add lab-1",
        "ip -n lab-switch link add port1 type veth peer name eth0 netns lab-1",
        "ip -n lab-switch link set port1 master bridge up",
        "ip -n lab-1 address add 10.77.0.2/24 dev eth0",
        "ip -n lab-1 link set lo up",
        "ip -n lab-1 link set eth0 up gso_max_size 32768",
    ]
    assert all(line.startswith(("ip netns add", "ip -n lab-")) for line in lines)


def test_every_host_is_limited(network):
    lab = network.Network("lab", 2)
    assert [" ".join(command) for command in lab.limits("200mbit")] == [
        f"tc -n lab-{i} qdisc replace dev eth0 root tbf rate 200mbit burst 64kb latency 200ms"
        for i in (0, 1)
    ]
    assert lab.limits(None) == []
    # What is larger than the bucket, tbf cuts into single packets, and the table would show what these cost.
    assert network.SEGMENT < 65536


def test_every_host_runs_a_node_of_torchrun(network):
    launch = importlib.import_module(LAUNCH)
    command = launch.node_command(network.Network("lab", 4), 2, ["--num-hosts", "4"])
    assert command[:4] == ["ip", "netns", "exec", "lab-2"]
    for part in (
        "GLOO_SOCKET_IFNAME=eth0",
        "torch.distributed.run",
        "--nnodes=4",
        "--node-rank=2",
        "--nproc-per-node=1",
        "--master-addr=10.77.0.1",
        "benchmarks.netlab.worker",
    ):
        assert part in command


def test_counters_are_read():
    counters = importlib.import_module(COUNTERS)
    text = (
        "Inter-|   Receive                                                |  Transmit\n"
        " face |bytes    packets errs drop fifo frame compressed multicast|bytes    packets errs drop fifo\n"
        "    lo:     100       2    0    0    0     0          0         0      100       2    0    0    0\n"
        "  eth0: 5000000    4000    0    0    0     0          0         0  1066000    1000    0    0    0\n"
    )
    sent = counters.parse(text, "eth0")
    assert (sent.num_bytes, sent.num_packets, sent.payload) == (1066000, 1000, 1000000)
    assert sent - counters.parse(text, "lo") == counters.Sent(1065900, 998)
    with pytest.raises(ValueError, match="`interface` to be one of this host, got 'eth7'"):
        counters.parse(text, "eth7")


@pytest.mark.parametrize(
    ("setting", "value", "said"),
    [
        ("sys.platform", "darwin", "needs Linux, this is darwin"),
        ("shutil.which", lambda tool: None, "needs ip and tc, which come with iproute2"),
        ("os.geteuid", lambda: 1000, "needs root .*: `sudo make netlab`"),
    ],
)
def test_what_is_missing_is_said_in_a_sentence(network, monkeypatch, setting, value, said):
    monkeypatch.setattr("sys.platform", "linux")
    monkeypatch.setattr("shutil.which", lambda tool: tool)
    monkeypatch.setattr("os.geteuid", lambda: 0)
    monkeypatch.setattr(setting, value)
    reason = network.why_not()
    assert re.search(said, reason)
    assert "\n" not in reason


def test_a_kernel_that_refuses_is_quoted(network, monkeypatch):
    def refuse(command, **_):
        if command[:3] == ["ip", "netns", "list"]:
            return subprocess.CompletedProcess(command, 0, "", "")
        raise subprocess.CalledProcessError(1, command, stderr="Operation not permitted\n")

    monkeypatch.setattr("sys.platform", "linux")
    monkeypatch.setattr("shutil.which", lambda tool: tool)
    monkeypatch.setattr("os.geteuid", lambda: 0)
    monkeypatch.setattr(subprocess, "run", refuse)
    assert "'Operation not permitted': in a container" in network.why_not()


def test_the_table_shows_ratios_and_what_is_not_known():
    report = importlib.import_module(REPORT)
    ours = row(label="Local SGD, H = 4", ms=62.5, counted_blocked_ms=8.25, counted_mb=0.375)
    ours["curve"] = [
        (4, 0.75, 3.0),
        (8, 1.5, 2.08),
    ]  # within 5 % of where DDP ends, and half a second earlier
    lines = report.table([row(), ours]).splitlines()
    ddp = "| 200mbit | no | DDP | 100 | 1.00 | 50.0 | – | 1.500 | 1.600 | 2.000 | 2.500 | 2.0 |"
    assert lines[2] == ddp
    assert (
        "| Local SGD, H = 4 | 62 | 1.60 | 12.5 | 8.2 | 0.375 | 1.600 | 2.080 | 2.080 | 1.5 |"
        in lines[3]
    )


def test_counts_that_the_interface_contradicts_are_named():
    report = importlib.import_module(REPORT)
    good = row(label="good", counted_blocked_ms=1.0, interface_mb=1.57)
    bad = row(label="bad", counted_blocked_ms=1.0, interface_mb=1.58)
    (line,) = report.disagreements([row(interface_mb=9.0), good, bad])
    assert line == "bad at 200mbit: the interface says 1.053 of what is counted"


def test_every_line_makes_a_strategy():
    strategies = importlib.import_module(STRATEGIES)
    made = {label: make() for label, make in strategies.LINES.items()}
    assert all(isinstance(strategy, Strategy) for strategy in made.values())
    assert strategies.LINES.keys() >= set(strategies.QUICK)


def sandbox():
    """The module, where namespaces can be made."""
    network = importlib.import_module(NETWORK)
    reason = network.why_not()
    if reason:
        pytest.skip(reason)
    return network


@pytest.mark.timeout(30)
def test_real_links_are_as_slow_as_asked_for_and_nothing_stays_behind():
    network = sandbox()
    lab = network.Network(f"sgdtest{os.getpid()}", 2)
    receive = (
        "import socket; s = socket.create_server(('10.77.0.1', 5000)); print('ready', flush=True); c, _ = s.accept()\n"
        "while c.recv(1 << 16): pass\n"
    )
    send = (
        "import socket, time; c = socket.create_connection(('10.77.0.1', 5000)); t = time.monotonic()\n"
        "c.sendall(bytes(1_000_000)); c.shutdown(1); c.recv(1); print(time.monotonic() - t)"
    )
    with network.running(lab, "20mbit"):
        assert set(lab.namespaces) <= set(network.existing())
        server = subprocess.Popen(
            network.inside(lab.hosts[0], [sys.executable, "-c", receive]),
            stdout=subprocess.PIPE,
            text=True,
        )
        assert server.stdout.readline() == "ready\n"
        client = subprocess.run(
            network.inside(lab.hosts[1], [sys.executable, "-c", send]),
            capture_output=True,
            text=True,
            check=True,
        )
        server.stdout.close()
        assert server.wait(5) == 0
    # A megabyte less the burst at 2.5 MB/s is 0.37 s; on an unlimited link it takes a hundredth of that.
    assert 0.3 < float(client.stdout) < 2.0
    assert not set(lab.namespaces) & set(network.existing())


@pytest.mark.timeout(60)
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_lab_cleans_up(root, number):
    network = sandbox()
    lab = subprocess.Popen(
        [sys.executable, "-m", "benchmarks.netlab", "--quick"],
        cwd=root,
        env={**os.environ, "PYTHONPATH": str(root)},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    mine = network.Network(f"sgdlab{lab.pid}", 2)
    end = time.monotonic() + 30
    try:
        while not all(
            name in network.existing() and network.processes(name) for name in mine.hosts
        ):
            assert time.monotonic() < end, "the lab was never there"
            time.sleep(0.1)
        started = [pid for name in mine.hosts for pid in network.processes(name)]
        lab.send_signal(number)
        assert lab.wait(20) != 0
    finally:
        lab.kill()
        lab.wait()
        network.remove(mine)
    assert not set(mine.namespaces) & set(network.existing())
    assert not [pid for pid in started if Path(f"/proc/{pid}").exists()]


def test_losses_are_those_of_the_mean_of_the_models():
    launch, training = (
        importlib.import_module(f"benchmarks.netlab.{name}") for name in ("launch", "training")
    )
    weights = torch.nn.utils.parameters_to_vector(training.Net(False).parameters()).detach()
    zeros = torch.zeros_like(weights)
    # The mean of w and -w is zero, which says of ten classes that each is as likely: the loss is log 10.
    ranks = [{4: (1.0, weights), 8: (3.0, zeros)}, {4: (2.0, -weights), 8: (4.0, zeros)}]
    assert launch.curve(ranks) == [
        (4, 1.5, pytest.approx(math.log(10))),
        (8, 3.5, pytest.approx(math.log(10))),
    ]


def test_goals_are_told_with_what_was_found():
    losses = importlib.import_module(LOSSES)
    rows = [
        row(label="no exchange", ms=55.0),
        row(ms=130.0),
        row(label="Local SGD, H = 1", counted_blocked_ms=70.0),
        row(label="gossip, one peer", counted_blocked_ms=45.5),
        row(label="Gossip-PGA, H = 8", curve=[(4, 0.75, 3.0), (8, 1.5, 2.08)]),
        row(label="Overlap Local-SGD, H = 2", ms=57.75, counted_blocked_ms=0.5),
    ]
    (line,) = losses.goals(rows)
    for part in (
        "takes 0.65 of an all-reduce",
        "waits 1.0%",
        "takes 1.05 of one without",
        "ends at 1.040",
    ):
        assert part in line
    assert "after 1.5 s, DDP after 2.0 s" in line
    assert losses.goals(rows[:-1]) == []


def test_the_model_finds_what_the_times_were_made_of():
    model = importlib.import_module(MODEL)
    true = model.LinkModel(latency=4e-4, efficiency=0.9, handling=2e-9)
    rows = [
        row(
            rate=rate,
            label=label,
            counted_messages=messages,
            counted_mb=mb,
            counted_blocked_ms=1e3 * true.seconds(messages, 1e6 * mb, model.SPEEDS[rate]),
        )
        for rate in model.SPEEDS
        for label, messages, mb in (("Local SGD, H = 1", 6, 1.6), ("gossip, one peer", 1, 1.068))
    ]
    found = model.fit(
        [*rows, row(straggles=True, label="Local SGD, H = 1", counted_blocked_ms=9e9)]
    )
    for name in ("latency", "efficiency", "handling"):
        assert getattr(found, name) == pytest.approx(getattr(true, name), rel=1e-6)


def test_an_exchange_with_everybody_is_a_ring():
    model = importlib.import_module(MODEL)
    costs = model.LinkModel(0.001, 0.5, 0.0).costs(4, 1e6, 8e6)
    # Six messages of a quarter each at half a megabyte a second; and one message of all of it.
    assert costs.all_reduce == pytest.approx(6 * 0.001 + 1.5 / 0.5)
    assert costs.swap == pytest.approx(0.001 + 1 / 0.5)


def test_clocks_wait_for_whom_they_meet():
    simulation = importlib.import_module(SIMULATION)
    costs = simulation.Costs(all_reduce=1.0, swap=0.5)
    times = np.array([[1.0, 1.0], [1.0, 4.0], [2.0, 1.0], [1.0, 1.0]])

    def took(kind, period):
        return simulation.mean_step(simulation.Pattern(kind, period), times, costs, 0)

    assert took("none", 1) == 12 / 4 / 2
    assert took("all", 1) == (2 + 1 + 4 + 1) / 2
    assert took("all", 2) == (5 + 1) / 2
    # Step 1, from the rank before: done after 1.5, 1.5, 2.5, 2.5. Computed after 2.5, 5.5, 3.5, 3.5; step 2, from the
    # rank before that one: done after 4, 6, 4, 6.
    assert took("peer", math.inf) == (4 + 6 + 4 + 6) / 4 / 2
    # What began after step 1, when the last was there after 2, arrives after 3: one waits to 3 for it, one not at all.
    assert took("late", 1) == (3 + 5 + 3 + 3) / 4 / 2


def test_the_lab_and_the_model_draw_the_same_slow_steps():
    simulation, training = (
        importlib.import_module(SIMULATION),
        importlib.import_module(f"{NETWORK[:-7]}training"),
    )
    draws = random.Random(3)
    drawn = [draws.random() < training.SLOW_STEPS for _ in range(20)]
    assert simulation.slow_steps(4, 20)[3].tolist() == drawn


def test_what_is_written_can_be_read_again(tmp_path):
    report = importlib.import_module(REPORT)
    rows = [row(), row(label="Local SGD, H = 4", counted_blocked_ms=8.25)]
    report.write(rows, "How it was made.", {"num_hosts": 4}, tmp_path)
    read = json.loads((tmp_path / "netlab.json").read_text())
    assert (read["note"], read["num_hosts"], len(read["rows"])) == ("How it was made.", 4, 2)
    assert read["rows"][0]["counted_blocked_ms"] is None  # JSON knows no NaN
    assert read["rows"][1]["counted_blocked_ms"] == 8.25
    assert (tmp_path / "netlab.md").read_text().endswith("How it was made.\n")
