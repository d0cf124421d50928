"""Monitor the noise scale of gradients, and recommend a batch size."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import astuple
from typing import TYPE_CHECKING, Any, ClassVar

from lightning.pytorch import LightningModule, Trainer
from torch import Tensor

from lightning_sgd._validation import expect
from lightning_sgd.callbacks._monitoring.gradient_collector import GradientCollector, GradientSource
from lightning_sgd.callbacks._monitoring.gradient_monitor import GradientMonitor
from lightning_sgd.callbacks._monitoring.history import TimeSeries
from lightning_sgd.data.effective_batch import effective_batch_size
from lightning_sgd.functional.noise.gradient_sample import GradientSample
from lightning_sgd.functional.noise.noise_scale import (
    GradientNoise,
    NoiseScale,
    gradient_noise,
    noise_scale,
    power_of_two,
    steps_ratio,
    total_noise,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

BLUE, ORANGE, GREY = "#0072B2", "#D55E00", "#555555"


class CriticalBatchSizeMonitor(GradientMonitor):
    r"""Log the batch size at which noise and signal in the gradients are equal, and recommend one at the end.

    Several gradients :math:`g_i` of b samples each are taken at the current weights. Products of two of them have the
    mean :math:`\|G\|^2`, their squares :math:`\|G\|^2 + \mathrm{Tr}(\Sigma)/b`.

    .. list-table::
        :header-rows: 1

        * - key
          - meaning
        * - ``critical_batch_size/noise_scale``
          - :math:`\mathrm{Tr}(\Sigma)/\|G\|^2` in samples, from sums over the last ``window`` looks; infinite where no
            gradient is seen in the noise
        * - ``critical_batch_size/low``, ``critical_batch_size/high``
          - the noise scale less and plus two standard errors
        * - ``critical_batch_size/noise_trace``
          - Tr(Σ) at this look
        * - ``critical_batch_size/gradient_sq``
          - ‖G‖² at this look
        * - ``critical_batch_size/noise_scale/<parameter>``
          - noise scale of one parameter, with ``log_layers``

    Batches far below the noise scale may be doubled for nearly half the steps; far above it, doubling saves nothing.
    The end message compares the batch of a step with the noise scale, recommends the nearest power of two, and says
    what that does to steps, samples and the learning rate. A figure shows the same.

    Cost: ``num_batches`` forward and backward passes per look, shared out over the ranks, as far as ``max_overhead``
    allows, or none, with another ``source``; memory for ``num_batches`` sketches. Training is not changed, to the last
    bit.

    Args:
        num_batches: Gradients per look [m].
        batch_size: Samples per gradient [b]; by default that of training.
        num_coordinates: Width of the sketch that is kept of a gradient; null keeps whole gradients.
        train_mode: Whether dropout and batch statistics are as in training, or as in evaluation.
        loss_fn: Function of module and batch that returns the loss; by default what ``training_step`` returns, with
            logging switched off. Manual optimization needs it.
        log_layers: Also log ``critical_batch_size/noise_scale/<parameter>``.
        window: Number of last looks that are added up.
        seed: Decides on batches and sketches.
        every_n_steps: Look after so many optimizer steps; by default after every 100.
        every_n_epochs: Look after so many epochs; instead of ``every_n_steps``.
        max_overhead: Largest share of the training time for looking, which the interval is stretched to keep; null
            never stretches it.
        save_figure: Save a figure in the log folder at the end, and hand it to loggers that take figures; needs the
            extra ``report``.
        source: Where the gradients come from: ``extra`` are passes over extra batches; ``microbatches`` are the
            ``accumulate_grad_batches`` gradients of one step on all ranks, ``ranks`` the gradient of each rank in one
            step. The last two cost no pass.

    Raises:
        ValueError: If an argument is out of range, or the source has one gradient only.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> trainer = Trainer(callbacks=[CriticalBatchSizeMonitor()], logger=False)

    Reference:
        Prateek Jain, Sham M. Kakade, Rahul Kidambi, Praneeth Netrapalli, Aaron Sidford. Parallelizing Stochastic
        Gradient Descent for Least Squares Regression. JMLR 18, 2018. For networks: Sam McCandlish, Jared Kaplan,
        Dario Amodei, OpenAI Dota Team. An Empirical Model of Large-Batch Training. arXiv 1812.06162, 2018.
    """

    metric_keys: ClassVar[tuple[str, ...]] = (
        "critical_batch_size/noise_scale",
        "critical_batch_size/low",
        "critical_batch_size/high",
        "critical_batch_size/noise_trace",
        "critical_batch_size/gradient_sq",
        "critical_batch_size/noise_scale/*",
    )
    figure_stem, figure_key = "critical_batch_size", "critical_batch_size/figure"
    headline = "noise_scale"

    def __init__(
        self,
        num_batches: int = 16,
        batch_size: int | None = None,
        num_coordinates: int | None = 65536,
        train_mode: bool = True,
        loss_fn: Callable[[LightningModule, Any], Tensor] | None = None,
        log_layers: bool = False,
        window: int = 10,
        seed: int = 0,
        every_n_steps: int | None = None,
        every_n_epochs: int | None = None,
        max_overhead: float | None = 0.02,
        save_figure: bool = True,
        source: GradientSource = "extra",
    ) -> None:
        remedy = "Noise is measured by differences between gradients; the default is 16."
        expect(num_batches >= 2, "num_batches", "at least 2", num_batches, remedy)
        expect(window >= 1, "window", "at least 1", window, "The default is 10.")
        collector = GradientCollector(
            num_batches, num_coordinates, batch_size, train_mode, loss_fn, seed, source, sketch=True
        )
        self.window = window
        super().__init__(
            collector, every_n_steps, every_n_epochs, max_overhead, 100, log_layers, save_figure
        )

    @property
    def noise_scale(self) -> NoiseScale | None:
        """The noise scale over the last looks; ``None`` before the first one."""
        looks = self._looks.get("")
        return noise_scale(total_noise(looks)) if looks else None

    def reset(self) -> None:
        """Clear what was found."""
        super().reset()
        self.batch_of_step: int | None = None
        self._looks: dict[str, list[GradientNoise]] = {}  # by parameter; "" for all of them

    def identity(self) -> dict[str, Any]:
        """Return the settings of the sample, the window and the interval."""
        settings = super().identity()
        interval = settings.pop("interval")
        return {**settings, "window": self.window, "interval": interval}

    def look(self, trainer: Trainer, pl_module: LightningModule) -> Mapping[str, float]:
        """Collect gradients, and measure their noise and signal."""
        sample = self.collector.sample(trainer, pl_module)
        if sample is None or len(sample.rows) < 2:
            return {}
        self.batch_of_step = _batch_of_step(trainer)
        values = self._record(sample)
        for name, part in sample.layers.items() if self.log_layers else ():
            noise = gradient_noise(sample.rows[:, part], sample.batch_size)
            values[f"noise_scale/{name}"] = self._windowed(name, noise).value
        return {f"critical_batch_size/{name}": value for name, value in values.items()}

    def describe_sample(self, trainer: Trainer, pl_module: LightningModule) -> str:
        """Return how many gradients are collected."""
        return f"noise scale from {super().describe_sample(trainer, pl_module)}"

    def describe_findings(self) -> str:
        """Return the noise scale, and the batch size that follows from it."""
        scale = self.noise_scale
        assert scale is not None  # there is a measurement
        when = self.times[-self.window :]
        return (
            f"{describe_noise_scale(scale, when)}{recommend_batch_size(scale, self.batch_of_step)}"
        )

    def plot(self) -> Figure:
        """Draw the noise scale over time, and the price of a batch size in steps and in samples.

        Raises:
            ModuleNotFoundError: If matplotlib is not installed.
        """
        return draw_batch_sizes(self.times, self.values, self.batch_of_step)

    def state_dict(self) -> dict[str, Any]:
        """Return what was found, and the state of the schedule."""
        looks = {name: [list(astuple(look)) for look in of] for name, of in self._looks.items()}
        return {
            **super().state_dict(),
            **self.history.state_dict(),
            "looks": looks,
            "batch_of_step": self.batch_of_step,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore :meth:`state_dict`."""
        super().load_state_dict(state_dict)
        looks = state_dict["looks"].items()
        self._looks = {name: [GradientNoise(*look) for look in of] for name, of in looks}
        self.history = TimeSeries.from_state(state_dict)
        self.batch_of_step = state_dict["batch_of_step"]

    def _record(self, sample: GradientSample) -> dict[str, float]:
        noise = gradient_noise(sample.rows, sample.batch_size)
        scale = self._windowed("", noise)
        values = {
            "noise_scale": scale.value,
            "low": scale.low,
            "high": scale.high,
            "noise_trace": noise.trace,
            "gradient_sq": noise.gradient_sq,
        }
        self.history.add(sample.step, values)
        return values

    def _windowed(self, name: str, noise: GradientNoise) -> NoiseScale:
        """Return the noise scale of the last looks, this one included, of one parameter or of all."""
        looks = self._looks.setdefault(name, [])
        looks.append(noise)
        del looks[: -self.window]
        return noise_scale(total_noise(looks))


