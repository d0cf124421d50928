"""Compare strategies on hosts with slow links: network namespaces on one Linux machine, one torchrun node in each.

sudo python -m benchmarks.netlab
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
import tempfile
from pathlib import Path
from typing import Any, NoReturn

from . import launch, report
from .losses import NEAR, goals
from .network import Network, running, why_not
from .strategies import LINES, QUICK
from .training import BATCH_SIZE, COMPUTE, SNAPSHOT_EVERY, Net

UNSHAPED = "unshaped"


def main() -> None:
    """Run the lab, and write the table."""
    args = _arguments()
    reason = why_not()
    if reason:
        sys.exit(reason)
    signal.signal(signal.SIGTERM, _leave)  # so that what was built is removed
    rows: list[dict[str, Any]] = []
    for rate in args.rates:
        print(f"{args.hosts} hosts, {rate} ...", flush=True)
        rows += measure(rate, args)
        # What is done stays when the rest is broken off.
        report.write(rows, "\n\n".join([*goals(rows), note(args)]), facts(args), args.output)
    print(report.table(rows), *goals(rows), sep="\n")
    wrong = report.disagreements(rows)
    print(f"Written to {args.output}/netlab.md, .json and .svg.")
    if wrong:
        sys.exit("The lab disagrees with the counters:\n" + "\n".join(wrong))


def measure(rate: str, args: argparse.Namespace) -> list[dict[str, Any]]:
    """Run all trainings on links of one rate."""
    network = Network(f"sgdlab{os.getpid()}", args.hosts)
    options = [
        *("--labels", *args.strategies, "--stragglers", *map(str, args.stragglers)),
        *("--num-hosts", str(args.hosts), "--num-steps", str(args.warm_up + args.steps)),
        *("--warm-up", str(args.warm_up)),
    ]
    shaped = None if rate == UNSHAPED else rate
    with tempfile.TemporaryDirectory() as folder, running(network, shaped):
        results = launch.run(network, options, Path(folder), args.time_limit)
    return [{"rate": rate, **result} for result in results]


def facts(args: argparse.Namespace) -> dict[str, Any]:
    """Return the settings that all trainings have in common."""
    return {
        "num_hosts": args.hosts,
        "steps": args.steps,
        "warm_up": args.warm_up,
        "compute": COMPUTE,
        "num_parameters": sum(param.numel() for param in Net(False).parameters()),
    }


def note(args: argparse.Namespace) -> str:
    """Describe how the table was made."""
    num_parameters = facts(args)["num_parameters"]
    return (
        f"{args.hosts} hosts, network namespaces on one machine with {os.cpu_count()} cores, gloo over virtual "
        f"Ethernet, sending limited by `tc tbf`; {num_parameters} parameters (float32), {BATCH_SIZE} digits per rank "
        f"and step, {args.steps} steps after {args.warm_up} of warm-up; computation simulated by "
        f"{1e3 * COMPUTE:.0f} ms of sleep, with a straggler one step in four takes four times as long, on every rank "
        "at random times of its own. Blocked: step time less a rank's own sleep, so also the real work on shared "
        "cores. The sleep comes before the forward pass: DDP has next to no backward pass to hide its exchange behind. "
        "Counted of DDP and of Lightning's post-local SGD: the gradients. The interface's bytes are those of "
        "the kernel without headers. One run: read ratios. Loss: of the mean of the models on all samples, every "
        f"{SNAPSHOT_EVERY} steps; equal time is when the first line of that link has all its samples; DDP's loss is "
        f"reached within {NEAR - 1:.0%} of where DDP ends. `no exchange`: every rank for itself, which is what "
        "computation takes on these cores."
    )


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="benchmarks.netlab", description=__doc__)
    parser.add_argument("--hosts", type=int, default=4)
    parser.add_argument("--rates", nargs="+", default=["100mbit", "200mbit", "1gbit", UNSHAPED])
    parser.add_argument("--strategies", nargs="+", default=list(LINES), choices=LINES)
    parser.add_argument("--stragglers", type=int, nargs="+", default=[0, 1], choices=[0, 1])
    parser.add_argument("--steps", type=int, default=80, help="a multiple of all periods")
    parser.add_argument("--warm-up", type=int, default=16, help="likewise")
    parser.add_argument("--time-limit", type=float, default=600.0, help="seconds for each rate")
    parser.add_argument("--output", type=Path, default=Path("docs/results"))
    parser.add_argument("--quick", action="store_true", help="a smoke run; writes to runs/netlab")
    args = parser.parse_args()
    if args.quick:
        args.hosts, args.rates, args.strategies = 2, ["200mbit"], list(QUICK)
        args.stragglers, args.steps, args.warm_up, args.time_limit = [0], 8, 4, 120.0
        args.output = Path("runs/netlab")
    return args


def _leave(*_: object) -> NoReturn:
    sys.exit("Ended by SIGTERM.")


if __name__ == "__main__":
    main()
