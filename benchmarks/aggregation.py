"""Time robust aggregation rules beside byzfl on the same rows, compare the results, and list where they part.

Every round calls every candidate once, in random order, on the same rows; ratios are taken within a round, so that the
drift of a shared machine cancels in their median.

    python benchmarks/aggregation.py
    python benchmarks/aggregation.py --large          # 8 rows of 100 million numbers, with the peak of the memory
    python benchmarks/aggregation.py --device cuda --workers 64 --length 1e7
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import json
import platform
import random
import resource
import statistics
import sys
import time
import types
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from operator import truediv
from pathlib import Path
from typing import Any

import torch
from rich.box import MARKDOWN, SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from torch import Tensor

from lightning_sgd import ALIE, ARC, IPM, NNM, Bucketing, CenteredClipping, Clip, get_aggregator

Function = Callable[[Tensor], Any]


@dataclass(frozen=True, slots=True)
class Candidate:
    """One row of the table.

    Attributes:
        name: As in ``get_aggregator``.
        ours: What is timed.
        theirs: The same of byzfl, where it has it.
        note: How they differ by intention.
    """

    name: str
    ours: Function
    theirs: Function | None = None
    note: str = ""


@dataclass(frozen=True, slots=True)
class Result:
    """What one call takes.

    Attributes:
        name: The candidate.
        milliseconds: Median time of a call of ours.
        byzfl_milliseconds: The same of byzfl.
        speedup: Median over rounds of the quotient in the same round.
        difference: Relative difference of the results.
        note: How they differ by intention.
    """

    name: str
    milliseconds: float
    byzfl_milliseconds: float | None
    speedup: float | None
    difference: float | None
    note: str


def imported_byzfl() -> Any:
    """The aggregators of byzfl, without the rest of it, which imports torchvision and seaborn."""
    spec = importlib.util.find_spec("byzfl")
    if spec is None or spec.submodule_search_locations is None:
        print("Peers are left out: the package byzfl is not installed.")
        return None
    package = types.ModuleType("byzfl")
    package.__path__ = list(spec.submodule_search_locations)
    sys.modules["byzfl"] = package
    return importlib.import_module("byzfl.aggregators")


def attacked_rows(workers: int, faulty: int, length: int, device: torch.device) -> Tensor:
    """Gradients that agree in part, the last ones replaced by an attack that hides among them."""
    generator = torch.Generator(device).manual_seed(0)
    rows = torch.randn(workers, length, generator=generator, device=device)
    rows += torch.randn(length, generator=generator, device=device)
    honest, own = rows[: workers - faulty], rows[workers - faulty :]
    rows[workers - faulty :] = ALIE(z=1.5)(honest, own, generator)
    return rows


def candidates(n: int, f: int, rows: Tensor, peer: Any) -> list[Candidate]:
    """Every rule, with the rule of byzfl that is meant to be the same."""
    radius = float((rows[0] - rows.mean(dim=0)).norm())
    norm = float(rows[0].norm()) * 0.9
    mixed = torch.empty_like(rows)

    def rule(name: str, **settings: object) -> Function:
        words = ", ".join(f"{key}={value!r}" for key, value in settings.items())
        return get_aggregator(f"{name}({words})" if words else name, f)

    def of(name: str, *args: object, **settings: object) -> Function | None:
        return None if peer is None else getattr(peer, name)(*args, **settings)

    def fresh(make: Callable[[], Function]) -> Function:
        return lambda x: make()(x)  # noqa: PLW0108  # a new one each time: it remembers its last result

    clipping = fresh(lambda: CenteredClipping(f, radius=radius))
    return [
        Candidate("mean", rule("mean"), of("Average")),
        Candidate("median", rule("median"), of("Median")),
        Candidate("trmean", rule("trmean"), of("TrMean", f)),
        Candidate("meamed", rule("meamed"), of("Meamed", f)),
        Candidate("phocas", rule("phocas")),
        Candidate(
            "krum", rule("krum", num_neighbours=n - f - 1), of("Krum", f), "n − f − 1 neighbours"
        ),
        Candidate(
            "multikrum",
            rule("multikrum", num_neighbours=n - f - 1),
            of("MultiKrum", f),
            "n − f − 1 neighbours",
        ),
        Candidate("bulyan", rule("bulyan")),
        Candidate("mda", rule("mda"), of("MDA", f)),
        Candidate("geomed", rule("geomed")),
        Candidate("rfa", rule("rfa"), of("GeometricMedian", nu=0.1, T=3), "3 steps from zero"),
        Candidate(
            "cclip",
            clipping,
            None if peer is None else fresh(lambda: peer.CenteredClipping(L=3, tau=radius)),
        ),
        Candidate("faba", rule("faba")),
        Candidate("monna", rule("monna"), of("MoNNA", f, 0)),
        Candidate("cge", rule("cge")),
        Candidate("filter", rule("filter"), of("CAF", f), "byzfl: one power step"),
        Candidate("caf", rule("caf"), of("CAF", f), "byzfl: one power step"),
        Candidate("dnc", rule("dnc")),
        Candidate("smea", rule("smea")),
        Candidate("nnm (rows)", lambda x: NNM()(x, f), of("NNM", f)),
        Candidate(
            "nnm (rows, out=)", lambda x: NNM()(x, f, out=mixed), of("NNM", f), "memory reused"
        ),
        Candidate("arc (rows)", lambda x: ARC()(x, f), of("ARC", f)),
        Candidate("clip (rows)", Clip(norm), of("Clipping", norm)),
        Candidate("bucketing (rows)", Bucketing(2), of("Bucketing", 2), "random"),
        Candidate("nnm+trmean", rule("nnm+trmean"), _both(of("NNM", f), of("TrMean", f))),
        Candidate(
            "nnm+krum",
            rule("nnm+krum", num_neighbours=n - f - 1),
            _both(of("NNM", f), of("Krum", f)),
        ),
    ]


def _both(first: Function | None, second: Function | None) -> Function | None:
    return None if first is None or second is None else lambda x: second(first(x))


def wait(device: torch.device) -> None:
    """Until the device has done everything that was asked of it."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def time_call(
    function: Function, rows: Tensor, clock: Callable[[], float], copied: bool
) -> tuple[float, Any]:
    """Seconds of one call, and its result; byzfl's clipping changes the rows, so it gets a copy."""
    given = rows.clone() if copied else rows
    wait(rows.device)
    start = clock()
    result = function(given)
    wait(rows.device)
    return clock() - start, result


