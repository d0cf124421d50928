"""Checks of values that LightningCLI takes as any text, and that Lightning would refuse with a traceback."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from lightning.pytorch.strategies import Strategy, StrategyRegistry

from lightning_sgd.cli.class_names import known_classes
from lightning_sgd.cli.errors import nearest

if TYPE_CHECKING:
    from lightning_sgd.cli.settings import Setting


def is_missing_checkpoint(path: object) -> bool:
    """Tell whether ``ckpt_path`` names a file that does not exist; ``best``, ``last`` and addresses name none.

    Example:
        >>> is_missing_checkpoint("best"), is_missing_checkpoint("no/such.ckpt")
        (False, True)
    """
    is_file = isinstance(path, str) and Path(path).suffix != "" and ":" not in path
    return is_file and not Path(str(path)).exists()


def is_unknown_strategy(strategy: object) -> bool:
    """Tell whether ``trainer.strategy`` is a word that Lightning does not know.

    Example:
        >>> is_unknown_strategy("DDP"), is_unknown_strategy("dpd")
        (False, True)
    """
    return isinstance(strategy, str) and strategy.lower() not in _strategy_names()


def about_strategy(strategy: str, given: Setting | None = None) -> str:
    """Write a sentence about an unknown strategy, with the nearest name of Lightning's and of ours.

    Args:
        strategy: The name.
        given: The setting that it comes from, for its place.

    Example:
        >>> about_strategy("dpd")
        "unknown strategy 'dpd': did you mean 'ddp'?"
    """
    where = f" at '{given.spell(given.path)}' in {given.source}" if given and given.source else ""
    classes = [cls.__name__ for cls in known_classes(Strategy)]
    aliases = tuple(name.lower() for name in classes)
    names = [name for name in _strategy_names() if not name.startswith(aliases)]
    if strategy.rpartition(".")[2] in classes:
        return f"strategy '{strategy}'{where} is a class: give it as {_as_class(strategy, given)}"
    first, second = (names, classes) if strategy.islower() else (classes, names)
    guess = nearest(strategy, first) or nearest(strategy, second)
    if guess is None:
        main_names = ", ".join(name for name in names if "_" not in name)
        return f"unknown strategy '{strategy}'{where}: see `lightning-sgd list`; Lightning has {main_names}"
    meant = _as_class(guess, given) if guess in classes else f"'{guess}'"
    return f"unknown strategy '{strategy}'{where}: did you mean {meant}?"


def _strategy_names() -> list[str]:
    return ["auto", *StrategyRegistry.available_strategies()]


def _as_class(name: str, given: Setting | None) -> str:
    if given and given.source:
        return f"'strategy: {{class_path: {name}}}'"
    return f"'--trainer.strategy.class_path={name}'"
