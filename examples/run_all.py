"""Run every example: each YAML as a user would, each script with ``--quick``; two at a time, each has two minutes."""

from __future__ import annotations

import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

FOLDER = Path(__file__).resolve().parent
SECONDS = 120
AT_A_TIME = 2  # most of an example is one process that imports torch


def commands() -> dict[str, list[str]]:
    """For every example the command that runs it."""
    found = {
        path.name: ["-m", "lightning_sgd", "fit", "--config", str(path)]
        for path in sorted(FOLDER.glob("*.yaml"))
    }
    own = FOLDER / "run_all.py"
    scripts = [*FOLDER.glob("*.py"), *FOLDER.glob("reproductions/[!_]*.py")]
    for path in sorted(scripts, key=lambda script: script.name):
        if path != own:
            found[path.name] = [str(path), "--quick"]
    return found


def run(arguments: list[str]) -> str | None:
    """Run Python in a scratch folder; what went wrong, or ``None``."""
    with tempfile.TemporaryDirectory() as scratch:
        try:
            done = subprocess.run(
                [sys.executable, *arguments],
                cwd=scratch,
                timeout=SECONDS,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                check=False,
            )
        except subprocess.TimeoutExpired:
            return f"took more than {SECONDS} seconds"
    return None if done.returncode == 0 else done.stdout[-4000:]


def timed(arguments: list[str]) -> tuple[str | None, float]:
    """What went wrong, or ``None``, and the seconds that it took."""
    start = time.perf_counter()
    return run(arguments), time.perf_counter() - start


def main() -> None:
    """Run them all, and exit with the number of failures."""
    found = commands()
    failures = 0
    with ThreadPoolExecutor(AT_A_TIME) as pool:
        for name, (problem, seconds) in zip(found, pool.map(timed, found.values()), strict=True):
            failures += problem is not None
            print(f"{'FAILED' if problem else 'ok':6} {seconds:5.1f} s  {name}", flush=True)
            if problem:
                print(problem)
    sys.exit(failures)


if __name__ == "__main__":
    main()
