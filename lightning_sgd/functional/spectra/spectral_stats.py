r"""Rank collapse: how far the spectra of weight matrices have shrunk.

Mini-batch SGD with weight decay moves weight matrices towards low rank. Galanti et al. measure this by the number of
singular values above a threshold, relative to the Frobenius norm, averaged over the layers,

.. math::
    \mathrm{rank}_\tau(W) = \#\Big\{ i : \frac{\sigma_i(W)}{\|W\|_F} > \tau \Big\}.

The number means nothing without its threshold τ, so several are taken by default. Low rank is no measure of quality:
the authors find only a marginal effect on test performance.

Reference:
    Tomer Galanti, Zachary S. Siegel, Aparna Gupte, Tomaso Poggio. SGD and weight decay secretly minimize the rank of
    your neural network. CPAL, 2025. https://arxiv.org/abs/2206.05794
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, TypeAlias, get_args

import torch
from torch import Tensor
from torch.nn.functional import pad

from lightning_sgd._validation import expect, expect_one_of
from lightning_sgd.functional.spectra import rank_measures
from lightning_sgd.functional.spectra.norms import SchattenNorms, extreme_norms, schatten_norms
from lightning_sgd.functional.spectra.rank_measures import SpectralNorm, threshold_rank
from lightning_sgd.functional.spectra.singular_values import (
    choose_route,
    singular_values,
    smallest_resolved,
)

Measure: TypeAlias = Literal[
    "rank",
    "hard_rank",
    "energy_rank",
    "stable_rank",
    "effective_rank",
    "participation_ratio",
    "nuclear_ratio",
    "intrinsic_dimension",
    "frobenius_norm",
    "spectral_norm",
]
StatsMethod: TypeAlias = Literal["auto", "gram", "svd", "sketch", "cheap"]
CHEAP: tuple[Measure, ...] = (
    "stable_rank",
    "participation_ratio",
    "frobenius_norm",
    "spectral_norm",
)
"""The measures that need no eigenvalue decomposition."""
CHEAPEST: tuple[Measure, ...] = ("stable_rank", "frobenius_norm", "spectral_norm")
"""The measures that do not even need a Gram matrix."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SpectralMeasures:
    """Checked settings of ``spectral_stats``, for callers that measure more than once.

    Attributes:
        measures: Which measures to take; all settings as for ``spectral_stats``.
        tol: Thresholds.
        tol_norm: Norm that the thresholds refer to.
        eta: Shares of energy.
        method: How to get the singular values.
        power: Exponent of the effective rank.
        dtype: Type to compute in.
    """

    measures: Sequence[Measure] = ("rank", "stable_rank", "effective_rank")
    # 0.001 is the default of the authors' code; the curves of their notebook are drawn at 0.04 and 0.05.
    tol: Sequence[float] = (1e-3, 1e-2, 5e-2)
    tol_norm: SpectralNorm = "fro"
    eta: Sequence[float] = (0.9, 0.99)
    method: StatsMethod = "auto"
    power: Literal[1, 2] = 1
    dtype: torch.dtype | None = None

    def __post_init__(self) -> None:
        _validate_names(self)
        _validate_numbers(self)
        _validate_accuracy(self)

    @property
    def keys(self) -> tuple[str, ...]:
        """The keys of the results, in their order."""
        return tuple(self._functions(0.0))

    @property
    def resolution(self) -> float:
        """The smallest σ/σ₁ that the measures depend on."""
        # Many small σ add up in the measures of Σσ, and the last share of Σσ² is spread over the whole tail.
        needed = {
            "rank": min(self.tol),
            # Zero asks for the most accurate way there is.
            "hard_rank": 0.0,
            "energy_rank": math.sqrt((1 - max(self.eta)) / 1000),
            "effective_rank": 1e-6 if self.power == 1 else 1e-3,
            "nuclear_ratio": 1e-6,
            "intrinsic_dimension": 1e-6,
        }
        return min(needed.get(name, 1e-3) for name in self.measures)

    def of(self, matrices: Iterable[Tensor]) -> dict[str, Tensor]:
        """Measure matrices of any sizes, as ``spectral_stats_of``."""
        limits: list[Tensor] = []
        # A generator can be read only once, so limits are collected while its matrices pass.
        watched = self._watch(matrices, limits)
        if self.method == "cheap":
            norms = [torch.stack(norms) for norms in self._norms(watched)]
            return self._from_norms(SchattenNorms(*_stack(norms, width=3).unbind(dim=-1)))
        spectra = _stack(self._singular_values(watched))
        return self._from_spectra(spectra, _stack(limits).squeeze(-1))

    def of_batch(self, weight: Tensor) -> dict[str, Tensor]:
        """Measure each matrix of a batch, as ``spectral_stats``."""
        if self.method == "cheap":
            matrices = weight.reshape(-1, *weight.shape[-2:])
            norms = [torch.stack(norms) for norms in self._norms(matrices)]
            shape = weight.shape[:-2]
            return self._from_norms(
                SchattenNorms(*(norm.reshape(shape) for norm in torch.stack(norms).unbind(dim=-1)))
            )
        spectra = self._singular_values([weight])[0]
        return self._from_spectra(spectra, _rounding_limit(weight))

    def _watch(self, matrices: Iterable[Tensor], limits: list[Tensor]) -> Iterator[Tensor]:
        """Pass the matrices on, and collect the rounding limits that ``hard_rank`` needs."""
        for matrix in matrices:
            if matrix.ndim != 2:
                shape = tuple(matrix.shape)
                expect(False, "matrices", "two-dimensional", shape, "Use `flatten(1)`.")
            if "hard_rank" in self.measures:
                limits.append(_rounding_limit(matrix))
            yield matrix

    def _norms(self, matrices: Iterable[Tensor]) -> list[SchattenNorms]:
        # Only the participation ratio needs Σσ⁴, hence a Gram matrix.
        with_gram = not set(self.measures) <= set(CHEAPEST)
        return schatten_norms(matrices) if with_gram else extreme_norms(matrices)

    def _singular_values(self, matrices: Iterable[Tensor]) -> list[Tensor]:
        assert self.method != "cheap"
        return singular_values(
            matrices, method=self.method, dtype=self.dtype, resolution=self.resolution
        )

    def _from_spectra(self, spectra: Tensor, limit: Tensor | float) -> dict[str, Tensor]:
        return {key: function(spectra) for key, function in self._functions(limit).items()}

    def _from_norms(self, norms: SchattenNorms) -> dict[str, Tensor]:
        values = {
            "stable_rank": norms.stable_rank,
            "participation_ratio": norms.participation_ratio,
            "frobenius_norm": norms.two,
            "spectral_norm": norms.infinity,
        }
        return {key: values[key] for key in self.keys}

    def _functions(self, limit: Tensor | float) -> dict[str, Callable[[Tensor], Tensor]]:
        """Return for each key a function of the singular values."""
        found: dict[str, Callable[[Tensor], Tensor]] = {}
        for name in self.measures:
            if name == "rank":
                for tol in self.tol:
                    found[f"rank@{tol:g}"] = partial(threshold_rank, tol=tol, norm=self.tol_norm)
            elif name == "energy_rank":
                for eta in self.eta:
                    found[f"energy_rank@{eta:g}"] = partial(rank_measures.energy_rank, eta=eta)
            elif name == "hard_rank":
                found[name] = partial(threshold_rank, tol=limit, norm="spectral")
            elif name == "effective_rank":
                found[name] = partial(rank_measures.effective_rank, power=self.power)
            else:
                found[name] = getattr(rank_measures, name)
        return found


