"""TailIndex against NumPy's least squares on the whole sequence, over updates and over processes."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.processes import run_ranks

from lightning_sgd import TailIndex, dyadic_tail_index, sample_stable


def stable(alpha, shape, seed=0):
    return sample_stable(alpha, shape, generator=torch.Generator().manual_seed(seed))


def oracle(x, levels):
    x = np.asarray(x)[: len(x) >> levels << levels]
    sums = [x.reshape(-1, 2**j).sum(axis=1) for j in range(levels + 1)]
    means = [np.log(np.abs(each)).mean() for each in sums]
    weights = np.sqrt([len(each) for each in sums])
    return np.log(2) / np.polyfit(np.arange(levels + 1), means, 1, w=weights)[0]


@settings(max_examples=20, deadline=None)
@given(cuts=st.lists(st.integers(0, 5000), max_size=6), levels=st.integers(1, 8))
def test_updates_may_be_cut_anywhere(cuts, levels):
    x, metric = stable(1.4, 5000), TailIndex(levels=levels)
    for part in torch.tensor_split(x, sorted(cuts)):
        metric.update(part)
    assert metric.compute().item() == pytest.approx(oracle(x, levels), rel=1e-6)


def test_gradients_one_by_one_are_a_sample_of_every_coordinate():
    rows = stable(1.5, (64, 3000)) * stable(2.0, 3000, seed=1).exp()
    metric = TailIndex("coordinate", levels=3)
    for row in rows:
        metric.update(row[None])
    assert metric.compute().item() == pytest.approx(1.5, abs=0.03)
    assert metric.result().alpha == pytest.approx(dyadic_tail_index(rows, dim=0).alpha, rel=1e-12)


def test_forward_gives_the_value_of_the_batch_and_keeps_the_epoch():
    x, metric = stable(1.4, 4096 + 7), TailIndex(levels=4)
    for batch in x.split(1024):
        value = metric(batch).item()
        if len(batch) == 1024:
            assert value == pytest.approx(oracle(batch, 4), rel=1e-6)
    assert metric.compute().item() == pytest.approx(oracle(x, 4), rel=1e-6)
    metric.reset()
    assert metric.rest == []
    assert int(metric.num_samples) == 0


def test_ranks_add_up(tmp_path):
    # Seven samples on each rank fill no block; together they make one.
    def work(rank):
        metric = TailIndex(levels=3)
        metric.update(stable(1.4, 1000 + 4, seed=rank))
        return {"alpha": metric.compute(), "num_samples": metric.num_samples}

    found = run_ranks(work, 2, tmp_path)
    parts = [stable(1.4, 1004, seed=rank) for rank in (0, 1)]
    joined = torch.cat([*(part[:1000] for part in parts), *(part[1000:] for part in parts)])
    assert [f["alpha"].item() for f in found] == pytest.approx([oracle(joined, 3)] * 2, rel=1e-6)


def test_samples_that_are_not_stable_are_called_what_they_are():
    metric = TailIndex()
    metric.update(stable(1.4, 2**17))
    assert metric.result().verdict == "stable"
    assert abs(metric.result().alpha - 1.4) < 4 * metric.result().standard_error


def test_little_is_kept():
    metric = TailIndex()
    metric.update(torch.ones(10**6))
    kept = sum(state.numel() for state in metric.metric_state.values() if torch.is_tensor(state))
    assert kept < 400
    assert sum(rest.untyped_storage().nbytes() for rest in metric.rest) < 2**8 * 4


def test_half_precision_is_read_in_float64():
    x = stable(1.5, 4096).to(torch.bfloat16)
    metric = TailIndex(levels=4)
    metric.update(x)
    assert metric.compute().item() == pytest.approx(oracle(x.double(), 4), rel=1e-6)


def test_missing_samples_and_wrong_settings():
    with pytest.warns(UserWarning, match="before the ``update`` method"):
        assert TailIndex().compute().isnan()
    for settings_ in ({"mode": "both"}, {"levels": 0}):
        with pytest.raises(ValueError, match=r"Expected `(mode|levels)` to be"):
            TailIndex(**settings_)
    with pytest.raises(ValueError, match="Expected `samples` to be of shape"):
        TailIndex("coordinate").update(torch.ones(8))


def test_it_can_be_drawn_and_saved():
    import matplotlib as mpl

    mpl.use("Agg")
    metric = TailIndex(levels=2)
    metric.update(stable(1.5, 103))
    figure, _ = metric.plot()
    assert figure is not None
    metric.persistent(True)
    other = TailIndex(levels=2)
    other.persistent(True)
    other.load_state_dict(metric.state_dict())
    other.update(stable(1.5, 50, seed=1))
    metric.update(stable(1.5, 50, seed=1))
    assert other.result() == metric.result()
