"""Exact rates of SGD, Nesterov SGD and MaSS on least squares that some weights solve exactly.

Takes the second moments of the iterates through one step by hand: for these two kinds of data they obey a linear
recursion, whose spectral radius says how fast E‖w − w*‖² falls, or grows if it is above 1.

    python examples/reproductions/mass_rates.py
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from _shared import arguments, markdown, svg_style
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table
from scipy.optimize import brentq, minimize_scalar

from lightning_sgd import MaSSHyperParameters, critical_batch_sizes, mass_hyperparameters

if TYPE_CHECKING:
    from pathlib import Path

    from matplotlib.axes import Axes

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Problem:
    """Least squares without label noise, as far as second moments see it.

    Attributes:
        H: E[xxᵀ], diagonal.
        Q: What turns the diagonal of U into that of E[x xᵀ U x xᵀ].
        L1: Smallest number with E[‖x‖²xxᵀ] ⪯ L1·H.
        kappa_tilde: Smallest number with E[⟨x, H⁻¹x⟩xxᵀ] ⪯ κ̃·H.
    """

    H: Array
    Q: Array
    L1: float
    kappa_tilde: float

    def closed_form(self, batch_size: int = 1) -> MaSSHyperParameters:
        """The paper's hyper-parameters for MaSS."""
        eigenvalues = self.H.diagonal()
        L, mu = float(eigenvalues.max()), float(eigenvalues.min())
        return mass_hyperparameters(L, self.L1, mu, self.kappa_tilde, batch_size)


def component_decoupled(*variances: float) -> Problem:
    """The paper's data: x = σ_i·z·e_i for an i drawn evenly from two, and z ~ N(0, 2)."""
    H = np.diag(variances)
    return Problem(H=H, Q=6 * H**2, L1=6 * max(variances), kappa_tilde=6.0)


def gaussian(eigenvalues: Sequence[float]) -> Problem:
    """Samples x ~ N(0, diag(eigenvalues))."""
    values = np.asarray(eigenvalues, dtype=float)
    return Problem(
        H=np.diag(values),
        Q=2 * np.diag(values**2) + np.outer(values, values),
        L1=float(values.sum() + 2 * values.max()),
        kappa_tilde=len(values) + 2.0,
    )


def second_moments(problem: Problem, eta1: float, eta2: float, gamma: float) -> Array:
    """What one step on one sample does to the moments (E w², E wu, E u²) of every coordinate.

    The step is w' = (1 − η1·xxᵀ)u and u' = (1 + γ − c·xxᵀ)u − γw with c = η1(1 + γ) − η2.
    """
    H, Q = problem.H, problem.Q
    one, zero = np.eye(len(H)), np.zeros_like(H)
    c, g = eta1 * (1 + gamma) - eta2, 1 + gamma
    ww = [zero, zero, one - 2 * eta1 * H + eta1**2 * Q]
    wu = [zero, -gamma * (one - eta1 * H), g * one - (c + eta1 * g) * H + eta1 * c * Q]
    uu = [gamma**2 * one, -2 * gamma * (g * one - c * H), g**2 * one - 2 * g * c * H + c**2 * Q]
    return np.block([ww, wu, uu])


def rate(problem: Problem, eta1: float, eta2: float = 0.0, gamma: float = 0.0) -> float:
    """Factor by which the second moments grow or shrink per step in the long run."""
    return float(np.abs(np.linalg.eigvals(second_moments(problem, eta1, eta2, gamma))).max())


def mass_rate(problem: Problem) -> float:
    """Rate of MaSS with its closed-form hyper-parameters."""
    best = problem.closed_form()
    return rate(problem, best.eta1, best.eta2, best.gamma)


def sgd_rate(problem: Problem) -> float:
    """Rate of SGD at the step size 1/L1."""
    return rate(problem, 1 / problem.L1)


def best_nesterov(problem: Problem) -> float:
    """Lowest rate that Nesterov SGD reaches with any step size and any γ."""

    def with_gamma(t: float) -> float:
        gamma = 1 - np.exp(-t)
        steps = (-8.0, 0.7)  # log η·L1
        return float(minimize(lambda s: rate(problem, np.exp(s) / problem.L1, gamma=gamma), steps))

    return minimize(with_gamma, (0.0, 9.0))