def spectral_stats(
    weight: Tensor,
    *,
    measures: Sequence[Measure] = ("rank", "stable_rank", "effective_rank"),
    tol: Sequence[float] = (1e-3, 1e-2, 5e-2),
    tol_norm: Literal["fro", "spectral"] = "fro",
    eta: Sequence[float] = (0.9, 0.99),
    method: StatsMethod = "auto",
    power: Literal[1, 2] = 1,
    dtype: torch.dtype | None = None,
) -> dict[str, Tensor]:
    """Measure the spectrum of one matrix, or of each matrix of a batch.

    ======================= ============================ ==============================================================
    measure                 key                          definition, from singular values σ₁ ≥ σ₂ ≥ …
    ======================= ============================ ==============================================================
    ``rank``                ``rank@0.001``, …            how many σ/‖W‖_F, or σ/σ₁ by ``tol_norm``, are above ``tol``
    ``hard_rank``           same as the measure          how many σ/σ₁ are above max(m, n) times machine epsilon
    ``energy_rank``         ``energy_rank@0.9``, …       how many σ hold the share ``eta`` of Σσ²
    ``stable_rank``         same as the measure          Σσ² / σ₁²
    ``effective_rank``      same as the measure          exp(−Σ p log p), p = σ/Σσ; with ``power=2`` p = σ²/Σσ²
    ``participation_ratio`` same as the measure          (Σσ²)² / Σσ⁴
    ``nuclear_ratio``       same as the measure          Σσ / σ₁
    ``intrinsic_dimension`` same as the measure          (Σσ)² / Σσ²
    ``frobenius_norm``      same as the measure          √Σσ²
    ``spectral_norm``       same as the measure          σ₁
    ======================= ============================ ==============================================================

    All but the norms ignore the scale of the matrix. A zero matrix has 0 everywhere, one with NaN or Inf has NaN.

    Cost: for short side m, about m²n + 4/3·m³ operations; with method ``"cheap"`` m²n, or mn·120 where the
    participation ratio is not asked for, and with ``"sketch"`` mn·64.

    Args:
        weight: Tensor of shape (…, m, n).
        measures: Which measures to take.
        tol: Thresholds of ``rank`` [τ].
        tol_norm: Norm that the thresholds refer to: ``"fro"`` as in the paper, or ``"spectral"``.
        eta: Shares of ``energy_rank`` [η].
        method: How to get the singular values, see
            ``lightning_sgd.functional.spectra.singular_values.singular_values``. By default the
            cheapest way that is accurate enough for the measures. ``"cheap"`` takes no decomposition, for the
            stable rank, the participation ratio and the norms; the spectral norm is then a lower bound.
        power: Exponent of ``effective_rank``.
        dtype: Type to compute in; by default float32 where it is accurate enough and else float64.

    Returns:
        For each key a tensor of shape (…).

    Raises:
        ValueError: If an argument is out of range, or the method in this type cannot tell so small a threshold from
            rounding.

    Example:
        >>> stats = spectral_stats(torch.diag(torch.tensor([2.0, 1.0, 1.0])), tol=(0.1, 0.5))
        >>> {key: round(value.item(), 4) for key, value in stats.items()}
        {'rank@0.1': 3.0, 'rank@0.5': 1.0, 'stable_rank': 1.5, 'effective_rank': 2.8284}

    Reference:
        Galanti et al., https://arxiv.org/abs/2206.05794; the rank at τ = 0.001 is theirs.
    """
    return SpectralMeasures(
        measures=measures,
        tol=tol,
        tol_norm=tol_norm,
        eta=eta,
        method=method,
        power=power,
        dtype=dtype,
    ).of_batch(weight)