def compare(
    found: list[Candidate], rows: Tensor, rounds: int, clock: Callable[[], float]
) -> list[Result]:
    """All candidates on the same rows."""
    functions = {(c.name, "ours"): c.ours for c in found}
    functions |= {(c.name, "byzfl"): c.theirs for c in found if c.theirs is not None}
    times: dict[tuple[str, str], list[float]] = {key: [] for key in functions}
    results: dict[tuple[str, str], Any] = {}
    order = list(functions)
    for number in range(rounds + 1):
        random.shuffle(order)
        for key in order:
            seconds, result = time_call(functions[key], rows, clock, key[1] == "byzfl")
            if number:
                times[key].append(seconds)
            else:  # a warm-up
                results[key] = result
    return [_result(c, times, results) for c in found]


def _result(
    candidate: Candidate,
    times: dict[tuple[str, str], list[float]],
    results: dict[tuple[str, str], Any],
) -> Result:
    ours, theirs = (candidate.name, "ours"), (candidate.name, "byzfl")
    speedup = difference = None
    if theirs in times:
        speedup = statistics.median(map(truediv, times[theirs], times[ours]))
        if results[theirs] is not None:
            gap = (results[ours] - results[theirs]).norm() / results[theirs].norm()
            difference = float(gap)
    return Result(
        name=candidate.name,
        milliseconds=1e3 * statistics.median(times[ours]),
        byzfl_milliseconds=1e3 * statistics.median(times[theirs]) if theirs in times else None,
        speedup=speedup,
        difference=difference,
        note=candidate.note,
    )


