"""Rules from names in a string, such as ``nnm+trmean``."""

from __future__ import annotations

import ast
from collections.abc import Callable
from typing import Any, TypeVar

from lightning_sgd._validation import expect
from lightning_sgd.aggregation._aggregator import Aggregator
from lightning_sgd.aggregation.clipping import CenteredClipping
from lightning_sgd.aggregation.coordinate import CoordinateMedian, MeaMed, Phocas, TrimmedMean
from lightning_sgd.aggregation.geometric import GeometricMedian
from lightning_sgd.aggregation.krum import Bulyan, Krum, MultiKrum
from lightning_sgd.aggregation.mean import Mean
from lightning_sgd.aggregation.nearest import CGE, FABA, MoNNA
from lightning_sgd.aggregation.pre_aggregated import PreAggregated
from lightning_sgd.aggregation.pre_aggregation import ARC, NNM, Bucketing, Clip, PreAggregator
from lightning_sgd.aggregation.spectral import DnC, SpectralFilter
from lightning_sgd.aggregation.subsets import MDA, SMEA

Made = TypeVar("Made")

RULES: dict[str, tuple[Callable[..., Aggregator], dict[str, object]]] = {
    "mean": (Mean, {}),
    "median": (CoordinateMedian, {}),
    "trmean": (TrimmedMean, {}),
    "meamed": (MeaMed, {}),
    "phocas": (Phocas, {}),
    "krum": (Krum, {}),
    "multikrum": (MultiKrum, {}),
    "bulyan": (Bulyan, {}),
    "mda": (MDA, {}),
    "smea": (SMEA, {}),
    "geomed": (GeometricMedian, {}),
    # The settings of byzfl; the authors' code takes four steps and 1e-5.
    "rfa": (GeometricMedian, {"smoothing": 0.1, "num_iterations": 3, "start": "zero"}),
    "cclip": (CenteredClipping, {}),
    "faba": (FABA, {}),
    "monna": (MoNNA, {}),
    "cge": (CGE, {}),
    "filter": (SpectralFilter, {}),
    "caf": (SpectralFilter, {"stop": "agnostic"}),
    "dnc": (DnC, {}),
}
"""Rule and settings of each name."""

STEPS: dict[str, Callable[..., PreAggregator]] = {
    "nnm": NNM,
    "bucketing": Bucketing,
    "clip": Clip,
    "arc": ARC,
}
"""Pre-aggregation of each name."""


def get_aggregator(spec: str | Aggregator, num_byzantine: int) -> Aggregator:
    """Build a rule, with its pre-aggregations, from names joined by ``+``.

    Args:
        spec: Such as ``"krum"``, ``"nnm+trmean"`` or, with settings,
            ``"bucketing(bucket_size=3)+krum(num_neighbours=5)"``. A rule is passed through.
        num_byzantine: How many of the workers may be faulty [f].

    Raises:
        ValueError: If a name or a setting is not known, or ``spec`` holds another ``num_byzantine``.

    Example:
        >>> get_aggregator("nnm+trmean", num_byzantine=2)
        NNM() + TrimmedMean(num_byzantine=2)
    """
    if isinstance(spec, Aggregator):
        same = spec.num_byzantine == num_byzantine
        remedy = "Give it once."
        expect(
            same,
            "num_byzantine",
            f"{spec.num_byzantine}, as the rule has it",
            num_byzantine,
            remedy,
        )
        return spec
    *steps, last = _calls(spec)
    rule = _rule(spec, *last, num_byzantine)
    return PreAggregated([_step(spec, *step) for step in steps], rule) if steps else rule


def _calls(spec: str) -> list[tuple[str, dict[str, Any]]]:
    """Parse a string to names with settings; as Python, so that nested brackets and quotes are right."""
    try:
        return [_call(part) for part in _summands(ast.parse(spec, mode="eval").body)]
    except (SyntaxError, ValueError):
        remedy = "Write, for example, nnm+trmean or bucketing(bucket_size=3)+krum."
        raise ValueError(
            f"Expected `aggregator` to be names joined by +, got {spec!r}. {remedy}"
        ) from None


def _summands(node: ast.expr) -> list[ast.expr]:
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        return [*_summands(node.left), node.right]
    return [node]


def _call(node: ast.expr) -> tuple[str, dict[str, Any]]:
    if isinstance(node, ast.Name):
        return node.id, {}
    if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Name)) or node.args:
        raise ValueError
    # Literals only: a string in a configuration file must not run code.
    return node.func.id, {str(word.arg): ast.literal_eval(word.value) for word in node.keywords}


def _rule(spec: str, name: str, settings: dict[str, Any], num_byzantine: int) -> Aggregator:
    remedy = f"Rules are {', '.join(RULES)}; before them may stand {', '.join(STEPS)}."
    expect(name in RULES, "aggregator", "a rule at its end", spec, remedy)
    make, defaults = RULES[name]
    named = settings.get("num_byzantine", num_byzantine)
    expected = f"{named}, as {name} has it"
    expect(named == num_byzantine, "num_byzantine", expected, num_byzantine, "Give it once.")
    return _make(name, make, {**defaults, **settings, "num_byzantine": num_byzantine})


def _step(spec: str, name: str, settings: dict[str, Any]) -> PreAggregator:
    remedy = f"These are {', '.join(STEPS)}; the rule comes last."
    expect(name in STEPS, "aggregator", "pre-aggregations before its rule", spec, remedy)
    return _make(name, STEPS[name], settings)


def _make(name: str, make: Callable[..., Made], settings: dict[str, Any]) -> Made:
    try:
        return make(**settings)
    except TypeError as error:
        # A wrong name of a setting: Python's message says which.
        raise ValueError(f"Expected `aggregator` to give {name} what it takes; {error}.") from None
