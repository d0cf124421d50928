"""Monitor whether the noise of the gradients is Gaussian."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor

from lightning_sgd._validation import expect
from lightning_sgd.callbacks._monitoring.gradient_collector import GradientCollector, GradientSource
from lightning_sgd.callbacks._monitoring.gradient_monitor import GradientMonitor
from lightning_sgd.callbacks._monitoring.history import TimeSeries
from lightning_sgd.functional.noise.gaussian_null import TestName
from lightning_sgd.functional.noise.gradient_gaussianity import (
    MIN_GRADIENTS,
    GaussianityResult,
    GaussianitySettings,
    gradient_gaussianity,
)
from lightning_sgd.functional.noise.normality_tests import MAX_SAMPLES

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

VERDICTS = {
    "Gaussian": "nothing speaks against Gaussian noise in",
    "not Gaussian": "noise is not Gaussian in",
    "Gaussian on random directions only": (
        "noise is not Gaussian by coordinate, though nothing speaks against it in sums over coordinates, in"
    ),
    "undecided": "there is no noise that could be tested in",
}
"""By verdict, how a sentence about it begins."""
CURVES = {
    "random": ("on random directions", "#0072B2", "o-", ""),
    "coordinate": ("by coordinate", "#D55E00", "s--", "coordinate_"),
}
"""By family of directions: its label, colour and line in the figure, and the prefix of its quantities."""


class GaussianityMonitor(GradientMonitor):
    r"""Log in how many directions gradient noise is not Gaussian, and in how many Gaussian noise would seem so.

    Gradients :math:`g_i` of several batches are taken at the current weights. Their noise
    :math:`u_i = g_i - \bar g` is projected on random directions v, and :math:`\langle u_1, v\rangle, …,
    \langle u_M, v\rangle` are tested for normality; the noise is Gaussian if all projections are. Tests on several
    directions depend on each other, so the share of rejected directions is calibrated by Gaussian noise of the same
    covariance.

    .. list-table::
        :header-rows: 1

        * - key
          - meaning
        * - ``gaussianity/rejected``
          - share of random directions rejected at ``level``
        * - ``gaussianity/expected``
          - mean of that share for Gaussian noise
        * - ``gaussianity/limit``
          - the share that Gaussian noise exceeds with probability ``false_alarm_rate`` / 2
        * - ``gaussianity/p_value``
          - calibrated p-value of the share
        * - ``gaussianity/coordinate_rejected``, ``…_expected``, ``…_limit``, ``…_p_value``
          - the same for single coordinates: a random direction is a sum over all coordinates, which looks Gaussian
            whatever the law of each
        * - ``gaussianity/statistic``
          - mean of the test statistic over random directions
        * - ``gaussianity/expected_statistic``
          - its mean for Gaussian noise and as many gradients; the statistic means nothing without it
        * - ``gaussianity/rejected_anderson_darling``
          - share rejected by the paper's second test
        * - ``gaussianity/norm_kurtosis``
          - how much lengths of the noise differ, as excess kurtosis of random projections
        * - ``gaussianity/effective_dimension``
          - over how many directions the noise spreads
        * - ``gaussianity/rejected/<parameter>``
          - share of rejected random directions of one parameter, with ``log_layers``

    The end message has the verdict with its reason. A figure has a QQ plot.

    Cost: ``num_batches`` forward and backward passes per look, shared out over the ranks, and about a second on one CPU
    core for the tests, as far as ``max_overhead`` allows; memory for ``num_batches`` × ``num_coordinates`` numbers.
    Training is not changed, to the last bit.

    Args:
        num_batches: Gradients per look [M], 20 to 5000.
        batch_size: Samples per gradient [b], by default that of training; the answer is for this size alone.
        num_directions: Random directions, and as many coordinates [R].
        test: Test on one direction: ``"shapiro_wilk"``, ``"anderson_darling"`` or ``"jarque_bera"``.
        level: Level of the test on one direction.
        false_alarm_rate: How often the verdict on Gaussian noise may be another, at one look.
        num_bootstraps: Samples of Gaussian noise for the calibration [B].
        num_coordinates: About how many coordinates to keep, spread over all parameters; null for all.
        train_mode: Whether dropout and batch statistics are as in training, or as in evaluation.
        loss_fn: Function of module and batch that returns the loss; by default what ``training_step`` returns, with
            logging switched off. Manual optimization needs it.
        log_layers: Also log ``gaussianity/rejected/<parameter>``.
        seed: Decides on batches, coordinates and directions.
        every_n_steps: Look after so many optimizer steps; by default after every 500.
        every_n_epochs: Look after so many epochs; instead of ``every_n_steps``.
        max_overhead: Largest share of the training time for looking, which the interval is stretched to keep; null
            never stretches it.
        save_figure: Save a figure in the log folder at the end, and hand it to loggers that take figures; needs the
            extra ``report``.
        source: Where the gradients come from: ``extra`` are passes over extra batches; ``microbatches`` are the
            ``accumulate_grad_batches`` gradients of one step on all ranks, ``ranks`` the gradient of each rank in one
            step. The last two cost no pass, but a step must have 20 gradients or more.

    Raises:
        ValueError: If an argument is out of range, or the source has one gradient only.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> trainer = Trainer(callbacks=[GaussianityMonitor(every_n_steps=100)], logger=False)

    Reference:
        Abhishek Panigrahi, Raghav Somani, Navin Goyal, Praneeth Netrapalli. Non-Gaussianity of Stochastic Gradient
        Noise. NeurIPS workshop Science meets Engineering of Deep Learning, 2019.
    """

    metric_keys: ClassVar[tuple[str, ...]] = (
        "gaussianity/rejected",
        "gaussianity/expected",
        "gaussianity/limit",
        "gaussianity/p_value",
        "gaussianity/coordinate_rejected",
        "gaussianity/coordinate_expected",
        "gaussianity/coordinate_limit",
        "gaussianity/coordinate_p_value",
        "gaussianity/statistic",
        "gaussianity/expected_statistic",
        "gaussianity/rejected_anderson_darling",
        "gaussianity/norm_kurtosis",
        "gaussianity/effective_dimension",
        "gaussianity/rejected/*",
    )
    figure_stem, figure_key, headline = "gaussianity", "gaussianity/quantiles", "rejected"

    history: GaussianityHistory

    def __init__(
        self,
        num_batches: int = 256,
        batch_size: int | None = None,
        num_directions: int = 256,
        test: TestName = "shapiro_wilk",
        level: float = 0.05,
        false_alarm_rate: float = 0.01,
        num_bootstraps: int = 199,
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
        between = f"between {MIN_GRADIENTS} and {MAX_SAMPLES}"
        remedy = "Fewer show nothing, and for more the p-values are not valid; the default is 256."
        enough = MIN_GRADIENTS <= num_batches <= MAX_SAMPLES
        expect(enough, "num_batches", between, num_batches, remedy)
        self.settings = GaussianitySettings(
            num_directions, test, level, false_alarm_rate, num_bootstraps
        )
        collector = GradientCollector(
            num_batches, num_coordinates, batch_size, train_mode, loss_fn, seed, source
        )
        self.seed = seed
        super().__init__(
            collector, every_n_steps, every_n_epochs, max_overhead, 500, log_layers, save_figure
        )

    def reset(self) -> None:
        """Clear what was found."""
        self.history = GaussianityHistory()

    def identity(self) -> dict[str, Any]:
        """Return the settings of sample and tests, and the interval."""
        settings = super().identity()
        interval = settings.pop("interval")
        return {**settings, **asdict(self.settings), "interval": interval}

    def look(self, trainer: Trainer, pl_module: LightningModule) -> Mapping[str, float]:
        """Collect gradients, and test their noise."""
        sample = self.collector.sample(trainer, pl_module)
        if sample is None or len(sample.rows) < MIN_GRADIENTS:
            return {}
        generator = torch.Generator().manual_seed(self.seed)
        layers = sample.layers if self.log_layers else None
        rows = sample.rows[:MAX_SAMPLES]  # ranks may have rounded their number up
        found = gradient_gaussianity(rows, generator, self.settings, layers)
        self.history.record(sample.step, found, sample.batch_size)
        named = {f"rejected/{name}": share for name, share in found.layers.items()}
        return {f"gaussianity/{name}": value for name, value in (found.values | named).items()}

    def describe_sample(self, trainer: Trainer, pl_module: LightningModule) -> str:
        """Return how many gradients are collected, and how many directions tested."""
        tests = self.settings.num_directions
        num = min(tests, self.collector.coordinates(pl_module).num_coordinates)
        steps = self.collector.steps
        is_enough = steps is None or steps.num_gradients(trainer) >= MIN_GRADIENTS
        few = "" if is_enough else f", too few to test, which takes {MIN_GRADIENTS}"
        collected = super().describe_sample(trainer, pl_module)
        return f"{collected}, {tests} random directions and {num} coordinates tested{few}"

    def describe_findings(self) -> str:
        """Return the verdict with its reason, and since when it holds."""
        return self.history.describe(self.settings)

    def plot(self) -> Figure:
        """Draw a QQ plot of the last look, and the share of rejected directions over time.

        Raises:
            ModuleNotFoundError: If matplotlib is not installed.
        """
        return draw_gaussianity(self.history, self.settings.level)

    def state_dict(self) -> dict[str, Any]:
        """Return what was found, and the state of the schedule."""
        return {**super().state_dict(), "history": self.history.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore :meth:`state_dict`."""
        super().load_state_dict(state_dict)
        self.history = GaussianityHistory(**copy.deepcopy(state_dict["history"]))


