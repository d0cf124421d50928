"""Every rule, pre-aggregation and attack as a user of YAML writes it."""

from __future__ import annotations

import inspect

import docstring_parser
import pytest
import torch
from jsonargparse import ArgumentParser

from lightning_sgd import aggregation
from lightning_sgd.aggregation import Aggregator, Attack, PreAggregated, PreAggregator
from lightning_sgd.aggregation.composition import RULES, STEPS, get_aggregator

CONCRETE = [
    cls
    for cls in vars(aggregation).values()
    if isinstance(cls, type)
    and issubclass(cls, (Aggregator, Attack, PreAggregator, aggregation.LabelFlip))
    and not inspect.isabstract(cls)
]
REQUIRED = {
    "num_byzantine": 2,
    "radius": 1.5,
    "num_classes": 10,
    "steps": [{"class_path": "lightning_sgd.NNM"}],
    "rule": {"class_path": "lightning_sgd.TrimmedMean", "init_args": {"num_byzantine": 1}},
}


def parsed(cls, base, **settings):
    """An object that was built from a config, after the config was printed and read again."""
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--object", type=base)
    config = {"class_path": f"lightning_sgd.{cls.__name__}", "init_args": settings}
    first = parser.parse_object({"object": config})
    again = parser.parse_string(parser.dump(first))
    assert again == first
    return parser.instantiate_classes(again).object


def required(cls):
    parameters = inspect.signature(cls).parameters.values()
    return {p.name: REQUIRED[p.name] for p in parameters if p.default is p.empty}


@pytest.mark.parametrize("cls", CONCRETE, ids=lambda cls: cls.__name__)
def test_class_paths(cls):
    bases = (Aggregator, Attack, PreAggregator, aggregation.LabelFlip)
    base = next(base for base in bases if issubclass(cls, base))
    hint = str | Aggregator if base is Aggregator else base
    assert type(parsed(cls, hint, **required(cls))) is cls


@pytest.mark.parametrize("cls", CONCRETE, ids=lambda cls: cls.__name__)
def test_every_argument_is_documented(cls):
    documented = [param.arg_name for param in docstring_parser.parse(cls.__doc__).params]
    accepted = list(inspect.signature(cls).parameters)
    assert [name for name in documented if name in accepted] == accepted
    assert ">>>" in cls.__doc__


def test_nested_class_paths_are_the_string():
    rows = torch.randn(7, 20, generator=torch.Generator().manual_seed(0))
    built = parsed(PreAggregated, Aggregator, steps=REQUIRED["steps"], rule=REQUIRED["rule"])
    assert torch.equal(built(rows), get_aggregator("nnm+trmean", 1)(rows))


def test_settings_of_unusual_types():
    assert (
        parsed(aggregation.CenteredClipping, Aggregator, num_byzantine=1, radius="auto").radius
        == "auto"
    )
    assert parsed(aggregation.CenteredClipping, Aggregator, num_byzantine=1, radius=2).radius == 2
    assert parsed(aggregation.ALIE, Attack, z=1.5, sign=1).sign == 1
    assert parsed(aggregation.Mean, Aggregator, worker_weights=[1, 2.5]).worker_weights == (1, 2.5)
    attack = parsed(aggregation.OptimalFactor, Attack, rule=REQUIRED["rule"])
    assert isinstance(attack.rule, aggregation.TrimmedMean)


@pytest.mark.parametrize("name", RULES)
def test_every_name_builds_a_rule(name):
    rows = torch.randn(11, 8, generator=torch.Generator().manual_seed(0))
    for step in ("", *(f"{step}+" for step in STEPS if step != "clip"), "clip(radius=1.0)+"):
        if name == "monna" and step == "bucketing+":
            continue  # buckets have no trusted worker
        f = 2 if step != "bucketing+" else 0
        assert get_aggregator(f"{step}{name}", f)(rows).shape == (8,)
