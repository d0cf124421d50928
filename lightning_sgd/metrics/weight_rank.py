"""Rank measures of the weights of a module, as a torchmetrics ``Metric``."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn
from torchmetrics import Metric

from lightning_sgd._validation import Words, expect
from lightning_sgd.functional.spectra.spectral_stats import Measure, SpectralMeasures, StatsMethod
from lightning_sgd.functional.spectra.weight_matrices import find_weight_matrices

if TYPE_CHECKING:
    from torchmetrics.utilities.plot import _AX_TYPE, _PLOT_OUT_TYPE


class WeightRank(Metric):
    """Measures of the rank of weight matrices, per matrix and on average.

    Each update adds the measures of the weights as they are; the result is the average over updates and, where ranks
    hold different weights, over ranks. The mean over matrices leaves out those that are zero or not finite, because a
    dead layer says nothing about the rank of the others. They still have their own entries, 0 and NaN.

    Args:
        measures: Which measures to take, see :func:`~lightning_sgd.spectral_stats`.
        tol: Thresholds of ``rank`` [τ].
        tol_norm: Norm that the thresholds refer to, ``"fro"`` or ``"spectral"``.
        eta: Shares of ``energy_rank`` [η].
        method: How to compute the singular values.
        power: Exponent of ``effective_rank``.
        dtype: Type to compute in; by default float32 where it is accurate enough and else float64.
        include: Patterns such as ``encoder.*``; only matrices whose name matches one are taken. By default all.
        exclude: Patterns of names to leave out.
        min_side: Smallest number of rows and of columns.
        **kwargs: Settings of every ``torchmetrics.Metric``.

    Raises:
        ValueError: If an argument is out of range.

    Example:
        >>> net = nn.Linear(16, 8, bias=False)
        >>> _ = nn.init.orthogonal_(net.weight)
        >>> metric = WeightRank(measures=["rank", "stable_rank"], tol=[0.01])
        >>> {key: round(value.item(), 3) for key, value in metric(net).items()}
        {'rank@0.01': 8.0, 'stable_rank': 8.0, 'rank@0.01/weight': 8.0, 'stable_rank/weight': 8.0}

    Reference:
        Galanti et al., https://arxiv.org/abs/2206.05794
    """

    is_differentiable = False
    higher_is_better = None
    full_state_update = False
    plot_lower_bound = 0.0

    total: Tensor
    num_updates: Tensor

    def __init__(
        self,
        measures: Sequence[Measure] = ("rank", "stable_rank", "effective_rank"),
        tol: Sequence[float] = (1e-3, 1e-2, 5e-2),
        tol_norm: Literal["fro", "spectral"] = "fro",
        eta: Sequence[float] = (0.9, 0.99),
        method: StatsMethod = "auto",
        power: Literal[1, 2] = 1,
        dtype: torch.dtype | None = None,
        include: Sequence[str] | None = None,
        exclude: Sequence[str] | None = None,
        min_side: int = 8,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.measures = tuple(measures)
        self.spectral_measures = SpectralMeasures(
            measures=(
                *self.measures,
                "frobenius_norm",
            ),  # tells which matrices are zero or not finite
            tol=tol,
            tol_norm=tol_norm,
            eta=eta,
            method=method,
            power=power,
            dtype=dtype,
        )
        self.choice: dict[str, Any] = {
            "include": include,
            "exclude": exclude,
            "min_side": min_side,
        }
        self.names: tuple[str, ...] = ()
        # The scalar takes the shape of the first update by broadcasting, also when ranks are summed.
        self.add_state("total", torch.zeros(()), dist_reduce_fx="sum")
        self.add_state("num_updates", torch.zeros(()), dist_reduce_fx="sum")

    def update(self, weights: nn.Module | Mapping[str, Tensor]) -> None:
        """Measure the weights as they are now.

        Args:
            weights: A module, or matrices by name, which are all taken whatever the patterns; tensors of more
                dimensions are flattened to (first, all others).
        """
        names, matrices = self._matrices(weights)
        expect(
            names == (self.names or names),
            "weights",
            f"the {len(self.names)} matrices of the update before",
            Words(f"{len(names)} others"),
            "Call `reset()` first, or use one metric per module.",
        )
        self.names = names
        values = self.spectral_measures.of(matrices)
        # Not in place: a scalar cannot broadcast itself to the shape of the first update.
        self.total = self.total + torch.stack(list(values.values())).to(self.total)
        self.num_updates = self.num_updates + 1

    def _matrices(
        self, weights: nn.Module | Mapping[str, Tensor]
    ) -> tuple[tuple[str, ...], Iterator[Tensor]]:
        if isinstance(weights, nn.Module):
            found = find_weight_matrices(weights, **self.choice)
            return tuple(matrix.name for matrix in found), (matrix.read() for matrix in found)
        for name, weight in weights.items():
            remedy = "Leave biases out."
            expect(weight.ndim >= 2, "weights", "matrices", Words(f"a vector, `{name}`"), remedy)
        return tuple(weights), (weight.flatten(1) for weight in weights.values())

    def compute(self) -> dict[str, Tensor]:
        """Compute the mean of each measure over the matrices, and ``<measure>/<name>`` for each matrix."""
        keys = self.spectral_measures.keys
        if not self.names:
            return dict.fromkeys(self._asked(keys), torch.full_like(self.num_updates, torch.nan))
        values = dict(zip(keys, self.total / self.num_updates, strict=True))
        # One matrix of zeros or with NaN must not decide the mean over the others.
        alive = values["frobenius_norm"].isfinite() & (values["frobenius_norm"] > 0)
        asked = self._asked(keys)
        means = {key: torch.where(alive, values[key], 0.0).sum() / alive.sum() for key in asked}
        each = {
            f"{key}/{name}": value
            for key in asked
            for name, value in zip(self.names, values[key], strict=True)
        }
        return means | each

    def _asked(self, keys: Sequence[str]) -> list[str]:
        return [key for key in keys if key != "frobenius_norm" or key in self.measures]

    def reset(self) -> None:
        """Forget all updates and the names of their matrices."""
        super().reset()
        self.names = ()

    def plot(
        self,
        val: dict[str, Tensor] | Sequence[dict[str, Tensor]] | None = None,
        ax: _AX_TYPE | None = None,
    ) -> _PLOT_OUT_TYPE:
        """Plot the means, one result or several over time.

        Args:
            val: A result of ``forward`` or ``compute``, or a list of them; by default the current one.
            ax: A matplotlib axis to draw on; by default a new figure.

        Returns:
            Figure and axis.

        Raises:
            ModuleNotFoundError: If matplotlib is not installed.
        """
        val = self.compute() if val is None else val
        means = _means(val) if isinstance(val, dict) else [_means(result) for result in val]
        return self._plot(means, ax)


def _means(result: dict[str, Tensor]) -> dict[str, Tensor]:
    return {key: value for key, value in result.items() if "/" not in key}
