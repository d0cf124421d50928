"""Monitor how heavy-tailed the noise of the gradients is."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor

from lightning_sgd._validation import expect
from lightning_sgd.callbacks._monitoring.gradient_collector import GradientCollector, GradientSource
from lightning_sgd.callbacks._monitoring.gradient_monitor import GradientMonitor
from lightning_sgd.callbacks._monitoring.history import TimeSeries
from lightning_sgd.functional.noise.gradient_tail_index import (
    GradientTailIndex,
    gradient_tail_index,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

CURVES = {
    "coordinate": ("by coordinate", "#0072B2", "o-"),
    "pooled": ("pooled, as in the paper", "#D55E00", "s--"),
    "pooled_shuffled": ("pooled, shuffled", "#555555", "^:"),
}
"""By quantity: its label, colour and line in the figure."""


class TailIndexMonitor(GradientMonitor):
    r"""Log the tail index of gradient noise, and checks of whether that number can be trusted.

    Gradients of several batches are taken at the current weights. If their noise were symmetric α-stable, sums of
    :math:`K_1` independent entries would be :math:`K_1^{1/\alpha}` times as large as single ones. α = 2 is Gaussian;
    a smaller α has heavier tails.

    .. list-table::
        :header-rows: 1

        * - key
          - meaning
        * - ``tail_index/coordinate``
          - index of each coordinate over batches, 1/α averaged over coordinates: the index of the noise
        * - ``tail_index/coordinate_error``
          - standard error of the index
        * - ``tail_index/pooled``
          - index as in the paper, of all coordinates of all batches as one sequence. Coordinates differ in scale and
            depend on each other, so that it is between 1 and 1.5 for Gaussian noise, too
        * - ``tail_index/pooled_shuffled``
          - the same with entries in random order. A gap to ``pooled`` shows dependence; a value below ``coordinate``
            shows unequal scales
        * - ``tail_index/zero_fraction``
          - share of entries that are exactly zero, as from dead units
        * - ``tail_index/coordinate/<parameter>``
          - index of one parameter, with ``log_layers``

    The end message has the verdict ``stable``, ``finite variance`` or ``undecided``. A figure shows the stability
    profile.

    Cost: ``num_batches`` forward and backward passes per look, shared out over the ranks, as far as ``max_overhead``
    allows; memory for ``num_batches`` × ``num_coordinates`` numbers. Training is not changed, to the last bit.

    Args:
        num_batches: Gradients per look [M].
        batch_size: Samples per gradient [b]; by default that of training.
        num_coordinates: About how many coordinates to keep, spread over all parameters; null for all.
        train_mode: Whether dropout and batch statistics are as in training, or as in evaluation.
        loss_fn: Function of module and batch that returns the loss; by default what ``training_step`` returns, with
            logging switched off. Manual optimization needs it.
        log_layers: Also log ``tail_index/coordinate/<parameter>``.
        seed: Decides on batches and coordinates.
        every_n_steps: Look after so many optimizer steps; by default after every 500.
        every_n_epochs: Look after so many epochs; instead of ``every_n_steps``.
        max_overhead: Largest share of the training time for looking, which the interval is stretched to keep; null
            never stretches it.
        save_figure: Save a figure in the log folder at the end, and hand it to loggers that take figures; needs the
            extra ``report``.
        source: Where the gradients come from: ``extra`` are passes over extra batches; ``microbatches`` are the
            ``accumulate_grad_batches`` gradients of one step on all ranks, ``ranks`` the gradient of each rank in one
            step. The last two cost no pass, and have as many gradients as a step has: few tell little.

    Raises:
        ValueError: If an argument is out of range, or the source has one gradient only.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> trainer = Trainer(callbacks=[TailIndexMonitor(every_n_steps=100)], logger=False)

    Reference:
        Umut Şimşekli, Levent Sagun, Mert Gürbüzbalaban. A Tail-Index Analysis of Stochastic Gradient Noise in Deep
        Neural Networks. ICML, 2019.
    """

    metric_keys: ClassVar[tuple[str, ...]] = (
        "tail_index/coordinate",
        "tail_index/coordinate_error",
        "tail_index/pooled",
        "tail_index/pooled_shuffled",
        "tail_index/zero_fraction",
        "tail_index/coordinate/*",
    )
    figure_stem, figure_key, headline = "tail_index", "tail_index/profile", "pooled"

    def __init__(
        self,
        num_batches: int = 64,
        batch_size: int | None = None,
        num_coordinates: int | None = 131072,
        train_mode: bool = True,
        loss_fn: Callable[[LightningModule, Any], Tensor] | None = None,
        log_layers: bool = False,
        seed: int = 0,
        every_n_steps: int | None = None,
        every_n_epochs: int | None = None,
        max_overhead: float | None = 0.02,
        save_figure: bool = True,
        source: GradientSource = "extra",
    ) -> None:
        remedy = "Noise is measured by differences between gradients; the default is 64."
        expect(num_batches >= 2, "num_batches", "at least 2", num_batches, remedy)
        collector = GradientCollector(
            num_batches, num_coordinates, batch_size, train_mode, loss_fn, seed, source
        )
        self.seed = seed
        super().__init__(
            collector, every_n_steps, every_n_epochs, max_overhead, 500, log_layers, save_figure
        )

    def reset(self) -> None:
        """Clear what was found."""
        super().reset()
        self.profiles: dict[str, list[float]] = {}
        self.verdict: str = "undecided"

    def look(self, trainer: Trainer, pl_module: LightningModule) -> Mapping[str, float]:
        """Collect gradients, and estimate the tail index of their noise."""
        sample = self.collector.sample(trainer, pl_module)
        if sample is None:
            return {}
        generator = torch.Generator().manual_seed(self.seed)
        found = gradient_tail_index(sample, generator, self.log_layers)
        values = self._record(sample.step, found)
        layers = {f"coordinate/{name}": alpha for name, alpha in found.layers.items()}
        values |= layers if self.log_layers else {}
        return {f"tail_index/{name}": value for name, value in values.items()}

    def describe_findings(self) -> str:
        """Return index and verdict, and how far the pooled index is from them."""
        last = self.history.latest()
        return (
            f"by coordinate α = {last['coordinate']:.2f} ± {last['coordinate_error']:.2f} at step {self.times[-1]}, "
            f"{self.verdict}; pooled as in the paper {last['pooled']:.2f}, in random order "
            f"{last['pooled_shuffled']:.2f}, which unequal scales and dependence pull towards 1 whatever the tails."
        )

    def plot(self) -> Figure:
        """Draw the index over time, and the stability profiles of the last look.

        Raises:
            ModuleNotFoundError: If matplotlib is not installed.
        """
        curves = {name: self.values.get(name, []) for name in CURVES}
        return draw_tail_index(self.times, curves, self.profiles)

    def state_dict(self) -> dict[str, Any]:
        """Return what was found, and the state of the schedule."""
        return {
            **super().state_dict(),
            **self.history.state_dict(),
            "profiles": {name: list(profile) for name, profile in self.profiles.items()},
            "verdict": self.verdict,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore :meth:`state_dict`."""
        super().load_state_dict(state_dict)
        self.history = TimeSeries.from_state(state_dict)
        self.profiles = {name: list(profile) for name, profile in state_dict["profiles"].items()}
        self.verdict = state_dict["verdict"]

    def _record(self, step: int, found: GradientTailIndex) -> dict[str, float]:
        values = {
            "coordinate": found.coordinate.alpha,
            "coordinate_error": found.coordinate.standard_error,
            "pooled": found.pooled.alpha,
            "pooled_shuffled": found.pooled_shuffled,
            "zero_fraction": found.coordinate.zero_fraction,
        }
        self.history.add(step, values)
        self.profiles = {
            "coordinate": list(found.coordinate.profile),
            "pooled": list(found.pooled_profile.profile),
        }
        self.verdict = found.coordinate.verdict
        return values


