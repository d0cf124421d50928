"""Watches the rank of weight matrices while they are trained."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
import torch.distributed as dist
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor
from torch.optim import Optimizer

from lightning_sgd._validation import expect
from lightning_sgd.callbacks._monitoring.monitor import Monitor
from lightning_sgd.callbacks.rank_monitor.bound import BoundTracker
from lightning_sgd.callbacks.rank_monitor.heat_map import STEM, draw_heat_map, publish_if_possible
from lightning_sgd.callbacks.rank_monitor.history import RankHistory, mean_of_the_living
from lightning_sgd.functional.spectra.rank_measures import SpectralNorm
from lightning_sgd.functional.spectra.spectral_stats import (
    CHEAPEST,
    Measure,
    SpectralMeasures,
    StatsMethod,
)
from lightning_sgd.functional.spectra.weight_matrices import WeightMatrix, find_weight_matrices

if TYPE_CHECKING:
    from matplotlib.figure import Figure

NORM: Literal["frobenius_norm"] = "frobenius_norm"


class RankMonitor(Monitor):
    r"""Logs how the rank of weight matrices falls during training.

    Mini-batch SGD with weight decay moves weight matrices towards low rank, the more so the smaller the batch and the
    larger step size and decay. For each weight matrix, its singular values :math:`\sigma_1 \ge \sigma_2 \ge \dots`
    give

    .. math::
        \mathrm{rank}_\tau = \#\{i : \sigma_i / \|W\|_F > \tau\}, \quad
        \text{stable rank} = \frac{\sum\sigma^2}{\sigma_1^2}, \quad
        \text{effective rank} = e^{-\sum p \log p},\ p = \frac{\sigma}{\sum\sigma},

    and more, see ``measures``. Low rank is no sign of quality: the authors find a marginal effect on test performance.

    Logs ``rank/<measure>``, the mean over the matrices that are alive, and ``rank/num_dead``, the number of those that
    are not finite or have shrunk to a millionth of their first norm; with ``log_layers`` also
    ``rank/<measure>/<matrix>``. ``rank/frobenius_norm``, the scale that the others ignore, is always among them. The
    values are in ``trainer.callback_metrics`` too. At the end it says which matrices
    fell, and saves a heat map.

    Cost: about m²n + 4/3·m³ operations per m × n matrix with m ≤ n and full look, shared out over the ranks, and three
    small all-reduces. Between full looks of large networks there are glances, about 120·mn operations for the stable
    rank, to one percent or better, and the norms. The monitor looks as far as ``max_overhead`` allows. Training is not
    changed, to the last bit.

    Args:
        measures: Which measures to take: ``rank``, ``hard_rank``, ``energy_rank``, ``stable_rank``,
            ``effective_rank``, ``participation_ratio``, ``nuclear_ratio``, ``intrinsic_dimension``, ``spectral_norm``.
        tol: Thresholds of ``rank`` [τ]; the number means nothing without its threshold.
        tol_norm: Norm that the thresholds refer to: ``fro`` as in the paper, or ``spectral``.
        include: Patterns such as ``encoder.*``; only matrices whose name matches one are watched. By default all.
        exclude: Patterns of names to leave out.
        min_side: Smallest number of rows and of columns of a matrix.
        every_n_steps: Look after so many optimizer steps; instead of ``every_n_epochs``.
        every_n_epochs: Look after so many epochs; by default after every epoch.
        full_every_n_looks: Take all measures so often, and between only those that are cheap. Looks that take less than
            0.1 s are always full.
        method: How to get the singular values: ``auto`` for the cheapest way that is accurate enough, ``gram``,
            ``svd``, ``sketch`` for lower bounds, or ``cheap`` for stable rank and participation ratio without any.
        log_layers: Log every matrix, not only the mean.
        log_bound: Also log what batch size, step size and decay imply for the rank: ``rank/bound_<eps>``, the bound on
            ``rank`` relative to the short side, mean over matrices for which it is below one, and
            ``rank/bound_vacuous_<eps>``, the share of matrices for which it says nothing. For SGD and MaSS
            without a GradScaler.
        bound_eps: Thresholds of the bound [ε].
        max_overhead: Largest share of the training time for looking, the first look included. Looks that would exceed
            it are left out, the last one too; null makes all of them, and all of them full.
        save_figure: Save a heat map, matrices by time, in the log folder at the end, and hand it to loggers that take
            figures; needs the extra ``report``.

    Raises:
        ValueError: If an argument is out of range, or there is no matrix to watch.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> trainer = Trainer(callbacks=[RankMonitor(every_n_steps=100)], logger=False)

    Reference:
        Tomer Galanti, Zachary S. Siegel, Aparna Gupte, Tomaso Poggio. SGD and Weight Decay Secretly Minimize the Rank
        of Your Neural Network. CPAL 2025.
    """

    metric_keys: ClassVar[tuple[str, ...]] = (
        "rank/rank_*",
        "rank/stable_rank",
        "rank/effective_rank",
        "rank/frobenius_norm",
        "rank/num_dead",
        "rank/bound_*",
        "rank/*/*",
    )

    def __init__(
        self,
        measures: Sequence[Measure] = ("rank", "stable_rank", "effective_rank"),
        tol: Sequence[float] = (1e-3, 1e-2, 5e-2),
        tol_norm: SpectralNorm = "fro",
        include: Sequence[str] | None = None,
        exclude: Sequence[str] | None = None,
        min_side: int = 8,
        every_n_steps: int | None = None,
        every_n_epochs: int | None = None,
        full_every_n_looks: int = 10,
        method: StatsMethod = "auto",
        log_layers: bool = False,
        log_bound: bool = False,
        bound_eps: Sequence[float] = (0.1, 0.01),
        max_overhead: float | None = 0.01,
        save_figure: bool = True,
    ) -> None:
        expect(
            full_every_n_looks >= 1,
            "full_every_n_looks",
            "at least 1",
            full_every_n_looks,
            "With 1 every look is full.",
        )
        super().__init__(every_n_steps, every_n_epochs, max_overhead, full_every_n_looks)
        wanted: tuple[Measure, ...] = tuple(dict.fromkeys((*measures, NORM)))
        self.spectra = SpectralMeasures(measures=wanted, tol=tol, tol_norm=tol_norm, method=method)
        cheap = tuple(measure for measure in wanted if measure in CHEAPEST)
        self.norms = SpectralMeasures(measures=cheap, method="cheap")
        self.schedule.can_glance = cheap != wanted
        self.include, self.exclude, self.min_side = include, exclude, min_side
        self.log_layers = log_layers
        self.log_bound = log_bound
        self.bound_eps = bound_eps
        self.save_figure = save_figure
        self.matrices: list[WeightMatrix] = []
        self.history = RankHistory(self.spectra.keys, self.norms.keys)
        self.bound: BoundTracker | None = None
        self._bound_state: dict[str, Any] | None = None

    @property
    def state_key(self) -> str:
        """Tells instances with different settings apart in a checkpoint."""
        return self._generate_state_key(
            keys=list(self.spectra.keys),
            include=self.include,
            exclude=self.exclude,
            min_side=self.min_side,
            every=self.schedule.every,
            unit=self.unit,
        )

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Find the matrices."""
        restored = self._restored
        super().on_fit_start(trainer, pl_module)
        self.matrices = find_weight_matrices(
            pl_module, include=self.include, exclude=self.exclude, min_side=self.min_side
        )
        if not self.matrices:
            raise ValueError(
                f"Expected `min_side`, `include` and `exclude` to leave RankMonitor at least one matrix, got "
                f"{self.min_side}, {self.include} and {self.exclude} for {type(pl_module).__name__}. "
                "Lower `min_side` or widen the patterns."
            )
        if not restored:
            self.history.clear()
            self._bound_state = None

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Prepare the bound; then look for the first time."""
        self.bound = BoundTracker(self.matrices, trainer) if self.log_bound else None
        if self.bound is not None and self._bound_state is not None:
            self.bound.load_state_dict(self._bound_state)
        super().on_train_start(trainer, pl_module)

    def on_before_optimizer_step(
        self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer
    ) -> None:
        """Follow step size and decay."""
        if self.bound is not None:
            self.bound.before_step(optimizer)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, *args: Any, **kwargs: Any
    ) -> None:
        """Look, if it is time to."""
        if self.bound is not None:
            self.bound.after_batch()
        super().on_train_batch_end(trainer, pl_module, *args, **kwargs)

    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        """Leave no hook behind."""
        if self.bound is not None:
            self.bound.remove_hooks()

    def look(self, trainer: Trainer, pl_module: LightningModule) -> Mapping[str, float]:
        """Take the measures; each rank those of its share of the matrices."""
        return self._note(trainer, self._measure(trainer, pl_module, self.spectra), full=True)

    def glance(self, trainer: Trainer, pl_module: LightningModule) -> Mapping[str, float]:
        """Take those measures that need no singular values but the largest."""
        return self._note(trainer, self._measure(trainer, pl_module, self.norms), full=False)

    def _note(self, trainer: Trainer, table: Tensor, full: bool) -> dict[str, float]:
        """Enter a table into the history; the values to log."""
        again = self.history.add(trainer.global_step, table, full)
        alive = self.history.alive(table)
        means = mean_of_the_living(table, alive).tolist()
        values = {"rank/num_dead": float((~alive).sum())}
        for key, mean, row in zip(self.spectra.keys, means, table.tolist(), strict=True):
            if full or key in self.norms.keys:
                name = metric_key(key)
                values[name] = mean
                if self.log_layers:
                    layers = zip(self.matrices, row, strict=True)
                    values |= {f"{name}/{matrix.name}": value for matrix, value in layers}
        return values if again else values | self._bounds(table)

    def announce(self, trainer: Trainer, pl_module: LightningModule) -> str:
        """How many matrices, and which measures."""
        names = ", ".join(key for key in self.spectra.keys if key != NORM)
        parts = [f"{names} of {len(self.matrices)} weight matrices"]
        if self.schedule.glances_between:
            cheap = ", ".join(key for key in self.norms.keys if key != NORM) or "norms"
            parts.append(
                f"in full at most every {self.schedule.full_every} looks, else only {cheap}"
            )
        if self.bound is not None:
            applies = sum(owner is not None for owner in self.bound.owners)
            parts.append(
                f"with a bound for {applies} of them"
                if applies
                else "the bound is not applicable to this optimizer or precision"
            )
        return ", ".join(parts)

    def conclude(self, trainer: Trainer, pl_module: LightningModule) -> str:
        """What fell, how far and since when; saves the heat map."""
        names = [matrix.name for matrix in self.matrices]
        found = self.history.describe(names, trainer.global_step)
        return f"{found}.{self._save_figure(trainer)}"

    def state_dict(self) -> dict[str, Any]:
        """The history, and when to look next."""
        return {
            **super().state_dict(),
            **self.history.state_dict(),
            "names": [matrix.name for matrix in self.matrices],
            "bound": None if self.bound is None else self.bound.state_dict(),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on with the history."""
        super().load_state_dict(state_dict)
        self.history.load_state_dict(state_dict)
        self._bound_state = state_dict["bound"]

    def _bounds(self, table: Tensor) -> dict[str, float]:
        if self.bound is None:
            return {}
        self.bound.look(table[self.spectra.keys.index(NORM)].tolist())
        values = {}
        for eps in self.bound_eps:
            relative = self.bound.bounds(eps)
            values[f"rank/bound_vacuous_{eps:g}"] = 1 - len(relative) / len(self.matrices)
            if relative:
                values[f"rank/bound_{eps:g}"] = sum(relative) / len(relative)
        return values

    def _save_figure(self, trainer: Trainer) -> str:
        """Draw and publish the heat map; what to say about it."""
        if not self.save_figure:
            return ""
        return publish_if_possible(trainer, self._heat_map, STEM, "rank/heat_map", "heat map")

    def _heat_map(self) -> Figure:
        short = torch.tensor([min(matrix.shape) for matrix in self.matrices])
        quantity, times, values = self.history.headline()
        names = [matrix.name for matrix in self.matrices]
        return draw_heat_map(f"{quantity} over short side", names, times, values / short)

    def _measure(
        self, trainer: Trainer, pl_module: LightningModule, measures: SpectralMeasures
    ) -> Tensor:
        """Table of shape (measures, matrices), the same on all ranks, on the CPU; NaN for measures not taken."""
        rank, world_size = trainer.global_rank, trainer.world_size
        stats = measures.of(matrix.read() for matrix in self.matrices[rank::world_size])
        taken = torch.zeros(len(stats), len(self.matrices), device=pl_module.device)
        taken[:, rank::world_size] = torch.stack(list(stats.values())).to(taken)
        if world_size > 1:
            dist.all_reduce(taken)
        table = torch.full((len(self.spectra.keys), len(self.matrices)), torch.nan)
        table[[self.spectra.keys.index(key) for key in stats]] = taken.cpu()
        return table


def metric_key(key: str) -> str:
    """The name under which a measure is logged; TensorBoard takes no ``@``.

    Args:
        key: Key of :func:`~lightning_sgd.spectral_stats`.

    Example:
        >>> metric_key("rank@0.001")
        'rank/rank_0.001'
    """
    return f"rank/{key.replace('@', '_')}"