def mistakes(peer: Any, length: int) -> list[tuple[str, str, str]]:
    """Rows on which byzfl is wrong: what they are, what it makes of them, and what we do."""
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(20, length, generator=generator)
    honest = rows[:16].mean(dim=0)

    def error(result: Any) -> str:
        if result is None:
            return "returns None"
        gap = float((result - honest).norm()) / (length / 16) ** 0.5
        return f"{gap:.2g} standard errors off" if gap == gap else "NaN"

    found = []
    for name, theirs in (
        ("krum", peer.Krum(4)),
        ("median", peer.Median()),
        ("rfa", peer.GeometricMedian()),
        ("caf", peer.CAF(4)),
    ):
        bad = rows.clone()
        bad[0] = torch.nan
        ours = get_aggregator(name, 4)(bad)
        found.append((f"one row of NaN, {name}", error(theirs(bad)), error(ours)))
    bad = rows.clone()
    bad[16:] = IPM(2.0)(bad[:16], bad[16:], generator)
    honest = bad[:16].mean(dim=0)
    found.append(
        (
            f"IPM, ε = 2, caf; the mean is {error(bad.mean(dim=0))}",
            error(peer.CAF(4)(bad)),
            error(get_aggregator("caf", 4)(bad)),
        )
    )
    honest = rows.mean(dim=0)
    found.append(("f = 0, caf", error(peer.CAF(0)(rows)), error(get_aggregator("caf", 0)(rows))))
    return [*found, *_mistakes_with_rows(peer, rows)]


def _mistakes_with_rows(peer: Any, rows: Tensor) -> list[tuple[str, str, str]]:
    def changed(function: Function) -> str:
        given = rows.clone()
        given[0] *= 9
        before = given.clone()
        function(given)
        return "not changed" if torch.equal(given, before) else "changed in place"

    many = torch.cat([rows, rows[:10].flip(1)]) + 1e4
    exact = NNM()(many.double(), 4)

    def gap(result: Tensor) -> str:
        away = (result.double() - exact).norm() / (exact - many.double().mean(dim=0)).norm()
        return f"relative error {float(away):.2g}"

    try:
        peer.CenteredClipping(m=torch.zeros(3))
        centre = "taken"
    except TypeError:
        centre = "TypeError"
    return [
        ("the caller's rows, arc", changed(peer.ARC(4)), changed(lambda x: ARC()(x, 4))),
        ("30 rows with a common part of 10⁴, nnm", gap(peer.NNM(4)(many)), gap(NNM()(many, 4))),
        ("a centre to start at, cclip", centre, "the state"),
        (
            "rows in float64, median",
            str(peer.Median()(rows.double()).dtype),
            str(get_aggregator("median", 4)(rows.double()).dtype),
        ),
    ]


def as_tables(results: list[Result], wrong: list[tuple[str, str, str]]) -> list[Table]:
    """Times and results, and where byzfl is wrong."""
    times = Table(box=SIMPLE_HEAD)
    for header in ("rule", "ms", "byzfl, ms", "times as fast", "difference", "note"):
        left = header in {"rule", "note"}
        times.add_column(header, justify="left" if left else "right", no_wrap=True)
    for r in results:
        times.add_row(
            r.name,
            f"{r.milliseconds:.1f}",
            *(
                "" if value is None else form.format(value)
                for value, form in (
                    (r.byzfl_milliseconds, "{:.0f}"),
                    (r.speedup, "{:.1f}"),
                    (r.difference, "{:.1g}"),
                )
            ),
            r.note,
        )
    tables = [times]
    if wrong:
        errors = Table(box=SIMPLE_HEAD)
        for header in ("rows and rule", "byzfl", "ours"):
            errors.add_column(header, no_wrap=True)
        for row in wrong:
            errors.add_row(*row)
        tables.append(errors)
    return tables