def minimize(function: Callable[[float], float], bounds: tuple[float, float]) -> float:
    """Minimum of a function of one number."""
    return float(minimize_scalar(function, bounds=bounds, method="bounded").fun)


def largest_stable_step(gamma: float) -> float:
    """Largest η·L1 for which Nesterov SGD does not diverge on component-decoupled data."""
    problem = component_decoupled(1.0)
    return float(brentq(lambda s: rate(problem, s / problem.L1, gamma=gamma) - 1, 1e-3, 3.0))


def speedup(problem: Problem, other: float) -> float:
    """How many steps of SGD one step with rate ``other`` is worth, asymptotically."""
    return (1 - other) / (1 - sgd_rate(problem))


def steps_per_digit(problem: Problem, batch_size: int) -> tuple[float, float]:
    """What the number of steps is proportional to: κ_m for SGD, √(κ_m κ̃_m) for MaSS."""
    best = problem.closed_form(batch_size)
    return best.kappa_m, 1 / best.alpha


STEEP = component_decoupled(1.0, 2.0**-9)
GAUSSIAN_3D = gaussian([1.0, 1.0, 2.0**-10])
GAUSSIAN_128D = gaussian(np.maximum(0.7 ** np.arange(128), 1e-3))
BATCH_SIZES = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 4096)


@dataclass(frozen=True)
class Block:
    """One table: its headers, how its numbers look, and for each line a name and the numbers."""

    headers: tuple[str, ...]
    number: str
    lines: Mapping[str, Sequence[float]]

    def table(self) -> Table:
        """The same for the terminal."""
        table = Table()
        for i, header in enumerate(self.headers):
            table.add_column(header, justify="right" if i else "left")
        for name, values in self.lines.items():
            table.add_row(name, *(format(value, self.number) for value in values))
        return table


def rates() -> Block:
    """Reproduction A: who converges, and how fast."""
    problems = (STEEP, GAUSSIAN_3D)
    lines = {"SGD, η = 1/L₁": [sgd_rate(problem) for problem in problems]}
    for gamma in (0.5, 0.6, 0.7, 0.9, 0.99):
        lines[f"Nesterov SGD, η = 1/L₁, γ = {gamma:g}"] = [
            rate(problem, 1 / problem.L1, gamma=gamma) for problem in problems
        ]
    lines["Nesterov SGD, best η and γ"] = [best_nesterov(problem) for problem in problems]
    lines["MaSS, closed form"] = [mass_rate(problem) for problem in problems]
    headers = ("factor of E‖w − w*‖² per step", "decoupled", "Gaussian, d = 3")
    return Block(headers, ".6f", lines)


def stable_steps() -> Block:
    """Reproduction A: the step sizes that momentum costs."""
    gammas = (0.0, 0.3, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.99)
    lines = {f"{gamma:g}": [largest_stable_step(gamma)] for gamma in gammas}
    return Block(("Nesterov SGD, γ", "largest stable η·L₁"), ".4f", lines)


def speedups() -> Block:
    """Reproduction A: acceleration that grows with the condition number, and one that does not."""
    lines = {}
    for exponent in (5, 9, 13):
        problem = component_decoupled(1.0, 2.0**-exponent)
        rates = (best_nesterov(problem), mass_rate(problem))
        lines[f"2^{exponent}"] = [speedup(problem, rate) for rate in rates]
    return Block(("condition number κ", "best Nesterov SGD", "MaSS"), ".2f", lines)


def batch_sizes() -> Block:
    """Reproduction B: linear scaling, diminishing returns, saturation."""
    lines = {f"{m}": steps_per_digit(GAUSSIAN_128D, m) for m in BATCH_SIZES}
    return Block(("batch size m", "SGD: κ_m", "MaSS: √(κ_m κ̃_m)"), ".1f", lines)


GREY, ORANGE, BLUE = "#555555", "#D55E00", "#0072B2"