def spectral_stats_of(matrices: Iterable[Tensor], **settings: Any) -> dict[str, Tensor]:
    """Measure the spectra of matrices of any sizes, decomposed together.

    The matrices are taken one at a time, so that a generator need not hold them all. Results are on the device of the
    first matrix; nothing but the decompositions themselves waits for it.

    Args:
        matrices: Tensors of shape (m, n), each with its own m and n.
        **settings: As for :func:`spectral_stats`.

    Returns:
        For each key of :func:`spectral_stats` a tensor with one value per matrix.

    Raises:
        ValueError: As for :func:`spectral_stats`.

    Example:
        >>> spectral_stats_of([torch.eye(3), torch.eye(5, 9)], measures=["stable_rank"])
        {'stable_rank': tensor([3., 5.])}
    """
    return SpectralMeasures(**settings).of(matrices)


def _rounding_limit(matrix: Tensor) -> Tensor:
    rows, columns = matrix.shape[-2:]
    limit = rank_measures.rounding_tolerance(rows, columns, matrix.dtype)
    return torch.full((1,), limit, device=matrix.device)  # `torch.tensor` would wait for the device


def _stack(vectors: Sequence[Tensor], width: int = 1) -> Tensor:
    """Stack vectors as rows on the device of the first, padded with zeros, which change no measure."""
    if not vectors:
        return torch.zeros(0, width)
    width = max(len(vector) for vector in vectors)
    # The types differ where some matrices needed float64 and others did not.
    dtype = max((vector.dtype for vector in vectors), key=lambda dtype: dtype.itemsize)
    rows = [vector.to(vectors[0].device, dtype) for vector in vectors]
    return torch.stack([pad(row, (0, width - len(row))) for row in rows])


def _validate_names(settings: SpectralMeasures) -> None:
    expect_one_of(settings.tol_norm, SpectralNorm, "tol_norm")
    expect_one_of(settings.method, StatsMethod, "method")
    expect_one_of(settings.power, Literal[1, 2], "power")
    types = (None, torch.float32, torch.float64)
    remedy = "Leave it out."
    expect(settings.dtype in types, "dtype", f"one of {types}", settings.dtype, remedy)
    for measure in settings.measures:
        expect_one_of(measure, Measure, "measures")
    known = CHEAP if settings.method == "cheap" else get_args(Measure)
    asked = settings.measures
    expect(
        bool(asked) and set(asked) <= set(known),
        "measures",
        f"a list of some of {known}",
        asked,
        "Others need another `method` than 'cheap'." if known is CHEAP else "Name at least one.",
    )


def _validate_numbers(settings: SpectralMeasures) -> None:
    for argument in ("tol", "eta"):
        values = getattr(settings, argument)
        expect(
            isinstance(values, Sequence)
            and bool(values)
            and all(0 < value < 1 for value in values),
            argument,
            "a list of numbers in (0, 1)",
            values,
            "Or leave it out.",
        )


def _validate_accuracy(settings: SpectralMeasures) -> None:
    """Refuse a method, chosen by the user, by which rounding noise would be counted."""
    if settings.method == "auto" or settings.method == "cheap":
        return
    counted = {"rank": min(settings.tol), "hard_rank": 1e-6}
    # Counts are wrong by whole numbers below the resolution; other measures lose digits only.
    for measure in counted.keys() & set(settings.measures):
        needed = counted[measure]
        route = choose_route(settings.method, settings.dtype, needed, torch.float32)
        noise = smallest_resolved(*route)
        expect(
            noise <= needed,
            "method",
            f"one that resolves {needed:g} for `{measure}`",
            settings.method,
            f"In {route.dtype} it resolves {noise:.1e}; 'auto' chooses a better one.",
        )
