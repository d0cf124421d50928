"""The commands that need no training, and how they are found."""

from __future__ import annotations

import subprocess
import sys

import pytest

import lightning_sgd
from lightning_sgd.catalogue import CATALOGUE
from lightning_sgd.cli.entry import COMMANDS, OWN_COMMANDS
from lightning_sgd.cli.methods import read_card


@pytest.fixture
def output(command, capsys, monkeypatch):
    """What a command prints in a terminal of 100 columns."""
    monkeypatch.setenv("COLUMNS", "100")

    def run(*words):
        command(*words)
        return capsys.readouterr().out

    return run


def test_without_arguments_the_help_is_shown(command, capsys):
    command()
    shown = capsys.readouterr().out
    with pytest.raises(SystemExit) as stop:
        command("--help")
    assert stop.value.code == 0
    assert capsys.readouterr().out == shown


def test_the_help_has_one_line_per_command(output):
    lines = output().splitlines()
    assert set(OWN_COMMANDS) == {"list", "explain", "report", "doctor"}
    assert set(COMMANDS) == {"fit", "validate", "test", "predict", *OWN_COMMANDS}
    for name, summary in COMMANDS.items():
        assert [line.split() for line in lines if line.strip().startswith(f"{name} ")] == [
            [name, *summary.split()]
        ]


def test_the_help_builds_no_parser_of_lightning(monkeypatch):
    # These take seconds on a slow machine.
    code = (
        "import sys; from lightning_sgd.cli import main; before = set(sys.modules); main([]); main(['list']); "
        "new = set(sys.modules) - before; "
        "sys.exit(any(name.startswith(('jsonargparse', 'lightning_sgd.cli.training')) for name in new))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, timeout=100)
    assert result.returncode == 0, result.stderr


def test_a_mistake_is_one_line_in_a_shell_too(tmp_path):
    result = subprocess.run(
        [sys.executable, "-m", "lightning_sgd", "fit", "--optimizer", "Mass"],
        capture_output=True,
        text=True,
        timeout=100,
        cwd=tmp_path,
        check=False,
    )
    assert result.returncode == 2
    assert result.stdout == ""
    assert result.stderr == "lightning-sgd: error: unknown optimizer 'Mass': did you mean 'MaSS'?\n"


def test_the_version(command, capsys):
    with pytest.raises(SystemExit) as stop:
        command("--version")
    assert stop.value.code == 0
    assert capsys.readouterr().out.startswith(
        f"lightning-sgd {lightning_sgd.__version__} (lightning "
    )


@pytest.mark.parametrize("method", CATALOGUE, ids=lambda method: method.key)
def test_the_list_shows_every_method(output, method):
    text = " ".join(output("list").split())
    for expected in (method.title, str(method.paper.year), *(p.name for p in method.plugins)):
        assert expected in text
    assert method.summary.split()[0] in text


def test_the_list_of_one_kind(output):
    assert "MaSS" in output("list", "--kind", "optimizer")
    assert "MaSS" not in output("list", "--kind", "model")


@pytest.mark.parametrize("name", ["mass", "MASS", "mass_hyperparameters", "CONDITIONNUMBERS"])
def test_a_card_is_shown_by_any_name_of_its_method(output, name):
    text = output("explain", name)
    assert "MaSS" in text.splitlines()[0] or "MaSS" in text.splitlines()[1]
    assert "class_path: lightning_sgd.MaSS" in text


@pytest.mark.parametrize("method", CATALOGUE, ids=lambda method: method.key)
def test_a_card_shows_nothing_of_its_markup(output, method):
    assert read_card(method).startswith("#")
    text = output("explain", method.key)
    for markup in ("```", ":::", "{math}", "{class}", "{func}", "$", "\\frac", "\\alpha", "|---"):
        assert markup not in text, markup


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("fitt", "unknown command 'fitt': did you mean 'fit'?"),
        ("List", "unknown command 'List': did you mean 'list'?"),
        ("zzzz", "unknown command 'zzzz': see `lightning-sgd --help`"),
        ("--hepl", "unrecognized arguments: --hepl"),
        ("explain mas", "unknown method 'mas': did you mean 'MaSS'?"),
        ("explain zzzz", "unknown method 'zzzz': see `lightning-sgd list`"),
        ("explain", "the following arguments are required: NAME"),
        ("report nowhere", "run folder 'nowhere' does not exist"),
    ],
)
def test_a_mistake_is_one_line(complaint, words, message):
    assert complaint(*words.split()) == message


def test_an_unknown_kind_lists_those_that_there_are(complaint):
    assert "'optimizer'" in complaint("list", "--kind", "optimiser")
