"""Gradients of many tensors as the rows of one matrix, one row per worker, in shards of equal length."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_sgd._validation import Words, expect
from lightning_sgd.functional.distributed.flat_buffers import accumulation_dtype, real, unique


class FlatGradients:
    """A matrix with one row per worker of this rank, in which the gradient of each tensor has a place.

    Rows are padded with zeros to ``num_shards`` shards of equal length. Tensors without a gradient have zeros in their
    places.

    Args:
        tensors: Real or complex floating-point tensors on one device; duplicates share one place.
        num_shards: Number of shards [n].
        num_rows: Number of workers [k].

    Attributes:
        rows: The matrix, of shape (k, n⌈d/n⌉), in 32 bits or more.
        numel: Number of real elements of all tensors [d].
        used: For each tensor, whether any of the rows packed since :meth:`clear` had a gradient of it.
        num_packed: Number of rows packed since then.

    Example:
        >>> weight, bias = torch.ones(2, requires_grad=True), torch.ones(1, requires_grad=True)
        >>> (3 * weight).sum().backward()
        >>> gradients = FlatGradients([weight, bias], num_shards=2)
        >>> gradients.pack()
        >>> gradients.rows
        tensor([[3., 3., 0., 0.]])
        >>> gradients.used
        [True, False]
    """

    def __init__(self, tensors: Sequence[Tensor], num_shards: int, num_rows: int = 1) -> None:
        self.tensors = unique(tensors)
        self._shapes = [real(tensor).shape for tensor in self.tensors]
        self._sizes = [shape.numel() for shape in self._shapes]
        self.numel = sum(self._sizes)
        # Rounded up, because shards of an all-to-all must be of equal length; the padding is zero in every row.
        self.num_shards, self.shard_size = num_shards, -(-self.numel // num_shards)
        shape = num_rows, self.shard_size * num_shards
        self.rows = torch.zeros(shape, dtype=self._dtype(), device=self._device())
        self.clear()

    @property
    def num_bytes(self) -> int:
        """Size of one gradient, in bytes."""
        return self.numel * self.rows.element_size()

    def clear(self) -> None:
        """Start the next step without rows."""
        self.num_packed = 0
        self.used = [False] * len(self.tensors)

    def reserve(self, num_rows: int) -> None:
        """Make room for ``num_rows`` rows; packed rows are kept."""
        missing = num_rows - len(self.rows)
        if missing > 0:
            self.rows = torch.cat([self.rows, self.rows.new_zeros(missing, self.rows.shape[1])])

    @torch.no_grad()
    def pack(self, factor: float = 1.0, *, absent: bool = False) -> None:
        """Copy the gradients into the next row.

        Args:
            factor: Factor of the row.
            absent: Whether there is no gradient at all; the row is then NaN.
        """
        self.reserve(self.num_packed + 1)
        row = self.rows[self.num_packed]
        self.num_packed += 1
        if absent:
            # NaN tells a missing gradient from a gradient of zero, and travels with the row without a message of its
            # own.
            row[: self.numel].fill_(torch.nan)
            return
        into, source = [], []
        for index, (tensor, view) in enumerate(zip(self.tensors, self.views(row), strict=True)):
            gradient = tensor.grad
            if gradient is None:
                # The row still holds the values of an earlier step.
                view.zero_()
                continue
            if gradient.is_sparse:
                _refuse_sparse()
            self.used[index] = True
            into.append(view)
            source.append(real(gradient) if gradient.is_complex() else gradient)
        _copy(into, source)
        if factor != 1.0:
            row.mul_(factor)

    @torch.no_grad()
    def unpack(self, row: Tensor, used: Sequence[bool], factor: float = 1.0) -> None:
        """Copy a row into the gradients of the tensors.

        Args:
            row: Tensor of shape (n⌈d/n⌉,).
            used: For each tensor whether it gets a gradient; the others get ``None``.
            factor: Factor of the row, applied in place.
        """
        if factor != 1.0:
            row.mul_(factor)
        into, source = [], []
        for tensor, view, is_used in zip(self.tensors, self.views(row), used, strict=True):
            if not is_used:
                # An optimizer skips `None`, but decays weights and moves momentum for a gradient of zeros.
                tensor.grad = None
                continue
            if tensor.grad is None:
                tensor.grad = torch.empty_like(tensor)
            into.append(real(tensor.grad) if tensor.grad.is_complex() else tensor.grad)
            source.append(view)
        _copy(into, source)

    def views(self, row: Tensor) -> list[Tensor]:
        """Return the parts of a row, of shape (n⌈d/n⌉,), in the shapes of the tensors."""
        parts = torch.split(row[: self.numel], self._sizes)
        return [part.view(shape) for part, shape in zip(parts, self._shapes, strict=True)]

    def _dtype(self) -> torch.dtype:
        # One type for the whole row, the widest: distances between gradients are taken over all parameters at once.
        dtype = torch.float32
        for tensor in self.tensors:
            dtype = torch.promote_types(dtype, accumulation_dtype(real(tensor).dtype))
        return dtype

    def _device(self) -> torch.device:
        devices = list(dict.fromkeys(tensor.device for tensor in self.tensors))
        remedy = "Gradients are aggregated as one vector; keep the module on one device."
        expect(len(devices) < 2, "parameters", "on one device", list(map(str, devices)), remedy)
        return devices[0] if devices else torch.device("cpu")


def _copy(into: list[Tensor], source: list[Tensor]) -> None:
    if into:
        torch._foreach_copy_(into, source)


def _refuse_sparse() -> None:
    remedy = "Set sparse=False in the embedding."
    expect(False, "gradients", "dense where they are aggregated", Words("a sparse one"), remedy)
