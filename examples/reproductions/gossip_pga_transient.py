"""How long sparse gossip trails parallel SGD: logistic regression on a ring of 20, 50 and 100 ranks, in one process.

The models of all ranks are the rows of one matrix; a round of gossip is a product with the matrix of the ring.

    python examples/reproductions/gossip_pga_transient.py
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

import torch
from _shared import arguments, save_table, svg_style
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor

from lightning_sgd import Ring

if TYPE_CHECKING:
    from pathlib import Path

    from matplotlib.axes import Axes

NUM_FEATURES, NUM_SAMPLES = 10, 2000
RANKS = (20, 50, 100)
WINDOW = 100  # a multiple of every period: at global averages alone all ranks would look equal

# Period of global averages, and whether ranks gossip in between.
METHODS = {
    "parallel SGD": (1, False),
    "Gossip-PGA, H = 4": (4, True),
    "Gossip-PGA, H = 16": (16, True),
    "gossip": (None, True),
    "Local SGD, H = 16": (16, False),
}
COLORS = ("#555555", "#56B4E9", "#0072B2", "#D55E00", "#009E73")


@dataclass(frozen=True)
class Curve:
    """Mean squared distances from the solution, one per window of steps.

    Attributes:
        method: Key of ``METHODS``.
        num_ranks: Number of ranks.
        mean_model: Of the mean of the models.
        local_models: Of the models, on average over the ranks.
    """

    method: str
    num_ranks: int
    mean_model: list[float]
    local_models: list[float]


class Problem:
    """Logistic regression in which every rank has a truth, and so samples, of its own."""

    def __init__(self, num_ranks: int, num_trials: int, seed: int) -> None:
        self.generator = torch.Generator().manual_seed(seed)
        shape = (num_trials, num_ranks, NUM_SAMPLES, NUM_FEATURES)
        self.features = 10**0.5 * torch.randn(shape, generator=self.generator)
        truth = torch.randn(num_trials, num_ranks, NUM_FEATURES, generator=self.generator)
        truth /= truth.norm(dim=-1, keepdim=True)
        chance = torch.sigmoid(torch.einsum("trsd,trd->trs", self.features, truth))
        drawn = torch.rand(chance.shape, generator=self.generator)
        self.signs = torch.where(drawn < chance, 1.0, -1.0)
        self.solution = torch.stack([self._solve(t) for t in range(num_trials)])

    def _solve(self, trial: int) -> Tensor:
        """Newton's method on the mean loss of all samples of all ranks."""
        z = (self.signs[trial, ..., None] * self.features[trial]).flatten(0, 1).double()
        x = torch.zeros(NUM_FEATURES, dtype=torch.float64)
        for _ in range(30):
            p = torch.sigmoid(-z @ x)
            gradient = -(z * p[:, None]).mean(dim=0)
            x = x - torch.linalg.solve(z.T @ (z * (p * (1 - p))[:, None]) / len(z), gradient)
        return x.float()

    def gradients(self, models: Tensor) -> Tensor:
        """Of one sample of each rank, the same for every method; models are (methods, trials, ranks, features)."""
        trials, ranks = self.signs.shape[:2]
        index = torch.randint(NUM_SAMPLES, (trials, ranks), generator=self.generator)
        at = (torch.arange(trials)[:, None], torch.arange(ranks), index)
        z = self.signs[at][..., None] * self.features[at]
        return -z * torch.sigmoid(-(models * z).sum(dim=-1, keepdim=True))


def matrices(num_ranks: int, step: int) -> Tensor:
    """What each method does after a step, counted from 1, one matrix each."""
    mean = torch.full((num_ranks, num_ranks), 1 / num_ranks)
    ring = Ring().on(num_ranks).matrix().float()
    between = {True: ring, False: torch.eye(num_ranks)}
    return torch.stack(
        [
            mean if period is not None and step % period == 0 else between[gossips]
            for period, gossips in METHODS.values()
        ]
    )


