"""Spread of the probabilities over time, its figure, and the hardest samples and classes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from matplotlib.figure import Figure

LEVELS = (0.01, 0.05, 0.25, 0.5, 0.75, 0.95, 0.99)
NUM_LOOKED_AT = 100_000
"""Of larger data sets this many evenly spaced samples are sorted."""
STEM = "priority_sampling"


class PriorityHistory:
    """Quantiles of the probabilities by epoch, in units of the uniform probability."""

    def __init__(self) -> None:
        self.steps: list[int] = []
        self.quantiles: list[list[float]] = []

    def append(self, step: int, probabilities: Tensor) -> None:
        """Append the quantiles after ``step`` optimizer steps."""
        stride = -(-len(probabilities) // NUM_LOOKED_AT)
        relative = probabilities[::stride] * len(probabilities)
        levels = torch.tensor(LEVELS, dtype=relative.dtype)
        self.steps.append(step)
        self.quantiles.append(relative.quantile(levels).tolist())

    def state_dict(self) -> dict[str, Any]:
        """Return lists of numbers."""
        return {"steps": list(self.steps), "quantiles": [list(row) for row in self.quantiles]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the history."""
        self.steps = list(state["steps"])
        self.quantiles = [list(row) for row in state["quantiles"]]


def draw_priorities(history: PriorityHistory, probabilities: Tensor) -> Figure:
    """Draw the quantiles over time, and the share of draws that the likeliest samples get at the end."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8.0, 3.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    steps, bands = history.steps, list(zip(*history.quantiles, strict=True))
    for low, high, alpha in ((0, 6, 0.15), (1, 5, 0.25), (2, 4, 0.4)):
        label = f"{LEVELS[low]:.0%} to {LEVELS[high]:.0%}"
        left.fill_between(steps, bands[low], bands[high], color="#0072B2", alpha=alpha, label=label)
    left.plot(steps, bands[3], "o-", color="#0072B2", markersize=3, label="median")
    left.axhline(1.0, color="#999999", linewidth=0.8)
    left.set(xlabel="optimizer step", ylabel="probability / uniform", yscale="log")
    left.legend(fontsize="small", loc="lower left")
    shares = torch.cat([torch.zeros(1, dtype=torch.float64), _descending(probabilities).cumsum(0)])
    right.plot(torch.linspace(0, 1, len(shares)), shares / shares[-1], color="#0072B2")
    right.plot([0, 1], [0, 1], color="#999999", linewidth=0.8)
    right.set(xlabel="share of samples, likeliest first", ylabel="share of draws at the end")
    return figure


def hardest(
    scores: Tensor,
    measured_at: Tensor,
    classes: Tensor,
    num_classes: int = 3,
    num_samples: int = 10,
) -> str:
    """Name the classes and samples with the largest scores, for a sentence."""
    found = {
        "classes": hardest_classes(scores, classes, num_classes),
        "samples": hardest_samples(scores, measured_at, num_samples),
    }
    return "; ".join(
        f"hardest {what} {', '.join(f'{number} ({score:.2g})' for number, score in rows)}"
        for what, rows in found.items()
        if rows
    )


def hardest_samples(scores: Tensor, measured_at: Tensor, num: int) -> list[tuple[int, float]]:
    """Return indices and scores of the samples with the largest scores, among those that were measured."""
    known = scores.where(measured_at >= 0, -1.0)
    top = known.topk(min(num, int((measured_at >= 0).sum())))
    return list(zip(top.indices.tolist(), top.values.tolist(), strict=True))


def hardest_classes(scores: Tensor, classes: Tensor, num: int) -> list[tuple[int, float]]:
    """Return the classes with the largest mean scores, and these; classes of samples are negative where unknown."""
    known = classes >= 0
    if not bool(known.any()):
        return []
    labels, found = classes[known].long(), scores[known].double()
    counts = torch.bincount(labels)
    means = torch.bincount(labels, found) / counts.clamp(min=1)
    top = means.where(counts > 0, -1.0).topk(min(num, int((counts > 0).sum())))
    return list(zip(top.indices.tolist(), top.values.tolist(), strict=True))


def _descending(probabilities: Tensor) -> Tensor:
    stride = -(-len(probabilities) // NUM_LOOKED_AT)
    return probabilities[::stride].sort(descending=True).values
