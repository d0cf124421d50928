"""Finds the command among the words of the command line, and runs it."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import NoReturn, get_args

from lightning_sgd.catalogue import Kind
from lightning_sgd.cli.errors import UsageError, did_you_mean

PROG = "lightning-sgd"
TRAINING_COMMANDS = {
    "fit": "train a model",
    "validate": "evaluate on the validation set",
    "test": "evaluate on the test set",
    "predict": "run the model on unlabelled data",
}
OWN_COMMANDS = {
    "list": "show the methods of this package",
    "explain": "show the card of one method",
    "report": "summarise and plot a finished run",
    "doctor": "check versions, known problems, this machine, and a config",
}
COMMANDS = {**TRAINING_COMMANDS, **OWN_COMMANDS}


def main(args: Sequence[str] | None = None) -> None:
    """Run ``lightning-sgd``.

    Args:
        args: The words after the command's name; those of the shell by default.

    Raises:
        SystemExit: With code 2 after a mistake of the user, told in one line on stderr; with code 0 after ``--help``.
    """
    words = list(sys.argv[1:] if args is None else args)
    if args is None and "" not in sys.path:
        # So that a config finds the user's own modules, as `python -m lightning_sgd` does; last, so that no file of the
        # working directory hides a library.
        sys.path.append(str(Path.cwd()))
    try:
        if _command(words) in TRAINING_COMMANDS:
            from lightning_sgd.cli.training import CommandLine

            CommandLine(args=None if args is None else words)
        else:
            _run_own_command(words)
    except UsageError as error:
        sys.stderr.write(f"{PROG}: error: {error}\n")
        raise SystemExit(2) from None


def _command(words: Sequence[str]) -> str | None:
    """Find the command among the words; LightningCLI allows ``--config FILE`` before it."""
    if words and not words[0].startswith("-") and words[0] not in COMMANDS:
        hint = did_you_mean(words[0], COMMANDS, f"see `{PROG} --help`")
        raise UsageError(f"unknown command '{words[0]}': {hint}")
    return next((word for word in words if word in COMMANDS), None)


def _run_own_command(words: Sequence[str]) -> None:
    parser = _own_parser()
    settings = vars(parser.parse_args(words))
    command: Callable[..., None] | None = settings.pop("run", None)
    if command is None:
        parser.print_help()
    else:
        command(**settings)


class _OneLineParser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UsageError(message)


def _own_parser() -> argparse.ArgumentParser:
    parser = _OneLineParser(
        prog=PROG,
        description="Published SGD methods for PyTorch Lightning.",
        epilog=f"`{PROG} COMMAND --help` shows the options of a command.",
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=_versions())
    commands = parser.add_subparsers(title="commands", metavar="COMMAND")
    made = {
        name: commands.add_parser(name, help=summary, description=f"{summary}.".capitalize())
        for name, summary in COMMANDS.items()  # LightningCLI parses its own four: here for the list
    }
    made["list"].add_argument("--kind", choices=get_args(Kind), help="only methods of this kind")
    made["list"].set_defaults(run=_list)
    name_help = "a method, or one of its classes or functions, in any case"
    made["explain"].add_argument("name", metavar="NAME", help=name_help)
    made["explain"].set_defaults(run=_explain)
    run_help = "folder of a run, or one above it: then the newest run"
    made["report"].add_argument("run_folder", metavar="RUN", help=run_help)
    made["report"].set_defaults(run=_report)
    config_help = "also build what this file for `fit` names, and check that it resumes and fits"
    made["doctor"].add_argument("--config", metavar="FILE", help=config_help)
    made["doctor"].set_defaults(run=_doctor)
    return parser


def _versions() -> str:
    return f"{PROG} {version(PROG)} (lightning {version('lightning')}, torch {version('torch')})"


def _list(kind: Kind | None) -> None:
    from lightning_sgd.cli.methods import print_methods

    print_methods(kind)


def _explain(name: str) -> None:
    from lightning_sgd.cli.methods import print_card

    print_card(name)


def _report(run_folder: str) -> None:
    from lightning_sgd.report import ReportError, report

    try:
        report(run_folder)
    except ReportError as error:
        raise UsageError(str(error)) from error


def _doctor(config: str | None) -> None:
    from lightning_sgd.cli.doctor import examine

    examine(config)
