"""Time the ranks of a network's weights beside other ways to get them: one table from one run.

Every round times each candidate once, in random order, on the same random weights; ratios are taken within a round, so
that the drift of a shared machine cancels in their median.

    python benchmarks/rank.py
    python benchmarks/rank.py --quick --json rank.json

The row of the default cadence is what a user pays: the mean over the first 100 looks of ``RankMonitor`` with its
default settings, some of them full looks and the others cheap, by its own schedule and the median times of these two
rows. It assumes that an epoch, the default interval, takes as long as ``--epoch-seconds`` says. Where epochs are short,
looks are rarer, and full ones rarer still; longer ones make no difference.

WeightWatcher takes part where the package ``weightwatcher`` is installed. It computes something else for convolutions,
the spectra of their k × k slices, which are far smaller matrices than the C_out × (C_in·k²) of this package and of the
paper; of linear layers it computes the same.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import logging
import platform
import random
import statistics
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from operator import truediv
from pathlib import Path

import torch
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from torch import nn

from lightning_sgd import RankMonitor
from lightning_sgd.functional.spectra.spectral_stats import spectral_stats_of
from lightning_sgd.functional.spectra.weight_matrices import find_weight_matrices

BASELINE = "svdvals, layer by layer"
PEER = "WeightWatcher.analyze"
FULL, CHEAP, CADENCE = "ours, full look", "ours, cheap look", "ours, default cadence"


def resnet18() -> nn.Sequential:
    """The convolutions and the classifier of a ResNet-18."""
    layers: list[nn.Module] = [nn.Conv2d(3, 64, 7)]
    before = 64
    for width in (64, 128, 256, 512):
        layers += [nn.Conv2d(before, width, 3), *(nn.Conv2d(width, width, 3) for _ in range(3))]
        if width != before:
            layers.append(nn.Conv2d(before, width, 1))
        before = width
    return nn.Sequential(*layers, nn.Linear(512, 1000))


def gpt2_small() -> nn.Sequential:
    """The linear layers of the twelve blocks of GPT-2 small."""
    shapes = ((768, 2304), (768, 768), (768, 3072), (3072, 768))
    return nn.Sequential(*(nn.Linear(*shape) for _ in range(12) for shape in shapes))


NETWORKS = {"ResNet-18": resnet18, "GPT-2 small": gpt2_small}


def candidates(module: nn.Module) -> dict[str, Callable[[], object]]:
    """Every row of the table; a new one is one more entry here."""
    matrices = find_weight_matrices(module, min_side=1)

    by_default = RankMonitor().spectra, RankMonitor().norms

    def ours(**settings: object) -> Callable[[], object]:
        return lambda: spectral_stats_of((matrix.read() for matrix in matrices), **settings)

    found: dict[str, Callable[[], object]] = {
        BASELINE: lambda: [torch.linalg.svdvals(matrix.read()) for matrix in matrices],
        FULL: lambda: by_default[0].of(matrix.read() for matrix in matrices),
        CHEAP: lambda: by_default[1].of(matrix.read() for matrix in matrices),
        "ours, rank, stable rank": ours(measures=["rank", "stable_rank"]),
    }
    analyze = weightwatcher(module)
    return found if analyze is None else {**found, PEER: analyze}


def weightwatcher(module: nn.Module) -> Callable[[], object] | None:
    """Its ``analyze()`` with default settings, if the package is installed."""
    warnings.simplefilter("ignore")  # of its own, on import and in every fit
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            from weightwatcher import WeightWatcher
    except ImportError:
        return None
    logging.getLogger("weightwatcher").setLevel(logging.CRITICAL)
    analyze: Callable[[], object] = WeightWatcher(model=module).analyze
    return analyze


@dataclass(frozen=True, slots=True)
class Result:
    """What one candidate takes for one network.

    Attributes:
        network: Name of the network.
        matrices: Number of its weight matrices.
        name: The candidate.
        milliseconds: Median time.
        faster_than_baseline: Median over rounds of the baseline's time relative to this one's in the same round.
        faster_than_peer: The same for WeightWatcher, if it takes part.
        milliseconds_range: Smallest and largest time.
        rounds: Number of rounds.
        full_share: For the default cadence, which share of the looks are full ones.
    """

    network: str
    matrices: int
    name: str
    milliseconds: float
    faster_than_baseline: float
    faster_than_peer: float | None
    milliseconds_range: tuple[float, float]
    rounds: int
    full_share: float | None = None


def seconds_of(call: Callable[[], object]) -> float:
    """Wall time of one call."""
    start = time.perf_counter()
    call()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start


def compare(network: str, module: nn.Module, seconds: float, epoch_seconds: float) -> list[Result]:
    """All candidates on one network, for so many seconds and at least one round."""
    calls = candidates(module)
    order = list(calls)
    for name in order:
        if name != BASELINE:
            calls[name]()
    times: dict[str, list[float]] = {name: [] for name in order}
    end = time.monotonic() + seconds
    while not times[BASELINE] or time.monotonic() < end:
        random.shuffle(order)
        for name in order:
            times[name].append(seconds_of(calls[name]))
    full_share = share_of_full_looks(times[FULL], times[CHEAP], epoch_seconds)
    times[CADENCE] = [
        full_share * full + (1 - full_share) * cheap
        for full, cheap in zip(times[FULL], times[CHEAP], strict=True)
    ]
    results = []
    for name, taken in times.items():
        results.append(
            Result(
                network=network,
                matrices=len(list(module.children())),
                name=name,
                milliseconds=1e3 * statistics.median(taken),
                faster_than_baseline=median_ratio(times[BASELINE], taken),
                faster_than_peer=median_ratio(times[PEER], taken) if PEER in times else None,
                milliseconds_range=(1e3 * min(taken), 1e3 * max(taken)),
                rounds=len(taken),
                full_share=full_share if name == CADENCE else None,
            )
        )
    return sorted(results, key=lambda result: -result.milliseconds)


def share_of_full_looks(
    full: Sequence[float], cheap: Sequence[float], epoch_seconds: float, num_looks: int = 100
) -> float:
    """Which share of the first looks of the monitor with its default settings are full ones."""
    costs = {"look": statistics.median(full), "glance": statistics.median(cheap)}
    schedule = RankMonitor().schedule
    taken: list[str] = []
    epoch = 0
    while len(taken) < num_looks:
        rung = schedule.choose(epoch, epoch * epoch_seconds) if schedule.is_due(epoch) else None
        if rung is not None:
            schedule.record(rung, epoch, costs[rung])
            taken.append(rung)
        epoch += 1
    return taken.count("look") / num_looks


def median_ratio(others: Sequence[float], own: Sequence[float]) -> float:
    """Median of the ratios within each round."""
    return float(statistics.median(map(truediv, others, own)))


def as_table(results: Sequence[Result]) -> Table:
    """The results, one line each."""
    table = Table(box=SIMPLE_HEAD)
    table.add_column("network", no_wrap=True)
    table.add_column("ranks by", no_wrap=True)
    for header in ("ms", "× svdvals", "× peer"):
        table.add_column(header, justify="right", no_wrap=True)
    for result, after in zip(results, [*results[1:], None], strict=True):
        peer = result.faster_than_peer
        table.add_row(
            f"{result.network}, {result.matrices}",
            result.name
            if result.full_share is None
            else f"{result.name}, {result.full_share:.0%} full",
            f"{result.milliseconds:.1f}",
            f"{result.faster_than_baseline:.1f}",
            "" if peer is None else f"{peer:.1f}",
            end_section=after is None or after.network != result.network,
        )
    return table


def describe(device: torch.device, epoch_seconds: float) -> str:
    """The machine and the settings behind the numbers."""
    where = f"{platform.machine()} CPU, threads: {torch.get_num_threads()}"
    if device.type == "cuda":
        where = torch.cuda.get_device_name(device)
    return (
        f"{where}, torch {torch.__version__}, float32 weights. Medians; how many times faster than “{BASELINE}” and "
        f"than “{PEER}” in the same round. The latter takes smaller matrices for convolutions, and fits a power law to "
        f"each spectrum. “{CADENCE}” is the mean over the first 100 looks of RankMonitor() where an epoch takes "
        f"{epoch_seconds:g} s."
    )


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description="Time the ranks of weights beside other ways.")
    parser.add_argument("--device", default="cpu", type=torch.device, help="cpu (default) or cuda")
    parser.add_argument("--networks", nargs="+", default=list(NETWORKS), choices=list(NETWORKS))
    parser.add_argument("--seconds", type=float, default=30, help="per network (default: 30)")
    parser.add_argument(
        "--epoch-seconds",
        type=float,
        default=600,
        help="assumed time of an epoch, for the row of the default cadence (default: 600)",
    )
    parser.add_argument("--threads", type=int, default=1, help="CPU threads (default: 1)")
    parser.add_argument("--json", type=Path, metavar="PATH", help="also write the numbers there")
    parser.add_argument(
        "--quick", action="store_true", help="only the first six layers of each, one round"
    )
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the comparison."""
    options = parse(arguments)
    torch.set_num_threads(options.threads)
    random.seed(0)
    torch.manual_seed(0)
    results: list[Result] = []
    for name in options.networks:
        network = NETWORKS[name]().to(options.device)
        module = network[:6] if options.quick else network
        seconds = 0 if options.quick else options.seconds
        results += compare(name, module, seconds, options.epoch_seconds)
    description = describe(options.device, options.epoch_seconds)
    Console(width=100).print(as_table(results))
    print(description)
    if options.json:
        record = {"on": description, "results": [asdict(result) for result in results]}
        options.json.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
