"""The names by which the Trainer finds strategies: ``Trainer(strategy="local_sgd")``."""

from __future__ import annotations

from typing import Any

from lightning.pytorch.strategies import Strategy, StrategyRegistry

START_METHODS = ("popen", "fork", "spawn")


def register(name: str, strategy: type[Strategy], **settings: Any) -> None:
    """Register a strategy, and as ``<name>_fork`` and ``<name>_spawn`` with other ways to start processes.

    Args:
        name: In lower case, because the Trainer looks for it in lower case.
        strategy: The class.
        **settings: Numbers and strings for its constructor.
    """
    for method in START_METHODS:
        key = name if method == "popen" else f"{name}_{method}"
        if key not in StrategyRegistry:
            description = f"{strategy.__name__} with start_method '{method}'"
            settings = {**settings, "start_method": method}
            StrategyRegistry.register(key, strategy, description=description, **settings)