def _batch_of_step(trainer: Trainer) -> int | None:
    """Return the samples of an optimizer step; ``None`` with several loaders, or if the loader does not tell."""
    try:
        return effective_batch_size(trainer)
    except ValueError:
        return None


def describe_noise_scale(scale: NoiseScale, times: Sequence[int]) -> str:
    """Return the noise scale with its interval, and the optimizer steps at which it was measured."""
    when = f"at step {times[-1]}" if len(times) == 1 else f"over steps {times[0]} to {times[-1]}"
    if math.isinf(scale.high):
        value = "" if math.isinf(scale.value) else f" {scale.value:.3g} samples,"
        return f"noise scale{value} {when}, above {scale.low:.3g} for certain"
    return f"noise scale {scale.value:.3g} samples (between {scale.low:.3g} and {scale.high:.3g}) {when}"


def recommend_batch_size(scale: NoiseScale, batch_size: int | None) -> str:
    """Return whether another batch size would pay, and which; continues :func:`describe_noise_scale`.

    Args:
        scale: The noise scale over the last looks.
        batch_size: Samples of a step; ``None`` where that is not known.

    Example:
        >>> recommend_batch_size(NoiseScale(100.0, 80.0, 130.0), batch_size=100).split(":")[0]
        ', about the 100 of a step, which is a good compromise'
        >>> recommend_batch_size(NoiseScale(math.nan, 0.0, math.inf), batch_size=100)
        '. Nothing follows from that.'
    """
    if batch_size is None or math.isnan(scale.value):
        return (
            ". Nothing follows from that." if batch_size else ". Batches up to about that size pay."
        )
    if scale.low <= batch_size <= scale.high:
        doubled = _price(scale, batch_size, 2 * batch_size, "twice the batch")
        return f", about the {batch_size} of a step, which is a good compromise: {doubled}."
    if batch_size < scale.low:
        wanted = scale.low if math.isinf(scale.value) else scale.value
        best = max(power_of_two(wanted), 2 * batch_size)
        price = _price(scale, batch_size, best, f"{best} samples in a step")
        return f", above the {batch_size} of a step: a larger batch pays. {price.capitalize()}."
    best = min(power_of_two(scale.value), max(batch_size // 2, 1))
    price = _price(scale, batch_size, best, f"{best} samples in a step")
    return (
        f", below the {batch_size} of a step: a larger batch would not pay. {price.capitalize()}."
    )


def _price(scale: NoiseScale, batch_size: int, other: int, name: str) -> str:
    steps = steps_ratio(scale.value, batch_size, other)
    return (
        f"{name} would take {steps:.2g} times the steps and {steps * other / batch_size:.2g} times the samples, at a "
        f"learning rate up to {1 / steps:.2g} times today's"
    )


def draw_batch_sizes(
    times: Sequence[int], values: Mapping[str, Sequence[float]], batch_size: int | None
) -> Figure:
    """Draw two panels: the noise scale over steps, and the price of a batch size in steps and in samples.

    Args:
        times: Optimizer steps of the looks.
        values: ``noise_scale``, ``low`` and ``high``, one number for each of ``times``.
        batch_size: Samples of a step; ``None`` where that is not known.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8.0, 3.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    found = [value for value in values.get("noise_scale", ()) if 0 < value < math.inf]
    if found:
        _draw_times(left, times, values, max(found))
        _draw_price(right, found[-1], batch_size)
    if batch_size is not None:
        left.axhline(batch_size, color=GREY, linestyle=":", label="batch of a step")
    left.set(xlabel="optimizer step", ylabel="samples", yscale="log", title="noise scale")
    if left.lines:
        left.legend(fontsize="small", loc="upper right")
    return figure


def _draw_times(
    axes: Axes, times: Sequence[int], values: Mapping[str, Sequence[float]], largest: float
) -> None:
    low, high = ([min(max(v, 0.1), 100 * largest) for v in values[key]] for key in ("low", "high"))
    axes.fill_between(list(times), low, high, color=BLUE, alpha=0.15, label="two standard errors")
    shown = [value if 0 < value < math.inf else math.nan for value in values["noise_scale"]]
    axes.plot(times, shown, "o-", color=BLUE, markersize=3)


def _draw_price(axes: Axes, scale: float, batch_size: int | None) -> None:
    sizes = [scale * 2 ** (k / 4) for k in range(-20, 21)]
    axes.loglog(sizes, [1 + scale / size for size in sizes], color=BLUE, label="steps")
    axes.loglog(sizes, [1 + size / scale for size in sizes], color=ORANGE, label="samples")
    axes.axvline(scale, color=BLUE, linewidth=0.8, linestyle="--")
    if batch_size is not None:
        axes.axvline(batch_size, color=GREY, linestyle=":")
    axes.set(xlabel="batch size", ylabel="times the least", title="price, after the last look")
    axes.legend(fontsize="small", loc="upper center")
