"""Compare losses along the trainings: at equal times, until an equal loss, and with the goals of the lab."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

Row = dict[str, Any]
NEAR = 1.05  # "DDP's loss" is at most so many times what DDP has at its end


def same_link(rows: list[Row], row: Row) -> dict[str, Row]:
    """Select the trainings under the same conditions, by label.

    Args:
        rows: One training each.
        row: One of them.
    """
    return {
        each["label"]: each
        for each in rows
        if (each["rate"], each["straggles"]) == (row["rate"], row["straggles"])
    }


def shortest(group: dict[str, Row]) -> float:
    """Return the seconds after which the first training has seen all its samples.

    Args:
        group: Trainings, by label.
    """
    seconds: list[float] = [row["curve"][-1][1] for row in group.values()]
    return min(seconds)


def loss_at(row: Row, seconds: float) -> float:
    """Interpolate the loss at a time after the start linearly.

    Args:
        row: One training.
        seconds: Not after its end.

    Example:
        >>> loss_at({"curve": [(4, 1.0, 2.0), (8, 3.0, 1.0)]}, 2.0)
        1.5
    """
    _, times, losses = zip(*row["curve"], strict=True)
    return float(np.interp(seconds, times, losses))


def time_to(row: Row, loss: float) -> float:
    """Return the seconds until the loss falls to a level, or NaN if it never does.

    Args:
        row: One training.
        loss: To be reached.

    Example:
        >>> curve = [(4, 1.0, 2.0), (8, 3.0, 1.0)]
        >>> time_to({"curve": curve}, 1.0), time_to({"curve": curve}, 0.5)
        (3.0, nan)
    """
    return next((seconds for _, seconds, reached in row["curve"] if reached <= loss), math.nan)


def goals(rows: list[Row]) -> list[str]:
    """Return the goals of the lab on slow links, each with its result; empty if lines of the table are missing.

    Args:
        rows: One training each.
    """
    found = []
    for rate in dict.fromkeys(row["rate"] for row in rows):
        group = {row["label"]: row for row in rows if row["rate"] == rate and not row["straggles"]}
        if {"no exchange", *NEEDED} <= group.keys():
            found.append(f"{rate}, no straggler: " + "; ".join(_goals(group)) + ".")
    return found


NEEDED = (
    *("DDP", "Local SGD, H = 1", "gossip, one peer"),
    *("Gossip-PGA, H = 8", "Overlap Local-SGD, H = 2"),
)


def _goals(group: dict[str, Row]) -> list[str]:
    ddp, every_step, gossip, pga, overlap = (group[label] for label in NEEDED)
    alone, blocked = group["no exchange"], "counted_blocked_ms"
    target = NEAR * ddp["curve"][-1][2]
    return [
        f"an exchange with one peer takes {gossip[blocked] / every_step[blocked]:.2f} of an all-reduce (goal 0.70)",
        (
            f"Overlap with H = 2 waits {overlap[blocked] / overlap['compute_ms']:.1%} of its computation (goal 5 %) "
            f"and a step takes {overlap['ms'] / alone['ms']:.2f} of one without exchange (goal 1.10)"
        ),
        (
            f"Gossip-PGA ends at {pga['curve'][-1][2] / ddp['curve'][-1][2]:.3f} of DDP's loss (goal 1.05), "
            f"which it is near after {time_to(pga, target):.1f} s, DDP after {time_to(ddp, target):.1f} s"
        ),
    ]
