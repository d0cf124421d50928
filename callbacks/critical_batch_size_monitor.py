"""Watches the noise scale of gradients, and says whether a larger batch would pay."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import astuple
from typing import TYPE_CHECKING, Any, ClassVar

from lightning.pytorch import LightningModule, Trainer
from torch import Tensor

from lightning_sgd._validation import expect
from lightning_sgd.callbacks._batch_size_advice import advice, describe_scale
from lightning_sgd.callbacks._batch_size_figure import STEM, draw_batch_sizes
from lightning_sgd.callbacks._monitoring.gradient_collector import GradientCollector, GradientSource
from lightning_sgd.callbacks._monitoring.gradient_monitor import GradientMonitor
from lightning_sgd.data.effective_batch import effective_batch_size
from lightning_sgd.functional.noise.gradient_sample import GradientSample
from lightning_sgd.functional.noise.noise_scale import (
    GradientNoise,
    NoiseScale,
    gradient_noise,
    noise_scale,
    total_noise,
)

if TYPE_CHECKING:
    from matplotlib.figure import Figure


class CriticalBatchSizeMonitor(GradientMonitor):
    r"""Logs the batch size at which noise and signal in the gradients are equal, and recommends one at the end.

    At the weights as they are, several gradients :math:`g_i` of b samples each are taken. Products of two of them have
    the mean :math:`\|G\|^2`, their squares :math:`\|G\|^2 + \mathrm{Tr}(\Sigma)/b`. Logged are

    - ``critical_batch_size/noise_scale``: :math:`\mathrm{Tr}(\Sigma)/\|G\|^2`, in samples, from sums over the last
      ``window`` looks; infinite where no gradient is seen in the noise,
    - ``critical_batch_size/low`` and ``critical_batch_size/high``: two standard errors on both sides,
    - ``critical_batch_size/noise_trace`` and ``critical_batch_size/gradient_sq``: Tr(Σ) and ‖G‖² of this look.

    Batches far below the noise scale may be doubled for nearly half the steps; far above it, doubling saves nothing.
    The line at the end compares the batch of a step with it, recommends the nearest power of two, and says what that
    does to steps, samples and the learning rate. A figure shows the same.

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
        source: Where the gradients come from: ``extra`` are passes over batches of its own; ``microbatches`` are the
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

    times: list[int]
    values: dict[str, list[float]]
    batch_of_step: int | None
    _looks: dict[str, list[GradientNoise]]

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
        steps = 100 if every_n_steps is None and every_n_epochs is None else every_n_steps
        super().__init__(steps, every_n_epochs, max_overhead)
        remedy = "Noise is in differences between gradients; the default is 16."
        expect(num_batches >= 2, "num_batches", "at least 2", num_batches, remedy)
        expect(window >= 1, "window", "at least 1", window, "The default is 10.")
        self.collector = GradientCollector(
            num_batches, num_coordinates, batch_size, train_mode, loss_fn, seed, source, sketch=True
        )
        self.log_layers, self.window, self.save_figure = log_layers, window, save_figure
        self._interval = (steps, every_n_epochs)
        self._forget()

    @property
    def state_key(self) -> str:
        """Tells instances with different settings apart in a checkpoint."""
        settings = {**self._settings_of_collector(), "window": self.window}
        return self._generate_state_key(**settings, interval=list(self._interval))

    @property
    def noise_scale(self) -> NoiseScale | None:
        """The noise scale over the last looks; ``None`` before the first one."""
        looks = self._looks.get("")
        return noise_scale(total_noise(looks)) if looks else None

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Share the gradients with other monitors."""
        if not self._restored:
            self._forget()
        super().on_fit_start(trainer, pl_module)

    def look(self, trainer: Trainer, pl_module: LightningModule) -> Mapping[str, float]:
        """Collect gradients, and measure noise and signal in them."""
        sample = self.collector.sample(trainer, pl_module)
        if sample is None or len(sample.rows) < 2:
            return {}
        self.batch_of_step = _batch_of_step(trainer)
        values = self._note(sample)
        for name, part in sample.layers.items() if self.log_layers else ():
            noise = gradient_noise(sample.rows[:, part], sample.batch_size)
            values[f"noise_scale/{name}"] = self._add(name, noise).value
        return {f"critical_batch_size/{name}": value for name, value in values.items()}

    def announce(self, trainer: Trainer, pl_module: LightningModule) -> str:
        """How many gradients, or why none."""
        obstacle = self.collector.obstacle(trainer, pl_module)
        if obstacle is not None:
            return f"nothing can be measured, because {obstacle}"
        return f"noise scale from {self.collector.describe(trainer, pl_module)}"

    def conclude(self, trainer: Trainer, pl_module: LightningModule) -> str:
        """The noise scale, and what batch size follows from it; saves the figure."""
        scale = self.noise_scale
        if scale is None:
            return "no gradient noise was measured."
        times = self.times[-self.window :]
        series = self.values["noise_scale"] if self.save_figure else []
        figure = self._save_figure(trainer, series, STEM, "critical_batch_size/figure")
        return f"{describe_scale(scale, times)}{advice(scale, self.batch_of_step)}{figure}"

    def plot(self) -> Figure:
        """Noise scale over time, and what a batch size costs in steps and in samples.

        Raises:
            ModuleNotFoundError: If matplotlib is not installed.
        """
        return draw_batch_sizes(self.times, self.values, self.batch_of_step)

    def state_dict(self) -> dict[str, Any]:
        """What was found, and when to look next."""
        looks = {name: [list(astuple(look)) for look in of] for name, of in self._looks.items()}
        return {
            **super().state_dict(),
            "looks": looks,
            "times": list(self.times),
            "values": {name: list(series) for name, series in self.values.items()},
            "batch_of_step": self.batch_of_step,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on with what was found."""
        super().load_state_dict(state_dict)
        looks = state_dict["looks"].items()
        self._looks = {name: [GradientNoise(*look) for look in of] for name, of in looks}
        self.times = list(state_dict["times"])
        self.values = {name: list(series) for name, series in state_dict["values"].items()}
        self.batch_of_step = state_dict["batch_of_step"]

    def _forget(self) -> None:
        self.times, self.values = [], {}
        self.batch_of_step, self._looks = None, {}

    def _note(self, sample: GradientSample) -> dict[str, float]:
        """Enter what was found into the history."""
        noise = gradient_noise(sample.rows, sample.batch_size)
        scale = self._add("", noise)
        values = {
            "noise_scale": scale.value,
            "low": scale.low,
            "high": scale.high,
            "noise_trace": noise.trace,
            "gradient_sq": noise.gradient_sq,
        }
        self.times.append(sample.step)
        for name, value in values.items():
            self.values.setdefault(name, []).append(value)
        return values

    def _add(self, name: str, noise: GradientNoise) -> NoiseScale:
        """The noise scale of the last looks, this one included; of all parameters or of one."""
        looks = self._looks.setdefault(name, [])
        looks.append(noise)
        del looks[: -self.window]
        return noise_scale(total_noise(looks))


def _batch_of_step(trainer: Trainer) -> int | None:
    """Samples of one optimizer step; ``None`` with several loaders, or one that does not tell."""
    try:
        return effective_batch_size(trainer)
    except ValueError:
        return None
