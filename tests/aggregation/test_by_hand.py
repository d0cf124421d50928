"""Every rule on rows few enough to follow by hand."""

from __future__ import annotations

import pytest
import torch

from lightning_sgd.aggregation import (
    ARC,
    CGE,
    FABA,
    MDA,
    NNM,
    SMEA,
    Bucketing,
    Bulyan,
    CenteredClipping,
    Clip,
    CoordinateMedian,
    DnC,
    GeometricMedian,
    Krum,
    MeaMed,
    Mean,
    MoNNA,
    MultiKrum,
    Phocas,
    SpectralFilter,
    TrimmedMean,
    get_aggregator,
)

# Squared distances: 12: 1, 13: 4, 14: 2, 15: 200, 23: 5, 24: 1, 25: 181, 34: 2, 35: 164, 45: 162.
FIVE = torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.0, 2.0], [1.0, 1.0], [10.0, 10.0]])
FIRST_FOUR = (0.5, 0.75)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    ("rule", "expected"),
    [
        (Mean(), (2.4, 2.6)),
        (Mean(worker_weights=[1, 2, 3, 2, 2]), (2.4, 2.8)),
        (CoordinateMedian(1), (1.0, 1.0)),
        (TrimmedMean(1), (2 / 3, 1.0)),
        (MeaMed(1), FIRST_FOUR),
        (Phocas(1), FIRST_FOUR),
        # Scores 3, 2, 6, 3, 326 over two neighbours; 7, 7, 11, 5, 507 over three.
        (Krum(1), (1.0, 0.0)),
        (Krum(1, num_neighbours=3), (1.0, 1.0)),
        (MultiKrum(1), FIRST_FOUR),
        (MultiKrum(1, num_selected=1, num_neighbours=3), (1.0, 1.0)),
        (MultiKrum(1, num_selected=3), (2 / 3, 1 / 3)),
        (MDA(1), FIRST_FOUR),
        (SMEA(1), FIRST_FOUR),
        (CGE(1), FIRST_FOUR),
        (FABA(1), FIRST_FOUR),
        (MoNNA(1, trusted=2), FIRST_FOUR),
        (MoNNA(2, trusted=1), (2 / 3, 1 / 3)),
        (DnC(1), FIRST_FOUR),
        (DnC(1, filter_fraction=2), (2 / 3, 1.0)),  # τ of the first row is the next
        (GeometricMedian(1), (1.0, 1.0)),  # one of the rows, where Weiszfeld divides by zero
        (GeometricMedian(1, smoothing=0.1, num_iterations=3, start="zero"), (0.686287, 0.645705)),
        (GeometricMedian(1, smoothing=0.1, num_iterations=3), (0.912816, 0.979555)),
        (CenteredClipping(1, radius=1.0, num_iterations=1), (0.482843, 0.482843)),
        (CenteredClipping(1, radius=1.0, num_iterations=3), (0.717905, 0.807903)),
        (SpectralFilter(1, stop="agnostic"), (0.505433, 0.770320)),
        (SpectralFilter(1, stop="threshold", sigma0=0.3), (0.505433, 0.770320)),
        (SpectralFilter(1, stop="threshold", sigma0=2.0), (2.4, 2.6)),
        (get_aggregator("nnm+mean", 1), (1.0, 1.25)),
        (get_aggregator("nnm+krum", 1), FIRST_FOUR),
        (get_aggregator("arc+mean", 1), ((2 + 2 / 2**0.5) / 5, (3 + 2 / 2**0.5) / 5)),
        (get_aggregator("clip(radius=1.0)+mean", 1), ((1 + 2 / 2**0.5) / 5, (1 + 2 / 2**0.5) / 5)),
        (get_aggregator("bucketing(bucket_size=1)+median", 1), (1.0, 1.0)),
    ],
    ids=repr,
)
def test_five_rows(rule, expected, dtype):
    rows = FIVE.to(dtype)
    assert rule(rows).dtype == dtype
    rule.load_state_dict({**rule.state_dict(), "previous": None})
    assert rule(list(rows)).tolist() == pytest.approx(expected, abs=1e-6)


def test_the_passes_of_the_filter():
    rows = FIVE.double()
    rule = SpectralFilter(1, stop="agnostic")
    rule(rows)
    expected = (0.237828, 0.248591, 0.256739, 0.256842, 0.0)
    assert rule.report.weights.tolist() == pytest.approx(expected, abs=1e-6)
    assert rule.report.top_eigenvalue == pytest.approx(0.727196, abs=1e-6)


def test_bulyan_selects_one_by_one():
    rows = torch.tensor([[0.0], [1.0], [2.0], [3.5], [4.0], [6.0], [100.0]])
    rule = Bulyan(1)
    assert rule(rows).item() == pytest.approx(13 / 6)
    selected = rule.mixing((rows @ rows.T).double(), 1)
    assert (selected @ rows.double()).flatten().tolist() == [2.0, 3.5, 1.0, 4.0, 0.0]


def test_geometric_median_of_another_library():
    rows = torch.tensor([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0], [7.0, 8.0, 9.0]])
    result = get_aggregator("rfa", 1)(rows)
    assert result.tolist() == pytest.approx((3.78788764, 4.78788764, 5.78788764), rel=1e-6)


def test_rows_after_each_pre_aggregation():
    mixed = NNM()(FIVE, num_byzantine=1)
    torch.testing.assert_close(mixed, torch.tensor([[0.5, 0.75]] * 4 + [[3.0, 3.25]]))
    out = torch.full_like(mixed, torch.nan)
    assert NNM()(FIVE, num_byzantine=1, out=out) is out
    assert torch.equal(out, mixed)
    torch.testing.assert_close(Clip(5.0)(FIVE), torch.cat([FIVE[:4], FIVE[4:] / 200**0.5 * 5]))
    # ⌊2 · 1 · 4/5⌋ = 1 row is clipped to the norm of the fourth, 2.
    torch.testing.assert_close(
        ARC()(FIVE, num_byzantine=1), torch.cat([FIVE[:4], FIVE[4:] / 200**0.5 * 2])
    )
    buckets = Bucketing(bucket_size=2, seed=1)(FIVE.double())
    assert buckets.shape == (3, 2)
    order = torch.randperm(5, generator=torch.Generator().manual_seed(1 << 32))
    expected = [FIVE[order[a:b]].double().mean(dim=0) for a, b in ((0, 2), (2, 4), (4, 5))]
    torch.testing.assert_close(buckets, torch.stack(expected))