def simulate(num_ranks: int, num_steps: int, num_trials: int, seed: int = 0) -> list[Curve]:
    """All methods on the same samples, with steps of 0.2 that are halved every 1000 steps."""
    problem = Problem(num_ranks, num_trials, seed)
    models = torch.zeros(len(METHODS), num_trials, num_ranks, NUM_FEATURES)
    cycle = [matrices(num_ranks, step)[:, None] for step in range(1, 17)]
    mean_model, local_models = [], []
    for step in range(num_steps):
        models = models - 0.2 * 0.5 ** (step // 1000) * problem.gradients(models)
        models = cycle[step % 16] @ models
        apart = models - problem.solution[:, None]
        mean_model.append(apart.mean(dim=2).square().sum(dim=-1).mean(dim=1))
        local_models.append(apart.square().sum(dim=-1).mean(dim=(1, 2)))
    windows = [
        torch.stack(errors).unfold(0, WINDOW, WINDOW).mean(dim=-1)
        for errors in (mean_model, local_models)
    ]
    return [
        Curve(method, num_ranks, *(_rounded(errors[:, index]) for errors in windows))
        for index, method in enumerate(METHODS)
    ]


def _rounded(errors: Tensor) -> list[float]:
    return [float(f"{error:.4g}") for error in errors.tolist()]


def as_table(curves: list[Curve], window: int) -> Table:
    """Errors of the mean model in one window, in brackets those of the local models."""
    table = Table()
    for header in ("n", *METHODS):
        table.add_column(header, justify="right", no_wrap=True)
    for num_ranks in sorted({curve.num_ranks for curve in curves}):
        row = [curve for curve in curves if curve.num_ranks == num_ranks]
        cells = (f"{c.mean_model[window]:.3g} ({c.local_models[window]:.2g})" for c in row)
        table.add_row(str(num_ranks), *cells)
    return table


def draw(path: Path, curves: list[Curve]) -> None:
    """One panel per number of ranks: the error of the mean model against steps."""
    from matplotlib import pyplot as plt

    with plt.rc_context(svg_style("gossip_pga")):
        figure, panels = plt.subplots(1, 3, figsize=(9, 3.2), layout="constrained", sharey=True)
        for axes, num_ranks in zip(panels, RANKS, strict=True):
            draw_panel(axes, [curve for curve in curves if curve.num_ranks == num_ranks])
            axes.set(title=f"{num_ranks} ranks", xlabel="step")
        panels[0].set_ylabel("squared distance of the mean model")
        handles = panels[0].get_legend_handles_labels()
        figure.legend(*handles, loc="outside lower center", ncols=5, frameon=False)
        figure.savefig(path, metadata={"Date": None})
        plt.close(figure)


def draw_panel(axes: Axes, curves: list[Curve]) -> None:
    """One line per method."""
    for curve, color in zip(curves, COLORS, strict=True):
        steps = [(index + 0.5) * WINDOW for index in range(len(curve.mean_model))]
        axes.semilogy(steps, curve.mean_model, color=color, label=curve.method, linewidth=1)


def main() -> None:
    """Simulate, print the tables, keep the numbers and the figure."""
    parser = arguments(
        "Gossip-PGA and its controls on a ring.",
        "gossip_pga",
        quick="1000 steps of 20 ranks, no figure",
    )
    parser.add_argument("--trials", type=int, default=4, help="how many (default: 4)")
    options = parser.parse_args()
    torch.set_num_threads(1)  # more threads than one only wait for each other at this size
    ranks, num_steps = ((20,), 1000) if options.quick else (RANKS, 4000)
    curves = [
        curve
        for n in track(ranks, transient=True)
        for curve in simulate(n, num_steps, options.trials)
    ]
    options.output.mkdir(parents=True, exist_ok=True)
    numbers = json.dumps([asdict(curve) for curve in curves])
    (options.output / "gossip_pga_transient.json").write_text(numbers + "\n")
    for name, window in (("", 9), ("_end", num_steps // WINDOW - 1)):
        table = as_table(curves, window)
        Console(width=140).print(f"Steps {window * WINDOW} to {(window + 1) * WINDOW}", table)
        save_table(options.output / f"gossip_pga_transient{name}.md", table, 140)
    if not options.quick:
        draw(options.output / "gossip_pga_transient.svg", curves)
    print(f"Written to {options.output}")


if __name__ == "__main__":
    main()
