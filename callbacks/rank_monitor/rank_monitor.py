"""Monitor the rank of weight matrices during training."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor
from torch.optim import Optimizer

from lightning_sgd._distributed import reduce_sum
from lightning_sgd._validation import expect
from lightning_sgd.callbacks._monitoring.figures import publish_if_possible
from lightning_sgd.callbacks._monitoring.monitor import Monitor
from lightning_sgd.callbacks.rank_monitor.bound import BoundTracker
from lightning_sgd.callbacks.rank_monitor.heat_map import STEM, draw_heat_map
from lightning_sgd.callbacks.rank_monitor.history import RankHistory, mean_over_alive
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
    r"""Log how the rank of weight matrices falls during training.

    Mini-batch SGD with weight decay moves weight matrices towards low rank, the more so the smaller the batch and the
    larger step size and decay. For each weight matrix, its singular values :math:`\sigma_1 \ge \sigma_2 \ge \dots`
    give

    .. math::
        \mathrm{rank}_\tau = \#\{i : \sigma_i / \|W\|_F > \tau\}, \quad
        \text{stable rank} = \frac{\sum\sigma^2}{\sigma_1^2}, \quad
        \text{effective rank} = e^{-\sum p \log p},\ p = \frac{\sigma}{\sum\sigma},

    and more, see ``measures``. Low rank is no sign of quality: the authors find a marginal effect on test performance.

    .. list-table::
        :header-rows: 1

        * - key
          - meaning
        * - ``rank/<measure>``
          - mean over the matrices that are alive, such as ``rank/stable_rank``, ``rank/effective_rank``, or
            ``rank/rank_0.01`` for ``rank`` with the threshold 0.01
        * - ``rank/frobenius_norm``
          - mean Frobenius norm, always logged: the other measures do not depend on the scale
        * - ``rank/num_dead``
          - matrices that are not finite or have shrunk to a millionth of their first norm
        * - ``rank/<measure>/<matrix>``
          - the measure of one matrix, with ``log_layers``
        * - ``rank/bound_<eps>``, ``rank/bound_vacuous_<eps>``
          - with ``log_bound``, see there

    The values are in ``trainer.callback_metrics`` too. The end message names the matrices whose rank fell, and a heat
    map shows all of them.

    Cost: about m²n + 4/3·m³ operations per m × n matrix with m ≤ n and full look, shared out over the ranks, and three
    small all-reduces. Between full looks of large networks there are cheap looks, with about 120·mn operations for the
    stable rank, to one percent or better, and the norms. The monitor looks as far as ``max_overhead`` allows. Training
    is not changed, to the last bit.

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
        self.schedule.has_cheap_look = cheap != wanted
        self.include, self.exclude, self.min_side = include, exclude, min_side
        self.log_layers = log_layers
        self.log_bound = log_bound
        self.bound_eps = bound_eps
        self.save_figure = save_figure
        self.matrices: list[WeightMatrix] = []
        self.history = RankHistory(self.spectra.keys, self.norms.keys)
        self.bound: BoundTracker | None = None
        self._bound_state: dict[str, Any] | None = None

    def reset(self) -> None:
        """Clear history and bound."""
        self.history.clear()
        self._bound_state = None

    def identity(self) -> dict[str, Any]:
        """Return the measures, the selection of matrices, and the interval."""
        return {
            "keys": list(self.spectra.keys),
            "include": self.include,
            "exclude": self.exclude,
            "min_side": self.min_side,
            "every": self.schedule.every,
            "unit": self.unit,
        }

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Find the weight matrices."""
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

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Prepare the bound; then look for the first time."""
        self.bound = BoundTracker(self.matrices, trainer) if self.log_bound else None
        if self.bound is not None and self._bound_state is not None:
            self.bound.load_state_dict(self._bound_state)
        super().on_train_start(trainer, pl_module)

    def on_before_optimizer_step(
        self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer
    ) -> None:
        """Record step size and decay for the bound."""
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
        """Remove hooks from the modules."""
        if self.bound is not None:
            self.bound.remove_hooks()

    def look(self, trainer: Trainer, pl_module: LightningModule) -> Mapping[str, float]:
        """Take all measures; each rank those of its share of the matrices."""
        return self._record(trainer, self._measure(trainer, pl_module, self.spectra), full=True)

    def cheap_look(self, trainer: Trainer, pl_module: LightningModule) -> Mapping[str, float]:
        """Take only the measures that need no singular values but the largest."""
        return self._record(trainer, self._measure(trainer, pl_module, self.norms), full=False)

    def _record(self, trainer: Trainer, table: Tensor, full: bool) -> dict[str, float]:
        """Append a table to the history, and return the values to log."""
        again = self.history.add(trainer.global_step, table, full)
        alive = self.history.alive(table)
        means = mean_over_alive(table, alive).tolist()
        values = {"rank/num_dead": float((~alive).sum())}
        for key, mean, row in zip(self.spectra.keys, means, table.tolist(), strict=True):
            if full or key in self.norms.keys:
                name = metric_key(key)
                values[name] = mean
                if self.log_layers:
                    layers = zip(self.matrices, row, strict=True)
                    values |= {f"{name}/{matrix.name}": value for matrix, value in layers}
        return values if again else values | self._bounds(table)

    def describe_start(self, trainer: Trainer, pl_module: LightningModule) -> str:
        """Return the measures and the number of matrices."""
        names = ", ".join(key for key in self.spectra.keys if key != NORM)
        parts = [f"{names} of {len(self.matrices)} weight matrices"]
        if self.schedule.alternates:
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

    def describe_end(self, trainer: Trainer, pl_module: LightningModule) -> str:
        """Return which ranks fell, how far and since when, and publish the heat map."""
        names = [matrix.name for matrix in self.matrices]
        found = self.history.describe(names, trainer.global_step)
        return f"{found}.{self._publish_figure(trainer)}"

    def state_dict(self) -> dict[str, Any]:
        """Return the history, and the state of the schedule."""
        return {
            **super().state_dict(),
            **self.history.state_dict(),
            "names": [matrix.name for matrix in self.matrices],
            "bound": None if self.bound is None else self.bound.state_dict(),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore :meth:`state_dict`."""
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

    def _publish_figure(self, trainer: Trainer) -> str:
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
        """Return a table of shape (measures, matrices), equal on all ranks, on the CPU; NaN for measures not taken."""
        rank, world_size = trainer.global_rank, trainer.world_size
        stats = measures.of(matrix.read() for matrix in self.matrices[rank::world_size])
        taken = torch.zeros(len(stats), len(self.matrices), device=pl_module.device)
        taken[:, rank::world_size] = torch.stack(list(stats.values())).to(taken)
        # Each rank has filled in its own columns, so that the sum is exact and one collective is enough.
        reduce_sum(taken, world_size)
        table = torch.full((len(self.spectra.keys), len(self.matrices)), torch.nan)
        table[[self.spectra.keys.index(key) for key in stats]] = taken.cpu()
        return table


def metric_key(key: str) -> str:
    """Return the metric key of a measure of :func:`~lightning_sgd.spectral_stats`; TensorBoard takes no ``@``.

    Example:
        >>> metric_key("rank@0.001")
        'rank/rank_0.001'
    """
    return f"rank/{key.replace('@', '_')}"
