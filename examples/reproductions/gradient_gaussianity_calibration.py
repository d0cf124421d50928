"""How often the verdict on noise is wrong: false alarms for Gaussian noise, and what is found of other noise.

Gaussian noise with flat and with falling spectra must be called something else at the stated rate at most, however much
its directions depend on each other; and a rule without calibration, more than 10 % of the directions rejected, shows
why that takes a calibration. Other noise shows what random directions see of it, and what they cannot see.

    python examples/reproductions/gradient_gaussianity_calibration.py
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from statistics import fmean

import torch
from _shared import arguments, save_table
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from torch import Tensor

from lightning_sgd import GaussianityResult, GaussianitySettings, gradient_gaussianity

NUM_GRADIENTS, NUM_COORDINATES, NUM_RUNS = 128, 2000, 400
SETTINGS = GaussianitySettings(128, false_alarm_rate=0.05, num_bootstraps=79)


def normal(generator: torch.Generator, *shape: int) -> Tensor:
    """Independent normal numbers."""
    return torch.randn(*shape, generator=generator)


def spectrum(power: float) -> Callable[[torch.Generator], Tensor]:
    """Gaussian noise whose variances fall with a power of their rank."""
    scales = torch.arange(1, NUM_COORDINATES + 1) ** (-power / 2)
    return lambda generator: normal(generator, NUM_GRADIENTS, NUM_COORDINATES) * scales


def student(generator: torch.Generator, *shape: int) -> Tensor:
    """Student's t with three degrees of freedom."""
    return normal(generator, *shape) / normal(generator, *shape, 3).square().mean(dim=-1).sqrt()


def factors(generator: torch.Generator) -> Tensor:
    """Three exponential factors, and a little Gaussian noise."""
    heavy = torch.empty(NUM_GRADIENTS, 3).exponential_(generator=generator)
    rest = normal(generator, NUM_GRADIENTS, NUM_COORDINATES)
    return heavy @ normal(generator, 3, NUM_COORDINATES) + 0.05 * rest


SHAPE = (NUM_GRADIENTS, NUM_COORDINATES)
GAUSSIAN: dict[str, Callable[[torch.Generator], Tensor]] = {
    "Gaussian, flat spectrum": spectrum(0),
    "Gaussian, spectrum 1/i": spectrum(1),
    "Gaussian, spectrum 1/i²": spectrum(2),
    "Gaussian, spectrum 1/i⁴": spectrum(4),
}
OTHER: dict[str, Callable[[torch.Generator], Tensor]] = {
    "t(3) by coordinate": lambda g: student(g, *SHAPE),
    "exponential by coordinate": lambda g: torch.empty(SHAPE).exponential_(generator=g),
    "rare events by coordinate": lambda g: (torch.rand(*SHAPE, generator=g) < 0.02).float(),
    "multivariate t(3)": lambda g: normal(g, *SHAPE) * student(g, NUM_GRADIENTS, 1),
    "log-normal scale, 0.3": lambda g: (
        normal(g, *SHAPE) * (0.3 * normal(g, NUM_GRADIENTS, 1)).exp()
    ),
    "three exponential factors": factors,
}


@dataclass(frozen=True)
class Row:
    """What was found for noise of one law.

    Attributes:
        law: Its name.
        runs: How many samples of it.
        random: Share of the runs in which random directions are not Gaussian.
        coordinate: Share of the runs in which coordinates are not.
        any: Share of the runs with another verdict than Gaussian.
        uncalibrated: Share of the runs in which more than 10 % of the random directions are rejected.
        mean_rejected: Mean share of random directions rejected.
        max_rejected: Largest share.
        dimension: Mean effective dimension.
    """

    law: str
    runs: int
    random: float
    coordinate: float
    any: float
    uncalibrated: float
    mean_rejected: float
    max_rejected: float
    dimension: float


def measure(law: str, draw: Callable[[torch.Generator], Tensor], runs: int) -> Row:
    """Test samples of one law."""
    found: list[GaussianityResult] = []
    for seed in range(runs):
        generator = torch.Generator().manual_seed(seed)
        found.append(gradient_gaussianity(draw(generator), generator, SETTINGS))
    rate = SETTINGS.family_rate
    shares = [each.random.rejected for each in found]
    return Row(
        law,
        runs,
        fmean(each.random.p_value <= rate for each in found),
        fmean(each.coordinate.p_value <= rate for each in found),
        fmean(each.verdict != "Gaussian" for each in found),
        fmean(share > 0.1 for share in shares),
        round(fmean(shares), 4),
        max(shares),
        round(fmean(each.effective_dimension for each in found), 2),
    )


def as_table(rows: Sequence[Row]) -> Table:
    """One line each."""
    table = Table(box=SIMPLE_HEAD, padding=0)
    headers = (
        "noise",
        "runs",
        "verdict not Gaussian",
        "random directions",
        "coordinates",
        "rejected > 10 %",
        "rejected: mean",
        "largest",
        "dimension",
    )
    for header in headers:
        table.add_column(header, justify="left" if header == "noise" else "right", no_wrap=True)
    for row in rows:
        shares = (row.any, row.random, row.coordinate, row.uncalibrated)
        table.add_row(
            row.law,
            str(row.runs),
            *(f"{share:.1%}" for share in shares),
            f"{row.mean_rejected:.0%}",
            f"{row.max_rejected:.0%}",
            f"{row.dimension:.1f}",
        )
    return table


def main() -> None:
    """Draw and test, print the table, keep the numbers."""
    options = arguments(
        "False alarms and power of the verdict on noise.",
        "gradient_gaussianity_calibration",
        quick="a few runs",
    ).parse_args()
    torch.set_num_threads(1)  # more threads than one only wait for each other at this size
    runs = 3 if options.quick else NUM_RUNS
    rows = [measure(law, draw, runs) for law, draw in GAUSSIAN.items()]
    rows += [measure(law, draw, max(runs // 4, 3)) for law, draw in OTHER.items()]
    table = as_table(rows)
    Console(width=140).print(table)
    options.output.mkdir(parents=True, exist_ok=True)
    numbers = json.dumps([asdict(row) for row in rows], indent=1)
    (options.output / "gradient_gaussianity_calibration.json").write_text(numbers + "\n")
    save_table(options.output / "gradient_gaussianity_calibration.md", table, 160)
    print(f"Written to {options.output}")


if __name__ == "__main__":
    main()
