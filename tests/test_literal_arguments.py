"""A misspelt word is refused by every public class and function that has a choice of words, also outside YAML."""

from __future__ import annotations

import inspect
from typing import Any, Literal, get_args, get_origin, get_type_hints

import numpy as np
import pytest
import torch

import lightning_sgd
from tests.support.settings import SETTINGS

REQUIRED: dict[str, dict[str, Any]] = {
    "CenteredClipping": {"num_byzantine": 1},
    "GeometricMedian": {"num_byzantine": 1},
    "SpectralFilter": {"num_byzantine": 1},
    "OptimalFactor": {"rule": lightning_sgd.CoordinateMedian(1)},
    "BiasedSGDProblem": {"m": 0.5, "L": 1.0, "G2": 0.1},
    "PrioritySampler": {"dataset": 4, "batch_size": 2},
    "spectral_stats": {"weight": torch.eye(4)},
    "dyadic_tail_index": {"samples": torch.randn(64)},
    "log_moment_tail_index": {"samples": torch.randn(64)},
}
"""Required arguments of what `SETTINGS` does not build."""

RESULTS = ("GaussianityResult", "StepBound", "TailIndexResult")
"""Records that the package returns; users do not make them."""


def words_of(annotation: Any) -> tuple[Any, ...]:
    """The values of the `Literal`s anywhere in a type."""
    if get_origin(annotation) is Literal:
        return get_args(annotation)
    return tuple(word for part in get_args(annotation) for word in words_of(part))


def choices() -> list[tuple[str, str]]:
    """Name of the class or function, and of its argument."""
    found = []
    for name in lightning_sgd.__all__:
        thing = getattr(lightning_sgd, name)
        if not callable(thing) or name in RESULTS:
            continue
        hints = get_type_hints(thing.__init__ if inspect.isclass(thing) else thing)
        found += [(name, key) for key in hints if key != "return" and words_of(hints[key])]
    return found


def arguments(name: str) -> dict[str, Any]:
    """What a class or function needs at least."""
    given = {**SETTINGS.get(name, {}), **REQUIRED.get(name, {})}
    thing = getattr(lightning_sgd, name)
    if inspect.isclass(thing) and issubclass(thing, torch.optim.Optimizer):
        given.setdefault("params", [torch.nn.Parameter(torch.ones(2))])
    if inspect.isclass(thing) and issubclass(thing, torch.optim.lr_scheduler.LRScheduler):
        given["optimizer"] = torch.optim.SGD([torch.nn.Parameter(torch.ones(2))], lr=0.1)
    return given


def test_the_walk_finds_the_choices() -> None:
    """Of every kind of plug-in."""
    found = set(choices())
    assert len(found) > 50
    assert {
        ("LocalSGDStrategy", "buffers"),
        ("PrioritySampling", "unseen"),
        ("SpectralFilter", "stop"),
        ("WeightRank", "measures"),
        ("spectral_stats", "measures"),
        ("NovoGrad", "variant"),
    } <= found


@pytest.mark.parametrize(("name", "argument"), choices())
def test_misspelt_words_are_refused(name: str, argument: str) -> None:
    """By an error that names the argument."""
    thing = getattr(lightning_sgd, name)
    hints = get_type_hints(thing.__init__ if inspect.isclass(thing) else thing)
    word = words_of(hints[argument])[0]
    wrong: Any = f"{word}_"
    if argument == "measures":
        wrong = [wrong]
    with pytest.raises(ValueError, match=f"`{argument}`"):
        thing(**{**arguments(name), argument: wrong})


def test_the_nearest_word_is_suggested() -> None:
    """Also for a common abbreviation."""
    with pytest.raises(ValueError, match=r"got 'bf16'\. Did you mean 'bfloat16'\?"):
        lightning_sgd.GossipPGAStrategy(wire_dtype="bf16")  # type: ignore[arg-type]  # on purpose


def test_half_a_step_is_no_period() -> None:
    """A float that is no whole number."""
    with pytest.raises(ValueError, match="`period` to be a whole number"):
        lightning_sgd.LocalSGDStrategy(period=2.5)  # type: ignore[arg-type]  # on purpose


@pytest.mark.parametrize(
    ("name", "argument", "value", "meant"),
    [
        ("LocalSGDStrategy", "period", "4", 4),
        ("LocalSGDStrategy", "period", {"0": "1", "10": "4"}, {0: 1, 10: 4}),
        ("GossipPGAStrategy", "period", np.int64(4), 4),
        ("OverlapLocalSGDStrategy", "pullback", "0.5", 0.5),
        ("ByzantineStrategy", "audit_every", np.int64(2), 2),
        ("LocalSGDStrategy", "tail_start", np.float32(0.5), 0.5),
    ],
)
def test_numbers_may_be_text_or_of_numpy(name: str, argument: str, value: Any, meant: Any) -> None:
    """And are kept as numbers of Python."""
    kept = getattr(getattr(lightning_sgd, name)(**{argument: value}), argument)
    assert kept == meant
    assert type(kept) is type(meant)


def test_the_number_of_faulty_workers_may_be_of_numpy() -> None:
    """As where it is computed from an array."""
    faulty: Any = np.int64(1)
    assert type(lightning_sgd.ByzantineStrategy(num_byzantine=faulty).rule.num_byzantine) is int


def test_settings_of_priority_sampling_may_be_text() -> None:
    """As a shell or an environment variable gives them; the state key is that of the numbers."""
    text: Any = {"beta": "1", "alpha": "0.5"}
    given = lightning_sgd.PrioritySampling(**text)
    assert given.state_key == lightning_sgd.PrioritySampling(beta=1, alpha=0.5).state_key
