"""GradientGaussianity against the tests of all rows at once, over updates and over processes."""

from __future__ import annotations

import math

import pytest
import torch
from support.processes import run_ranks

from lightning_sgd import GradientGaussianity, gradient_gaussianity

QUICK = {"num_directions": 50, "false_alarm_rate": 0.05, "num_bootstraps": 39}


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def heavy(num, size, seed=0):
    return normal(num, size, seed=seed) * normal(num, 1, seed=seed + 1).exp()


def test_gradients_one_by_one_or_in_rows_are_the_same():
    rows, metrics = heavy(60, 200), [GradientGaussianity(**QUICK) for _ in range(2)]
    for row in rows:
        metrics[0].update(row)
    for part in rows.split(25):
        metrics[1].update(part)
    generator = torch.Generator().manual_seed(0)
    expected = gradient_gaussianity(rows, generator, metrics[0].settings)
    for metric in metrics:
        assert metric.result() == expected
        assert metric.compute().item() == pytest.approx(expected.random.rejected)
    assert expected.verdict == "not Gaussian"
    metrics[0].reset()
    metrics[0].update(normal(60, 200))
    assert metrics[0].result().verdict == "Gaussian"


def test_ranks_put_their_gradients_together(tmp_path):
    # Fifteen gradients are too few for a test; thirty are not.
    def work(rank):
        metric = GradientGaussianity(**QUICK)
        metric.update(heavy(15, 100, seed=10 * rank))
        return {"share": metric.compute(), "alone": torch.tensor(len(metric.rows[0]))}

    found = run_ranks(work, 2, tmp_path)
    rows = torch.cat([heavy(15, 100, seed=10 * rank) for rank in (0, 1)])
    metric = GradientGaussianity(**QUICK)
    metric.update(rows)
    assert [f["share"].item() for f in found] == [metric.compute().item()] * 2
    assert [f["alone"].item() for f in found] == [15, 15]


def test_a_fixed_part_of_the_coordinates_is_kept():
    metric = GradientGaussianity(num_coordinates=100, **QUICK)
    row = torch.arange(10_000.0)
    for _ in range(3):
        metric.update(row)
    kept = metric.rows
    assert [part.shape for part in kept] == [(1, 100)] * 3
    assert torch.equal(kept[0], kept[2])
    assert sum(part.untyped_storage().nbytes() for part in kept) == 3 * 400
    gaps = kept[0][0].diff()
    assert gaps.min() > 0
    assert gaps.max() < 200
    whole = GradientGaussianity(num_coordinates=None, **QUICK)
    whole.update(row)
    row.zero_()
    assert whole.rows[0].max() == 9999


def test_missing_gradients_and_wrong_settings():
    with pytest.warns(UserWarning, match="before the ``update`` method"):
        assert GradientGaussianity().compute().isnan()
    metric = GradientGaussianity()
    metric.update(normal(19, 5))
    assert math.isnan(metric.compute())
    assert metric.result().verdict == "undecided"
    for settings in ({"level": 2.0}, {"num_coordinates": 0}, {"test": "t"}):
        with pytest.raises(ValueError, match=f"Expected `{next(iter(settings))}` to be"):
            GradientGaussianity(**settings)
    with pytest.raises(ValueError, match="Expected `gradients` to be of shape"):
        metric.update(torch.ones(1, 2, 3))
    with pytest.raises(ValueError, match="Expected `gradients` to be at most 5000 in all"):
        metric.update(normal(4990, 5))


def test_it_can_be_drawn_and_saved():
    import matplotlib as mpl

    mpl.use("Agg")
    metric, other = GradientGaussianity(**QUICK), GradientGaussianity(**QUICK)
    metric.update(heavy(30, 40))
    figure, _ = metric.plot()
    assert figure is not None
    for each in (metric, other):
        each.persistent(True)
    other.load_state_dict(metric.state_dict())
    assert other.result() == metric.result()
    other.update(heavy(5, 40))
    assert len(torch.cat(other.rows)) == 35
