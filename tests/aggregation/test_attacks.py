"""Attacks: what they send, and that they find the weakness they are for."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy.stats import norm

from lightning_sgd.aggregation import (
    ALIE,
    IPM,
    BitFlip,
    ConstantAttack,
    CoordinateMedian,
    GaussianAttack,
    LabelFlip,
    Mean,
    Mimic,
    MinMax,
    NonFinite,
    OptimalFactor,
    SignFlip,
    SpectralFilter,
    TrimmedMean,
)
from lightning_sgd.functional.robust.attacks import alie_factor

HONEST = torch.tensor([[1.0, 2.0], [3.0, 2.0], [5.0, 8.0]])  # mean (3, 4), std (2, √12)
OWN = torch.tensor([[1.0, -1.0], [2.0, 0.5]])


def sent(attack, honest=HONEST, own=OWN, seed=0):
    return attack(honest, own, torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(
    ("attack", "expected"),
    [
        (SignFlip(), [[-1, 1], [-2, -0.5]]),
        (SignFlip(omniscient=True), [[-3, -4]] * 2),
        (IPM(), [[-0.3, -0.4]] * 2),
        (IPM(2.0), [[-6, -8]] * 2),
        (ALIE(z=0.5), [[2, 4 - 12**0.5 / 2]] * 2),
        (ALIE(z=0.5, sign=1), [[4, 4 + 12**0.5 / 2]] * 2),
        (Mimic(), [[1, 2]] * 2),
        (Mimic(worker=2), [[5, 8]] * 2),
        (ConstantAttack(), [[0, 0]] * 2),
        (ConstantAttack(7), [[7, 7]] * 2),
        (NonFinite(), [[math.nan] * 2] * 2),
        (NonFinite("inf"), [[math.inf] * 2] * 2),
        (BitFlip(num_coordinates=50, bit=0), [[0.5, -0.5], [4, 1]]),
    ],
    ids=lambda value: type(value).__name__,
)
def test_what_is_sent(attack, expected):
    expected = torch.tensor(expected, dtype=torch.float32)
    torch.testing.assert_close(sent(attack), expected, equal_nan=True)
    for dtype in (torch.float64, torch.bfloat16):
        found = sent(attack, HONEST.to(dtype), OWN.to(dtype))
        assert (found.dtype, found.shape) == (dtype, OWN.shape)


@pytest.mark.parametrize(
    ("n", "f", "z"),
    [(20, 4, 0.1573), (25, 5, 0.2533), (50, 12, 0.3360), (10, 2, 0.0), (8, 1, -0.18)],
)
def test_the_factor_of_alie(n, f, z):
    assert alie_factor(n, f) == pytest.approx(z, abs=5e-5)
    supporters = n // 2 + 1 - f
    assert alie_factor(n, f) == pytest.approx(norm.ppf((n - f - supporters) / (n - f)), abs=1e-12)


def test_alie_takes_a_fixed_factor_where_the_formula_has_none():
    honest = torch.randn(7, 5, generator=torch.Generator().manual_seed(0))
    expected = honest.mean(dim=0) - 1.5 * honest.std(dim=0)
    torch.testing.assert_close(sent(ALIE(), honest, torch.zeros(1, 5))[0], expected)
    honest = torch.cat([honest, honest + 1, honest[:2]])
    expected = honest.mean(dim=0) - alie_factor(20, 4) * honest.std(dim=0)
    torch.testing.assert_close(sent(ALIE(), honest, torch.zeros(4, 5))[0], expected)


@pytest.mark.parametrize("by_sum", [False, True])
def test_min_max_is_as_far_as_it_can_be(by_sum):
    honest = torch.randn(9, 30, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    row = sent(MinMax(by_sum), honest, torch.zeros(2, 30, dtype=torch.float64))[0]
    gamma = ((honest.mean(dim=0) - row) / honest.std(dim=0)).mean()
    combine = torch.sum if by_sum else torch.amax

    def spread(point):
        return float(combine((honest - point).square().sum(dim=1), dim=0))

    limit = max(spread(other) for other in honest)
    assert spread(row) == pytest.approx(limit, rel=1e-9)
    assert spread(honest.mean(dim=0) - 1.001 * gamma * honest.std(dim=0)) > limit


def test_the_optimal_factor_is_no_worse_than_a_grid():
    honest = torch.randn(12, 40, generator=torch.Generator().manual_seed(1)) + 0.3
    own = torch.zeros(4, 40)
    for rule in (CoordinateMedian(4), TrimmedMean(4), SpectralFilter(4, "agnostic")):
        for direction, vector in (("alie", honest.std(dim=0)), ("ipm", honest.mean(dim=0))):

            def error(row, rule=rule):
                result = rule(torch.cat([honest, row.expand_as(own)]))
                return float((result - honest.mean(dim=0)).norm())

            grid = (0.0, 0.25, 0.5, 1.0, 1.5, 2.0, 3.0, 5.0, 10.0, 30.0)
            best = max(error(honest.mean(dim=0) - factor * vector) for factor in grid)
            attack = OptimalFactor(rule, direction, num_evaluations=24)
            assert error(sent(attack, honest, own)[0]) >= 0.8 * best


def test_the_optimal_factor_grows_without_bound_against_the_mean():
    honest = torch.randn(5, 3, generator=torch.Generator().manual_seed(1))
    assert float(sent(OptimalFactor(Mean()), honest, torch.zeros(1, 3)).norm()) > 1e3


def test_random_attacks_follow_the_generator():
    for attack in (GaussianAttack(1.0, 2.0), BitFlip(num_coordinates=3)):
        own = torch.ones(2, 10_000)
        one, again, other = (sent(attack, own=own, seed=seed) for seed in (0, 0, 1))
        assert torch.equal(one, again)
        assert not torch.equal(one, other)
        assert not torch.equal(one[0], one[1])
    noise = sent(GaussianAttack(1.0, 2.0), own=own)
    assert (float(noise.mean()), float(noise.std())) == pytest.approx((1.0, 2.0), abs=0.05)


@pytest.mark.parametrize("value", [1.0, -3.25, 1e-20, 6e30])
@pytest.mark.parametrize("bit", range(8))
def test_one_bit_of_the_exponent_is_flipped(value, bit):
    row = sent(BitFlip(num_coordinates=1, bit=bit), own=torch.tensor([[value]]))
    expected = (np.array([value], np.float32).view(np.uint32) ^ (1 << (23 + bit))).view(np.float32)
    np.testing.assert_array_equal(row.numpy()[0], expected)


def test_mimic_learns_whom_to_copy():
    # Honest workers differ most along the first axis; the copy is of the one farthest out on it.
    generator = torch.Generator().manual_seed(0)
    places = torch.tensor([[-1.0], [-0.5], [0.0], [2.0], [0.2]]) * torch.eye(6)[0]
    attack = Mimic(num_warmup_steps=20)
    for _ in range(20):
        honest = places + 0.1 * torch.randn(5, 6, generator=generator)
        assert torch.equal(attack(honest, OWN.new_zeros(2, 6), generator)[0], honest[0])
    resumed = Mimic(num_warmup_steps=20)
    resumed.load_state_dict(attack.state_dict())
    copied = [sent(a, honest, OWN.new_zeros(2, 6)) for a in (attack, resumed)]
    assert torch.equal(copied[0], copied[1])
    farthest = honest[[0, 3]]
    assert any(torch.equal(copied[0][0], row) for row in farthest)
    assert abs(float(attack.direction[0])) > 0.95


def test_flipped_labels():
    labels = torch.tensor([[0, 1], [8, 9]])
    assert LabelFlip(10)(labels).tolist() == [[9, 8], [1, 0]]
    assert torch.equal(LabelFlip(10)(LabelFlip(10)(labels)), labels)


def test_scopes_say_where_an_attack_can_run():
    # A strategy whose ranks hold a block of columns each relies on them.
    own = (SignFlip(), GaussianAttack(), ConstantAttack(), NonFinite(), BitFlip())
    columns = (SignFlip(omniscient=True), IPM(), ALIE(), Mimic())
    rows = (MinMax(), OptimalFactor(Mean()), Mimic(num_warmup_steps=1))
    for attacks, scope in ((own, "own"), (columns, "columns"), (rows, "rows")):
        assert {attack.scope for attack in attacks} == {scope}
    for attack in columns:
        parts = [sent(attack, HONEST[:, i : i + 1], OWN[:, i : i + 1]) for i in (0, 1)]
        torch.testing.assert_close(torch.cat(parts, dim=1), sent(attack))
    for attack in own:
        nothing = torch.empty(0, 2)
        torch.testing.assert_close(sent(attack, nothing), sent(attack), equal_nan=True)


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: IPM(-1.0), "epsilon"),
        (lambda: ALIE(z=math.nan), "`z`"),
        (lambda: ALIE(sign=0), "sign"),
        (lambda: OptimalFactor(Mean(), "up"), "direction"),
        (lambda: OptimalFactor(Mean(), num_evaluations=1), "num_evaluations"),
        (lambda: Mimic(worker=-1), "worker"),
        (lambda: Mimic(num_warmup_steps=-1), "num_warmup_steps"),
        (lambda: sent(Mimic(worker=3)), "less than 3"),
        (lambda: GaussianAttack(std=-1.0), "std"),
        (lambda: NonFinite("zero"), "one of nan, inf"),
        (lambda: BitFlip(num_coordinates=0), "num_coordinates"),
        (lambda: BitFlip(bit=8), "bit"),
        (lambda: LabelFlip(1), "num_classes"),
        (lambda: IPM().load_state_dict({"num_calls": 1}), "state"),
    ],
)
def test_settings_are_checked(make, match):
    with pytest.raises(ValueError, match=match):
        make()
