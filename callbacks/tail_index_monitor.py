"""Watches how heavy-tailed the noise of the gradients is."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor

from lightning_sgd._validation import expect
from lightning_sgd.callbacks._monitoring.gradient_collector import GradientCollector, GradientSource
from lightning_sgd.callbacks._monitoring.gradient_monitor import GradientMonitor
from lightning_sgd.callbacks._tail_index_figure import CURVES, STEM, draw_tail_index
from lightning_sgd.functional.noise.gradient_tail_index import (
    GradientTailIndex,
    gradient_tail_index,
)

if TYPE_CHECKING:
    from matplotlib.figure import Figure

QUANTITIES = tuple(CURVES)


class TailIndexMonitor(GradientMonitor):
    r"""Logs the tail index of gradient noise, and what the number is worth.

    At the weights as they are, gradients of batches of its own are taken. If the noise U in them were symmetric
    α-stable, sums of :math:`K_1` independent entries would be :math:`K_1^{1/\alpha}` times as large as single ones: 2
    is Gaussian, less is heavier. Logged are

    - ``tail_index/coordinate``, the index of each coordinate over batches, 1/α averaged over coordinates, and
      ``tail_index/coordinate_error``, its standard error: the truth about the noise;
    - ``tail_index/pooled``, the number of the paper: all coordinates of all batches as one sequence. Coordinates differ
      in scale and depend on each other, so that it is between 1 and 1.5 for Gaussian noise, too;
    - ``tail_index/pooled_shuffled``, the same with entries in random order. A gap between the two shows dependence, and
      a value below the first shows unequal scales;
    - ``tail_index/zero_fraction``, the share of entries that are exactly zero, of dead units for instance.

    At the end it says the verdict, ``stable``, ``finite variance`` or ``undecided``, and saves a figure with the
    stability profile.

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
        source: Where the gradients come from: ``extra`` are passes over batches of its own; ``microbatches`` are the
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
        steps = 500 if every_n_steps is None and every_n_epochs is None else every_n_steps
        super().__init__(steps, every_n_epochs, max_overhead)
        remedy = "Noise is in differences between gradients; the default is 64."
        expect(num_batches >= 2, "num_batches", "at least 2", num_batches, remedy)
        self.collector = GradientCollector(
            num_batches, num_coordinates, batch_size, train_mode, loss_fn, seed, source
        )
        self.log_layers, self.seed, self.save_figure = log_layers, seed, save_figure
        self._interval = (steps, every_n_epochs)
        self.times: list[int] = []
        self.values: dict[str, list[float]] = {}
        self.profiles: dict[str, list[float]] = {}
        self.verdict: str = "undecided"

    @property
    def state_key(self) -> str:
        """Tells instances with different settings apart in a checkpoint."""
        settings = self._settings_of_collector()
        return self._generate_state_key(**settings, interval=list(self._interval))

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Share the gradients with other monitors."""
        if not self._restored:
            self._forget()
        super().on_fit_start(trainer, pl_module)

    def look(self, trainer: Trainer, pl_module: LightningModule) -> Mapping[str, float]:
        """Collect gradients, and measure the noise in them."""
        sample = self.collector.sample(trainer, pl_module)
        if sample is None:
            return {}
        generator = torch.Generator().manual_seed(self.seed)
        found = gradient_tail_index(sample, generator, self.log_layers)
        values = self._note(sample.step, found)
        layers = {f"coordinate/{name}": alpha for name, alpha in found.layers.items()}
        values |= layers if self.log_layers else {}
        return {f"tail_index/{name}": value for name, value in values.items()}

    def announce(self, trainer: Trainer, pl_module: LightningModule) -> str:
        """How many gradients of how many coordinates, or why none."""
        obstacle = self.collector.obstacle(trainer, pl_module)
        if obstacle is not None:
            return f"nothing can be measured, because {obstacle}"
        return self.collector.describe(trainer, pl_module)

    def conclude(self, trainer: Trainer, pl_module: LightningModule) -> str:
        """Index, verdict, and what the pooled number is worth; saves the figure."""
        if not self.times:
            return "no gradient noise was measured."
        last = {name: series[-1] for name, series in self.values.items()}
        return (
            f"by coordinate α = {last['coordinate']:.2f} ± {last['coordinate_error']:.2f} at step {self.times[-1]}, "
            f"{self.verdict}; pooled as in the paper {last['pooled']:.2f}, in random order "
            f"{last['pooled_shuffled']:.2f}, which unequal scales and dependence pull towards 1 whatever the tails."
            f"{self._figure(trainer)}"
        )

    def plot(self) -> Figure:
        """Index over time, and the stability profiles at the last look.

        Raises:
            ModuleNotFoundError: If matplotlib is not installed.
        """
        curves = {name: self.values.get(name, []) for name in QUANTITIES}
        return draw_tail_index(self.times, curves, self.profiles)

    def state_dict(self) -> dict[str, Any]:
        """What was found, and when to look next."""
        return {
            **super().state_dict(),
            "times": list(self.times),
            "values": {name: list(series) for name, series in self.values.items()},
            "profiles": {name: list(profile) for name, profile in self.profiles.items()},
            "verdict": self.verdict,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on with what was found."""
        super().load_state_dict(state_dict)
        self.times = list(state_dict["times"])
        self.values = {name: list(series) for name, series in state_dict["values"].items()}
        self.profiles = {name: list(profile) for name, profile in state_dict["profiles"].items()}
        self.verdict = state_dict["verdict"]

    def _forget(self) -> None:
        self.times, self.values, self.profiles, self.verdict = [], {}, {}, "undecided"

    def _note(self, step: int, found: GradientTailIndex) -> dict[str, float]:
        """Enter what was found into the history, unless it is there already."""
        values = {
            "coordinate": found.coordinate.alpha,
            "coordinate_error": found.coordinate.standard_error,
            "pooled": found.pooled.alpha,
            "pooled_shuffled": found.pooled_shuffled,
            "zero_fraction": found.coordinate.zero_fraction,
        }
        if self.times[-1:] != [step]:
            self.times.append(step)
            for name, value in values.items():
                self.values.setdefault(name, []).append(value)
        self.profiles = {
            "coordinate": list(found.coordinate.profile),
            "pooled": list(found.pooled_profile.profile),
        }
        self.verdict = found.coordinate.verdict
        return values

    def _figure(self, trainer: Trainer) -> str:
        pooled = self.values.get("pooled", []) if self.save_figure else []
        return self._save_figure(trainer, pooled, STEM, "tail_index/profile")
