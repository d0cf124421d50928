"""Fit a cost model to the measurements of the lab, and predict more ranks and faster links.

python -m benchmarks.netlab.model
"""

from __future__ import annotations

import argparse
import json
import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from scipy.optimize import nnls

from .simulation import PATTERNS, Costs, Pattern, mean_step, slow_steps
from .training import SLOWER

Row = dict[str, Any]
SPEEDS = {"100mbit": 1e8, "200mbit": 2e8, "1gbit": 1e9, "unshaped": math.inf}
"""Bits per second of the links of the lab."""
RANKS, GIGABITS = (8, 64, 256, 1024), (1, 10, 25, 100)
LATENCY = 5e-5
"""Seconds per message between hosts that do not share two cores, as in a data centre."""
NUM_BYTES, COMPUTE = 4 * 25.6e6, 0.1
"""ResNet-50 in single precision, a tenth of a second per step."""


@dataclass(frozen=True)
class LinkModel:
    """Model of the seconds of an exchange: messages · latency + bytes · (8 / (efficiency · speed) + handling).

    Attributes:
        latency: Seconds per message, whatever its size.
        efficiency: Share of the link's speed that arrives.
        handling: Seconds per byte that do not depend on the link, on the cores of the lab.
    """

    latency: float
    efficiency: float
    handling: float

    def seconds(self, num_messages: float, num_bytes: float, speed: float) -> float:
        """Predict the seconds of one exchange.

        Args:
            num_messages: That a rank sends one after the other.
            num_bytes: That it sends in all.
            speed: Bits per second.

        Example:
            >>> LinkModel(0.001, 0.8, 0.0).seconds(6, 1e6, 1e8)
            0.106
        """
        return num_messages * self.latency + num_bytes * (
            8 / (self.efficiency * speed) + self.handling
        )

    def costs(self, num_ranks: int, num_bytes: float, speed: float) -> Costs:
        """Predict the seconds of each kind of exchange.

        Args:
            num_ranks: How many take part.
            num_bytes: Of the parameters.
            speed: Bits per second.
        """
        rounds = 2 * (num_ranks - 1)
        ring = self.seconds(rounds, rounds / num_ranks * num_bytes, speed)
        return Costs(all_reduce=ring, swap=self.seconds(1, num_bytes, speed))


def fit(rows: list[Row]) -> LinkModel:
    """Fit by least squares to the waiting times of trainings without stragglers that wait for their exchanges.

    Only limited links count: without a limit, the cores alone decide, and what else they had to do.

    Args:
        rows: Of the lab.
    """
    chosen = [
        row
        for row in rows
        if row["label"] in FITTED and not row["straggles"] and SPEEDS[row["rate"]] < math.inf
    ]
    columns = [
        (row["counted_messages"], 8e6 * row["counted_mb"] / SPEEDS[row["rate"]], row["counted_mb"])
        for row in chosen
    ]
    matrix, waited = np.array(columns), np.array([row["counted_blocked_ms"] for row in chosen])
    # Relative errors count: what takes a millisecond is to be right as what takes a hundred.
    found, _ = nnls(matrix / waited[:, None], np.ones(len(waited)))
    return LinkModel(found[0] / 1e3, 1e3 / max(found[1], 1e-12), found[2] / 1e9)


FITTED = ("Local SGD, H = 1", "Local SGD, H = 4", "gossip, one peer", "Gossip-PGA, H = 8")


def compared(results: Row, model: LinkModel) -> str:
    """Write a Markdown table of milliseconds per step, predicted and measured; stragglers are not in the fit.

    Args:
        results: What the lab wrote.
        model: Fitted to it.
    """
    rows, num_hosts, warm_up = results["rows"], results["num_hosts"], results["warm_up"]
    slow = slow_steps(num_hosts, warm_up + results["steps"])
    lines = [
        "| link | straggler | strategy | measured ms | model ms | ratio |",
        "|---|---|---|---:|---:|---:|",
    ]
    own = {(r["rate"], r["straggles"]): r for r in rows if r["label"] == "no exchange"}
    for row in rows:
        if row["label"] not in PATTERNS:
            continue
        alone = own[row["rate"], row["straggles"]]
        work = (alone["ms"] - alone["compute_ms"]) / 1e3
        times = results["compute"] * np.where(slow & row["straggles"], SLOWER, 1) + work
        costs = model.costs(num_hosts, 4 * results["num_parameters"], SPEEDS[row["rate"]])
        told = 1e3 * mean_step(PATTERNS[row["label"]], times, costs, warm_up)
        cells = row["rate"], "yes" if row["straggles"] else "no", row["label"]
        numbers = f"{row['ms']:.0f} | {told:.0f} | {told / row['ms']:.2f}"
        lines.append(f"| {' | '.join(cells)} | {numbers} |")
    return "\n".join(lines)


def predicted(links: LinkModel, num_steps: int = 256) -> str:
    """Write a Markdown table of milliseconds per step for many ranks by link speed; in brackets with stragglers.

    Args:
        links: What an exchange takes.
        num_steps: How many are simulated.
    """
    titles = ["ranks", "strategy", *(f"{speed} Gbit/s" for speed in GIGABITS)]
    lines = ["| " + " | ".join(titles) + " |", "|---:|---|" + "---:|" * len(GIGABITS)]
    for num_ranks in RANKS:
        slow = slow_steps(num_ranks, num_steps)
        for label, pattern in PATTERNS.items():
            costs = [links.costs(num_ranks, NUM_BYTES, 1e9 * speed) for speed in GIGABITS]
            cells = [
                f"{_milliseconds(pattern, np.zeros_like(slow), cost)} ({_milliseconds(pattern, slow, cost)})"
                for cost in costs
            ]
            lines.append(f"| {num_ranks} | {label} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _milliseconds(pattern: Pattern, slow: np.ndarray, costs: Costs) -> str:
    return f"{1e3 * mean_step(pattern, COMPUTE * np.where(slow, SLOWER, 1), costs, 0):.0f}"


def page(results: Row) -> str:
    """Write the page: the model, its fit and its predictions.

    Args:
        results: What the lab wrote.
    """
    model = fit(results["rows"])
    parameters = (
        f"Fitted: {1e3 * model.latency:.2f} ms per message, {model.efficiency:.0%} of the link's speed, "
        f"{1e9 * model.handling:.1f} ms per MB on the lab's cores."
    ).replace("%", " %")
    about = (
        f"**Model, not measured**: ms per step with {NUM_BYTES / 4e6:.1f} M parameters in single precision and "
        f"{1e3 * COMPUTE:.0f} ms of computation; in brackets where one step in four takes four times as long, on every "
        "rank at times of its own"
    )
    return "\n\n".join(
        [
            parameters,
            compared(results, model),
            f"{about}. With the lab's {1e3 * model.latency:.2f} ms per message:",
            predicted(replace(model, handling=0.0)),
            f"The same with {1e3 * LATENCY:.2f} ms per message, which was assumed, not fitted:",
            predicted(replace(model, handling=0.0, latency=LATENCY)),
        ]
    )


def main() -> None:
    """Read the measurements of the lab, and write the page."""
    parser = argparse.ArgumentParser(prog="benchmarks.netlab.model", description=__doc__)
    parser.add_argument("--results", type=Path, default=Path("docs/results"), help="of the lab")
    folder = parser.parse_args().results
    text = page(json.loads((folder / "netlab.json").read_text()))
    (folder / "netlab_model.md").write_text(text + "\n")


if __name__ == "__main__":
    main()
