"""Train every line of the table in turn on one rank; `torchrun` starts this on every host."""

from __future__ import annotations

import argparse
import json
import logging
import os
import warnings
from pathlib import Path
from typing import Any

import torch

from .strategies import LINES
from .training import train


def main() -> None:
    """Write the measurements of every training into a file of this rank."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--labels", nargs="+", required=True)
    parser.add_argument("--stragglers", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--num-hosts", type=int, required=True)
    parser.add_argument("--num-steps", type=int, required=True)
    parser.add_argument("--warm-up", type=int, required=True)
    parser.add_argument("--folder", type=Path, required=True)
    args = parser.parse_args()
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.simplefilter("ignore")
    rank = os.environ["RANK"]
    results: list[dict[str, Any]] = []
    for straggles in map(bool, args.stragglers):
        for label in args.labels:
            meter = train(LINES[label](), straggles, args.num_hosts, args.num_steps, args.warm_up)
            torch.save(meter.snapshots, args.folder / f"{rank}-{len(results)}.pt")
            results.append({"label": label, "straggles": straggles, **meter.result})
    (args.folder / f"{rank}.json").write_text(json.dumps(results))


if __name__ == "__main__":
    main()