def large(clock: Callable[[], float]) -> str:
    """Eight rows of 100 million numbers: time, and the peak of the memory of the process."""
    generator = torch.Generator().manual_seed(0)
    rows = [torch.randn(10**8, generator=generator) for _ in range(8)]
    lines = []
    for name in ("filter", "median", "nnm+trmean"):
        start = clock()
        get_aggregator(name, 2)(rows)
        seconds = clock() - start
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
        lines.append(f"{name} {seconds:.1f} s (peak so far {peak:.2f} GiB)")
    return "8 rows of 10⁸ numbers, 2.98 GiB: " + ", ".join(lines) + "."


def describe(options: argparse.Namespace) -> str:
    """The machine and the settings behind the numbers."""
    device: torch.device = options.device
    if device.type == "cuda":
        where = torch.cuda.get_device_name(device)
    else:
        where = f"{_cpu_name()}, threads: {torch.get_num_threads()}"
    spent = " CPU time of the thread, on a machine shared with other work." * options.cpu_time
    return (
        f"{where}, torch {torch.__version__}, float32; n = {options.workers}, f = {options.faulty}, "
        f"d = {int(options.length):_}, ALIE with z = 1.5. Medians of {options.rounds} rounds; "
        f"quotients within a round.{spent}"
    )


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def save(path: Path, tables: list[Table], description: str) -> None:
    """Write the tables as a fragment that documentation can include."""
    parts = []
    for table in tables:
        table.box = MARKDOWN
        console = Console(width=160)
        with console.capture() as lines:
            console.print(table)
        parts.append("\n".join(map(str.rstrip, lines.get().strip().splitlines())))
    command = " ".join(["python benchmarks/aggregation.py", *sys.argv[1:]])
    path.write_text("\n\n".join([f"`{command}`", *parts, description]) + "\n")


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description="Time aggregation rules beside byzfl.")
    parser.add_argument("--workers", type=int, default=20, help="rows (default: 20)")
    parser.add_argument("--faulty", type=int, default=4, help="of them faulty (default: 4)")
    parser.add_argument("--length", type=float, default=1e6, help="of a row (default: 1e6)")
    parser.add_argument("--rounds", type=int, default=5, help="calls of each (default: 5)")
    parser.add_argument("--device", default="cpu", type=torch.device, help="cpu (default) or cuda")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads (default: 1)")
    parser.add_argument("--no-peers", action="store_true", help="ours alone")
    parser.add_argument("--large", action="store_true", help="also 8 rows of 10⁸ numbers")
    parser.add_argument(
        "--cpu-time", action="store_true", help="time of the one thread, for a machine that is busy"
    )
    parser.add_argument("--output", type=Path, metavar="DIR", help="also write the results there")
    parser.add_argument("--quick", action="store_true", help="only show that everything runs")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the comparison."""
    options = parse(arguments)
    if options.quick:
        options.length, options.rounds, options.workers, options.faulty = 1e4, 1, 11, 2
    torch.set_num_threads(options.threads)
    random.seed(0)
    n, f = options.workers, options.faulty
    peer = None if options.no_peers else imported_byzfl()
    clock = time.thread_time if options.cpu_time else time.perf_counter
    lines = [large(clock)] if options.large else []  # first, while the peak is its own
    rows = attacked_rows(n, f, int(options.length), options.device)
    results = compare(candidates(n, f, rows, peer), rows, options.rounds, clock)
    wrong = mistakes(peer, min(int(options.length), 10**6)) if peer is not None else []
    tables, description = as_tables(results, wrong), "\n\n".join([describe(options), *lines])
    for table in tables:
        Console(width=160).print(table)
    print(description)
    if options.output:
        options.output.mkdir(parents=True, exist_ok=True)
        record = {"on": description, "results": [asdict(r) for r in results], "mistakes": wrong}
        text = json.dumps(record, indent=1, ensure_ascii=False)
        (options.output / "aggregation_cpu.json").write_text(text + "\n")
        save(options.output / "aggregation_cpu.md", tables, description)


if __name__ == "__main__":
    main()
