"""Run every example: each YAML as a user would, each script with ``--quick``; each has a minute."""

from __future__ import annotations

import subprocess
import sys
import tempfile
import time
from pathlib import Path

FOLDER = Path(__file__).resolve().parent
SECONDS = 60


def commands() -> dict[str, list[str]]:
    """For every example the command that runs it."""
    found = {
        path.name: ["-m", "lightning_sgd", "fit", "--config", str(path)]
        for path in sorted(FOLDER.glob("*.yaml"))
    }
    for path in sorted(FOLDER.glob("*.py")):
        if path != Path(__file__).resolve():
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


def main() -> None:
    """Run them one after the other, and exit with the number of failures."""
    failures = 0
    for name, arguments in commands().items():
        start = time.perf_counter()
        problem = run(arguments)
        failures += problem is not None
        print(f"{'FAILED' if problem else 'ok':6} {time.perf_counter() - start:5.1f} s  {name}")
        if problem:
            print(problem)
    sys.exit(failures)


if __name__ == "__main__":
    main()
