"""Singular values against NumPy's decomposition in float64, and at the limits of each route."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_sgd.functional.precision import full_precision
from lightning_sgd.functional.spectra import singular_values as spectra
from lightning_sgd.functional.spectra.gram import gram_matrix
from lightning_sgd.functional.spectra.norms import schatten_norms
from lightning_sgd.functional.spectra.singular_values import (
    choose_route,
    singular_values,
    smallest_resolved,
)


def normal(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def with_spectrum(sigma, rows, columns, seed=0, dtype=torch.float64):
    """A matrix with these singular values and random singular vectors, made by NumPy."""
    rng = np.random.default_rng(seed)
    U = np.linalg.qr(rng.standard_normal((rows, rows)))[0][:, : len(sigma)]
    V = np.linalg.qr(rng.standard_normal((columns, columns)))[0][:, : len(sigma)]
    return torch.from_numpy(U * np.asarray(sigma) @ V.T).to(dtype)


def oracle(matrix):
    return np.linalg.svd(matrix.double().numpy(), compute_uv=False)


shapes = st.lists(st.tuples(st.integers(1, 12), st.integers(1, 12)), min_size=1, max_size=8)


@settings(max_examples=40, deadline=None)
@given(
    shapes=shapes,
    dtype=st.sampled_from([torch.float32, torch.float64, torch.bfloat16]),
    exponent=st.integers(-18, 18),
    method=st.sampled_from(["auto", "gram", "svd", "sketch"]),
    limit=st.sampled_from([1, 100, 2**24]),
)
def test_equal_those_of_numpy(shapes, dtype, exponent, method, limit):
    # Whatever the sizes, types, scales and batches: also where the squares overflow float32.
    matrices = [10.0**exponent * normal(*shape, seed=i) for i, shape in enumerate(shapes)]
    matrices = [matrix.to(dtype) for matrix in matrices]
    spectra = singular_values(matrices, method=method, max_batch_elements=limit)
    for matrix, sigma in zip(matrices, spectra, strict=True):
        expected = oracle(matrix)
        np.testing.assert_allclose(sigma.numpy(), expected, rtol=2e-3, atol=1e-3 * expected[0])
        assert (sigma.diff() <= 0).all()


def test_batches_have_the_spectra_of_their_matrices():
    batch = normal(2, 3, 6, 4)
    (sigma,) = singular_values([batch])
    np.testing.assert_allclose(sigma.numpy(), np.linalg.svd(batch.numpy(), compute_uv=False), 1e-3)
    assert [tuple(s.shape) for s in singular_values([batch, batch[0, 0].mT])] == [(2, 3, 4), (4,)]


def test_matrices_of_a_generator_are_taken_one_at_a_time():
    # Sharded weights are gathered one by one: never may two be needed at once.
    alive = []

    def matrices():
        for i in range(4):
            assert len(alive) == 0
            alive.append(i)
            yield normal(4, 5 + i, seed=i)
            alive.pop()

    assert len(singular_values(matrices())) == 4


@pytest.mark.parametrize("method", ["gram", "svd", "sketch"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_a_matrix_that_is_not_finite_leaves_the_others_alone(method, bad):
    # One diverged layer must neither stop training nor hide the ranks of the rest.
    matrices = [normal(6, 9, seed=i) for i in range(4)]
    expected = singular_values(matrices, method=method)
    matrices[1] = matrices[1].clone()
    matrices[1][2, 3] = bad
    spectra = singular_values(matrices, method=method, sketch_size=6)
    assert spectra[1].isnan().all()
    for i in (0, 2, 3):
        torch.testing.assert_close(spectra[i], expected[i], rtol=0, atol=0)
    assert all(norm.isnan() for norm in schatten_norms(matrices)[1])


@pytest.mark.parametrize("method", ["gram", "svd", "sketch"])
def test_a_zero_matrix_has_zeros(method):
    (sigma,) = singular_values([torch.zeros(7, 5)], method=method, sketch_size=3)
    assert (sigma == 0).all()
    norms = schatten_norms([torch.zeros(7, 5)])[0]
    assert [*norms, norms.stable_rank, norms.participation_ratio] == [0, 0, 0, 0, 0]


@pytest.mark.parametrize(
    ("method", "dtype", "floor"),
    [
        ("gram", torch.float32, 3e-4),
        ("svd", torch.float32, 6e-8),
        ("gram", torch.float64, 1e-8),
    ],
)
def test_each_route_is_accurate_down_to_what_it_promises(method, dtype, floor):
    # A Gram matrix squares: below √ε·σ₁ it holds noise. Users choose thresholds by this table.
    assert smallest_resolved(method, dtype) == pytest.approx(floor, rel=1.01)
    ratios = np.logspace(0, np.log10(2 * smallest_resolved(method, dtype)), 24)
    # Its own rounding moves the singular values of a float32 matrix: the last is only asked for in float64.
    W = with_spectrum(ratios, 48, 96)
    (sigma,) = singular_values(
        [W if dtype == torch.float64 else W.float()], method=method, dtype=dtype
    )
    at_the_limit = 0.15 if method == "gram" else 1.0
    np.testing.assert_allclose(sigma[:24].numpy(), oracle(W)[:24], rtol=at_the_limit)
    np.testing.assert_allclose(sigma[:16].numpy(), oracle(W)[:16], rtol=1e-2)


def test_float32_gram_matrices_lose_what_auto_keeps():
    W = with_spectrum([1.0, 1e-2, 1e-5], 32, 64).float()
    wrong = singular_values([W], method="gram", dtype=torch.float32)[0]
    right = singular_values([W], resolution=1e-6)[0]
    assert wrong[2] > 2e-5
    assert right[:3].tolist() == pytest.approx([1.0, 1e-2, 1e-5], rel=1e-3)


@pytest.mark.parametrize(
    ("arguments", "route"),
    [
        (("auto", None, 1e-3, torch.float32), ("gram", torch.float32)),
        (("auto", None, 1e-3, torch.bfloat16), ("gram", torch.float32)),
        (("auto", None, 9e-4, torch.float32), ("gram", torch.float32)),
        (("auto", None, 6e-4, torch.float32), ("gram", torch.float64)),
        (("auto", None, 0.0, torch.float32), ("gram", torch.float64)),
        (("auto", None, 0.0, torch.float64), ("svd", torch.float64)),
        (("auto", torch.float32, 1e-5, torch.float32), ("svd", torch.float32)),
        (("gram", None, 1e-5, torch.float32), ("gram", torch.float64)),
        (("gram", torch.float32, 1e-9, torch.float32), ("gram", torch.float32)),
        (("gram", torch.float32, 1e-3, torch.float64), ("gram", torch.float64)),
        (("sketch", None, 1e-3, torch.float32), ("sketch", torch.float32)),
    ],
)
def test_auto_takes_the_cheapest_route_that_resolves_enough(arguments, route):
    assert choose_route(*arguments) == route


def test_a_sketch_bounds_from_below_and_finds_low_rank_exactly():
    W = with_spectrum(np.geomspace(1, 1e-4, 40), 64, 200)
    (sketch,) = singular_values([W], method="sketch", sketch_size=20)
    exact = oracle(W)[:20]
    assert len(sketch) == 20
    assert (sketch.numpy() <= exact * (1 + 1e-12)).all()
    np.testing.assert_allclose(sketch[:10].numpy(), exact[:10], rtol=1e-3)
    low = with_spectrum([3.0, 2.0, 1.0], 64, 200)
    (sketch,) = singular_values([low], method="sketch", sketch_size=5)
    np.testing.assert_allclose(sketch.numpy(), [3, 2, 1, 0, 0], atol=1e-12)


def test_a_sketch_draws_only_from_its_own_generator():
    W, state = normal(32, 40), torch.get_rng_state()
    first, second = (singular_values([W], method="sketch", sketch_size=4)[0] for _ in range(2))
    generator = torch.Generator().manual_seed(7)
    other = singular_values([W], method="sketch", sketch_size=4, generator=generator)[0]
    assert torch.equal(first, second)
    assert not torch.equal(first, other)
    assert torch.equal(state, torch.get_rng_state())


@pytest.mark.parametrize("shape", [(12, 40), (150, 200), (300, 140)])
def test_cheap_norms_are_those_of_the_spectrum(shape):
    W = normal(*shape)
    sigma = oracle(W)
    norms = schatten_norms([W, 1e18 * W])
    for scale, (two, four, infinity) in zip((1, 1e18), norms, strict=True):
        assert two.item() == pytest.approx(scale * np.linalg.norm(sigma), rel=1e-5)
        assert four.item() == pytest.approx(scale * np.sum(sigma**4) ** 0.25, rel=1e-5)
        assert scale * sigma[0] * 0.997 <= infinity.item() <= scale * sigma[0] * (1 + 1e-5)
    sigma2 = sigma**2
    assert norms[0].stable_rank.item() == pytest.approx(sigma2.sum() / sigma2[0], rel=6e-3)
    ratio = sigma2.sum() ** 2 / (sigma2**2).sum()
    assert norms[1].participation_ratio.item() == pytest.approx(ratio, rel=1e-4)


def test_lanczos_stops_where_nothing_is_left():
    # Rank 3 of 200: the Krylov space ends after three steps, and noise must not be taken for a direction.
    W = with_spectrum([5.0, 4.0, 1.0], 200, 200).float()
    norms = schatten_norms([W, W.expand(2, 200, 200)])
    assert norms[0].infinity.item() == pytest.approx(5.0, rel=1e-5)
    assert norms[1].infinity.tolist() == pytest.approx([5.0, 5.0], rel=1e-5)
    assert norms[0].stable_rank.item() == pytest.approx(42 / 25, rel=1e-4)
    one, none = schatten_norms([torch.eye(200), torch.zeros(200, 200)])
    assert (one.infinity.item(), none.infinity.item()) == (pytest.approx(1.0), 0.0)


SETTINGS = {
    "older": lambda: torch.set_float32_matmul_precision("medium"),
    "older flag": lambda: setattr(torch.backends.cuda.matmul, "allow_tf32", True),
    "newer": lambda: setattr(torch.backends.cuda.matmul, "fp32_precision", "tf32"),
    "newer, cpu": lambda: setattr(torch.backends.mkldnn.matmul, "fp32_precision", "bf16"),
    "none": lambda: None,
}


def precisions():
    try:
        older = torch.get_float32_matmul_precision()
    except RuntimeError:
        older = "refused"
    backends = torch.backends.cuda.matmul, torch.backends.mkldnn.matmul
    return older, *(backend.fp32_precision for backend in backends)


@pytest.fixture
def _precisions_restored():
    yield
    torch.set_float32_matmul_precision("highest")
    torch.backends.cuda.matmul.fp32_precision = "none"
    torch.backends.mkldnn.matmul.fp32_precision = "none"


@pytest.mark.usefixtures("_precisions_restored")
@pytest.mark.parametrize("setting", SETTINGS)
def test_reduced_precision_is_off_inside_and_back_after(setting):
    # TensorFloat-32 and autocast ruin a Gram matrix silently; training must get them back, even after an error.
    SETTINGS[setting]()
    before = precisions()
    with pytest.raises(KeyError), torch.autocast("cpu", torch.bfloat16), full_precision():
        older, *newer = precisions()
        assert older == "highest"
        assert set(newer) <= {"none", "ieee"}
        assert (normal(4, 4) @ normal(4, 4)).dtype == torch.float32
        assert not torch.is_autocast_enabled("cpu")
        raise KeyError
    assert precisions() == before


@pytest.mark.usefixtures("_precisions_restored")
def test_spectra_do_not_depend_on_the_precision_of_training():
    matrices = [normal(40, 60), normal(200, 300)]
    expected = singular_values(matrices)
    torch.set_float32_matmul_precision("medium")
    with torch.autocast("cpu", torch.bfloat16):
        spectra = singular_values(matrices)
        norms = schatten_norms(matrices)
    for sigma, reference, norm in zip(spectra, expected, norms, strict=True):
        torch.testing.assert_close(sigma, reference, rtol=0, atol=0)
        assert norm.two.item() == pytest.approx(reference.norm().item(), rel=1e-5)


@pytest.mark.parametrize(
    ("matrices", "arguments", "message"),
    [
        ([], {"method": "qr"}, "`method` to be one of"),
        ([], {"max_batch_elements": 0}, "`max_batch_elements` to be at least 1"),
        ([], {"sketch_size": 0}, "`sketch_size` to be at least 1"),
        ([torch.zeros(2, 2, dtype=torch.complex64)], {}, "`matrices` to be real"),
        ([torch.zeros(3)], {}, "`matrices` to be of shape"),
        ([torch.zeros(0, 3)], {}, "`matrices` to be not empty"),
    ],
)
def test_refuses_what_has_no_singular_values(matrices, arguments, message):
    with pytest.raises(ValueError, match=f"Expected {message}"):
        singular_values(matrices, **arguments)


def test_refuses_lanczos_without_a_step():
    with pytest.raises(ValueError, match="Expected `num_steps` to be at least 1"):
        schatten_norms([], num_steps=0)


@pytest.fixture
def decomposed(monkeypatch):
    """The types of the Gram matrices that are decomposed."""
    dtypes, original = [], spectra.gram_singular_values
    monkeypatch.setattr(
        spectra, "gram_singular_values", lambda g: (dtypes.append(g.dtype), original(g))[1]
    )
    return dtypes


@pytest.mark.parametrize("shape", [(96, 200), (200, 96), (2, 96, 200)])
def test_a_well_conditioned_oblong_matrix_is_done_in_single_precision(shape, decomposed):
    # Half the time of float64, for spectra that do not need it.
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    (sigma,) = singular_values([matrix], resolution=1e-6)
    assert decomposed == [torch.float32]
    expected = np.linalg.svd(matrix.double().numpy(), compute_uv=False)
    np.testing.assert_allclose(sigma.numpy(), expected, rtol=2e-5)


@pytest.mark.parametrize("rank", [1, 5, 95])
def test_a_collapsed_oblong_matrix_is_done_in_double_precision(rank, decomposed):
    # Rounding in float32 would look like many small singular values.
    generator = torch.Generator().manual_seed(0)
    matrix = torch.randn(96, rank, generator=generator, dtype=torch.float64)
    matrix = (matrix @ torch.randn(rank, 200, generator=generator, dtype=torch.float64)).float()
    (sigma,) = singular_values([matrix], resolution=1e-6)
    assert decomposed == [torch.float32, torch.float64]
    expected = np.linalg.svd(matrix.double().numpy(), compute_uv=False)
    np.testing.assert_allclose(sigma[:rank].numpy(), expected[:rank], rtol=1e-6)
    assert (sigma[rank:] < 1e-6 * sigma[0]).all()


def test_an_oblong_matrix_that_is_not_finite_has_no_singular_values():
    matrix = torch.randn(96, 200)
    matrix[3, 4] = float("inf")
    assert singular_values([matrix], resolution=1e-6)[0].isnan().all()


@pytest.mark.parametrize("shape", [(255, 300), (256, 300), (513, 600), (2, 300, 400)])
def test_gram_matrices_are_put_together_from_blocks(shape):
    rows = torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    torch.testing.assert_close(gram_matrix(rows), rows @ rows.mT, rtol=1e-12, atol=1e-12)
