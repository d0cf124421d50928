"""The subset of rows whose covariance has the smallest top eigenvalue, by looking at all."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import torch
from torch import Tensor

_CHUNK = 4096
_BATCH = 128


def smallest_covariance_subset(gram: Tensor, size: int) -> list[int]:
    r"""Numbers of the ``size`` rows whose covariance has the smallest top eigenvalue.

    A matrix A with non-negative eigenvalues has none above its top one λ, so :math:`\lVert A \rVert_F^2 \le \lambda
    \operatorname{tr} A`: subsets whose bound is above the best λ so far are passed over.

    Args:
        gram: Inner products of the rows, of shape (n, n), whatever was subtracted from them.
        size: How many rows to choose.

    Example:
        >>> rows = torch.tensor([[0.0], [1.0], [1.5], [7.0]])
        >>> smallest_covariance_subset(rows @ rows.T, 2)
        [1, 2]
    """
    best, chosen = torch.inf, list(range(size))
    for subsets in _chunks(len(gram), size):
        covariances = _centred(gram[subsets[:, :, None], subsets[:, None, :]])
        bounds = _lower_bounds(covariances)
        for batch in torch.split(bounds.argsort(stable=True), _BATCH):
            if float(bounds[batch[0]]) >= best:
                break
            tops = torch.linalg.eigvalsh(covariances[batch])[:, -1]
            index = int(tops.argmin())
            if float(tops[index]) < best:
                best, chosen = float(tops[index]), subsets[batch[index]].tolist()
    return chosen


def _chunks(num_rows: int, size: int) -> Iterator[Tensor]:
    subsets = itertools.combinations(range(num_rows), size)
    while chunk := list(itertools.islice(subsets, _CHUNK)):
        yield torch.tensor(chunk)


def _centred(grams: Tensor) -> Tensor:
    rows, columns = grams.mean(dim=-1, keepdim=True), grams.mean(dim=-2, keepdim=True)
    return grams - rows - columns + rows.mean(dim=-2, keepdim=True)


def _lower_bounds(covariances: Tensor) -> Tensor:
    traces = covariances.diagonal(dim1=-2, dim2=-1).sum(dim=-1)
    squares = covariances.square().sum(dim=(-2, -1))
    return torch.where(traces > 0, squares / traces, 0.0) * (1 - 1e-12)
