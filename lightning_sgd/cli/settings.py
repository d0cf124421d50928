"""What the user wrote, setting by setting, before LightningCLI makes anything of it."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

import yaml

from lightning_sgd.cli.errors import UsageError, nearest

KeyPath: TypeAlias = tuple[str | int, ...]


@dataclass(frozen=True, slots=True)
class Setting:
    """One value that the user gave.

    Attributes:
        path: Its key, split at the dots; a number is a position in a list.
        value: The value, as YAML reads it.
        source: The config file that holds it, ``None`` for the command line.

    Example:
        >>> str(Setting(("trainer", "callbacks", 0, "monitor"), "loss", "a.yaml"))
        "key 'trainer.callbacks[0].monitor' in a.yaml"
        >>> str(Setting(("trainer", "callbacks", 0, "monitor"), "loss"))
        "option '--trainer.callbacks.monitor'"
    """

    path: KeyPath
    value: object
    source: str | None = None

    def __str__(self) -> str:
        where = f" in {self.source}" if self.source else ""
        return f"{'key' if self.source else 'option'} '{self.spell(self.path)}'{where}"

    def spell(self, path: KeyPath) -> str:
        """Write a path as the user has to write it where this setting stands."""
        if self.source is None:
            return _option(path)
        return "".join(f".{key}" if isinstance(key, str) else f"[{key}]" for key in path)[1:]

    def option(self, length: int) -> str:
        """Name the option of the command line for the first keys of the path."""
        return _option(self.path[:length])


def _option(path: KeyPath) -> str:
    return f"--{'.'.join(key for key in path if isinstance(key, str))}"


def read_settings(words: Sequence[str], command: str) -> list[Setting]:
    """Read all settings of a command line and of its config files, in the order in which they count.

    Args:
        words: The words of the command line.
        command: The command, whose section is taken if a config file has one.

    Raises:
        UsageError: If a config file is missing or is no YAML.
    """
    settings: list[Setting] = []
    for name, value in _options(words):
        if name in {"-c", "--config"}:
            tree = _read_yaml(value)
            settings += _leaves((), tree.get(command, tree), value)
        else:
            settings += _leaves(_place(name.lstrip("-"), settings), _parse(value), None)
    return settings


def missing_file(what: str, file: str) -> str:
    """Write a sentence about a file that does not exist, with the file beside it that is spelt most like it."""
    path = Path(file)
    beside = {other.stem: str(other) for other in path.parent.glob(f"*{path.suffix}")}
    guess = nearest(path.stem, beside)
    hint = f"did you mean '{beside[guess]}'?" if guess else "check the path"
    return f"{what} '{file}' does not exist: {hint}"


def _options(words: Sequence[str]) -> Iterator[tuple[str, str]]:
    """Yield name and value of every ``--name value`` and ``--name=value``."""
    for word, following in zip(words, [*words[1:], "--"], strict=True):
        if re.match(r"--?[A-Za-z]", word):
            name, equals, value = word.partition("=")
            yield name, value if equals or following.startswith("--") else following


def _parse(value: str) -> object:
    try:
        return yaml.safe_load(value)
    except yaml.YAMLError:
        return value


def _place(name: str, settings: Sequence[Setting]) -> KeyPath:
    """Find the path of an option: ``callbacks+`` opens a place in a list, ``callbacks.monitor`` means the last one."""
    path: KeyPath = ()
    for key in name.split("."):
        last = _last_position(path, settings)
        path += (key,) if last is None else (last, key)
    if name.endswith("+"):
        path = (*path[:-1], name.rpartition(".")[2].removesuffix("+"))
        last = _last_position(path, settings)
        path += (0 if last is None else last + 1,)
    return path


def _last_position(path: KeyPath, settings: Sequence[Setting]) -> int | None:
    """Find the last place that is taken in the list at ``path``; ``None`` if there is no list."""
    below = [
        setting.path[len(path) :][:1] for setting in settings if setting.path[: len(path)] == path
    ]
    return max((key for keys in below for key in keys if isinstance(key, int)), default=None)


def _leaves(path: KeyPath, tree: object, source: str | None) -> Iterator[Setting]:
    if isinstance(tree, dict) and tree:
        for key, value in tree.items():
            yield from _leaves((*path, str(key).removesuffix("+")), value, source)
    elif isinstance(tree, list) and tree:
        for position, value in enumerate(tree):
            yield from _leaves((*path, position), value, source)
    elif path:
        yield Setting(path, tree, source)


def _read_yaml(file: str) -> dict[str, object]:
    if "://" in file:  # LightningCLI reads these; nothing is known about a misspelling in them
        return {}
    try:
        text = file if file.startswith("{") else Path(file).read_text(encoding="utf-8")
        tree = yaml.safe_load(text)
    except FileNotFoundError as error:
        raise UsageError(missing_file("config file", file)) from error
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        where = f" in line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        raise UsageError(f"config file '{file}' is not YAML{where}: {error.problem}") from error
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"config file '{file}' cannot be read: {error}") from error
    if not isinstance(tree, dict):
        raise UsageError(f"config file '{file}' holds no settings: expected lines `key: value`")
    return tree