def draw_tail_index(
    times: Sequence[int],
    values: Mapping[str, Sequence[float]],
    profiles: Mapping[str, Sequence[float]],
) -> Figure:
    """Draw two panels: index over steps, and local index over the length of sums.

    Args:
        times: Optimizer steps of the looks.
        values: By quantity, one number for each time.
        profiles: By quantity, the local indices between sums of 1, 2, 4, … samples.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8.0, 3.2), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    for key, series in values.items():
        name, color, line = CURVES[key]
        left.plot(times, series, line, color=color, label=name, markersize=3)
    for key, profile in profiles.items():
        name, color, line = CURVES[key]
        right.plot([2**j for j in range(len(profile))], profile, line, color=color, label=name)
    left.set(xlabel="optimizer step", ylabel="tail index α", ylim=(0, 3))
    right.set(xlabel="samples per sum", title="stability profile at the last look")
    if any(profiles.values()):  # an empty logarithmic axis cannot be drawn
        right.set(xscale="log")
    for axes in (left, right):
        _mark_gaussian(axes)
    left.legend(fontsize="small", loc="lower left")
    return figure


def _mark_gaussian(axes: Axes) -> None:
    axes.axhline(2.0, color="#999999", linewidth=0.8)
    axes.text(0.99, 2.03, "Gaussian", transform=axes.get_yaxis_transform(), ha="right", fontsize=7)
