"""Rank of the weights against batch size, step size and weight decay, with runs without decay as control.

An MLP with batch normalisation on handwritten digits, SGD without momentum. Written without Lightning, so that nothing
stands between SGD and the numbers.

    python examples/reproductions/rank_collapse_sweep.py
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import islice, product
from statistics import fmean
from typing import TYPE_CHECKING, NamedTuple

import torch
from _shared import arguments, save_table, split_digits, svg_style
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.optim import SGD

from lightning_sgd.functional.spectra.spectral_stats import spectral_stats_of
from lightning_sgd.functional.spectra.weight_matrices import find_weight_matrices

if TYPE_CHECKING:
    from pathlib import Path

    from matplotlib.axes import Axes

WIDTH, DEPTH = 64, 3
NUM_IMAGES, NUM_EPOCHS = 1297, 25
HEADERS = {
    "rank@0.04": "rank .04",
    "rank@0.001": "rank .001",
    "stable_rank": "stable",
    "effective_rank": "effective",
    "participation_ratio": "PR",
}
"""The measures, and what the table calls them."""


class Setting(NamedTuple):
    """What is varied.

    Attributes:
        batch_size: Samples per step [B].
        lr: Step size [μ].
        weight_decay: As torch's SGD takes it.
        num_steps: Length of the training.
    """

    batch_size: int
    lr: float
    weight_decay: float
    num_steps: int

    def without_decay(self) -> Setting:
        """The control."""
        return self._replace(weight_decay=0.0)


def steps(batch_size: int, num_epochs: int = NUM_EPOCHS) -> int:
    """How many steps some epochs of full batches take."""
    return num_epochs * (NUM_IMAGES // batch_size)


BATCH_SIZES = (4, 16, 64)
STEP_SIZES = (0.01, 0.05, 0.2)
DECAYS = (1e-3, 5e-3, 2e-2)
SAME_EPOCHS = [Setting(B, 0.05, 5e-3, steps(B)) for B in BATCH_SIZES]
SAME_STEPS = [Setting(B, 0.2, 5e-3, steps(16)) for B in BATCH_SIZES]
BY_STEP_SIZE = [Setting(16, lr, 5e-3, steps(16)) for lr in STEP_SIZES]
BY_DECAY = [Setting(16, 0.05, decay, steps(16)) for decay in DECAYS]
STRONG = [Setting(8, 0.1, decay, steps(8)) for decay in (1e-2, 3e-2)]
QUICK = [Setting(8, 0.1, decay, steps(8, num_epochs=5)) for decay in (1e-2, 3e-2)]


def with_controls(settings: Sequence[Setting]) -> list[Setting]:
    """Each setting once, and once the same without decay."""
    return sorted({*settings, *(setting.without_decay() for setting in settings)})


BLUE, ORANGE, GREY = "#0072B2", "#D55E00", "#555555"


@dataclass(frozen=True)
class Run:
    """What one training run showed.

    Attributes:
        setting: Batch size, step size, decay, number of steps.
        seed: Seed of the weights and of the order of the samples, the same with and without decay.
        accuracy: Share of the test set that is classified correctly in the end.
        measures: For each key of ``HEADERS`` the mean over the hidden matrices in the end.
    """

    setting: Setting
    seed: int
    accuracy: float
    measures: dict[str, float]

    def as_dict(self) -> dict[str, object]:
        """Plain names and numbers."""
        return {**asdict(self), "setting": self.setting._asdict()}


def mlp() -> nn.Sequential:
    """Hidden layers with batch normalisation, all as wide as the images, and a classifier."""
    hidden = [(nn.Linear(WIDTH, WIDTH), nn.BatchNorm1d(WIDTH), nn.ReLU()) for _ in range(DEPTH)]
    return nn.Sequential(*(layer for block in hidden for layer in block), nn.Linear(WIDTH, 10))


def measure(net: nn.Module) -> dict[str, float]:
    """Each measure, averaged over the hidden matrices; the classifier has too few rows to take part."""
    matrices = find_weight_matrices(net, min_side=WIDTH)
    stats = spectral_stats_of(
        (matrix.read() for matrix in matrices),
        measures=["rank", "stable_rank", "effective_rank", "participation_ratio"],
        tol=(0.04, 0.001),
    )
    return {key: round(float(stats[key].mean()), 3) for key in HEADERS}


def batches(num_images: int, batch_size: int) -> Iterator[Tensor]:
    """Epoch after epoch in random order, full batches only: a single image has no batch statistics."""
    while True:
        order = torch.randperm(num_images)
        yield from order[: num_images - num_images % batch_size].split(batch_size)


def train(setting: Setting, seed: int) -> Run:
    """Train at constant settings, with decay on all parameters."""
    (x, y), (test_x, test_y) = split_digits()
    torch.manual_seed(seed)
    net = mlp()
    optimizer = SGD(net.parameters(), setting.lr, weight_decay=setting.weight_decay, fused=True)
    for batch in islice(batches(len(x), setting.batch_size), setting.num_steps):
        optimizer.zero_grad()
        cross_entropy(net(x[batch]), y[batch]).backward()
        optimizer.step()
    with torch.no_grad():
        accuracy = float((net.eval()(test_x).argmax(dim=1) == test_y).double().mean())
    return Run(setting, seed, accuracy, measure(net))


def train_all(settings: Sequence[Setting], num_seeds: int) -> list[Run]:
    """Every setting with every seed."""
    todo = list(product(settings, range(num_seeds)))
    return [train(setting, seed) for setting, seed in track(todo, transient=True)]


def differences(runs: Sequence[Run], setting: Setting, key: str = "effective_rank") -> list[float]:
    """What decay changes: for each seed, the measure less that of the same run without decay."""
    off = {run.seed: run.measures[key] for run in runs if run.setting == setting.without_decay()}
    return [run.measures[key] - off[run.seed] for run in runs if run.setting == setting]


def values_of(runs: Sequence[Run], setting: Setting, key: str = "effective_rank") -> list[float]:
    """A measure, one value per seed."""
    return [run.measures[key] for run in runs if run.setting == setting]


def mean_of(runs: Sequence[Run], setting: Setting, key: str = "effective_rank") -> float:
    """Mean of a measure over the seeds."""
    return fmean(values_of(runs, setting, key))


def as_table(runs: Sequence[Run], initial: dict[str, float]) -> Table:
    """Means over the seeds, and what decay alone changes in the effective rank."""
    num_seeds = len({run.seed for run in runs})
    settings = sorted({run.setting for run in runs})
    changes = {setting: differences(runs, setting) for setting in settings}
    spread = max(max(change) - min(change) for change in changes.values())
    caption = (
        f"Means over {DEPTH} hidden matrices and {num_seeds} seeds. By decay: effective rank less that without decay,"
        f" same seed; between seeds it differs by at most {spread:.1f}. PR: participation ratio."
    )
    table = Table(box=SIMPLE_HEAD, padding=0, caption=caption, caption_justify="left")
    for header in ("B", "μ", "decay", "steps", *HEADERS.values(), "by decay", "acc. %"):
        table.add_column(header, justify="right", no_wrap=True)
    table.add_row("", "", "", "0", *(f"{initial[key]:.1f}" for key in HEADERS), "", "")
    for setting in settings:
        means = (f"{mean_of(runs, setting, key):.1f}" for key in HEADERS)
        by_decay = f"{fmean(changes[setting]):+.1f}" if setting.weight_decay else ""
        accuracy = fmean(run.accuracy for run in runs if run.setting == setting)
        row = (*(f"{value:g}" for value in setting), *means, by_decay, f"{100 * accuracy:.1f}")
        table.add_row(*row)
    return table


def draw_lines(axes: Axes, runs: Sequence[Run], settings: Sequence[Setting], over: str) -> None:
    """Effective rank with decay (blue, filled) and without (orange, open): means in the range of the seeds."""
    xs = [getattr(setting, over) for setting in settings]
    for has_decay in (False, True):
        color, style = (BLUE, "o-") if has_decay else (ORANGE, "s--")
        found = [
            values_of(runs, setting if has_decay else setting.without_decay())
            for setting in settings
        ]
        axes.fill_between(xs, list(map(min, found)), list(map(max, found)), color=color, alpha=0.2)
        face = color if has_decay else "white"
        axes.semilogx(xs, list(map(fmean, found)), style, color=color, markerfacecolor=face)
    ticks = DECAYS if over == "weight_decay" else xs
    axes.set_xticks(ticks, [f"{x:g}" for x in ticks])
    axes.minorticks_off()


def name_line(axes: Axes, x: float, y: float, text: str, color: str, points: int = 7) -> None:
    """Write the name of a line so many points above or below it."""
    axes.annotate(
        text,
        (x, y),
        xytext=(0, points),
        textcoords="offset points",
        ha="center",
        va="bottom" if points > 0 else "top",
        color=color,
    )


def draw_panels(panels: Sequence[Axes], runs: Sequence[Run]) -> None:
    """Effective rank over batch size, twice, over step size and over decay."""
    epochs, same, middle, right = panels
    draw_lines(epochs, runs, SAME_EPOCHS, over="batch_size")
    draw_lines(same, runs, SAME_STEPS, over="batch_size")
    draw_lines(middle, runs, BY_STEP_SIZE, over="lr")
    draw_lines(right, runs, STRONG, over="weight_decay")
    draw_lines(right, runs, BY_DECAY, over="weight_decay")
    epochs.set(title="25 epochs, μ = 0.05", xlabel="batch size B", ylabel="effective rank")
    same.set(title="2025 steps, μ = 0.2", xlabel="batch size B")
    middle.set(title="2025 steps, B = 16", xlabel="step size μ")
    right.set(title="25 epochs", xlabel="weight decay", ylim=(27, 54))
    name_line(same, 8, mean_of(runs, SAME_STEPS[1].without_decay()), "no decay", ORANGE)
    name_line(same, 16, mean_of(runs, SAME_STEPS[1]), "decay 0.005", BLUE, points=-9)
    name_line(right, 2.2e-3, mean_of(runs, BY_DECAY[1]), "B = 16, μ = 0.05", GREY, points=-7)
    name_line(right, 6e-3, mean_of(runs, STRONG[0]), "B = 8, μ = 0.1", GREY, points=-7)


def draw(path: Path, runs: Sequence[Run], initial: float) -> None:
    """Four panels in one file: batch size twice, step size, decay."""
    from matplotlib import pyplot as plt

    with plt.rc_context(svg_style("rank_collapse")):
        figure, panels = plt.subplots(1, 4, figsize=(11, 3.3), layout="constrained", sharey=True)
        draw_panels(panels, runs)
        for axes in panels:
            axes.axhline(initial, color=GREY, linewidth=0.8, linestyle=":")
        name_line(panels[0], 8, initial, "at the beginning", GREY, points=3)
        figure.savefig(path, metadata={"Date": None})
        plt.close(figure)


def main() -> None:
    """Train, print the table, keep the numbers and the figure."""
    options = arguments(
        "Rank of the weights against what drives it.",
        "rank_collapse_sweep",
        quick="two settings, five epochs, no figure",
        seeds=2,
    ).parse_args()
    torch.set_num_threads(1)  # more threads than one only wait for each other at this size
    full = SAME_EPOCHS + SAME_STEPS + BY_STEP_SIZE + BY_DECAY + STRONG
    settings = with_controls(QUICK if options.quick else full)
    start = settings[0]._replace(num_steps=0)
    untrained = train_all([start], options.seeds)
    initial = {key: mean_of(untrained, start, key) for key in HEADERS}
    runs = train_all(settings, options.seeds)
    table = as_table(runs, initial)
    Console().print(table)
    options.output.mkdir(parents=True, exist_ok=True)
    numbers = json.dumps({"initial": initial, "runs": [run.as_dict() for run in runs]})
    (options.output / "rank_collapse_sweep.json").write_text(numbers + "\n")
    save_table(options.output / "rank_collapse_sweep.md", table)
    if not options.quick:
        draw(options.output / "rank_collapse_sweep.svg", runs, initial["effective_rank"])
    print(f"Written to {options.output}")


if __name__ == "__main__":
    main()
