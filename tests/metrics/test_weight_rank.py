"""The weights of a module, measured by NumPy layer by layer."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from support.processes import run_ranks
from torch import nn
from torchmetrics import MetricCollection

from lightning_sgd import NoEffectWarning
from lightning_sgd.metrics import WeightRank

MEASURES = ["rank", "stable_rank", "effective_rank"]


def network(seed=0):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(
            nn.Conv2d(8, 12, 3), nn.BatchNorm2d(12), nn.Flatten(), nn.Linear(12, 9)
        )


def oracle(weight):
    sigma = np.linalg.svd(weight.detach().double().flatten(1).numpy(), compute_uv=False)
    p = sigma / sigma.sum()
    return {
        "rank@0.2": (sigma / np.linalg.norm(sigma) > 0.2).sum(),
        "stable_rank": (sigma**2).sum() / sigma[0] ** 2,
        "effective_rank": np.exp(-(p * np.log(p)).sum()),
    }


def expected(*weights):
    """Weights by name, then the values of the metric."""
    single = {name: oracle(weight) for name, weight in weights}
    keys = next(iter(single.values()))
    result = {key: np.mean([values[key] for values in single.values()]) for key in keys}
    for key in keys:
        result |= {f"{key}/{name}": values[key] for name, values in single.items()}
    return result


def numbers(result):
    return {key: value.item() for key, value in result.items()}


def test_measures_each_matrix_and_their_mean():
    net, metric = network(), WeightRank(tol=[0.2])
    metric.update(net)
    wanted = expected(("0.weight", net[0].weight), ("3.weight", net[3].weight))
    result = numbers(metric.compute())
    assert result == pytest.approx(wanted, rel=1e-5)
    assert list(result) == list(wanted)


def test_takes_matrices_by_name():
    weights = {"a": torch.randn(3, 4), "b": torch.randn(5, 2, 2)}
    metric = WeightRank(tol=[0.2])
    metric.update(weights)
    assert numbers(metric.compute()) == pytest.approx(expected(*weights.items()), rel=1e-5)


def test_patterns_and_settings_reach_the_weights():
    metric = WeightRank(measures=["frobenius_norm"], method="cheap", exclude=["0.*"])
    net = network()
    result = numbers(metric(net))
    norm = net[3].weight.norm().item()
    assert result == pytest.approx({"frobenius_norm": norm, "frobenius_norm/3.weight": norm})
    with pytest.warns(NoEffectWarning, match="'fc'"):
        WeightRank(include=["fc"]).update(net)


def test_dead_matrices_are_shown_but_not_averaged():
    # A layer of zeros has no rank to average, a diverged one no number; the rest still has a mean.
    weights = {
        "live": torch.eye(6),
        "zero": torch.zeros(5, 5),
        "nan": torch.full((4, 4), torch.nan),
    }
    metric = WeightRank(measures=["stable_rank"])
    result = numbers(metric(weights))
    assert result["stable_rank"] == result["stable_rank/live"] == pytest.approx(6.0)
    assert result["stable_rank/zero"] == 0.0
    assert np.isnan(result["stable_rank/nan"])
    assert np.isnan(numbers(WeightRank()({"zero": torch.zeros(5, 5)}))["stable_rank"])


def test_updates_are_averaged_and_forward_gives_the_last():
    first, second = network(0), network(1)
    metric = WeightRank(tol=[0.2])
    metric.update(first)
    batch = numbers(metric(second))
    both = [
        expected(("0.weight", net[0].weight), ("3.weight", net[3].weight))
        for net in (first, second)
    ]
    assert batch == pytest.approx(both[1], rel=1e-5)
    mean = {key: (both[0][key] + both[1][key]) / 2 for key in both[0]}
    assert numbers(metric.compute()) == pytest.approx(mean, rel=1e-5)


def test_a_reset_forgets_the_matrices_too():
    metric = WeightRank()
    metric.update({"a": torch.eye(3)})
    with pytest.raises(
        ValueError, match="Expected `weights` to be the 1 matrices of the update before"
    ):
        metric.update({"b": torch.eye(3)})
    metric.reset()
    metric.update({"b": torch.eye(4)})
    assert "rank@0.01/b" in metric.compute()


def test_no_update_gives_nan():
    with pytest.warns(UserWarning, match="before the ``update`` method"):
        result = WeightRank(tol=[0.2]).compute()
    assert list(result) == ["rank@0.2", "stable_rank", "effective_rank"]
    assert all(value.isnan() for value in result.values())


def test_works_in_a_collection_with_a_prefix():
    collection = MetricCollection([WeightRank(measures=["stable_rank"])], prefix="weights/")
    collection.update(network())
    assert "weights/stable_rank/0.weight" in collection.compute()


def of_rank(rank):
    """Parameter averaging: between exchanges the ranks hold different weights."""
    metric = WeightRank(measures=["stable_rank"])
    metric.update({"a": torch.eye(4) if rank == 0 else torch.eye(4)[:1]})
    return metric.compute()


def test_processes_with_different_weights_are_averaged(tmp_path):
    for result in run_ranks(of_rank, 2, tmp_path):
        assert numbers(result) == pytest.approx({"stable_rank": 2.5, "stable_rank/a": 2.5})


def test_plots_the_means():
    pytest.importorskip("matplotlib").use("Agg")
    import matplotlib.pyplot as plt

    metric = WeightRank(tol=[0.2])
    results = [metric(network(seed)) for seed in range(3)]
    for value, points in ((None, 1), (results, 3)):
        _, ax = metric.plot(value)
        assert [line.get_label() for line in ax.lines] == [
            "rank@0.2",
            "stable_rank",
            "effective_rank",
        ]
        assert len(ax.lines[0].get_ydata()) == points
    plt.close("all")


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: WeightRank(measures=["srank"]), "`measures` to be one of"),
        (lambda: WeightRank(tol=[2.0]), "`tol` to be a list of numbers"),
        (
            lambda: WeightRank().update({"bias": torch.zeros(3)}),
            "`weights` to be matrices, got a vector",
        ),
        (
            lambda: WeightRank(include="fc").update(nn.Linear(8, 8)),
            "`include` to be a list of patterns",
        ),
    ],
)
def test_refuses_what_has_no_rank(call, message):
    with pytest.raises(ValueError, match=f"Expected {message}"):
        call()
