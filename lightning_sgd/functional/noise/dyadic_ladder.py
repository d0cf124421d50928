r"""Sums of 1, 2, 4, … consecutive samples, and the mean logarithm of their magnitudes, in one pass and O(1) memory.

The sum of :math:`2^j` independent samples of a strictly stable law with index α is distributed as :math:`2^{j/\alpha}`
times one of them, so that :math:`m_j = \mathrm E\ln|\text{sum of }2^j| = m_0 + j\ln 2/\alpha`. The samples of one sum
of the top level are a *block*. Only sums over blocks and sums of products over blocks are kept. They determine the
spread of any combination of the :math:`m_j`, and they add up over chunks and ranks.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

CHUNK = 2**19
"""Samples at a time: enough to hide the cost of calls, few enough for the cache."""
PRODUCT = 16
"""Number of magnitudes that are multiplied before one logarithm is taken."""


@dataclass(frozen=True)
class LadderSums:
    """Sufficient statistics of a stream of samples, in float64.

    Attributes:
        log_sums: Sum over blocks of the logarithms, by level, shape (levels + 1,).
        counts: Number of logarithms, by level; those of zero are left out.
        products: Sum over blocks of the outer product of (logarithms, counts) with itself.
        num_blocks: Number of complete blocks.
        num_samples: Samples in them.
        num_zeros: How many of these were exactly zero.
    """

    log_sums: Tensor
    counts: Tensor
    products: Tensor
    num_blocks: Tensor
    num_samples: Tensor
    num_zeros: Tensor

    @classmethod
    def empty(cls, levels: int, device: torch.device | str = "cpu") -> LadderSums:
        """Create the statistics of no samples.

        Args:
            levels: Number of doublings.
            device: Device of the tensors.
        """
        shapes = ((levels + 1,), (levels + 1,), (2 * levels + 2, 2 * levels + 2), (), (), ())
        return cls(*(torch.zeros(shape, dtype=torch.float64, device=device) for shape in shapes))

    @classmethod
    def of_blocks(
        cls, logs: Tensor, counts: Tensor, num_samples: int, num_zeros: int
    ) -> LadderSums:
        """Sum the logarithms of some blocks.

        Args:
            logs: Sums of logarithms, shape (blocks, levels + 1).
            counts: Numbers of logarithms, of the same shape.
            num_samples: Samples in all of the blocks.
            num_zeros: Zeros among them.
        """
        # Products of counts, too: zeros have no logarithm, so the mean of a level is a ratio of two random sums.
        both = torch.cat([logs, counts], dim=1)
        numbers = logs.new_tensor([len(logs), num_samples, num_zeros])
        return cls(logs.sum(0), counts.sum(0), both.mT @ both, *numbers.unbind())

    @property
    def levels(self) -> int:
        """The number of doublings."""
        return len(self.log_sums) - 1

    def __add__(self, other: LadderSums) -> LadderSums:
        pairs = zip(vars(self).values(), vars(other).values(), strict=True)
        return LadderSums(*(a + b.to(a.device) for a, b in pairs))


def pooled_sums(samples: Tensor, levels: int) -> tuple[LadderSums, Tensor]:
    """Sum over the complete blocks of one long sequence, and return the remaining samples.

    Cost: about 4 ns per sample on one CPU core. Magnitudes are multiplied in groups of 16 and one logarithm is taken of
    each product; if a product leaves the range of float64, logarithms of all magnitudes are taken instead.

    Args:
        samples: The sequence; any shape, read in memory order.
        levels: Number of doublings.
    """
    flat = samples.detach().flatten()
    whole = flat.numel() >> levels << levels
    sums = LadderSums.empty(levels, flat.device)
    size = min(whole, max(CHUNK, 1 << levels))
    # Reused memory causes no page faults, which would take longer than the arithmetic.
    memory = torch.empty(2, size, dtype=torch.float64, device=flat.device)
    for chunk in torch.split(flat[:whole], size) if whole else ():
        sums = sums + _pooled_chunk(chunk, levels, memory)
    return sums, flat[whole:]


def stream_sums(chunks: Iterable[Tensor], levels: int) -> LadderSums:
    """Sum over a stream of chunks of any sizes; samples that fill no block at the end are dropped.

    Args:
        chunks: The parts of the sequence, in order.
        levels: Number of doublings.
    """
    sums, rest = LadderSums.empty(levels), torch.empty(0)
    for chunk in chunks:
        joined = torch.cat([rest.to(chunk), chunk.flatten()]) if len(rest) else chunk
        more, rest = pooled_sums(joined, levels)
        sums = sums + more
    return sums


def coordinate_sums(rows: Tensor, levels: int) -> tuple[LadderSums, Tensor]:
    """Sum over complete blocks of rows, with every column as a sequence of its own, and return the remaining rows.

    A block adds the mean over columns of their mean logarithms, so that the slope is the mean of the columns' slopes,
    whatever their scales. Columns in which all sums of some level are zero are left out.

    Args:
        rows: Shape (samples, coordinates).
        levels: Number of doublings.
    """
    whole = len(rows) >> levels << levels
    values = rows.detach()[:whole].double().reshape(-1, 1 << levels, rows.shape[1])
    means, alive = [], torch.ones((), dtype=torch.bool, device=rows.device)
    num_zeros = int((values == 0).sum())
    for level in range(levels + 1):
        nonzero = values != 0
        logs = torch.where(nonzero, values, 1.0).abs().log().sum(1)
        means.append(logs / nonzero.sum(1))
        alive = alive & nonzero.any(1)
        if level < levels:
            values = values[:, 0::2] + values[:, 1::2]
    # Blocks in which no column is alive have no logarithm at all.
    found = alive.any(1) if whole else torch.zeros(0, dtype=torch.bool, device=rows.device)
    table = torch.where(alive, torch.stack(means), 0.0).sum(2) / alive.sum(1)
    # As many as there are sums at each level, so that the fit weighs levels as in a pooled sequence.
    counts = 0.5 ** torch.arange(levels + 1, dtype=torch.float64, device=rows.device) * 2**levels
    counts = counts.expand(int(found.sum()), -1)
    sums = LadderSums.of_blocks(table.mT[found] * counts, counts, rows[:whole].numel(), num_zeros)
    return sums, rows[whole:]


def _pooled_chunk(chunk: Tensor, levels: int, memory: Tensor) -> LadderSums:
    """Sum over the blocks of a chunk of complete blocks; ``memory`` has room for two chunks."""
    num_samples, num_zeros = chunk.numel(), 0
    num_blocks = num_samples >> levels
    values, other = memory.unbind()
    values = values[:num_samples].copy_(chunk)
    logs, counts = [], []
    for level in range(levels + 1):
        log_sum, count = _log_sums(values.view(num_blocks, -1))
        logs.append(log_sum)
        counts.append(count)
        if level == 0:
            num_zeros = num_samples - int(count.sum())
        if level < levels:
            half = other[: values.numel() // 2]
            # The two halves of the memory take turns; nothing is allocated.
            values, other = torch.add(values[0::2], values[1::2], out=half), values
    table, numbers = torch.stack(logs, dim=1), torch.stack(counts, dim=1)
    return LadderSums.of_blocks(table, numbers, num_samples, num_zeros)


def _log_sums(values: Tensor) -> tuple[Tensor, Tensor]:
    """Return the sum of ln|value| over the values of each row that are not zero, and their number."""
    fast = _log_of_products(values)
    if fast is not None:
        return fast, torch.full_like(fast, values.shape[1])
    nonzero = values != 0
    values = torch.where(nonzero, values, 1.0)
    fast = _log_of_products(values)
    logs = values.abs().log().sum(1) if fast is None else fast
    return logs, nonzero.sum(1).double()


def _log_of_products(values: Tensor) -> Tensor | None:
    """Return Σ ln|v| of each row as Σ ln|Πv|; ``None`` if a product is zero, subnormal (rounded), or not finite."""
    num_rows, width = values.shape
    # Groups must fill a row, or products would mix samples of two blocks.
    group = math.gcd(width, PRODUCT)
    values = values.view(num_rows, width // group, group).prod(dim=2).abs()
    smallest, largest = values.aminmax()
    range_ = torch.finfo(values.dtype)
    if not (float(smallest) >= range_.tiny and float(largest) <= range_.max):  # false for NaN, too
        return None
    return values.log().sum(1)
