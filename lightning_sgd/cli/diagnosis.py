"""Which name is misspelt, where it stands, and what was probably meant.

jsonargparse reports a misspelt class as a failed union, and a nested key without its path. The search here
does not read those messages: it walks every given setting down the parser and stops at the first name
that does not exist.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jsonargparse import ArgumentParser
from lightning.pytorch.strategies import StrategyRegistry

from lightning_sgd.cli.class_names import class_path, known_classes, resolve, takes_plain_values
from lightning_sgd.cli.errors import did_you_mean, nearest
from lightning_sgd.cli.settings import KeyPath, Setting, missing_file

NOUNS = {
    "--model": "model",
    "--data": "data module",
    "--optimizer": "optimizer",
    "--lr_scheduler": "learning-rate scheduler",
    "--trainer.callbacks": "callback",
    "--trainer.logger": "logger",
    "--trainer.strategy": "strategy",
}
CLASS_KEYS = ("class_path", "init_args", "dict_kwargs")


def find_misspelling(
    parser: ArgumentParser, settings: Sequence[Setting], command: str
) -> str | None:
    """Write a sentence about the first misspelt name; ``None`` if every name is known.

    Args:
        parser: The parser of the command.
        settings: Everything that the user gave.
        command: The command, for hints.
    """
    for setting in settings:
        if complaint := _Walk(setting, settings, command).check(parser, 0):
            return complaint
    return None


@dataclass(frozen=True, slots=True)
class _Walk:
    """One setting on its way down the parser; ``end`` counts the keys of its path that are done."""

    setting: Setting
    settings: Sequence[Setting]
    command: str

    @property
    def path(self) -> KeyPath:
        return self.setting.path

    def check(self, parser: ArgumentParser, start: int) -> str | None:
        actions = {action.dest: action for action in parser._actions}
        for end in range(start + 1, len(self.path) + 1):
            key = ".".join(map(str, self.path[start:end]))
            if hasattr(actions.get(key), "_typehint"):
                return self._check_value(actions[key], end)
            if key not in actions and not any(name.startswith(f"{key}.") for name in actions):
                return self._unknown_key(actions, start, end)
        return None

    def _check_value(self, action: Any, end: int) -> str | None:
        hint = getattr(action, "_typehint", None)
        classes = known_classes(hint)
        while self.path[end:] and isinstance(self.path[end], int):
            end += 1
        rest = self.path[end:]
        if not classes or (not rest and takes_plain_values(hint)):
            return None
        if rest in {(), ("class_path",), ("help",)}:
            return self._check_class(self.setting, classes, end)
        return self._check_argument(action, classes, end)

    def _check_argument(self, action: Any, classes: Sequence[type], end: int) -> str | None:
        """Check the arguments of the class that is named for the same object."""
        named = self._class_setting(end)
        if named is None:
            return self._no_class(end)
        if complaint := self._check_class(named, classes, end):
            return complaint
        cls = resolve(str(named.value), classes)
        if not isinstance(cls, type) or self.path[end] == "dict_kwargs":
            return None
        parser = ArgumentParser(exit_on_error=False)
        skip = getattr(action, "sub_add_kwargs", {}).get("skip", set())
        parser.add_class_arguments(cls, fail_untyped=False, skip=skip)
        if self.path[end] == "init_args":
            return self.check(parser, end + 1)
        return self.check(parser, end) or self._init_args_missing(end)

    def _class_setting(self, end: int) -> Setting | None:
        """Find the setting that names the class, from the same source if it is there."""
        paths = {self.path[:end], (*self.path[:end], "class_path")}
        naming = [
            other for other in self.settings if other.path in paths and isinstance(other.value, str)
        ]
        same_source = [other for other in naming if other.source == self.setting.source]
        return next(reversed(same_source or naming), None)

    def _check_class(self, named: Setting, classes: Sequence[type], end: int) -> str | None:
        name = named.value
        if not isinstance(name, str) or resolve(name, classes) is not None:
            return None
        if name.endswith((".yaml", ".yml", ".json")):
            return None if Path(name).exists() else missing_file("config file", name)
        option = self.setting.option(end)
        where = f" at '{named.spell(named.path)}' in {named.source}" if named.source else ""
        if option not in NOUNS and not where:
            where = f" for '{option}'"
        if option == "--trainer.strategy" and name in StrategyRegistry:
            cls = StrategyRegistry[name]["strategy"].__name__
            return f"strategy '{name}'{where} takes no arguments: give them with its class, '{cls}'"
        hint = _guess_class(name, classes, self.command, option)
        return f"unknown {NOUNS.get(option, 'class')} '{name}'{where}: {hint}"

    def _unknown_key(self, keys: Collection[str], start: int, end: int) -> str:
        """Suggest the nearest key on the same level, else any key that ends in the same word."""
        above = "".join(f"{key}." for key in self.path[start : end - 1])
        level = {key.removeprefix(above).split(".")[0] for key in keys if key.startswith(above)}
        if start and not above:
            level |= set(CLASS_KEYS)
        if guess := nearest(str(self.path[end - 1]), level):
            return self._suggest((*self.path[: end - 1], guess, *self.path[end:]))
        by_last_word = {key.rpartition(".")[2]: key for key in keys}
        if guess := nearest(str(self.path[-1]), by_last_word):
            return self._suggest((*self.path[:start], *by_last_word[guess].split(".")))
        return f"unknown {self.setting}: see `lightning-sgd {self.command} {self._help(start)}`"

    def _help(self, start: int) -> str:
        """Name the option that lists what may stand at position ``start``."""
        end = start - 1 if start and self.path[start - 1] == "init_args" else start
        named = self._class_setting(end) if start else None
        return f"{self.setting.option(end)}.help {named.value}" if named else "--help"

    def _no_class(self, end: int) -> str | None:
        if self.path[end] in CLASS_KEYS:
            return None
        if guess := nearest(str(self.path[end]), CLASS_KEYS):
            return self._suggest((*self.path[:end], guess, *self.path[end + 1 :]))
        owner = self.setting.spell((*self.path[:end], "class_path"))
        return f"{self.setting} is given without a class: name it in '{owner}'"

    def _init_args_missing(self, end: int) -> str | None:
        """Suggest ``init_args``, which only the command line may leave out."""
        if self.setting.source is None:
            return None
        return self._suggest((*self.path[:end], "init_args", *self.path[end:]))

    def _suggest(self, path: KeyPath) -> str:
        return f"unknown {self.setting}: did you mean '{self.setting.spell(path)}'?"


def _guess_class(name: str, classes: Sequence[type], command: str, option: str) -> str:
    names = [cls.__name__ for cls in classes]
    otherwise = (
        f"see `lightning-sgd list`, or '{option}' in `lightning-sgd {command} --help`; "
        "a class of your own needs its full path"
    )
    if "." not in name:
        return did_you_mean(name, names, otherwise)
    guess = nearest(name, map(class_path, classes)) or nearest(name.rpartition(".")[2], names)
    return f"did you mean '{guess}'?" if guess else otherwise
