"""Write the table, the numbers and the plot."""

from __future__ import annotations

import json
import math
from typing import TYPE_CHECKING, Any

from .losses import NEAR, loss_at, same_link, shortest, time_to

if TYPE_CHECKING:
    from pathlib import Path

Row = dict[str, Any]
TITLES = (
    *("link", "straggler", "strategy", "ms per step", "× DDP", "blocked ms", "of these counted"),
    *("MB per step, counted", "MB per step, interface", "loss, equal samples"),
    *("loss, equal time", "s to DDP's loss"),
)
AGREEMENT = 0.05


def table(rows: list[Row]) -> str:
    """Write the Markdown table.

    Args:
        rows: One training each, in the order of the table.
    """
    lines = ["| " + " | ".join(TITLES) + " |", "|---|---|---|" + "---:|" * (len(TITLES) - 3)]
    for row in rows:
        group = same_link(rows, row)
        peer = group.get("DDP")
        cells = (
            *(row["rate"], "yes" if row["straggles"] else "no", row["label"]),
            *(f"{row['ms']:.0f}", _number(peer["ms"] / row["ms"] if peer else math.nan, 2)),
            *(f"{row['ms'] - row['compute_ms']:.1f}", _number(row["counted_blocked_ms"], 1)),
            *(_number(row["counted_mb"], 3), f"{row['interface_mb']:.3f}"),
            *(f"{row['curve'][-1][2]:.3f}", f"{loss_at(row, shortest(group)):.3f}"),
            _number(time_to(row, NEAR * peer["curve"][-1][2]) if peer else math.nan, 1),
        )
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _number(value: float, digits: int) -> str:
    return "–" if math.isnan(value) else f"{value:.{digits}f}"


def disagreements(rows: list[Row]) -> list[str]:
    """List trainings for which the counts of strategy and network interface differ too much.

    Args:
        rows: One training each.
    """
    found = []
    for row in rows:
        # Only strategies of this package count everything; of DDP the gradients are known.
        if math.isnan(row["counted_blocked_ms"]) or row["counted_mb"] == 0:
            continue
        ratio = row["interface_mb"] / row["counted_mb"]
        if abs(ratio - 1) > AGREEMENT:
            found.append(
                f"{row['label']} at {row['rate']}: the interface says {ratio:.3f} of what is counted"
            )
    return found


def write(rows: list[Row], note: str, facts: dict[str, Any], folder: Path) -> None:
    """Write three files named ``netlab``.

    Args:
        rows: One training each.
        note: How they were made.
        facts: What they have in common, for programs.
        folder: Where to.
    """
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "netlab.md").write_text(f"{table(rows)}\n\n{note}\n")
    plain = [
        {k: None if isinstance(v, float) and math.isnan(v) else v for k, v in row.items()}
        for row in rows
    ]
    head = json.dumps({"note": note, **facts})
    lines = ",\n".join(map(json.dumps, plain))
    (folder / "netlab.json").write_text(f'{head[:-1]}, "rows": [\n{lines}\n]}}\n')
    plot(rows, folder / "netlab.svg")


def plot(rows: list[Row], file: Path) -> None:
    """Plot milliseconds per step by link: one panel with stragglers, one without.

    Args:
        rows: One training each.
        file: Where to.
    """
    from matplotlib.figure import Figure

    rates, labels = (list(dict.fromkeys(row[key] for row in rows)) for key in ("rate", "label"))
    kinds = sorted({row["straggles"] for row in rows})
    figure = Figure(figsize=(4.5 * len(kinds) + 2.5, 3.5), layout="constrained")
    for axes, straggles in zip(
        figure.subplots(1, len(kinds), squeeze=False)[0], kinds, strict=True
    ):
        for label in labels:
            times = {
                r["rate"]: r["ms"]
                for r in rows
                if (r["label"], r["straggles"]) == (label, straggles)
            }
            axes.plot(rates, [times.get(rate, math.nan) for rate in rates], "o-", label=label)
        axes.set(
            title="with stragglers" if straggles else "no straggler", ylim=(0, None), xlabel="link"
        )
    figure.axes[0].set_ylabel("ms per step")
    figure.legend(
        *figure.axes[0].get_legend_handles_labels(), loc="outside right center", fontsize=8
    )
    figure.savefig(file, metadata={"Date": None})
