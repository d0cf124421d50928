"""Numbers and phrases of a report; nothing here reads files or prints."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lightning_sgd.report.files import Series


@dataclass(frozen=True, slots=True)
class Extreme:
    """A value and the step at which it was logged first."""

    value: float
    step: int


@dataclass(frozen=True, slots=True)
class Summary:
    """One metric in a few numbers.

    Attributes:
        first: The first value.
        last: The last value.
        lowest: The smallest value; ``None`` if all are NaN.
        highest: The largest value; ``None`` if all are NaN.
    """

    first: float
    last: float
    lowest: Extreme | None
    highest: Extreme | None


def is_loss(name: str) -> bool:
    """Tell whether lower is better.

    Example:
        >>> is_loss("train/loss"), is_loss("val/accuracy")
        (True, False)
    """
    return "loss" in name.lower()


def is_accuracy(name: str) -> bool:
    """Tell whether higher is better.

    Example:
        >>> is_accuracy("val_acc"), is_accuracy("val/loss")
        (True, False)
    """
    return "acc" in name.lower() and not is_loss(name)


def is_test(name: str) -> bool:
    """Tell whether the metric was taken on the test set.

    Example:
        >>> is_test("test/accuracy"), is_test("latest/loss")
        (True, False)
    """
    return name.lower().startswith("test")


def summarise(series: Series) -> Summary:
    """Find first, last and extreme values; NaN never counts as an extreme.

    Args:
        series: Values of one metric, at least one.

    Example:
        >>> from lightning_sgd.report.files import Series
        >>> summarise(Series(steps=[1, 2, 3], values=[5.0, 2.0, float("nan")])).lowest
        Extreme(value=2.0, step=2)
    """
    numbers = [
        Extreme(value, step)
        for step, value in zip(series.steps, series.values, strict=True)
        if not math.isnan(value)
    ]
    return Summary(
        first=series.values[0],
        last=series.values[-1],
        lowest=min(numbers, key=lambda extreme: extreme.value, default=None),
        highest=max(numbers, key=lambda extreme: extreme.value, default=None),
    )


def moving_average(values: Sequence[float], window: int) -> list[float]:
    """Average the values around each one, without NaN; at the ends over the values that exist.

    Args:
        values: The values.
        window: How many values to average, an odd number.

    Example:
        >>> moving_average([1.0, 2.0, 6.0], window=3)
        [1.5, 3.0, 4.0]
    """
    half = window // 2
    around = [values[max(0, i - half) : i + half + 1] for i in range(len(values))]
    numbers = [[value for value in part if not math.isnan(value)] for part in around]
    return [sum(part) / len(part) if part else math.nan for part in numbers]


def describe(spec: object) -> str:
    """Write a class and its settings on one line; what is switched off (null, false, 0) is left out.

    Args:
        spec: ``{"class_path": …, "init_args": …}`` of a config, or a plain value.

    Example:
        >>> describe({"class_path": "lightning_sgd.MaSS", "init_args": {"lr": 0.1, "foreach": None}})
        'MaSS(lr=0.1)'
        >>> describe("ddp")
        'ddp'
    """
    if not isinstance(spec, Mapping):
        return str(spec)
    name = str(spec.get("class_path", "")).rpartition(".")[2]
    settings = spec.get("init_args") or {}
    given = (f"{key}={describe(value)}" for key, value in settings.items() if value)
    return f"{name}({', '.join(given)})"


def describe_run(config: Mapping[str, object]) -> dict[str, str]:
    """Describe what was trained and how, as far as the config tells; Lightning's own choices are left out.

    Args:
        config: Content of ``config.yaml``.

    Example:
        >>> describe_run({"model": {"class_path": "my.Net"}, "seed_everything": 1})
        {'model': 'Net()', 'seed': '1'}
    """
    trainer = config.get("trainer")
    trainer = trainer if isinstance(trainer, Mapping) else {}
    parts = {
        "model": config.get("model"),
        "data": config.get("data"),
        "optimizer": config.get("optimizer"),
        "scheduler": config.get("lr_scheduler"),
        "strategy": trainer.get("strategy"),
        "epochs": trainer.get("max_epochs"),
        "seed": config.get("seed_everything"),
    }
    return {name: describe(spec) for name, spec in parts.items() if spec not in (None, "auto")}
