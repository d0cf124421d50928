"""What a noise scale means for the batch of a training, in words."""

from __future__ import annotations

import math
from collections.abc import Sequence

from lightning_sgd.functional.noise.noise_scale import NoiseScale, power_of_two, steps_ratio


def describe_scale(scale: NoiseScale, times: Sequence[int]) -> str:
    """The noise scale with its interval, and when it was measured.

    Args:
        scale: Of the last looks.
        times: Their steps.
    """
    when = f"at step {times[-1]}" if len(times) == 1 else f"over steps {times[0]} to {times[-1]}"
    if math.isinf(scale.high):
        value = "" if math.isinf(scale.value) else f" {scale.value:.3g} samples,"
        return f"noise scale{value} {when}, above {scale.low:.3g} for certain"
    return f"noise scale {scale.value:.3g} samples (between {scale.low:.3g} and {scale.high:.3g}) {when}"


def advice(scale: NoiseScale, batch_size: int | None) -> str:
    """Whether a larger batch would pay, and which; continues :func:`describe_scale`.

    Args:
        scale: Of the last looks.
        batch_size: Samples of a step; ``None`` where nobody knows.

    Example:
        >>> advice(NoiseScale(100.0, 80.0, 130.0), batch_size=100).split(":")[0]
        ', about the 100 of a step, which is a good compromise'
        >>> advice(NoiseScale(math.nan, 0.0, math.inf), batch_size=100)
        '. Nothing follows from that.'
    """
    if batch_size is None or math.isnan(scale.value):
        return (
            ". Nothing follows from that." if batch_size else ". Batches up to about that size pay."
        )
    if scale.low <= batch_size <= scale.high:
        doubled = _price(scale, batch_size, 2 * batch_size, "twice the batch")
        return f", about the {batch_size} of a step, which is a good compromise: {doubled}."
    if batch_size < scale.low:
        wanted = scale.low if math.isinf(scale.value) else scale.value
        best = max(power_of_two(wanted), 2 * batch_size)
        price = _price(scale, batch_size, best, f"{best} samples in a step")
        return f", above the {batch_size} of a step: a larger batch pays. {price.capitalize()}."
    best = min(power_of_two(scale.value), max(batch_size // 2, 1))
    price = _price(scale, batch_size, best, f"{best} samples in a step")
    return (
        f", below the {batch_size} of a step: a larger batch would not pay. {price.capitalize()}."
    )


def _price(scale: NoiseScale, batch_size: int, other: int, name: str) -> str:
    steps = steps_ratio(scale.value, batch_size, other)
    return (
        f"{name} would take {steps:.2g} times the steps and {steps * other / batch_size:.2g} times the samples, at a "
        f"learning rate up to {1 / steps:.2g} times today's"
    )
