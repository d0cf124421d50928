r"""Vectors of n workers as rows: their norms, their Gram matrix, and combinations of them, by blocks of columns.

Everything that depends only on distances and angles of n vectors can be computed from their n × n Gram matrix. Memory
is that of the rows, the result and one block. Norms and Gram matrices of column shards add up to those of the rows.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TypeAlias

import torch
from torch import Tensor

from lightning_sgd._validation import expect
from lightning_sgd.functional.precision import full_precision

Rows: TypeAlias = Tensor | Sequence[Tensor]
"""A matrix of shape (n, d), or n vectors of length d."""

BLOCK = 2**15
"""Columns at a time: few enough for the caches, enough to hide the cost of a call."""

_LARGEST_NORM = 1e15
"""Squares of elements up to here stay finite in single precision."""


def column_blocks(rows: Rows, size: int = BLOCK) -> Iterator[tuple[slice, Tensor]]:
    """Yield blocks of columns of shape (n, at most ``size``), in at least single precision, with their positions.

    Args:
        rows: Matrix of shape (n, d), or n vectors of length d.
        size: Columns per block.

    Example:
        >>> [tuple(block.shape) for _, block in column_blocks(torch.zeros(3, 5), size=4)]
        [(3, 4), (3, 1)]
    """
    for start in range(0, rows[0].numel(), size):
        columns = slice(start, start + size)
        block = rows[:, columns] if isinstance(rows, Tensor) else _stack(rows, columns)
        yield columns, block.to(torch.promote_types(block.dtype, torch.float32))


def _stack(rows: Sequence[Tensor], columns: slice) -> Tensor:
    return torch.stack([row[columns] for row in rows])


def squared_row_norms(rows: Rows) -> Tensor:
    """Compute the squared norm of each row in double precision, of shape (n,); not finite where the row is not.

    Args:
        rows: Matrix of shape (n, d), or n vectors of length d.

    Example:
        >>> squared_row_norms(torch.tensor([[3.0, 4.0], [1e30, 0.0], [torch.nan, 0.0]])).sqrt()
        tensor([5.0000e+00, 1.0000e+30,        nan], dtype=torch.float64)
    """
    device = _where_double_is(rows)
    total = torch.zeros(len(rows), dtype=torch.float64, device=device)
    for _, block in column_blocks(rows):
        total += _norms(block.to(device)).double().square()
    return total.cpu()


def _norms(block: Tensor) -> Tensor:
    if block.device.type == "cpu":  # four times as fast, but overflows at 1.8e19
        norms: Tensor = torch.linalg.vector_norm(block, dim=1)
        if bool(norms.isfinite().all()):
            return norms
    wide: Tensor = torch.linalg.vector_norm(block, dim=1, dtype=torch.float64)
    return wide


def _where_double_is(rows: Rows) -> torch.device:
    device = rows[0].device
    return torch.device("cpu") if device.type == "mps" else device


def usable_rows(squared_norms: Tensor, num_byzantine: int, max_ratio: float = 1e4) -> list[int]:
    """Choose the rows to compute with.

    Rows that are not finite are left out. So are the longest of the rows whose norm is beyond ``max_ratio`` times the
    median norm, as long as no more than ``num_byzantine`` rows are left out in all: in single precision they would
    leave no digits to the others. While faulty rows are fewer than half, they cannot move the median norm out of the
    range of the others.

    Args:
        squared_norms: Squared norms of shape (n,).
        num_byzantine: How many rows may be faulty [f].
        max_ratio: How many times longer than the median a row may be.

    Example:
        >>> usable_rows(torch.tensor([1.0, 2.0, torch.nan, 1.0, 1e30]), num_byzantine=2)
        [0, 1, 3]
    """
    norms = squared_norms.sqrt()
    finite = [i for i, norm in enumerate(norms.tolist()) if norm < torch.inf]
    if not finite:
        return []
    median = float(norms[finite].quantile(0.5))
    # If half of the rows are zero there is no scale, and only rows that would overflow are too long.
    limit = max_ratio * median if median > 0 else _LARGEST_NORM
    longest = sorted((i for i in finite if float(norms[i]) > limit), key=lambda i: -float(norms[i]))
    too_long = set(longest[: max(0, num_byzantine - (len(norms) - len(finite)))])
    return [i for i in finite if i not in too_long]


def median_row(squared_norms: Tensor) -> int:
    """Find the row of median norm: after subtracting one of the longest, the others could not be told apart.

    Args:
        squared_norms: Finite squared norms of shape (n,).

    Example:
        >>> median_row(torch.tensor([1e30, 1.0, 4.0]))
        2
    """
    return int(squared_norms.argsort(stable=True)[(len(squared_norms) - 1) // 2])


def row_gram(rows: Rows, reference: int | None) -> Tensor:
    r"""Compute inner products after subtracting one row from all, of shape (n, n) in double precision.

    Distances do not depend on the subtracted row, but in single precision a large common part of the rows would leave
    no digits of them. Blocks are multiplied in the precision of the rows, at least single, and added up in double.

    Args:
        rows: Matrix of shape (n, d), or n vectors of length d, all finite.
        reference: Number of the row to subtract; ``None`` for inner products of the rows as they are.

    Returns:
        The symmetric matrix, on the CPU.

    Example:
        >>> row_gram(torch.tensor([[1000.0, 1000.0], [1003.0, 1004.0]]), reference=0)
        tensor([[ 0.,  0.],
                [ 0., 25.]], dtype=torch.float64)
    """
    accumulator = _where_double_is(rows)
    total = torch.zeros(len(rows), len(rows), dtype=torch.float64, device=accumulator)
    with full_precision():
        for _, block in column_blocks(rows):
            shifted = block if reference is None else block - block[reference]
            total += (shifted @ shifted.mT).to(accumulator)
    # Products of blocks are not exactly symmetric on all devices, and `eigh` reads one triangle only.
    return (total + total.mT).cpu() / 2


def combine(matrix: Tensor, block: Tensor, out: Tensor | None = None) -> Tensor:
    """Compute ``matrix @ block`` in the type of the block; rows without weight may hold NaN or infinity.

    Args:
        matrix: Weights of shape (m, n), in double precision on the CPU.
        block: Some columns of the rows, of shape (n, s).
        out: Where to write the result, of shape (m, s) and the type of the block; by default new memory.

    Example:
        >>> combine(torch.tensor([[0.5, 0.5, 0.0]]), torch.tensor([[1.0], [2.0], [torch.nan]]))
        tensor([[1.5000]])
    """
    used = matrix.ne(0).any(dim=0)
    num_used = int(used.sum())
    # Multiplying by zeros is faster than copying the used rows, as long as most are used.
    if 2 * num_used > len(used):
        result = _product(matrix, block, out)
        if num_used == len(used) or bool(result.isfinite().all()):
            return result
    # Zero times NaN is NaN: rows without weight have to be left out of the product.
    chosen = used.nonzero().flatten()
    return _product(matrix[:, chosen], block[chosen.to(block.device)], out)


def _product(matrix: Tensor, block: Tensor, out: Tensor | None) -> Tensor:
    with full_precision():
        return torch.mm(matrix.to(block.device, block.dtype), block, out=out)


def squared_distances(gram: Tensor) -> Tensor:
    """Compute squared distances of the rows from each other, of shape (n, n), with zeros on the diagonal.

    Args:
        gram: Inner products of shape (n, n), whatever was subtracted from the rows.

    Example:
        >>> squared_distances(torch.tensor([[1.0, 0.0], [0.0, 4.0]]))
        tensor([[0., 5.],
                [5., 0.]])
    """
    squares = gram.diagonal()
    # Rounding can make distances of equal rows negative, and those of a row from itself other than zero.
    distances = (squares[:, None] + squares - 2 * gram).clamp_min(0.0)
    return distances.fill_diagonal_(0.0)


def check_rows(rows: Rows) -> Rows:
    """Refuse anything but a matrix or vectors of one length, of real floating-point numbers."""
    remedy = "Pass one flat gradient per worker."
    parts = [rows] if isinstance(rows, Tensor) else list(rows)
    shapes = [tuple(part.shape) for part in parts]
    fits = rows.ndim == 2 if isinstance(rows, Tensor) else {len(s) for s in shapes} == {1}
    expect(
        bool(parts) and fits and len(set(shapes)) == 1, "rows", "of shape (n, d)", shapes, remedy
    )
    expect(
        all(part.is_floating_point() for part in parts),
        "rows",
        "real numbers",
        parts[0].dtype,
        remedy,
    )
    expect(parts[0].numel() > 0, "rows", "not empty", shapes, remedy)
    return rows
