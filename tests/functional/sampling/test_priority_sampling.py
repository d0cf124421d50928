"""Probabilities, weights and the published rules against numbers by hand and against sums over all samples."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from lightning_sgd.functional.sampling import batch_selection as selection
from lightning_sgd.functional.sampling import priority_sampling as ps

NORMS = torch.tensor([1.0, 2.0, 3.0, 4.0], dtype=torch.float64)


def test_variance_by_hand():
    # g = 1, 2, 3, 4: uniform 1.25; in proportion to g nothing is left; half and half 0.340632.
    for mix, expected in ((1.0, 1.25), (0.0, 0.0), (0.5, 0.340632)):
        p = ps.mixed_probabilities(NORMS, mix)
        w = ps.importance_weights(p, 4, 1.0)
        assert (p * w * NORMS).sum().item() == pytest.approx(2.5)
        assert ps.gradient_variance(NORMS, p, 2.5) == pytest.approx(expected, abs=1e-6)
        by_definition = (p * (w * NORMS - 2.5) ** 2).sum().item()
        assert by_definition == pytest.approx(expected, abs=1e-6)
    assert p.tolist() == pytest.approx([0.175, 0.225, 0.275, 0.325])
    assert w.max().item() == pytest.approx(1.428571, abs=1e-6)


@pytest.mark.parametrize("mix", [0.1, 0.5, 1.0])
@pytest.mark.parametrize("beta", [0.0, 0.5, 1.0])
def test_mixing_bounds_the_weights(mix, beta):
    p = ps.mixed_probabilities(torch.tensor([0.0, 1e-9, 1e9]), mix)
    assert ps.importance_weights(p, 3, beta).max() <= mix**-beta * (1 + 1e-6)


def test_nothing_known_is_uniform():
    assert ps.mixed_probabilities(torch.zeros(4), 0.0).tolist() == [0.25] * 4


def test_weights_are_normalised_by_what_the_setting_says():
    w = torch.tensor([1.0, 3.0])
    assert ps.normalized_weights(w, "none", 4.0).tolist() == [1, 3]
    assert ps.normalized_weights(w, "mean", 4.0).tolist() == [0.5, 1.5]
    assert ps.normalized_weights(w, "max", 4.0).tolist() == [0.25, 0.75]


def test_gain_by_hand():
    # 1, 1, 1, 5: Σγ² = 0.4375, so the effective size is 2.2857 and the gain √(4 · 0.4375).
    scores = torch.tensor([1.0, 1.0, 1.0, 5.0])
    assert ps.effective_sample_size(scores) == pytest.approx(2.285714, abs=1e-6)
    assert ps.batch_size_gain(scores) == pytest.approx(1.322876, abs=1e-6)
    assert ps.batch_size_gain(torch.ones(7)) == pytest.approx(1.0)
    assert ps.batch_size_gain(torch.eye(9)[0]) == pytest.approx(3.0)
    assert ps.batch_size_gain(torch.zeros(5)) == 1.0


def test_the_gain_is_that_of_the_paper():
    for seed in range(20):
        scores = torch.rand(30, generator=torch.Generator().manual_seed(seed)).double()
        gamma = scores / scores.sum()
        share = ((gamma - 1 / 30) ** 2).sum() / (gamma**2).sum()
        assert ps.batch_size_gain(scores) == pytest.approx(1 / math.sqrt(1 - share), abs=1e-6)


@pytest.mark.parametrize(("b", "num", "expected"), [(32, 96, 2.0), (128, 640, 2.666667)])
def test_threshold_by_hand(b, num, expected):
    assert ps.presample_threshold(num, b) == pytest.approx(expected, abs=1e-6)


def test_values_by_hand():
    values = ps.priority_values(torch.tensor([0.0, 0.75]), 0.25, 0.5)
    assert values.tolist() == [0.5, 1.0]
    assert values.dtype == torch.float64


def test_decay_by_hand():
    # Mean 2; after one half-life half of the distance is left, after two a quarter.
    scores = torch.tensor([0.0, 4.0, 2.0])
    ages = torch.tensor([2.0, 1.0, 7.0])
    assert ps.decayed_scores(scores, ages, 1.0).tolist() == [1.5, 3.0, 2.0]


def test_ranks_fall_geometrically():
    values = ps.rank_values(torch.tensor([1.0, 9.0, 5.0, 5.0]), 16.0)
    # q = 16^(-1/4) = 1/2; ties keep their order.
    assert values.tolist() == pytest.approx([0.125, 1.0, 0.5, 0.25])


def test_ranks_in_closed_form_have_that_law():
    numbers = torch.rand(200_000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    counts = np.bincount(ps.geometric_ranks(numbers, 20, 50.0), minlength=20)
    law = ps.rank_values(torch.arange(20, 0, -1.0), 50.0).numpy()
    expected = law / law.sum() * len(numbers)
    assert ((counts - expected) ** 2 / expected).sum() < 43.8  # 0.999 quantile of 19 degrees
    assert ps.geometric_ranks(torch.tensor([0.999]), 10, 1.0).tolist() == [9]


def test_annealing_by_hand():
    assert ps.annealed(100.0, 1.0, 2.0, geometric=True) == pytest.approx(1.0)
    assert ps.annealed(0.4, 1.0, -1.0) == 0.4


def test_the_top_fraction():
    assert ps.top_fraction(torch.tensor([1.0, 4.0, 2.0, 3.0]), 0.5).tolist() == [0, 1, 0, 1]


def test_shards_of_unequal_size_are_unbiased_together():
    # Two ranks with three and five samples, each drawing from its own by any law.
    g = torch.randn(8, generator=torch.Generator().manual_seed(0)).double()
    shards = g[:3], g[3:]
    total = 0.0
    for shard in shards:
        p = torch.rand(len(shard), generator=torch.Generator().manual_seed(1)).double()
        p /= p.sum()
        total += (p * ps.sharded_weights(p, 8, 2, 1.0) * shard).sum().item() / 2
    assert total == pytest.approx(g.mean().item())


@pytest.mark.parametrize("exponent", [1, 2, 3])
def test_selective_backprop_keeps_its_share_of_stationary_losses(exponent):
    generator = torch.Generator().manual_seed(exponent)
    losses, kept = torch.rand(200, 64, generator=generator), 0
    history = torch.rand(1024, generator=generator)
    for batch in losses:
        history = torch.cat([history, batch])[-1024:]
        numbers = torch.rand(64, generator=generator)
        kept += len(selection.keep_by_percentile(batch, history, exponent, 0.0, numbers))
    share, num = 1 / (1 + exponent), losses.numel()
    # The history is shared by many batches: three standard errors of its 1024 losses, too.
    error = 3 * math.sqrt(share * (1 - share) / num) + 3 * 0.3 / math.sqrt(1024 * 13)
    assert kept / num == pytest.approx(share, abs=error)


def test_percentiles_are_strictly_below():
    history = torch.tensor([1.0, 2.0, 2.0, 3.0])
    assert selection.percentiles(torch.tensor([1.0, 2.0, 3.5]), history).tolist() == [0, 0.25, 1]


def test_selective_backprop_keeps_at_least_the_hardest():
    losses = torch.tensor([1.0, 3.0, 2.0])
    rows = selection.keep_by_percentile(losses, losses, 3.0, 0.0, torch.ones(3))
    assert rows.tolist() == [1]


@pytest.mark.parametrize(("n", "keep"), [(100, 0.5), (100, 0.29), (7, 0.5), (3, 0.1)])
def test_composers_variant_keeps_exactly_its_share(n, keep):
    generator = torch.Generator().manual_seed(0)
    losses, numbers = torch.rand(2, n, generator=generator)
    rows = selection.keep_by_quantile(losses, keep, numbers)
    assert len(rows) == len(set(rows.tolist())) == max(1, math.floor(round(n * keep, 9)))


@pytest.mark.slow
def test_composers_variant_draws_as_numpy_does_without_replacement():
    # q = 1/8, 3/8, 5/8, 7/8 with exponent 1; the chance of each to be among two, by enumeration.
    p = np.array([1, 3, 5, 7]) / 16
    chance = [p[i] + sum(p[j] * p[i] / (1 - p[j]) for j in range(4) if j != i) for i in range(4)]
    generator, counts, num = torch.Generator().manual_seed(0), np.zeros(4), 20_000
    losses = torch.tensor([0.1, 0.2, 0.3, 0.4], dtype=torch.float64)
    for _ in range(num):
        numbers = torch.rand(4, generator=generator, dtype=torch.float64)
        counts[selection.keep_by_quantile(losses, 0.5, numbers)] += 1
    assert counts / num == pytest.approx(np.array(chance), abs=4 * 0.5 / math.sqrt(num))


def test_the_largest_are_kept():
    assert selection.keep_largest(torch.tensor([3.0, -1.0, 5.0, 4.0]), 0.5).tolist() == [2, 3]


def test_drawn_rows_are_unbiased():
    scores = torch.tensor([0.0, 1.0, 3.0])
    numbers = (torch.arange(4000) + 0.5) / 4000
    rows, weights = selection.draw_rows(scores, numbers)
    assert torch.bincount(rows, minlength=3).tolist() == [0, 1000, 3000]
    assert weights[rows == 1].unique().tolist() == pytest.approx([4 / 3])
    assert weights[rows == 2].unique().tolist() == pytest.approx([4 / 9])
    rows, weights = selection.draw_rows(torch.zeros(4), torch.tensor([0.3, 0.99]))
    assert rows.tolist() == [1, 3]
    assert weights.tolist() == [1, 1]
