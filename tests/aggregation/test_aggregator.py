"""The base of all rules: what is dropped, refused, mixed, reported and composed."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from lightning_sgd import NoEffectWarning
from lightning_sgd.aggregation import (
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
    Mean,
    MoNNA,
    MultiKrum,
    PreAggregated,
    SpectralFilter,
    get_aggregator,
)
from lightning_sgd.functional.robust.stacked_rows import combine, row_gram, squared_row_norms

E5 = torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.0, 2.0], [1.0, 1.0], [10.0, 10.0]])


def test_rows_that_are_not_finite_are_dropped_and_named():
    rows = torch.cat([E5[:4], torch.tensor([[torch.nan, 0.0], [0.0, torch.inf], [1e30, 0.0]])])
    rule = Mean(num_byzantine=3)
    assert torch.equal(rule(rows), E5[:4].mean(dim=0))
    assert rule.report.dropped == (4, 5, 6)
    with pytest.raises(ValueError, match=r"Rows \[4, 5\] hold NaN or infinity"):
        Mean(num_byzantine=1)(rows)


@pytest.mark.parametrize("num_byzantine", [2, 3])
def test_half_of_the_rows_cannot_be_faulty(num_byzantine):
    rule = CoordinateMedian(num_byzantine)
    with pytest.raises(ValueError, match="Of 4 workers at most 1 may be faulty"):
        rule(E5[:4])
    with pytest.raises(ValueError, match="at most 1 may be faulty"):
        PreAggregated([NNM()], rule).check(4)


def test_names_compose_and_say_what_is_wrong():
    assert repr(get_aggregator("nnm+trmean", 2)) == "NNM() + TrimmedMean(num_byzantine=2)"
    rule = Mean()
    assert get_aggregator(rule, 0) is rule
    assert get_aggregator("filter(stop='threshold', sigma0=2.0)", 1).sigma0 == 2.0
    for wrong in (
        "medain",
        "median+nnm",
        "nnm+",
        "nnm(3)+mean",
        "mean(speed=3)",
        "__import__('os')",
    ):
        with pytest.raises(ValueError, match="Expected `aggregator` to"):
            get_aggregator(wrong, 1)


def test_what_the_report_says():
    rows = torch.cat([E5[:2], torch.full((1, 2), torch.nan), E5[2:]])
    rule = SpectralFilter(2, stop="agnostic")
    rule(rows)
    weights = rule.report.weights
    assert rule.report.dropped == (2,)
    assert weights.shape == (6,)
    assert weights[[2, 5]].tolist() == [0.0, 0.0]
    assert float(weights.sum()) == pytest.approx(1.0)
    assert rule.report.top_eigenvalue > 0
    composed = get_aggregator("nnm+caf", 2)
    composed(rows)
    assert composed.report.dropped == (2,)
    assert composed.report.top_eigenvalue is not None
    assert float(composed.report.weights[2]) == 0.0
    median = get_aggregator("nnm+median", 1)
    median(E5)
    # Each of the first four is one of four neighbours of all five rows, the last only of itself.
    expected = torch.tensor([4 + 0, 4 + 1, 4 + 1, 4 + 1, 1]) / 20
    torch.testing.assert_close(median.report.weights, expected.double())
    plain = CoordinateMedian(1)
    plain(E5)
    assert plain.report.weights is None


def test_steps_of_a_strategy_on_shards_are_the_call():
    # A strategy sums norms and Gram matrices of column shards; ranks then combine their own columns.
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(11, 1001, generator=generator, dtype=torch.float64)
    rows[3], rows[5] = torch.nan, 1e30
    for name in ("filter", "nnm+trmean", "bulyan", "median", "arc+cge", "multikrum", "geomed"):
        rule = get_aggregator(name, 2)
        expected = rule(rows)
        shards = rows.tensor_split(3, dim=1)
        kept, f = rule.keep(sum(squared_row_norms(shard) for shard in shards))
        assert (len(kept), f) == (9, 0)
        shards = [shard[kept] for shard in shards]
        if rule.needs_gram:
            matrix = rule.mixing(sum(row_gram(s, rule.reference) for s in shards), f)
            shards = [combine(matrix, shard) for shard in shards]
        found = torch.cat([rule.reduce(shard, f) for shard in shards])
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)


def test_worker_weights():
    rows = torch.tensor([[0.0], [1.0], [10.0]], dtype=torch.float64)
    weights = [3.0, 1.0, 1.0]
    assert Mean(worker_weights=weights)(rows).item() == pytest.approx(11 / 5)
    assert GeometricMedian(1, worker_weights=weights)(rows).item() == 0.0
    assert SpectralFilter(0, worker_weights=weights)(rows).item() == pytest.approx(11 / 5)
    # Whole weights stand for repeated rows; the filter cannot tell the difference.
    repeated = torch.tensor([[0.0], [0.0], [0.0], [1.0], [10.0]], dtype=torch.float64)
    for settings in ({"stop": "agnostic"}, {"stop": "threshold", "sigma0": 0.2}):
        weighted = SpectralFilter(1, worker_weights=[3.0, 1.0, 1.0], **settings)
        p = weighted.weights(rows @ rows.T, 0)
        q = SpectralFilter(1, **settings).weights(repeated @ repeated.T, 0)
        assert (p @ rows).item() == pytest.approx((q @ repeated).item())
    clipped = CenteredClipping(1, radius=2.0, num_iterations=1, worker_weights=weights)
    assert clipped(rows).item() == pytest.approx((0 + 1 + 2) / 5)
    rule = Mean(1, worker_weights=[1.0, 2.0, 3.0, 4.0])
    rows = torch.tensor([[1.0], [torch.nan], [2.0], [3.0]])
    assert rule(rows).item() == pytest.approx((1 + 6 + 12) / 8)


def test_a_trusted_worker_keeps_its_number_when_others_are_dropped():
    rows = torch.tensor([[torch.nan], [1.0], [2.0], [3.0], [9.0], [8.0]])
    assert MoNNA(2, trusted=5)(rows).item() == pytest.approx((3 + 9 + 8 + 2) / 4)
    with pytest.raises(ValueError, match="trust another worker"):
        MoNNA(2, trusted=0)(rows)


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: CoordinateMedian(-1), "num_byzantine"),
        (lambda: CoordinateMedian(0.5), "num_byzantine"),
        (lambda: Mean(worker_weights=[1.0, 0.0]), "worker_weights"),
        (lambda: Mean(worker_weights=[1.0, 1.0]).check(3), "Give one per worker"),
        (lambda: Krum(1).check(4), "at most 0 may be faulty for Krum"),
        (lambda: Krum(0).check(1), None),
        (lambda: MultiKrum(1, num_selected=5).check(5), "num_selected"),
        (lambda: MultiKrum(1, num_selected=0), "num_selected"),
        (lambda: Bulyan(1).check(6), "at most 0 may be faulty for Bulyan"),
        (lambda: MoNNA(1, trusted=-1), "trusted"),
        (lambda: MoNNA(1, trusted=3).check(3), "less than 3"),
        (lambda: SMEA(10).check(40), "There are 847660528"),
        (lambda: DnC(1, filter_fraction=3).check(3), "filter_fraction"),
        (lambda: DnC(1, filter_fraction=-1), "filter_fraction"),
        (lambda: DnC(1, filter_fraction=0), "filter_fraction"),  # would be the mean
        (lambda: DnC(2, filter_fraction=0.4), "filter_fraction"),
        (lambda: get_aggregator("filter(num_byzantine=3)", 2), "num_byzantine"),
        (lambda: get_aggregator("nnm+krum(num_byzantine=1)", 2), "num_byzantine"),
        (lambda: GeometricMedian(1, smoothing=0.0), "smoothing"),
        (lambda: GeometricMedian(1, num_iterations=0), "num_iterations"),
        (lambda: GeometricMedian(1, tolerance=-1), "tolerance"),
        (lambda: GeometricMedian(1, start="here"), "start"),
        (lambda: CenteredClipping(1, radius=0.0), "radius"),
        (lambda: CenteredClipping(1, num_iterations=0), "num_iterations"),
        (lambda: SpectralFilter(1, stop="soon"), "stop"),
        (lambda: SpectralFilter(1, stop="threshold"), "sigma0"),
        (lambda: SpectralFilter(1, gamma=0.5), "gamma"),
        (lambda: SpectralFilter(1, noise_factor=float("nan")), "noise_factor"),
        (lambda: SpectralFilter(1, mode="medium"), "mode"),
        (lambda: Bucketing(0), "bucket_size"),
        (lambda: Clip(-1.0), "radius"),
        (lambda: PreAggregated([], Mean()), "steps"),
        (lambda: PreAggregated([Bucketing()], MoNNA(1)), "belong to workers"),
        (lambda: PreAggregated([Bucketing()], Mean(1, worker_weights=[1, 2, 3])), "workers"),
        (lambda: PreAggregated([Bucketing()], CoordinateMedian(2)).check(8), "at most 1"),
        (lambda: NNM().load_state_dict({"draws": 1}), "state"),
        (
            lambda: Clip(1.0)(torch.eye(3), out=torch.eye(3).double()),
            "`out` to be of .* torch.float32",
        ),
        (lambda: Bucketing()(torch.eye(3), out=torch.eye(3)), r"`out` to be of \(2, 3\)"),
        (lambda: get_aggregator(Mean(), 1), "num_byzantine"),
    ],
)
def test_settings_are_checked(make, match):
    if match is None:
        make()
    else:
        with pytest.raises(ValueError, match=match):
            make()


def test_a_setting_without_effect_warns():
    with pytest.warns(NoEffectWarning, match="sigma0 has no effect"):
        SpectralFilter(1, sigma0=1.0)


def test_too_many_huge_rows_are_named_not_computed_with():
    rows = torch.cat([torch.ones(3, 4), torch.full((2, 4), 3e30)])
    with pytest.raises(ValueError, match="overflow"):
        SpectralFilter(1)(rows)


@pytest.mark.parametrize(
    "make",
    [
        lambda: CenteredClipping(1),
        lambda: SpectralFilter(1, mode="hard", seed=3),
        lambda: get_aggregator("bucketing(bucket_size=2)+cclip", 1),
        lambda: get_aggregator("bucketing(bucket_size=2)+median", 1),
        lambda: get_aggregator("bucketing(bucket_size=2)+filter(mode='hard', stop='agnostic')", 1),
    ],
)
def test_it_goes_on_from_its_state(make, tmp_path):
    generator = torch.Generator().manual_seed(0)
    batches = torch.randn(6, 9, 30, generator=generator)
    rule = make()
    for rows in batches[:3]:
        rule(rows)
    torch.save(rule.state_dict(), tmp_path / "state")
    resumed = make()
    resumed.load_state_dict(torch.load(tmp_path / "state", weights_only=True))
    fresh, differences = make(), []
    for rows in batches[3:]:
        expected = rule(rows)
        assert torch.equal(resumed(rows), expected)
        differences.append(not torch.equal(fresh(rows), expected))
    assert any(differences) or isinstance(rule, SpectralFilter)


def test_the_hard_filter_removes_whole_rows():
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(20, 500, generator=generator)
    rows[:4] += 3
    rule = SpectralFilter(4, mode="hard")
    rule(rows)
    weights = rule.report.weights
    assert weights[:4].tolist() == [0.0] * 4
    assert len(weights.unique()) == 2


def test_more_rows_than_eigendecompositions_are_made_for():
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(300, 1000, generator=generator, dtype=torch.float64)
    rows[:40] += 0.5
    rule = SpectralFilter(40)
    error = rule(rows) - rows[40:].mean(dim=0)
    assert float(rule.report.weights[:40].sum()) < 0.02
    spread = torch.linalg.matrix_norm(
        (rows - rule.report.weights @ rows) * rule.report.weights.sqrt()[:, None], 2
    )
    assert rule.report.top_eigenvalue == pytest.approx(float(spread) ** 2, rel=0.05)
    assert float(error.norm()) < 0.3 * (1000 / 260) ** 0.5


def test_gradients_are_not_tracked():
    rows = E5.clone().requires_grad_()
    for name in ("median", "filter", "nnm+trmean"):
        assert not get_aggregator(name, 1)(rows).requires_grad


@pytest.mark.slow
def test_memory_stays_below_a_copy_of_the_rows():
    # n × (n − f) × d would be 16 times the rows here; even one copy of them is too much for a large model.
    code = """
import resource, sys, torch
from lightning_sgd.aggregation import NNM, get_aggregator
torch.set_num_threads(1)
rows = torch.randn(20, 500_000)
get_aggregator("nnm+trmean", 4)(rows[:, :100_000])
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
for name in ("filter", "krum", "nnm+trmean", "bulyan", "meamed", "cclip", "arc+geomed"):
    get_aggregator(name, 4)(rows)
    get_aggregator(name, 4)(list(rows))
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""
    command = [sys.executable, "-c", code]
    result = subprocess.run(command, capture_output=True, text=True, timeout=100, check=True)
    assert int(result.stdout) < 20 * 500_000 * 4 / 1024 * 0.75
