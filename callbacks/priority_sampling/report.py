"""What a training with priorities leaves to be seen: their spread over time, the hardest samples and classes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lightning_sgd.functional.sampling.priority_sampling import effective_sample_size

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from lightning_sgd.callbacks.priority_sampling.run import PriorityRun

LEVELS = (0.01, 0.05, 0.25, 0.5, 0.75, 0.95, 0.99)
NUM_LOOKED_AT = 100_000
"""Of larger data sets evenly spaced samples are sorted."""
STEM = "priority_sampling"


class PriorityHistory:
    """Keeps quantiles of the probabilities by epoch, in units of the uniform one."""

    def __init__(self) -> None:
        self.steps: list[int] = []
        self.quantiles: list[list[float]] = []

    def note(self, step: int, probabilities: Tensor) -> None:
        """Add one epoch.

        Args:
            step: Optimizer steps so far.
            probabilities: Of all samples.
        """
        stride = -(-len(probabilities) // NUM_LOOKED_AT)
        relative = probabilities[::stride] * len(probabilities)
        levels = torch.tensor(LEVELS, dtype=relative.dtype)
        self.steps.append(step)
        self.quantiles.append(relative.quantile(levels).tolist())

    def state_dict(self) -> dict[str, Any]:
        """Lists of numbers."""
        return {"steps": list(self.steps), "quantiles": [list(row) for row in self.quantiles]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from :meth:`state_dict`."""
        self.steps = list(state["steps"])
        self.quantiles = [list(row) for row in state["quantiles"]]


def draw_priorities(history: PriorityHistory, probabilities: Tensor) -> Figure:
    """Draw two panels: spread of the probabilities over time, and how much the likeliest samples get at the end.

    Args:
        history: Quantiles by epoch.
        probabilities: Of all samples at the end.
    """
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


def conclusion(run: PriorityRun) -> str:
    """What came of a training: share by priority, effective size, what was never drawn, what is hardest.

    Args:
        run: The training.
    """
    table, spread = run.sampler.table, run.spread()
    share = effective_sample_size(spread) / len(spread)
    never = 1 - float(table.is_drawn.float().mean())
    samples = hardest_samples(table.scores, table.measured_at)
    classes = hardest_classes(table.scores, run.classes)
    named = "; ".join(
        f"hardest {what} {', '.join(f'{number} ({score:.2g})' for number, score in found)}"
        for what, found in (("classes", classes), ("samples", samples))
        if found
    )
    return f"{_drawn(run)}; effective sample size {share:.0%} of {len(spread)}, {never:.1%} never drawn; {named}."


def _drawn(run: PriorityRun) -> str:
    if run.selection is not None:
        return f"{run.num_trained} of {run.num_rows} rows trained on in {run.num_batches} batches"
    none = ", so it had no effect" if run.num_by_priority == 0 else ""
    return f"{run.num_by_priority} of {run.num_batches} batches drawn by priority{none}"


def hardest_samples(scores: Tensor, measured_at: Tensor, num: int = 10) -> list[tuple[int, float]]:
    """Numbers and scores of the samples with the largest scores, among those that have one.

    Args:
        scores: Of all samples.
        measured_at: Negative where there is none yet.
        num: How many.
    """
    known = scores.where(measured_at >= 0, -1.0)
    top = known.topk(min(num, int((measured_at >= 0).sum())))
    return list(zip(top.indices.tolist(), top.values.tolist(), strict=True))


def hardest_classes(scores: Tensor, classes: Tensor, num: int = 3) -> list[tuple[int, float]]:
    """Classes with the largest mean scores, with these.

    Args:
        scores: Of all samples.
        classes: Of all samples, negative where it is not known.
        num: How many.
    """
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
