"""Watches whether the noise of the gradients is Gaussian."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import asdict
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor

from lightning_sgd._validation import expect
from lightning_sgd.callbacks._gaussianity_figure import STEM, draw_gaussianity
from lightning_sgd.callbacks._gaussianity_history import GaussianityHistory
from lightning_sgd.callbacks._monitoring.gradient_collector import GradientCollector, GradientSource
from lightning_sgd.callbacks._monitoring.gradient_monitor import GradientMonitor
from lightning_sgd.functional.noise.gaussian_null import TestName
from lightning_sgd.functional.noise.gradient_gaussianity import (
    MIN_GRADIENTS,
    GaussianitySettings,
    gradient_gaussianity,
)
from lightning_sgd.functional.noise.normality_tests import MAX_SAMPLES

if TYPE_CHECKING:
    from matplotlib.figure import Figure


class GaussianityMonitor(GradientMonitor):
    r"""Logs in how many directions gradient noise is not Gaussian, beside how many Gaussian noise would have.

    At the weights as they are, gradients :math:`g_i` of batches of its own are taken. Their noise
    :math:`u_i = g_i - \bar g` is projected on random directions v, and :math:`\langle u_1, v\rangle, …,
    \langle u_M, v\rangle` are tested for normality; the noise is Gaussian if all projections are. Tests on several
    directions depend on each other, so that the share that is rejected is calibrated by Gaussian noise of the same
    covariance. Logged are

    - ``gaussianity/rejected``, the share of random directions rejected at ``level``, and ``gaussianity/expected`` and
      ``gaussianity/limit``, its mean for Gaussian noise and what that exceeds once in 2/``false_alarm_rate`` times;
    - ``gaussianity/p_value``, the calibrated p-value;
    - ``gaussianity/coordinate_rejected``, ``…_expected``, ``…_limit`` and ``…_p_value``, the same for single
      coordinates: random directions are sums over all coordinates, which look Gaussian whatever the law of each;
    - ``gaussianity/statistic`` and ``gaussianity/expected_statistic``, the mean of the test statistic, which says
      nothing without what Gaussian noise has for so many gradients;
    - ``gaussianity/rejected_anderson_darling``, the share by the paper's second test;
    - ``gaussianity/norm_kurtosis``, how much lengths of the noise differ, as excess kurtosis of random projections, and
      ``gaussianity/effective_dimension``, over how many directions it spreads.

    At the end it says the verdict with its reason, and saves a figure with a QQ plot.

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
        source: Where the gradients come from: ``extra`` are passes over batches of its own; ``microbatches`` are the
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
        steps = 500 if every_n_steps is None and every_n_epochs is None else every_n_steps
        super().__init__(steps, every_n_epochs, max_overhead)
        between = f"between {MIN_GRADIENTS} and {MAX_SAMPLES}"
        remedy = "Fewer show nothing, and for more the p-values are not valid; the default is 256."
        enough = MIN_GRADIENTS <= num_batches <= MAX_SAMPLES
        expect(enough, "num_batches", between, num_batches, remedy)
        self.settings = GaussianitySettings(
            num_directions, test, level, false_alarm_rate, num_bootstraps
        )
        self.collector = GradientCollector(
            num_batches, num_coordinates, batch_size, train_mode, loss_fn, seed, source
        )
        self.log_layers, self.seed, self.save_figure = log_layers, seed, save_figure
        self._interval = (steps, every_n_epochs)
        self.history = GaussianityHistory()

    @property
    def state_key(self) -> str:
        """Tells instances with different settings apart in a checkpoint."""
        settings = {**self._settings_of_collector(), **asdict(self.settings)}
        return self._generate_state_key(**settings, interval=list(self._interval))

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Share the gradients with other monitors."""
        if not self._restored:
            self.history = GaussianityHistory()
        super().on_fit_start(trainer, pl_module)

    def look(self, trainer: Trainer, pl_module: LightningModule) -> Mapping[str, float]:
        """Collect gradients, and test the noise in them."""
        sample = self.collector.sample(trainer, pl_module)
        if sample is None or len(sample.rows) < MIN_GRADIENTS:
            return {}
        generator = torch.Generator().manual_seed(self.seed)
        layers = sample.layers if self.log_layers else None
        rows = sample.rows[:MAX_SAMPLES]  # ranks may have rounded their number up
        found = gradient_gaussianity(rows, generator, self.settings, layers)
        self.history.note(sample.step, found, sample.batch_size)
        named = {f"rejected/{name}": share for name, share in found.layers.items()}
        return {f"gaussianity/{name}": value for name, value in (found.values | named).items()}

    def announce(self, trainer: Trainer, pl_module: LightningModule) -> str:
        """How many gradients of how many coordinates, or why none."""
        obstacle = self.collector.obstacle(trainer, pl_module)
        if obstacle is not None:
            return f"nothing can be tested, because {obstacle}"
        tests = self.settings.num_directions
        num = min(tests, self.collector.coordinates(pl_module).num_coordinates)
        gathered = self.collector.describe(trainer, pl_module)
        few = "" if self._has_enough(trainer) else f", too few to test, which takes {MIN_GRADIENTS}"
        return f"{gathered}, {tests} random directions and {num} coordinates tested{few}"

    def _has_enough(self, trainer: Trainer) -> bool:
        steps = self.collector.steps
        return steps is None or steps.num_gradients(trainer) >= MIN_GRADIENTS

    def conclude(self, trainer: Trainer, pl_module: LightningModule) -> str:
        """Verdict with its reason, and since when; saves the figure."""
        if not self.history.times:
            return "no gradient noise was tested."
        return f"{self.history.in_words(self.settings)}{self._figure(trainer)}"

    def plot(self) -> Figure:
        """QQ plot of the last look, and the share of rejected directions over time.

        Raises:
            ModuleNotFoundError: If matplotlib is not installed.
        """
        return draw_gaussianity(self.history, self.settings.level)

    def state_dict(self) -> dict[str, Any]:
        """What was found, and when to look next."""
        return {**super().state_dict(), "history": self.history.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on with what was found."""
        super().load_state_dict(state_dict)
        self.history = GaussianityHistory(**copy.deepcopy(state_dict["history"]))

    def _figure(self, trainer: Trainer) -> str:
        rejected = self.history.values.get("rejected", []) if self.save_figure else []
        return self._save_figure(trainer, rejected, STEM, "gaussianity/quantiles")
