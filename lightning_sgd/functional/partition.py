"""Partition a labelled data set into parts, evenly or sorted by label."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_sgd._validation import expect


def partition_by_label(
    labels: Tensor, num_parts: int, skew: float, generator: torch.Generator
) -> list[Tensor]:
    r"""Partition samples into parts of equal size, of which a fraction ``skew`` is sorted by label.

    In every part :math:`\mathrm{round}(\text{skew} \cdot n / \text{parts})` samples are contiguous in the order of
    labels, with the smallest labels in the first part; the others are drawn uniformly. The remaining samples, fewer
    than ``num_parts`` and drawn at random, belong to no part.

    Cost: O(n log n) time, O(n) memory.

    Args:
        labels: One label per sample, of shape (n,).
        num_parts: Number of parts, at least 1 and at most n.
        skew: 0.0 for parts of equal distribution, 1.0 for parts sorted by label, or a number between.
        generator: Source of the random order.

    Returns:
        The indices of each part, of shape (n // num_parts,).

    Raises:
        ValueError: If an argument is out of range or ``labels`` is not one-dimensional.

    Example:
        >>> labels = torch.tensor([0, 1, 2, 0, 1, 2])
        >>> parts = partition_by_label(labels, 3, skew=1.0, generator=torch.Generator().manual_seed(0))
        >>> [labels[part].tolist() for part in parts]
        [[0, 0], [1, 1], [2, 2]]
    """
    _validate(labels, num_parts, skew)
    part_size = len(labels) // num_parts
    order = torch.randperm(len(labels), generator=generator, device=generator.device)
    order = order.to(labels.device)[: part_size * num_parts]
    num_sorted = round(skew * part_size) * num_parts
    by_label, rest = order[:num_sorted], order[num_sorted:]
    by_label = by_label[labels[by_label].argsort(stable=True)]
    stretches = zip(by_label.view(num_parts, -1), rest.view(num_parts, -1), strict=True)
    return [torch.cat(pair) for pair in stretches]


def _validate(labels: Tensor, num_parts: int, skew: float) -> None:
    expect(labels.ndim == 1, "labels", "one-dimensional", tuple(labels.shape), "Flatten them.")
    expect(
        1 <= num_parts <= len(labels),
        "num_parts",
        f"between 1 and the number of samples, {len(labels)}",
        num_parts,
        "Ask for fewer parts.",
    )
    expect(0.0 <= skew <= 1.0, "skew", "in [0, 1]", skew, "0.0 deals evenly, 1.0 by label.")
