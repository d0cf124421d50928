"""RankMe against NumPy's decomposition of all features at once, over batches and over processes."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.processes import run_ranks

from lightning_sgd.metrics import RankMe


def features(rows, columns, rank, seed=0, mean=0.0):
    generator = torch.Generator().manual_seed(seed)
    left, right = (torch.randn(n, rank, generator=generator) for n in (rows, columns))
    return left @ right.T + mean


def oracle(Z, eps=1e-7, center=False):
    Z = np.asarray(Z, dtype=np.float64)
    sigma = np.linalg.svd(Z - center * Z.mean(axis=0), compute_uv=False)
    p = sigma / sigma.sum() + eps
    return np.exp(-(p * np.log(p)).sum())


def accumulated(Z, batch_size, **arguments):
    metric = RankMe(**arguments)
    for batch in Z.split(batch_size):
        metric.update(batch)
    return metric.compute().item()


@settings(max_examples=40, deadline=None)
@given(
    rows=st.integers(2, 60),
    columns=st.integers(1, 20),
    rank=st.integers(1, 20),
    batch_size=st.integers(1, 60),
    scale=st.sampled_from([1e-6, 1.0, 1e6]),
    eps=st.sampled_from([1e-7, 1e-5]),
)
def test_any_batches_give_the_value_of_all_features(rows, columns, rank, batch_size, scale, eps):
    # Other implementations look at one batch or a queue, and so depend on its size.
    Z = scale * features(rows, columns, rank)
    assert accumulated(Z, batch_size, eps=eps) == pytest.approx(oracle(Z, eps), rel=1e-5)


@pytest.mark.parametrize("center", [False, True])
def test_centering_removes_the_common_part(center):
    Z = features(200, 12, 12, mean=20.0)
    value = accumulated(Z, 32, center=center)
    assert value == pytest.approx(oracle(Z, center=center), rel=1e-6)
    assert (value > 8) == center


def test_collapsed_features_show():
    assert accumulated(features(500, 64, 1), 50) == pytest.approx(1.0, abs=1e-3)
    assert accumulated(torch.eye(40), 7) == pytest.approx(40.0, rel=1e-4)


def test_half_precision_features_are_added_in_float64():
    Z = features(64, 16, 16).to(torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        value = accumulated(Z, 16)
    assert value == pytest.approx(oracle(Z.float()), rel=1e-9)


def test_zero_missing_and_broken_features_have_values():
    # A monitor must not stop a run.
    assert accumulated(torch.zeros(5, 3), 5) == 0.0
    assert np.isnan(accumulated(torch.full((5, 3), torch.nan), 5))
    with pytest.warns(UserWarning, match="before the ``update`` method"):
        assert RankMe().compute().isnan()


def test_each_epoch_starts_anew():
    metric = RankMe()
    metric.update(features(20, 6, 6))
    metric.reset()
    metric.update(features(20, 4, 2, seed=1))  # another width, too
    assert metric.compute().item() == pytest.approx(oracle(features(20, 4, 2, seed=1)))


def test_forward_gives_the_value_of_the_batch_and_keeps_the_epoch():
    # `self.log("rank", metric)` in a step calls forward.
    metric, Z = RankMe(), features(40, 8, 8)
    for batch in Z.split(10):
        assert metric(batch).item() == pytest.approx(oracle(batch), rel=1e-6)
    assert metric.compute().item() == pytest.approx(oracle(Z), rel=1e-6)


def test_gradients_do_not_flow_and_are_not_kept():
    Z = features(8, 3, 3).requires_grad_()
    metric = RankMe()
    metric.update(Z)
    assert not metric.gram.requires_grad
    assert Z.grad is None


def uneven(rank):
    """Two processes with different numbers of samples."""
    metric = RankMe(center=True)
    for batch in features(90, 10, 10, mean=1.0)[slice(0, 70) if rank == 0 else slice(70, 90)].split(
        16
    ):
        metric.update(batch)
    return metric.compute()


def test_processes_give_the_value_of_all_their_features(tmp_path):
    expected = oracle(features(90, 10, 10, mean=1.0), center=True)
    values = [value.item() for value in run_ranks(uneven, 2, tmp_path)]
    assert values == pytest.approx([expected, expected], rel=1e-9)


def test_plots_one_value_or_several():
    pytest.importorskip("matplotlib").use("Agg")
    import matplotlib.pyplot as plt

    metric = RankMe()
    values = [metric(features(20, 6, rank)) for rank in (1, 3, 6)]
    _, ax = metric.plot()
    assert len(ax.lines[0].get_ydata()) == 1
    ax = plt.figure().gca()
    metric.plot(values, ax=ax)
    assert list(ax.lines[0].get_ydata()) == pytest.approx([value.item() for value in values])
    plt.close("all")


def test_states_survive_a_checkpoint():
    metric = RankMe()
    metric.persistent(True)
    metric.update(features(20, 6, 6))
    restored = RankMe()
    restored.persistent(True)
    restored.load_state_dict(metric.state_dict())
    restored._update_count = 1
    assert restored.compute() == metric.compute()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: RankMe(eps=-1.0), "`eps` to be at least 0"),
        (lambda: RankMe(eps=float("nan")), "`eps` to be at least 0"),
        (lambda: RankMe().update(torch.zeros(2, 3, 4)), r"`features` to be of shape \(N, K\)"),
    ],
)
def test_refuses_what_has_no_rank(call, message):
    with pytest.raises(ValueError, match=f"Expected {message}"):
        call()