def draw_stability(axes: Axes) -> None:
    """Rates at SGD's step size."""
    step, gammas = 1 / STEEP.L1, np.linspace(0.0, 0.999, 200)
    ratio = 1 - 1 / STEEP.kappa_tilde
    nesterov = [rate(STEEP, step, gamma=gamma) for gamma in gammas]
    mass = [rate(STEEP, step, step * ratio * (1 + gamma) / 2, gamma) for gamma in gammas]
    axes.axhline(1.0, color=GREY, linewidth=0.8)
    axes.plot(gammas, nesterov, "--", color=ORANGE)
    axes.plot(gammas, mass, color=BLUE)
    axes.text(0.0, 1.015, "diverges ↑", color=GREY)
    axes.text(0.86, 1.4, "Nesterov", color=ORANGE, ha="right")
    axes.text(0.86, 0.955, "MaSS", color=BLUE, ha="right")
    axes.set(
        title="At SGD's step size 1/L₁",
        xlabel="acceleration γ",
        ylabel="factor of E‖w − w*‖² per step",
        ylim=(0.9, 1.55),
    )


def draw_acceleration(axes: Axes) -> None:
    """Gain over SGD for growing condition numbers."""
    kappas = 2.0 ** np.arange(3, 17)
    problems = [component_decoupled(1.0, 1 / kappa) for kappa in kappas]
    axes.loglog(kappas, [speedup(p, best_nesterov(p)) for p in problems], "--", color=ORANGE)
    axes.loglog(kappas, [speedup(p, mass_rate(p)) for p in problems], color=BLUE)
    axes.text(kappas[-1], 4.8, "Nesterov,\nbest step size and γ", color=ORANGE, ha="right")
    axes.text(kappas[8], 45, "MaSS,\nclosed form", color=BLUE, ha="right")
    axes.set(
        title="Steps saved", xlabel="condition number κ", ylabel="one step is worth … of SGD's"
    )


def draw_batch_sizes(axes: Axes) -> None:
    """Steps against batch size, with the two critical batch sizes."""
    sgd, mass = zip(*(steps_per_digit(GAUSSIAN_128D, m) for m in BATCH_SIZES), strict=True)
    problem = GAUSSIAN_128D
    for critical in critical_batch_sizes(float(problem.H.max()), problem.L1, problem.kappa_tilde):
        axes.axvline(critical, color=GREY, linewidth=0.8, linestyle=":")
    axes.loglog(BATCH_SIZES, sgd, "-.", color=GREY)
    axes.loglog(BATCH_SIZES, mass, color=BLUE)
    axes.text(700, 1250, "SGD", color=GREY)
    axes.text(700, 42, "MaSS", color=BLUE)
    for position, text in [(2.3, "linear"), (26, "diminishing"), (760, "saturated")]:
        axes.text(position, 7500, text, color=GREY, ha="center")
    axes.set(
        title="Steps against batch size", xlabel="batch size m", ylabel="steps ∝", ylim=(20, 12000)
    )


def draw(path: Path) -> None:
    """Three panels in one file."""
    from matplotlib import pyplot as plt

    with plt.rc_context(svg_style("mass")):
        figure, panels = plt.subplots(1, 3, figsize=(10, 3.2), layout="constrained")
        for panel, fill in zip(
            panels, (draw_stability, draw_acceleration, draw_batch_sizes), strict=True
        ):
            fill(panel)
        figure.savefig(path, metadata={"Date": None})
        plt.close(figure)


def save_tables(path: Path, blocks: Mapping[str, Block]) -> None:
    """Write the tables as fragments that documentation can include."""
    path.write_text("\n\n".join(markdown(block.table()) for block in blocks.values()))


def main() -> None:
    """Print the tables; keep them and the figure."""
    options = arguments(
        "Exact rates of SGD, Nesterov SGD and MaSS.", "mass_rates", quick="without the figure"
    ).parse_args()
    blocks = {made.__name__: made() for made in (rates, stable_steps, speedups, batch_sizes)}
    for block in blocks.values():
        Console().print(block.table())
    options.output.mkdir(parents=True, exist_ok=True)
    save_tables(options.output / "mass_rates.md", blocks)
    numbers = {name: dict(block.lines) for name, block in blocks.items()}
    (options.output / "mass_rates.json").write_text(json.dumps(numbers, indent=1) + "\n")
    if not options.quick:
        draw(options.output / "mass_rates.svg")
    print(f"Written to {options.output}")


if __name__ == "__main__":
    main()
