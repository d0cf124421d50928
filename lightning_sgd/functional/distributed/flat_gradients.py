"""The gradients of many tensors as rows of one matrix, a row for each worker, in equal parts for the ranks."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from lightning_sgd._validation import Words, expect
from lightning_sgd.functional.distributed.flat_buffers import accumulation_dtype, real, unique


class FlatGradients:
    """A matrix with one row per worker of this rank, and a place in it for the gradient of each tensor.

    Rows are as long as needed to be cut into ``num_shards`` parts of equal length; what is added at the end stays
    zero. Tensors without a gradient have zeros in their places.

    Args:
        tensors: Real or complex floating-point tensors on one device; one that occurs twice has one place.
        num_shards: Number of parts [n].
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
        sizes = [real(tensor).numel() for tensor in self.tensors]
        self.numel, self.shard_size = sum(sizes), -(-sum(sizes) // num_shards)
        self.num_shards = num_shards
        self._offsets = [sum(sizes[:index]) for index in range(len(sizes) + 1)]
        shape = num_rows, self.shard_size * num_shards
        self.rows = torch.zeros(shape, dtype=self._dtype(), device=self._device())
        self.clear()

    @property
    def num_bytes(self) -> int:
        """Size of one gradient."""
        return self.numel * self.rows.element_size()

    def holds(self, tensors: Sequence[Tensor]) -> bool:
        """Whether these are the very tensors that have a place here.

        Args:
            tensors: As for the constructor.
        """
        return list(map(id, self.tensors)) == list(map(id, unique(tensors)))

    def clear(self) -> None:
        """Expect the gradients of another step."""
        self.num_packed = 0
        self.used = [False] * len(self.tensors)

    def reserve(self, num_rows: int) -> None:
        """Make room for so many rows; those that are packed stay.

        Args:
            num_rows: Number of workers.
        """
        missing = num_rows - len(self.rows)
        if missing > 0:
            self.rows = torch.cat([self.rows, self.rows.new_zeros(missing, self.rows.shape[1])])

    @torch.no_grad()
    def pack(self, factor: float = 1.0, *, absent: bool = False) -> None:
        """Copy the gradients into the next row.

        Args:
            factor: What they are multiplied by.
            absent: Whether there is no gradient at all; the row is then NaN from end to end.
        """
        self.reserve(self.num_packed + 1)
        row = self.rows[self.num_packed]
        self.num_packed += 1
        if absent:
            row[: self.numel].fill_(torch.nan)
            return
        pairs = list(zip(self.views(row), (tensor.grad for tensor in self.tensors), strict=True))
        _check_dense(grad for _, grad in pairs)
        self.used = [u or grad is not None for u, (_, grad) in zip(self.used, pairs, strict=True)]
        for view, grad in pairs:
            if grad is None:
                view.zero_()
        _copy((view, real(grad)) for view, grad in pairs if grad is not None)
        if factor != 1.0:
            row.mul_(factor)

    @torch.no_grad()
    def unpack(self, row: Tensor, used: Sequence[bool], factor: float = 1.0) -> None:
        """Make a row the gradients of the tensors.

        Args:
            row: As long as those here.
            used: For each tensor whether it gets one; the others have ``None`` after.
            factor: What the row is multiplied by, in place.
        """
        if factor != 1.0:
            row.mul_(factor)
        pairs = []
        for tensor, view, is_used in zip(self.tensors, self.views(row), used, strict=True):
            if not is_used:
                tensor.grad = None
                continue
            if tensor.grad is None:
                tensor.grad = torch.empty_like(tensor)
            pairs.append((real(tensor.grad), view))
        _copy(pairs)

    def views(self, row: Tensor) -> list[Tensor]:
        """The places of the tensors in a row.

        Args:
            row: As long as those here.
        """
        ends = zip(self._offsets, self._offsets[1:], strict=False)
        parts = zip(ends, self.tensors, strict=True)
        return [row[begin:end].view(real(tensor).shape) for (begin, end), tensor in parts]

    def _dtype(self) -> torch.dtype:
        dtype = torch.float32
        for tensor in self.tensors:
            dtype = torch.promote_types(dtype, accumulation_dtype(real(tensor).dtype))
        return dtype

    def _device(self) -> torch.device:
        devices = list(dict.fromkeys(tensor.device for tensor in self.tensors))
        remedy = "Gradients are aggregated as one vector; keep the module on one device."
        expect(len(devices) < 2, "parameters", "on one device", list(map(str, devices)), remedy)
        return devices[0] if devices else torch.device("cpu")


def _copy(pairs: Iterable[tuple[Tensor, Tensor]]) -> None:
    into_and_source = list(zip(*pairs, strict=True))
    if into_and_source:
        into, source = into_and_source
        torch._foreach_copy_(list(into), list(source))


def _check_dense(gradients: Iterable[Tensor | None]) -> None:
    dense = not any(grad is not None and grad.is_sparse for grad in gradients)
    remedy = "Set sparse=False in the embedding."
    expect(dense, "gradients", "dense where they are aggregated", Words("a sparse one"), remedy)
