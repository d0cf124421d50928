"""Compressors against their textbook errors, and the fitted error model against a linear programme."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from lightning_sgd import BiasedSGDProblem, biased_sgd_floor, fit_error_model
from lightning_sgd.functional.step_size.compression import (
    compression_sums,
    compressor,
    cosine,
    keep_largest,
    relative_error,
    round_to_bf16,
    round_to_grid,
    scaled_sign,
)

GAUSSIAN = torch.randn(100_000, generator=torch.Generator().manual_seed(0))
NAMES = ("bf16", "int8", "int4", "sign", "topk")


def error_of(values, compress):
    return relative_error(compression_sums([values], compress).tolist())


def test_bf16_keeps_every_number_within_the_unit_roundoff():
    # finfo(bfloat16).eps / 2 = 2⁻⁸, attained halfway between two numbers; Gaussian vectors are well below.
    relative = ((round_to_bf16(GAUSSIAN) - GAUSSIAN) / GAUSSIAN).abs()
    assert relative.max() <= 2.0**-8
    assert error_of(torch.tensor([1 + 2.0**-8]), round_to_bf16) == pytest.approx(2.0**-8, rel=1e-2)
    assert error_of(GAUSSIAN, round_to_bf16) == pytest.approx(0.00166, abs=2e-5)


@pytest.mark.parametrize("num_bits", [2, 3, 4, 8])
def test_a_grid_keeps_half_a_step(num_bits):
    # c = h·√p/2 at most, h·√(p/12) for numbers spread evenly over the cells; the largest magnitude is kept.
    step = float(GAUSSIAN.abs().max()) / (2 ** (num_bits - 1) - 1)
    error = round_to_grid(GAUSSIAN, num_bits) - GAUSSIAN
    assert float(error.norm()) <= step * math.sqrt(len(GAUSSIAN)) / 2
    assert len(round_to_grid(GAUSSIAN, num_bits).unique()) <= 2**num_bits - 1
    assert float(error[GAUSSIAN.abs().argmax()]) == 0
    if num_bits == 8:
        assert float(error.norm()) == pytest.approx(step * math.sqrt(len(GAUSSIAN) / 12), rel=0.01)


def test_sign_and_top_k_by_hand():
    # ‖u‖₁ = 8, ‖u‖² = 26, p = 4: error² = 26 − 8²/4 = 10, cosine = 8/(√4·√26).
    u = torch.tensor([[4.0, -3.0], [1.0, 0.0]])
    sums = compression_sums([u], scaled_sign).tolist()
    # The sign of zero is zero: its share of the error is missing.
    assert scaled_sign(u).tolist() == [[2, -2], [2, 0]]
    assert sums == [26, 4 + 1 + 1, -8 + -3 + 1]
    assert relative_error(sums) == pytest.approx(math.sqrt(6 / 26))
    assert cosine(sums) == pytest.approx((26 - 10) / math.sqrt(26 * 12))
    assert keep_largest(u, 0.5).tolist() == [[4, -3], [0, 0]]
    assert compression_sums([u], lambda v: keep_largest(v, 0.5)).tolist() == [26, 1, -1]


@pytest.mark.parametrize("fraction", [0.01, 0.3, 1.0])
def test_top_k_loses_no_more_than_its_share(fraction):
    # δ² = 1 − k/p in the worst case, all magnitudes equal.
    assert error_of(GAUSSIAN, lambda v: keep_largest(v, fraction)) ** 2 <= 1 - fraction + 1e-9
    flat = torch.ones(100)
    worst = error_of(flat, lambda v: keep_largest(v, fraction)) ** 2
    assert worst == pytest.approx(1 - fraction, abs=1e-12)
    assert int(keep_largest(torch.ones(7), 0.001).count_nonzero()) == 1


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_compressors_keep_type_shape_zero_and_their_input(name, dtype):
    for values in (torch.zeros(3, 2, dtype=dtype), GAUSSIAN[:6].view(3, 2).to(dtype)):
        before = values.clone()
        result = compressor(name)(values)
        assert result.dtype == dtype
        assert result.shape == values.shape
        assert torch.equal(values, before)
        assert bool(result.isfinite().all())
        assert not (before == 0).all() or not result.any()


def test_sums_are_over_all_tensors_and_against_numpy():
    # Each tensor is compressed on its own, as buckets are; a compressor that writes into its input is harmless.
    tensors = [GAUSSIAN[:50].clone(), GAUSSIAN[50:80].view(5, 6).clone()]
    kept = [tensor.clone() for tensor in tensors]
    sums = compression_sums(tensors, lambda v: v.mul_(0.5)).tolist()
    u = GAUSSIAN[:80].double().numpy()
    np.testing.assert_allclose(sums, [u @ u, u @ u / 4, -(u @ u) / 2], rtol=1e-12)
    assert all(torch.equal(a, b) for a, b in zip(tensors, kept, strict=True))
    assert cosine(sums) == pytest.approx(1)


def test_sparse_gradients_count_by_their_values():
    sparse = torch.sparse_coo_tensor([[0, 0, 2]], [1.0, 2.0, -1.0], (1000,), check_invariants=True)
    assert compression_sums([sparse], scaled_sign).tolist() == [10, 1 + 1, -3 + 1]


def test_degenerate_angles_and_ratios():
    assert (relative_error([0, 0, 0]), cosine([0, 0, 0])) == (0, 1)
    assert (relative_error([0, 1, 0]), cosine([0, 1, 0])) == (math.inf, 0)
    assert (relative_error([4, 4, -4]), cosine([4, 4, -4])) == (1, 0)  # everything is lost
    assert cosine([4, 16, -8]) == -1  # turned round
    assert relative_error(compression_sums([], scaled_sign).tolist()) == 0


def test_a_changed_shape_is_refused():
    with pytest.raises(ValueError, match=r"Expected `compressor` to be a function that keeps"):
        compression_sums([torch.ones(4)], lambda values: values[:2])


@pytest.mark.parametrize(
    ("settings", "argument"),
    [
        ({"name": "int16"}, "compressor"),
        ({"name": "topk", "topk_fraction": 0.0}, "topk_fraction"),
        ({"name": "topk", "topk_fraction": 1.5}, "topk_fraction"),
    ],
)
def test_impossible_compressors_are_refused(settings, argument):
    with pytest.raises(ValueError, match=f"Expected `{argument}` to be"):
        compressor(**settings)


def test_one_bit_is_no_grid():
    with pytest.raises(ValueError, match="Expected `num_bits` to be at least 2, got 1"):
        round_to_grid(GAUSSIAN, 1)


def lowest_floor(p, q, problem):
    """The same fit as a linear programme: minimise over lines above all points by bisection on the floor."""
    from scipy.optimize import linprog

    G2, m, M21 = problem.G2, problem.m, problem.L + problem.m

    def reachable(floor):  # is there a line with b + 2sG2 ≤ floor·(m² − 2m²s)?
        result = linprog(
            [0, 0],
            A_ub=[*([-x, -1] for x in p), [2 * G2 + 2 * m * m * floor, 1]],
            b_ub=[*(-y for y in q), floor * m * m],
            bounds=[(0, m / M21), (0, None)],
        )
        return result.status == 0

    low, high = 0.0, 2 * max(q) / m**2
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (low, middle) if reachable(middle) else (middle, high)
    return high


@pytest.mark.parametrize("seed", range(5))
def test_no_line_above_the_points_has_a_lower_floor(seed):
    rng = np.random.default_rng(seed)
    p = rng.uniform(0.1, 4, size=12)
    q = 0.01 * p * rng.uniform(0, 1, size=12) + 0.002 * rng.uniform(0, 1, size=12)
    problem = BiasedSGDProblem(m=1.0, L=10.0, G2=rng.uniform(0, 2))
    delta, c = fit_error_model(p, q, problem)
    assert (delta**2 * p + c**2 >= q * (1 - 1e-9)).all()
    floor = biased_sgd_floor(problem, delta, c)
    assert floor == pytest.approx(lowest_floor(p, q, problem), abs=3e-7)  # linprog's own tolerance


def test_models_by_hand():
    # Purely relative, purely absolute, and both: q = 0.04p + 0.01.
    here = BiasedSGDProblem(m=1.0, L=10.0, assumption="convex", G2=1.0)
    assert fit_error_model([1.0, 4.0], [0.01, 0.04], here) == pytest.approx((0.1, 0.0))
    assert fit_error_model([1.0, 4.0], [0.09, 0.09], here) == pytest.approx((0.0, 0.3))
    assert fit_error_model([1.0, 4.0], [0.02, 0.05], here) == pytest.approx((0.1, 0.1))
    assert fit_error_model([1.0, 4.0], [0.05, 0.05]) == pytest.approx((math.sqrt(0.05), 0.0))
    # An error beyond every relative budget is fitted as absolute, which always leaves a floor.
    assert fit_error_model([1.0, 2.0], [0.9, 1.8], here) == pytest.approx((0.0, math.sqrt(1.8)))
    # A vanishing gradient with an error has no relative error.
    assert fit_error_model([0.0, 1.0], [0.04, 0.0]) == pytest.approx((0.0, 0.2))
    assert fit_error_model([0.0], [0.0]) == (0.0, 0.0)


@pytest.mark.parametrize("with_problem", [False, True])
def test_a_quantile_leaves_outliers_out(with_problem):
    here = BiasedSGDProblem(m=1.0, L=10.0, G2=0.1) if with_problem else None
    p, q = [1.0] * 20, [0.01] * 19 + [0.25]
    all_of_them = fit_error_model(p, q, here)
    most = fit_error_model(p, q, here, quantile=0.95)
    assert all_of_them[0] ** 2 + all_of_them[1] ** 2 == pytest.approx(0.25)
    assert most[0] ** 2 + most[1] ** 2 == pytest.approx(0.01)


@pytest.mark.parametrize(
    ("arguments", "argument"),
    [
        (([], []), "grad_sq"),
        (([1.0], [1.0, 2.0]), "grad_sq and err_sq"),
        (([1.0], [math.nan]), "grad_sq and err_sq"),
        (([-1.0], [1.0]), "grad_sq and err_sq"),
        (([1.0], [1.0], None, 0.0), "quantile"),
        (([1.0], [1.0], None, 1.5), "quantile"),
    ],
)
def test_impossible_measurements_are_refused(arguments, argument):
    with pytest.raises(ValueError, match=f"Expected `{argument}` to be"):
        fit_error_model(*arguments)
