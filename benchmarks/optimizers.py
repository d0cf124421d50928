"""Time optimizer steps beside their peers: one table from one run.

Every round times one step of every candidate, in random order, on the same parameters and the same fresh
gradients; ratios are taken within a round, so that the drift of a shared machine cancels in their median.

    python benchmarks/optimizers.py
    python benchmarks/optimizers.py --method novograd
    python benchmarks/optimizers.py --device cuda --sizes 25e6x2000 --json optimizers_cuda.json
"""

from __future__ import annotations

import argparse
import json
import platform
import random
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import cache, partial
from operator import truediv
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from rich.box import MARKDOWN, SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.optim import Optimizer

from lightning_sgd import TRSGD, MaSS, NovoGrad, TRAdam

if TYPE_CHECKING:
    from types import ModuleType

SIZES = ("1e6x8", "1e6x500", "25e6x8", "25e6x2000")
BASELINES = {
    "mass": "SGD Nesterov, fused",
    "novograd": "SGD momentum, fused",
    "tra": "SGD momentum, fused",
}


@dataclass(frozen=True, slots=True)
class Candidate:
    """One row of the table: a name, and how to make the optimizer for some parameters."""

    name: str
    make: Callable[[list[Tensor]], Optimizer]


@cache
def candidates(method: str) -> list[Candidate]:
    """Every optimizer of the table of a method; a new one is one more entry here."""
    makers = {"mass": _around_mass, "novograd": _around_novograd, "tra": _around_tra}
    return makers[method]()


def _sgd(params: list[Tensor], **flags: bool) -> Optimizer:
    return torch.optim.SGD(params, lr=1e-3, momentum=0.9, **flags)


def _around_mass() -> list[Candidate]:
    found = [
        Candidate(BASELINES["mass"], partial(_sgd, nesterov=True, fused=True)),
        Candidate("SGD Nesterov, foreach", partial(_sgd, nesterov=True, foreach=True)),
        Candidate("MaSS, fused", lambda params: MaSS(params, lr=1e-3, fused=True)),
        Candidate("MaSS, foreach", lambda params: MaSS(params, lr=1e-3, foreach=True)),
    ]
    peers = imported_peers()
    if peers:
        found.append(
            Candidate("AccSGD, foreach", lambda params: peers.AccSGD(params, foreach=True))
        )
    return found


def _around_novograd() -> list[Candidate]:
    found = [
        Candidate(BASELINES["novograd"], partial(_sgd, fused=True)),
        Candidate("Adam, fused", lambda params: torch.optim.Adam(params, fused=True)),
        Candidate("NovoGrad, fused", lambda params: NovoGrad(params, fused=True)),
        Candidate("NovoGrad, foreach", lambda params: NovoGrad(params, foreach=True)),
    ]
    peers = imported_peers()
    if peers:
        found += [
            Candidate("peer's NovoGrad, foreach", lambda p: peers.NovoGrad(p, foreach=True)),
            Candidate("peer's NovoGrad, default", peers.NovoGrad),
        ]
    return found


def _around_tra() -> list[Candidate]:
    return [
        Candidate(BASELINES["tra"], partial(_sgd, fused=True)),
        Candidate("TRSGD, fused", lambda params: TRSGD(params, 1e-3, fused=True)),
        Candidate("TRSGD, foreach", lambda params: TRSGD(params, 1e-3, foreach=True)),
        Candidate("Adam, fused", lambda params: torch.optim.Adam(params, fused=True)),
        Candidate("TRAdam, fused", lambda params: TRAdam(params, fused=True)),
    ]


@cache
def imported_peers() -> ModuleType | None:
    """The package pytorch-optimizer, if it is installed."""
    try:
        import pytorch_optimizer
    except ImportError:
        print("Peers are left out: the package pytorch-optimizer is not installed.")
        return None
    return pytorch_optimizer


