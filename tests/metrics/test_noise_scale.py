"""GradientNoiseScale against sums by hand, over updates and over processes."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from support.processes import run_ranks

from lightning_sgd import GradientNoiseScale


def rows(seed, m=8):
    generator = torch.Generator().manual_seed(seed)
    return 0.5 + torch.randn(m, 50, generator=generator, dtype=torch.float64)


def by_hand(looks, b):
    """Sums of noise over sums of signal, by NumPy's variances."""
    traces = [b * np.var(x.numpy(), axis=0, ddof=1).sum() for x in looks]
    squares = [
        float(x.mean(dim=0).square().sum()) - trace / b / len(x)
        for x, trace in zip(looks, traces, strict=True)
    ]
    return sum(traces) / sum(squares)


def test_updates_add_up_before_they_are_divided():
    metric, looks = GradientNoiseScale(), [rows(0), rows(1, 2), rows(2, 5)]
    for x in looks:
        metric.update(x, batch_size=16)
    assert metric.compute().item() == pytest.approx(by_hand(looks, 16), rel=1e-6)
    scale = metric.result()
    assert scale.low < scale.value < scale.high
    metric.reset()
    with pytest.warns(UserWarning, match="called before the ``update``"):
        assert math.isnan(metric.compute().item())


def test_forward_gives_the_value_of_the_update():
    metric = GradientNoiseScale()
    for seed in range(3):
        value = metric(rows(seed), batch_size=4).item()
        assert value == pytest.approx(by_hand([rows(seed)], 4), rel=1e-6)


def test_ranks_add_up(tmp_path):
    def work(rank):
        metric = GradientNoiseScale()
        metric.update(rows(rank), batch_size=4)
        return metric.compute()

    found = run_ranks(work, 2, tmp_path)
    expected = by_hand([rows(0), rows(1)], 4)
    assert [each.item() for each in found] == pytest.approx([expected] * 2, rel=1e-6)


def test_it_is_drawn():
    metric = GradientNoiseScale()
    metric.update(rows(0), batch_size=4)
    figure, axes = metric.plot()
    assert axes.lines
    assert figure.axes == [axes]