@dataclass
class GaussianityHistory(TimeSeries):
    """Results of tests at several moments, and their summary in words; all of it goes into a checkpoint.

    Attributes:
        verdicts: The verdict at each of ``times``.
        quantiles: By family of directions, mean order statistics at the last time.
        tested: Batch size, and number of directions of each family, at the last time.
    """

    verdicts: list[str] = field(default_factory=list)
    quantiles: dict[str, list[float]] = field(default_factory=dict)
    tested: dict[str, int] = field(default_factory=dict)

    def record(self, step: int, found: GaussianityResult, batch_size: int) -> None:
        """Append a result on gradients of ``batch_size`` samples, unless there is one of this step already."""
        if not self.add(step, found.values):
            return
        self.verdicts.append(found.verdict)
        self.quantiles = {
            "random": list(found.random_quantiles),
            "coordinate": list(found.coordinate_quantiles),
        }
        self.tested = {
            "batch_size": batch_size,
            "random": found.random.num_directions,
            "coordinate": found.coordinate.num_directions,
        }

    def describe(self, settings: GaussianitySettings) -> str:
        """Return the last verdict with its reason, and when noise was not Gaussian."""
        begin = f"at step {self.times[-1]} {VERDICTS[self.verdicts[-1]]} batches of {self.tested['batch_size']}"
        if math.isnan(self.values["rejected"][-1]):
            return f"{begin}.{self._past()}"
        random = self._share("random", "random directions", "")
        single = self._share("coordinate", "coordinates", "coordinate_")
        return (
            f"{begin}: rejected at the {settings.level:.2g} level are {random} and {single}, calibrated at a rate of "
            f"false alarms of {settings.false_alarm_rate:.2g}.{self._past()}"
        )

    def _share(self, family: str, what: str, prefix: str) -> str:
        names = (f"{prefix}{name}" for name in ("rejected", "limit", "p_value"))
        rejected, limit, p_value = (self.values[name][-1] for name in names)
        if math.isnan(rejected):
            return f"no {what}, for there is no noise in them,"
        return (
            f"{rejected:.0%} of {self.tested[family]} {what} (Gaussian noise: at most {limit:.0%}, "
            f"p = {p_value:.2g})"
        )

    def _past(self) -> str:
        """Return at how many looks random directions were not Gaussian, if there were several."""
        if len(self.times) < 2:
            return ""
        pairs = zip(self.times, self.verdicts, strict=True)
        steps = [time for time, verdict in pairs if verdict == "not Gaussian"]
        first = f", first at step {steps[0]}" if steps else ""
        return (
            f" Not Gaussian on random directions at {len(steps)} of {len(self.times)} looks{first}."
        )


