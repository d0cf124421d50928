"""Compression of gradients: its error, and an error model that covers all measured errors."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Literal, TypeAlias

import torch
from torch import Tensor

from lightning_sgd._validation import expect, expect_one_of
from lightning_sgd.functional.step_size.biased_sgd import BiasedSGDProblem

Compressor: TypeAlias = Callable[[Tensor], Tensor]
CompressorName: TypeAlias = Literal["bf16", "int8", "int4", "sign", "topk"]


def round_to_bf16(values: Tensor) -> Tensor:
    """Round to bfloat16: relative error at most 2⁻⁸ per number.

    Args:
        values: Numbers of any shape.
    """
    return values.to(torch.bfloat16).to(values.dtype)


def round_to_grid(values: Tensor, num_bits: int) -> Tensor:
    """Round to a symmetric uniform grid that just holds the largest magnitude, 2^(bits−1) − 1 steps on each side.

    Args:
        values: Numbers of any shape.
        num_bits: Bits per number, at least 2.

    Example:
        >>> round_to_grid(torch.tensor([1.0, -0.4, 0.1]), num_bits=3)
        tensor([ 1.0000, -0.3333,  0.0000])
    """
    expect(num_bits >= 2, "num_bits", "at least 2", num_bits, "One bit is for the sign.")
    step = values.abs().max() / (2 ** (num_bits - 1) - 1)
    # A step of zero, from zeros or from underflow, would turn them into NaN.
    return torch.where(step > 0, (values / step).round() * step, values)


def scaled_sign(values: Tensor) -> Tensor:
    """Return the signs, times the mean magnitude.

    Args:
        values: Numbers of any shape.

    Example:
        >>> scaled_sign(torch.tensor([3.0, -1.0]))
        tensor([ 2., -2.])
    """
    return values.sign() * values.abs().mean()


def keep_largest(values: Tensor, fraction: float) -> Tensor:
    """Keep the numbers with the largest magnitudes, set the others to zero.

    Args:
        values: Numbers of any shape.
        fraction: Share that is kept; at least one number is.

    Example:
        >>> keep_largest(torch.tensor([3.0, -1.0, -4.0, 0.5]), fraction=0.5)
        tensor([ 3.,  0., -4.,  0.])
    """
    flat = values.flatten()
    num_kept = max(1, round(fraction * flat.numel()))
    kept = flat.abs().topk(num_kept).indices
    return torch.zeros_like(flat).index_copy(0, kept, flat[kept]).view_as(values)


def compressor(name: CompressorName, topk_fraction: float = 0.01) -> Compressor:
    """Return the compressor of this name.

    Args:
        name: ``bf16``, ``int8``, ``int4``, ``sign`` or ``topk``.
        topk_fraction: Share of the numbers that ``topk`` keeps.

    Raises:
        ValueError: If an argument is out of range.
    """
    expect(0 < topk_fraction <= 1, "topk_fraction", "in (0, 1]", topk_fraction, "Try 0.01.")
    known: dict[str, Compressor] = {
        "bf16": round_to_bf16,
        "int8": lambda values: round_to_grid(values, 8),
        "int4": lambda values: round_to_grid(values, 4),
        "sign": scaled_sign,
        "topk": lambda values: keep_largest(values, topk_fraction),
    }
    remedy = "Give one of them, or a function of a tensor, named by its import path in YAML."
    expect_one_of(name, CompressorName, "compressor", remedy)
    return known[name]


def compression_sums(gradients: Iterable[Tensor], compress: Compressor) -> Tensor:
    """Sum up the squared norms of gradients and errors and their inner product; float64, shape (3,).

    Sums over tensors and over shards of tensors add up.

    Args:
        gradients: One tensor per parameter, compressed each on its own; sparse ones by their values.
        compress: The compressor.

    Raises:
        ValueError: If the compressor changes a shape.
    """
    total = torch.zeros(3, dtype=torch.float64)
    for gradient in gradients:
        values = gradient.coalesce().values() if gradient.is_sparse else gradient
        # A copy, because a compressor may work in place, and the gradient is still needed by the optimizer.
        compressed = compress(values.detach().clone())
        expect(
            compressed.shape == values.shape,
            "compressor",
            f"a function that keeps the shape {tuple(values.shape)}",
            tuple(compressed.shape),
            "Return what the receiver of the gradient would use.",
        )
        # In float64: the error is a difference of nearly equal numbers, and its squares underflow in half precision.
        # MPS has none.
        wide = torch.float32 if values.device.type == "mps" else torch.float64
        u, e = values.to(wide), compressed.to(wide) - values.to(wide)
        total += torch.stack([(u * u).sum(), (e * e).sum(), (u * e).sum()]).cpu().double()
    return total


def relative_error(sums: Sequence[float]) -> float:
    """Divide the length of the error by the length of the gradient; 0 for 0/0.

    Args:
        sums: From :func:`compression_sums`.
    """
    u2, e2, _ = sums
    return math.sqrt(e2 / u2) if u2 > 0 else (0.0 if e2 == 0 else math.inf)


def cosine(sums: Sequence[float]) -> float:
    """Compute the cosine between gradient and compressed gradient; 1 where one of them vanishes with the error.

    Args:
        sums: From :func:`compression_sums`.

    Example:
        >>> u, compressed = torch.tensor([3.0, -1.0]), torch.tensor([2.0, -2.0])
        >>> round(cosine(compression_sums([u], scaled_sign).tolist()), 6)  # 8 / (√10·√8)
        0.894427
    """
    u2, e2, ue = sums
    # ‖u + e‖² from the three sums; where e is nearly −u the terms cancel and rounding may leave less than zero.
    v2 = max(u2 + 2 * ue + e2, 0.0)
    lengths = math.sqrt(u2) * math.sqrt(v2)
    if lengths == 0:
        return 1.0 if e2 == 0 else 0.0
    return min(max((u2 + ue) / lengths, -1.0), 1.0)


def fit_error_model(
    grad_sq: Sequence[float],
    err_sq: Sequence[float],
    problem: BiasedSGDProblem | None = None,
    quantile: float = 1.0,
) -> tuple[float, float]:
    r"""Fit the numbers δ and c with :math:`\|e\|^2 \le \delta^2\|u\|^2 + c^2` for what was measured.

    Of all lines above the points (‖u‖², ‖e‖²) the one with the lowest floor
    :math:`(c^2 + 2\delta^2G^2) / (m^2 - \tilde M\delta^2)` is taken, which is always among those through two points,
    through one point and the origin, or level. It covers gradients like those that were measured; a level line says
    nothing about larger ones.

    Args:
        grad_sq: Squared norms of gradients.
        err_sq: Squared norms of their errors, in the same order.
        problem: What is known about the objective; without it the error is taken to be relative as far as possible.
        quantile: Share of the points that must be covered.

    Returns:
        The pair (δ, c).

    Raises:
        ValueError: If an argument is out of range or there is nothing to fit.

    Example:
        >>> fit_error_model([1.0, 4.0, 9.0], [0.25, 1.0, 1.0])
        (0.5, 0.0)
    """
    expect(0 < quantile <= 1, "quantile", "in (0, 1]", quantile, "Use 1 to cover all points.")
    expect(len(grad_sq) > 0, "grad_sq", "a list of at least one number", [], "Measure first.")
    p, q = (torch.tensor(list(values), dtype=torch.float64) for values in (grad_sq, err_sq))
    expect(
        p.shape == q.shape and bool((p.isfinite() & q.isfinite() & (p >= 0) & (q >= 0)).all()),
        "grad_sq and err_sq",
        "equally many finite numbers ≥ 0",
        (len(grad_sq), len(err_sq)),
        "Leave out what overflowed.",
    )
    # The factor keeps a product such as 0.07·100, which is rounded up to 7.000000000000001, from covering one more.
    num_covered = math.ceil(quantile * len(p) * (1 - 1e-12))
    slopes = _slopes(p, q, num_covered, problem is not None)
    rest = (q - slopes[:, None] * p).kthvalue(num_covered, dim=1).values.clamp(min=0)
    best = int(_floors(slopes, rest, problem).argmin())
    return math.sqrt(float(slopes[best])), math.sqrt(float(rest[best]))


def _slopes(p: Tensor, q: Tensor, num_covered: int, with_pairs: bool) -> Tensor:
    """List the squares of δ that can be best, smallest first."""
    # A gradient of zero has no relative error; what it adds is covered by c.
    ratios = q[p > 0] / p[p > 0]
    if not with_pairs:
        covered = min(num_covered, len(ratios))
        return ratios.kthvalue(covered).values[None] if covered else torch.zeros(1).double()
    first, second = torch.triu_indices(len(p), len(p), offset=1)
    steps, rises = p[first] - p[second], q[first] - q[second]
    pairs = rises[steps != 0] / steps[steps != 0]
    slopes = torch.cat([torch.zeros(1).double(), ratios, pairs])
    return slopes[slopes >= 0].sort().values


def _floors(slopes: Tensor, rest: Tensor, problem: BiasedSGDProblem | None) -> Tensor:
    """Compute the floor for every pair of squares of δ and c; infinite where the formula does not hold."""
    if problem is None:
        return rest
    room = problem.m**2 - problem.m_tilde * slopes
    # Beyond δ²·M21 = m the formula for small errors is too low, see `biased_sgd_floor`.
    holds = (room > 0) & (slopes * problem.m21 <= problem.m)
    return torch.where(holds, (rest + 2 * slopes * problem.G2) / room, math.inf)