@dataclass(frozen=True, slots=True)
class Result:
    """What one step of one candidate takes.

    Attributes:
        parameters: Number of parameters.
        tensors: Number of tensors that hold them.
        name: The candidate.
        milliseconds: Median time of a step.
        ratio: Median over rounds of the time relative to the baseline in the same round.
        ratio_quartiles: First and third quartile of the same.
        state_bytes: Optimizer state per parameter.
        temporary_mib: Peak of the memory that a step takes and gives back; not measured on a CPU.
    """

    parameters: int
    tensors: int
    name: str
    milliseconds: float
    ratio: float
    ratio_quartiles: tuple[float, float]
    state_bytes: float
    temporary_mib: float | None


class Workload:
    """Parameters and gradients, shared by all candidates so that none has luckier addresses."""

    def __init__(
        self,
        parameters: int,
        tensors: int,
        device: torch.device,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        generator = torch.Generator(device).manual_seed(0)
        sizes = [len(range(i, parameters, tensors)) for i in range(tensors)]

        def normal(size: int) -> Tensor:
            return torch.randn(size, generator=generator, device=device)

        self.device, self.clock = device, clock
        self.params = [normal(size).requires_grad_() for size in sizes]
        self.gradients = [normal(size) for size in sizes]
        for param in self.params:
            param.grad = torch.empty_like(param)

    def refresh_gradients(self) -> None:
        """Write the gradients anew, as a backward pass does; torch's foreach Nesterov overwrites them."""
        gradients = [param.grad for param in self.params if param.grad is not None]
        torch._foreach_copy_(gradients, self.gradients)
        self.wait()

    def wait(self) -> None:
        """Until the device has done everything that was asked of it."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def time_step(self, optimizer: Optimizer) -> float:
        """Seconds of one step, from the call until the device is done."""
        self.refresh_gradients()
        start = self.clock()
        optimizer.step()
        self.wait()
        return self.clock() - start

    def temporary_mib(self, optimizer: Optimizer) -> float | None:
        """Peak of the memory that a step takes and gives back, where the device counts it."""
        if self.device.type != "cuda":
            return None
        torch.cuda.reset_peak_memory_stats(self.device)
        before = torch.cuda.memory_allocated(self.device)
        self.time_step(optimizer)
        return (torch.cuda.max_memory_allocated(self.device) - before) / 2**20


def time_rounds(
    work: Workload, optimizers: dict[str, Optimizer], seconds: float
) -> dict[str, list[float]]:
    """Rounds of one step each, for so many seconds and at least ten rounds."""
    times: dict[str, list[float]] = {name: [] for name in optimizers}
    order = list(optimizers)
    for name in 3 * order:
        work.time_step(optimizers[name])
    end = time.monotonic() + seconds
    while time.monotonic() < end or len(times[order[0]]) < 10:
        random.shuffle(order)
        for name in order:
            times[name].append(work.time_step(optimizers[name]))
    return times


def compare(
    method: str,
    parameters: int,
    tensors: int,
    device: torch.device,
    seconds: float,
    clock: Callable[[], float] = time.perf_counter,
) -> list[Result]:
    """All candidates at one size."""
    work = Workload(parameters, tensors, device, clock)
    optimizers = {candidate.name: candidate.make(work.params) for candidate in candidates(method)}
    times = time_rounds(work, optimizers, seconds)
    results = []
    for name, optimizer in optimizers.items():
        ratios = list(map(truediv, times[name], times[BASELINES[method]]))
        low, middle, high = statistics.quantiles(ratios, n=4)
        results.append(
            Result(
                parameters=parameters,
                tensors=tensors,
                name=name,
                milliseconds=1e3 * statistics.median(times[name]),
                ratio=middle,
                ratio_quartiles=(low, high),
                state_bytes=state_bytes(optimizer) / parameters,
                temporary_mib=work.temporary_mib(optimizer),
            )
        )
    return results


def state_bytes(optimizer: Optimizer) -> int:
    """Bytes of all state tensors."""
    values = (value for state in optimizer.state.values() for value in state.values())
    return sum(value.nbytes for value in values if isinstance(value, Tensor))


def as_table(results: list[Result]) -> Table:
    """The results, one line each."""
    on_cpu = results[0].temporary_mib is None
    headers = (
        "parameters",
        "optimizer",
        "ms/step",
        "ratio",
        "quartiles",
        "state B",
        "temporary MiB",
    )
    table = Table(box=SIMPLE_HEAD)
    for header in headers[:-1] if on_cpu else headers:
        table.add_column(header, justify="left" if header == "optimizer" else "right", no_wrap=True)
    for result in results:
        low, high = result.ratio_quartiles
        row = (
            f"{result.parameters / 1e6:g} M in {result.tensors}",
            result.name,
            f"{result.milliseconds:.3f}",
            f"{result.ratio:.3f}",
            f"{low:.2f}–{high:.2f}",
            f"{result.state_bytes:.2f}",
        )
        extra = () if on_cpu else (f"{result.temporary_mib:.1f}",)
        table.add_row(*row, *extra, end_section=result.name == results[-1].name)
    return table


def describe(method: str, device: torch.device) -> str:
    """The machine and the settings behind the numbers."""
    if device.type == "cuda":
        where = torch.cuda.get_device_name(device)
    else:
        where = f"{cpu_name()}, threads: {torch.get_num_threads()}"
    return (
        f"{where}, torch {torch.__version__}, float32. Medians; ratio to “{BASELINES[method]}” in the same round; "
        "optimizer state in bytes per parameter."
    )


def cpu_name() -> str:
    """What the machine calls its processor."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def write_markdown(path: Path, table: Table, description: str) -> None:
    """Write the table as a fragment that documentation can include."""
    table.box = MARKDOWN
    for row in table.rows:
        row.end_section = False
    console = Console(width=160)
    with console.capture() as lines:
        console.print(table)
    command = " ".join(["python benchmarks/optimizers.py", *sys.argv[1:]])
    path.write_text(f"`{command}`\n\n{lines.get().strip()}\n\n{description}\n")


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description="Time optimizer steps beside their peers.")
    parser.add_argument(
        "--method", choices=BASELINES, default="mass", help="whose table (default: mass)"
    )
    parser.add_argument("--device", default="cpu", type=torch.device, help="cpu (default) or cuda")
    parser.add_argument(
        "--sizes", nargs="+", default=SIZES, metavar="PARAMETERSxTENSORS", help=" ".join(SIZES)
    )
    parser.add_argument("--seconds", type=float, default=15, help="time per size (default: 15)")
    parser.add_argument(
        "--cpu-time", action="store_true", help="time of the one thread, for a machine that is busy"
    )
    parser.add_argument("--threads", type=int, default=1, help="CPU threads (default: 1)")
    parser.add_argument("--json", type=Path, metavar="PATH", help="also write the numbers there")
    parser.add_argument("--markdown", type=Path, metavar="PATH", help="also write the table there")
    parser.add_argument("--quick", action="store_true", help="only show that everything runs")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the comparison."""
    options = parse(arguments)
    torch.set_num_threads(options.threads)
    random.seed(0)
    results = []
    for size in ["1e5x8"] if options.quick else options.sizes:
        parameters, tensors = (int(float(number)) for number in size.split("x"))
        seconds = 0.2 if options.quick else options.seconds
        clock = time.thread_time if options.cpu_time else time.perf_counter
        results += compare(options.method, parameters, tensors, options.device, seconds, clock)
    table, description = as_table(results), describe(options.method, options.device)
    if options.cpu_time:
        description += " CPU time of the thread, on a machine shared with other work."
    Console().print(table)
    print(description)
    if options.json:
        record = {"on": description, "results": [asdict(result) for result in results]}
        options.json.write_text(json.dumps(record, indent=1) + "\n")
    if options.markdown:
        write_markdown(options.markdown, table, description)


if __name__ == "__main__":
    main()