def draw_gaussianity(history: GaussianityHistory, level: float) -> Figure:
    """Draw two panels: a QQ plot, and shares over steps with the limits that Gaussian noise keeps.

    Args:
        history: Results by time.
        level: Mean share of rejected directions for Gaussian noise.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8.0, 3.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    for family, (name, color, line, prefix) in CURVES.items():
        _draw_quantiles(left, history.quantiles.get(family, ()), name, color, line[0])
        for quantity, style in (("rejected", line), ("limit", ":")):
            series = history.values.get(f"{prefix}{quantity}", [])
            right.plot(history.times[: len(series)], series, style, color=color, markersize=3)
    left.axline((0, 0), slope=1, color="#999999", linewidth=0.8)
    left.set(xlabel="normal quantile", ylabel="mean quantile of the noise", title="last look")
    right.axhline(level, color="#999999", linewidth=0.8)
    right.set(xlabel="optimizer step", ylabel="share of directions rejected", ylim=(-0.03, 1.03))
    right.set_title("dotted: limit for Gaussian noise")
    left.legend(fontsize="small", loc="upper left")
    return figure


def _draw_quantiles(
    axes: Axes, quantiles: Sequence[float], name: str, color: str, marker: str
) -> None:
    num = len(quantiles)
    places = (torch.arange(1, num + 1, dtype=torch.float64) - 0.375) / (num + 0.25)
    scores = torch.special.ndtri(places).tolist()
    axes.plot(scores, quantiles, marker, color=color, markersize=3, label=name)
