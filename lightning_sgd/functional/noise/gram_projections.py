r"""Random projections of many vectors, computed from their inner products alone.

The projections of rows :math:`u_1, …, u_m` on a direction v with independent normal coordinates are, given the rows, a
normal vector with covariance :math:`K = UU^\top`. So they can be drawn from the m × m Gram matrix, exactly in law, and
no direction of the size of the model is needed: each costs :math:`m^2`, and Gram matrices of layers or shards add up.
This also limits what random directions can detect: if the rows have one length and are orthogonal, their projections
are independent and normal whatever the law of the coordinates. Any excess kurtosis comes from unequal lengths.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_sgd._validation import expect
from lightning_sgd.functional.spectra.gram import gram_matrix

CHUNK = 4096
_GIVE_PRODUCTS = "Give the inner products of m vectors."


def noise_gram(rows: Tensor) -> Tensor:
    """Compute the Gram matrix of rows less their mean, in float64, without a float64 copy of all rows.

    Args:
        rows: Shape (m, d).

    Returns:
        Shape (m, m), in float64; each of its rows sums to zero. Gram matrices of parts of the columns add up.

    Example:
        >>> noise_gram(torch.tensor([[3.0, 4.0], [1.0, 4.0]]))
        tensor([[ 1., -1.],
                [-1.,  1.]], dtype=torch.float64)
    """
    remedy = "Give each gradient a row."
    expect(rows.ndim == 2, "rows", "of shape (m, d)", tuple(rows.shape), remedy)
    rows = rows.detach().cpu() if rows.device.type == "mps" else rows.detach()
    gram = rows.new_zeros(len(rows), len(rows), dtype=torch.float64)
    for part in torch.split(rows, CHUNK, dim=1):
        wide = part.double()
        # The mean is subtracted from the rows and not from their products, where nearly equal numbers would cancel.
        gram += gram_matrix(wide - wide.mean(dim=0))
    return gram


def gram_projections(
    gram: Tensor, num_directions: int, generator: torch.Generator | None = None
) -> Tensor:
    r"""Draw projections of m vectors on random directions with independent standard normal coordinates.

    .. math::
        z^{(r)} = V \Lambda^{1/2} \xi^{(r)}, \qquad K = V \Lambda V^\top, \quad \xi^{(r)} \sim N(0, I_m)

    Exact in law, jointly over all directions: only their parts in the span of the vectors matter.

    Args:
        gram: Inner products of the vectors [K], shape (m, m).
        num_directions: How many directions [R].
        generator: On the CPU; by default the global one.

    Returns:
        Shape (R, m), one direction in each row, in float64; NaN if the Gram matrix is not finite.

    Raises:
        ValueError: If an argument is out of range, or no vectors have these inner products.

    Example:
        >>> gram = 4 * torch.ones(3, 3)  # three vectors that are equal
        >>> z = gram_projections(gram, 5, torch.Generator().manual_seed(0))
        >>> bool(torch.allclose(z, z[:, :1].expand(5, 3), atol=1e-6))
        True
    """
    remedy = "Each direction is one more row of the result."
    expect(num_directions >= 1, "num_directions", "at least 1", num_directions, remedy)
    expect(gram.ndim == 2, "gram", "of shape (m, m)", tuple(gram.shape), _GIVE_PRODUCTS)
    _check_square(gram)
    normal = torch.randn(num_directions, len(gram), generator=generator, dtype=torch.float64)
    if not bool(gram.isfinite().all()):
        return torch.full_like(normal, torch.nan).to(gram.device)
    # `eigh` reads one triangle only, and a negative eigenvalue would be cut to zero: both would hide a wrong matrix.
    skew = float((gram - gram.mT).abs().amax())
    values, vectors = torch.linalg.eigh(gram.double())
    lowest, largest = (float(value) for value in (values[0], values.abs().amax()))
    rounding = 1e-2 * largest  # far above what sums over many coordinates lose in any type
    expect(skew <= rounding, "gram", "symmetric", f"a difference of {skew:g}", _GIVE_PRODUCTS)
    negative = "without negative eigenvalues"
    expect(lowest >= -rounding, "gram", negative, lowest, _GIVE_PRODUCTS)
    half: Tensor = vectors * values.clamp_min(0.0).sqrt()
    return normal.to(gram.device) @ half.T


def effective_dimension(gram: Tensor) -> Tensor:
    r"""Compute over how many directions vectors spread: the participation ratio of the spectrum.

    .. math:: \frac{(\operatorname{tr} K)^2}{\operatorname{tr} K^2}

    Between 1 and the number of vectors m, even if the noise has more dimensions. The lower it is, the more do tests on
    random directions depend on each other.

    Args:
        gram: Inner products of the vectors, shape (…, m, m).

    Returns:
        Shape (…), in float64; NaN where the matrix is zero, not finite, or no vectors have these inner products.

    Raises:
        ValueError: If the matrices are not square.

    Example:
        >>> effective_dimension(torch.eye(7)).item(), effective_dimension(torch.ones(7, 7)).item()
        (7.0, 1.0)
    """
    _check_square(gram)
    wide = gram.double()  # squares of float32 overflow from 2e19 on
    squares = wide.diagonal(dim1=-2, dim2=-1)
    dimension = squares.sum(dim=-1).square() / wide.square().sum(dim=(-2, -1))
    # By Cauchy and Schwarz no matrix of inner products has less than 1; finite traces over infinite products have 0.
    is_gram = (squares >= 0).all(dim=-1) & (dimension >= 1 - 1e-3)
    return torch.where(is_gram, dimension, torch.nan)


def norm_excess_kurtosis(gram: Tensor) -> Tensor:
    r"""Compute the excess kurtosis of projections on random directions from the lengths of the vectors.

    .. math:: 3\,\frac{\operatorname{Var}(\|u\|^2)}{(\operatorname{E}\|u\|^2)^2}

    It comes from unequal lengths alone, as in a mixture of scales. For normal vectors it is small in many effective
    dimensions and 6 in one, where it is no evidence against normality.

    Args:
        gram: Inner products of the vectors, shape (…, m, m).

    Example:
        >>> norm_excess_kurtosis(torch.diag(torch.tensor([1.0, 3.0]))).item()  # variance 1, mean 2
        0.75
    """
    squares = gram.diagonal(dim1=-2, dim2=-1)
    return 3 * squares.var(dim=-1, correction=0) / squares.mean(dim=-1).square()


def _check_square(gram: Tensor) -> None:
    shape = tuple(gram.shape)
    is_square = gram.ndim >= 2 and shape[-1] == shape[-2] > 0
    expect(is_square, "gram", "of shape (m, m)", shape, _GIVE_PRODUCTS)
