"""Rules that use the direction in which the rows spread most."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal, TypeAlias, cast

import torch
from torch import Tensor

from lightning_sgd._validation import expect, expect_one_of, is_finite_at_least, warn_no_effect
from lightning_sgd.aggregation._aggregator import GramRule
from lightning_sgd.aggregation._draws import Draws
from lightning_sgd.functional.robust.spectral_filter import (
    largest_spread,
    noise_floor,
    spectral_filter,
)

FilterStop: TypeAlias = Literal["noise_floor", "agnostic", "threshold"]
FilterMode: TypeAlias = Literal["soft", "hard"]


class SpectralFilter(GramRule):
    r"""The mean after rows that increase the covariance most have lost weight; its error has no factor :math:`\sqrt d`.

    While the top eigenvalue λ of the covariance of the rows is too large, the mass of row i is multiplied by
    :math:`1 - \tau_i/\max_j \tau_j`, where τᵢ is its squared projection on the top eigenvector. By ``stop``, λ is too
    large if it is

    - ``"noise_floor"``: above ``noise_factor`` times the value that noise alone would give, estimated from the
      distances between the rows;
    - ``"threshold"``: above :math:`\gamma \sigma_0^2`, by ``gamma`` and ``sigma0``, if the standard deviation of honest
      gradients is known;
    - ``"agnostic"``: always. Of all weights that leave at least 1 − 2f/n of the mass, those with the smallest λ are
      taken. The other two rules end there as well if λ has not become small before.

    An attack that stays under the noise floor is not seen, and moves the result by no more than about the standard
    error of the honest mean. With f = 0 it is the mean.

    Cost: one Gram matrix, n²d multiplications, and usually two to five eigenproblems of size n.

    Args:
        num_byzantine: How many of the workers may be faulty [f].
        stop: Rule by which λ is small enough.
        sigma0: Standard deviation of honest gradients in their worst direction [σ₀], for ``"threshold"``.
        gamma: Factor by which λ may exceed σ₀² [γ], for ``"threshold"``.
        noise_factor: Factor by which λ may exceed the floor, for ``"noise_floor"``.
        mode: ``"soft"`` removes mass in proportion to τ; ``"hard"`` removes rows with τ > U·max τ completely, with U
            drawn anew from [0, 1].
        worker_weights: Mass of each worker at the start, such as its batch size; equal by default.
        seed: Seed of U; the same on all ranks.

    Example:
        >>> import torch
        >>> rows = torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.0, 2.0], [1.0, 1.0], [10.0, 10.0]])
        >>> SpectralFilter(1, stop="agnostic")(rows)
        tensor([0.5054, 0.7703])

    Reference:
        Deepesh Data, Suhas Diggavi. Byzantine-Resilient SGD in High Dimensions on Heterogeneous Data. ISIT 2021.
    """

    def __init__(
        self,
        num_byzantine: int,
        stop: FilterStop = "noise_floor",
        sigma0: float | None = None,
        gamma: float = 9.0,
        noise_factor: float = 3.0,
        mode: FilterMode = "soft",
        worker_weights: Sequence[float] | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__(num_byzantine)
        self._weigh_workers(worker_weights)
        expect_one_of(stop, FilterStop, "stop", "The default suits most.")
        expect_one_of(mode, FilterMode, "mode", "The default suits most.")
        _check_sigma0(stop, sigma0)
        for name, factor in (("gamma", gamma), ("noise_factor", noise_factor)):
            fits = is_finite_at_least(factor, 1.0)
            expect(fits, name, "a number of at least 1", factor, "Below 1 honest rows are cut.")
        self.stop, self.sigma0, self.gamma = stop, sigma0, gamma
        self.noise_factor, self.mode = noise_factor, mode
        self.draws = Draws(seed)
        self._lambda: float | None = None

    def weights(self, gram: Tensor, num_byzantine: int) -> Tensor:
        """Return the share of each row after filtering."""
        masses = self._shares(len(gram))
        # Ranks decide by the same number, so it comes from a seed and the number of the call.
        uniform = self.draws.next_uniform() if self.mode == "hard" else None
        floor = self._floor(gram, num_byzantine, float(masses.max()))
        found = spectral_filter(gram, num_byzantine, floor, masses=masses, uniform=uniform)
        self._lambda = found.top_eigenvalue
        return found.weights

    def _floor(self, gram: Tensor, num_byzantine: int, largest_weight: float) -> float | None:
        if self.stop == "agnostic":
            return None
        if self.sigma0 is not None:
            return self.gamma * self.sigma0**2
        # With unequal masses a row of mass p contributes p·tr(Σ) in a direction of its own: the largest counts.
        return self.noise_factor * noise_floor(gram, num_byzantine, largest_weight)

    def _top_eigenvalue(self) -> float | None:
        return self._lambda

    def state_dict(self) -> dict[str, object]:
        """Return the number of draws."""
        return {"draws": self.draws.state_dict()}

    def load_state_dict(self, state: Mapping[str, object]) -> None:
        """Restore what :meth:`state_dict` returned.

        Args:
            state: Result of :meth:`state_dict`.
        """
        self.draws.load_state_dict(cast("Mapping[str, int]", state["draws"]))


def _check_sigma0(stop: str, sigma0: float | None) -> None:
    if stop == "threshold":
        remedy = "stop='noise_floor' needs no such number."
        fits = sigma0 is not None and is_finite_at_least(sigma0, 0.0)
        expect(fits, "sigma0", "a number that is not negative", sigma0, remedy)
    elif sigma0 is not None:
        warn_no_effect(f"sigma0 has no effect with stop={stop!r}.")


class DnC(GramRule):
    """Divide and conquer: the mean without the rows with the largest projections on the direction of largest spread.

    ``filter_fraction`` · f rows are removed at once. The spectral filter computes the direction again after each
    removal, and stops when the spread is that of noise. The paper repeats this on random subsets of the coordinates;
    here all coordinates are used once.

    Cost: one Gram matrix and one eigenproblem of size n.

    Args:
        num_byzantine: How many of the workers may be faulty [f].
        filter_fraction: How many rows to remove for each faulty one [c]; rounded down, c·f must be at least one row.

    Example:
        >>> DnC(1)(torch.tensor([[1.0], [2.0], [3.0], [90.0]]))
        tensor([2.])

    Reference:
        Virat Shejwalkar, Amir Houmansadr. Manipulating the Byzantine: Optimizing Model Poisoning Attacks and Defenses
        for Federated Learning. NDSS 2021.
    """

    def __init__(self, num_byzantine: int, filter_fraction: float = 1.0) -> None:
        super().__init__(num_byzantine)
        fits = is_finite_at_least(filter_fraction, 0.0) and filter_fraction > 0
        remedy = "1 is usual; Mean removes no row."
        expect(fits, "filter_fraction", "a positive number", filter_fraction, remedy)
        # Fewer than one row is none: the mean, in the name of a robust rule.
        removes = num_byzantine == 0 or int(filter_fraction * num_byzantine) >= 1
        expect(removes, "filter_fraction", f"at least 1/{num_byzantine}", filter_fraction, remedy)
        self.filter_fraction = filter_fraction

    def check(self, num_rows: int) -> None:
        """Refuse settings that would remove all rows."""
        super().check(num_rows)
        fits = self.filter_fraction * self.num_byzantine < num_rows
        remedy = "It would remove every row."
        expect(fits, "filter_fraction", f"less than {num_rows}/f", self.filter_fraction, remedy)

    def weights(self, gram: Tensor, num_byzantine: int) -> Tensor:
        """Return uniform weights on the remaining rows."""
        n = len(gram)
        weights = torch.full((n,), 1 / n, dtype=gram.dtype)
        reach = largest_spread(gram, weights).projections
        # Of the rows that are left: those dropped before count as faulty ones that have been found.
        num_removed = int(self.filter_fraction * num_byzantine)
        weights[reach.argsort(stable=True)[n - num_removed :]] = 0.0
        return weights / weights.sum()
