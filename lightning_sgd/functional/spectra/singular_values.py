r"""Singular values of many matrices at once.

The singular values of an m × n matrix W are the square roots of the eigenvalues of its Gram matrix on the short side,
:math:`WW^\top` for m ≤ n. Forming it and solving for eigenvalues takes about :math:`m^2 n + \tfrac43 m^3` operations
where a singular value decomposition takes :math:`4 m^2 n`, and matrices that share only their short side share a batch.

The disadvantage is accuracy: rounding in a Gram matrix is relative to :math:`\sigma_1^2`, so that singular values below
:math:`\sqrt\varepsilon\,\sigma_1` are noise. :func:`smallest_resolved` says where that is, and ``method="auto"`` takes
the cheapest route that resolves what it is asked for:

======  ========  ====================
method  dtype     resolves σ/σ₁ down to
======  ========  ====================
gram    float32   3.5e-4
gram    float64   1.5e-8
svd     float32   1.2e-7
svd     float64   2.2e-16
======  ========  ====================
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable
from typing import Literal, NamedTuple, TypeAlias

import torch
from torch import Tensor

from lightning_sgd._validation import expect, expect_one_of
from lightning_sgd.functional.precision import full_precision
from lightning_sgd.functional.spectra.gram import (
    GramQueue,
    gram_matrix,
    gram_singular_values,
    normalize,
    where_finite,
)

SINGLE_PRECISION_LIMIT = 0.05
"""Above this σ/σ₁ a float32 Gram matrix is accurate to about 1e-5."""

SpectrumMethod: TypeAlias = Literal["auto", "gram", "svd", "sketch"]


def singular_values(
    matrices: Iterable[Tensor],
    *,
    method: SpectrumMethod = "auto",
    dtype: torch.dtype | None = None,
    resolution: float = 1e-3,
    max_batch_elements: int = 2**24,
    sketch_size: int = 64,
    generator: torch.Generator | None = None,
) -> list[Tensor]:
    """Compute the singular values of each matrix, in descending order.

    A matrix that contains NaN or Inf has NaN for singular values; it neither raises nor touches the others. Matrices
    are scaled before they are squared, so that no finite one overflows. They are taken one at a time: of those that a
    generator makes, only Gram matrices are kept.

    The method ``"sketch"`` restricts a matrix to the range that it maps a few random vectors to. It returns
    ``sketch_size`` values, each a lower bound; the last ones are loose, and what comes after them is missing.

    Args:
        matrices: Real tensors of shape (…, m, n), of any sizes, types and devices.
        method: ``"gram"``, ``"svd"``, ``"sketch"``, or ``"auto"`` for the cheaper of the first two that is accurate
            enough.
        dtype: Type to compute in, or the matrix' own where that is wider; by default float32 where it is accurate
            enough and else float64. Oblong matrices are tried in float32 first.
        resolution: Smallest σ/σ₁ that must come out right.
        max_batch_elements: Decompose whenever so many elements of equally sized Gram matrices have been collected.
        sketch_size: Number of singular values of a sketch.
        generator: Source of the random vectors of a sketch; by default a new one with seed 0 for each matrix.

    Returns:
        For each matrix a tensor of shape (…, min(m, n)) in the type of the computation.

    Raises:
        ValueError: If an argument is out of range or a matrix is complex or has no elements.

    Example:
        >>> singular_values([torch.tensor([[3.0, 0.0, 0.0], [0.0, 4.0, 0.0]])])
        [tensor([4., 3.])]
    """
    _validate(method, max_batch_elements, sketch_size)
    queue = GramQueue(gram_singular_values, max_batch_elements)
    scales: list[Tensor] = []
    with full_precision():
        for index, matrix in enumerate(matrices):
            route = choose_route(method, dtype, resolution, matrix.dtype)
            single = None
            if method == "auto" and dtype is None and route == Route("gram", torch.float64):
                single = _in_single_precision(matrix)
            # Scaled before it is squared: a Gram matrix of large weights would overflow, of tiny ones vanish.
            values, scale = normalize(matrix, route.dtype) if single is None else single
            scales.append(scale)
            if single is not None:
                queue.results[index] = values
            elif route.method == "gram":
                queue.put(index, values)
            elif route.method == "sketch" and sketch_size < min(values.shape[-2:]):
                queue.results[index] = _sketch(values, sketch_size, generator)
            else:
                queue.results[index] = where_finite(_svdvals, values)
        spectra = queue.finish()
    return [sigma * scale for sigma, scale in zip(spectra, scales, strict=True)]


def _in_single_precision(matrix: Tensor) -> tuple[Tensor, Tensor] | None:
    """Try a float32 Gram matrix: return scaled singular values and scale, or ``None`` if one of them needs float64.

    An oblong matrix has no small singular values unless its rank has collapsed, and float32 takes half the time.
    """
    short, long = sorted(matrix.shape[-2:])
    # A random matrix twice as long as wide has σ_min/σ₁ near (√2 − 1)/(√2 + 1) = 0.17, well above the limit.
    if matrix.dtype == torch.float64 or short < 64 or long < 2 * short:
        return None
    scaled, scale = normalize(matrix, torch.float32)
    rows = scaled if scaled.shape[-2] == short else scaled.mT
    sigma = gram_singular_values(gram_matrix(rows))
    enough = sigma[..., -1] > SINGLE_PRECISION_LIMIT * sigma[..., 0]
    return (sigma, scale) if bool(enough.all()) else None


class Route(NamedTuple):
    """Method and type by which singular values are computed."""

    method: str
    dtype: torch.dtype


def choose_route(
    method: SpectrumMethod, dtype: torch.dtype | None, resolution: float, matrix_dtype: torch.dtype
) -> Route:
    """Choose the cheapest way to resolve singular values down to ``resolution``, or else the most accurate one.

    Args:
        method: As for :func:`singular_values`.
        dtype: As for :func:`singular_values`.
        resolution: As for :func:`singular_values`; below the rounding of the matrix itself there is nothing to resolve.
        matrix_dtype: Type of the matrix.

    Example:
        >>> choose_route("auto", None, 1e-3, torch.float32)
        Route(method='gram', dtype=torch.float32)
        >>> choose_route("auto", None, 1e-4, torch.float32)
        Route(method='gram', dtype=torch.float64)
    """
    own = torch.promote_types(matrix_dtype, torch.float32)
    needed = max(resolution, torch.finfo(own).eps)
    methods = ("gram", "svd") if method == "auto" else (method,)
    dtypes = (torch.float32, torch.float64) if dtype is None else (dtype,)
    for candidate in itertools.product(methods, dtypes):
        route = Route(candidate[0], torch.promote_types(candidate[1], own))
        # Candidates go from cheap to accurate. The factor 2: see the noise in `smallest_resolved`.
        if 2 * smallest_resolved(*route) <= needed:
            break
    return route


def smallest_resolved(method: str, dtype: torch.dtype) -> float:
    """Return the ratio σ/σ₁ below which a method gives rounding noise; at twice the ratio a tenth of it remains.

    Args:
        method: ``"gram"``, ``"svd"`` or ``"sketch"``.
        dtype: Type of the computation.

    Example:
        >>> smallest_resolved("gram", torch.float32)
        0.00034526698300124393
    """
    eps = torch.finfo(dtype).eps
    return math.sqrt(eps) if method == "gram" else eps


def _validate(method: str, max_batch_elements: int, sketch_size: int) -> None:
    expect_one_of(method, SpectrumMethod, "method", "The default is 'auto'.")
    for name, value, default in (
        ("max_batch_elements", max_batch_elements, "2**24"),
        ("sketch_size", sketch_size, "64"),
    ):
        if value < 1:
            expect(False, name, "at least 1", value, f"The default is {default}.")


def _svdvals(matrices: Tensor) -> Tensor:
    tall = matrices if matrices.shape[-2] >= matrices.shape[-1] else matrices.mT
    values: Tensor = torch.linalg.svdvals(
        tall
    )  # for wide ones LAPACK takes more than twice as long
    return values


def _sketch(matrix: Tensor, size: int, generator: torch.Generator | None) -> Tensor:
    short = matrix if matrix.shape[-2] <= matrix.shape[-1] else matrix.mT
    if generator is None:
        # A generator of its own, so that measuring leaves the random numbers of the training as they are.
        generator = torch.Generator(matrix.device).manual_seed(0)
    shape = (*short.shape[:-2], short.shape[-1], size)
    probes = torch.randn(shape, generator=generator, device=generator.device, dtype=matrix.dtype)

    def restricted(short: Tensor) -> Tensor:
        basis = torch.linalg.qr(short @ probes.to(short.device)).Q
        # One power iteration more: a flat spectrum would else be caught only in part.
        basis = torch.linalg.qr(short @ (short.mT @ basis)).Q
        return _svdvals(basis.mT @ short)

    return where_finite(restricted, short)
