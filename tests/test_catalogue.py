"""Walks the catalogue: whatever every method must have, whatever it is."""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import re

import docstring_parser
import pytest
from support.settings import SETTINGS

import lightning_sgd
from lightning_sgd.catalogue import CATALOGUE, FOLDERS, GROUPS, find, plugins

METHODS = pytest.mark.parametrize("method", CATALOGUE, ids=lambda method: method.key)
PLUGINS = pytest.mark.parametrize("plugin", list(plugins()), ids=lambda plugin: plugin.name)


@METHODS
def test_every_place_is_there(method, root):
    importlib.import_module(f"lightning_sgd.functional.{method.core}")
    for path in (method.example, method.card, *method.tests):
        assert (root / path).is_file(), path
    for plugin in method.plugins:
        source = inspect.getsourcefile(getattr(lightning_sgd, plugin.name))
        module = getattr(lightning_sgd, plugin.name).__module__
        folder = FOLDERS[plugin.kind].removeprefix("lightning_sgd/")
        assert module.startswith(f"lightning_sgd.{folder}."), (plugin.name, source)


def test_exports_are_the_names_in_the_records():
    symbols = [name for record in (*CATALOGUE, *GROUPS) for name in record.symbols]
    assert len(symbols) == len(set(symbols))
    assert set(lightning_sgd.__all__) == set(symbols)
    assert all(hasattr(lightning_sgd, name) for name in lightning_sgd.__all__)


def test_no_class_takes_a_name_of_torch_or_lightning():
    # Two classes of one name make both unreachable by their bare name.
    import lightning.pytorch.callbacks
    import lightning.pytorch.strategies
    import torch

    taken = {
        name
        for module in (
            torch.optim,
            torch.optim.lr_scheduler,
            lightning.pytorch.callbacks,
            lightning.pytorch.strategies,
        )
        for name in vars(module)
    }
    assert not taken & set(lightning_sgd.__all__)


def test_records_cannot_be_changed():
    with pytest.raises(dataclasses.FrozenInstanceError):
        CATALOGUE[0].title = "another"


@pytest.mark.parametrize("name", ["mass", "MaSS", "MASS", "critical_batch_sizes"])
def test_methods_are_found_by_any_of_their_names(name):
    assert find(name) is CATALOGUE[0]


def test_an_unknown_name_is_not_found():
    assert find("no such method") is None


@METHODS
def test_summaries_are_one_sentence(method):
    for text in (method.summary, method.use_when):
        assert re.fullmatch(r"[A-Z][^.]*\.", text), text
        assert len(text) < 110


@METHODS
def test_the_card_has_its_sections_and_names_only_real_symbols(method, root):
    card = (root / method.card).read_text()
    headings = re.findall(r"^## (.+)$", card, flags=re.MULTILINE)
    for heading in ("When to use it", "When not to", "Differs from the paper", "Reproduction"):
        assert heading in headings, heading
    assert card.index("```yaml") < card.index("\n## "), "the YAML lines come first"
    for name in re.findall(r"lightning_sgd\.(\w+)", card):
        assert name in lightning_sgd.__all__, name
    for path in re.findall(r"\]\((?!https?:|#)([^)#]+)", card):
        assert (root / method.card).parent.joinpath(path).exists(), path


@PLUGINS
def test_every_constructor_argument_is_documented(plugin):
    # Undocumented arguments have an empty help line on the command line.
    cls = getattr(lightning_sgd, plugin.name)
    accepted = list(inspect.signature(cls).parameters)
    documented = [param.arg_name for param in docstring_parser.parse(cls.__doc__).params]
    assert [name for name in documented if name in accepted] == accepted
    assert all(param.description for param in docstring_parser.parse(cls.__doc__).params)


@pytest.mark.parametrize("name", lightning_sgd.__all__)
def test_every_public_name_has_a_docstring(name):
    assert inspect.getdoc(getattr(lightning_sgd, name))


@METHODS
def test_every_class_of_a_method_shows_an_example(method):
    for plugin in method.plugins:
        assert ">>>" in getattr(lightning_sgd, plugin.name).__doc__, plugin.name


def test_the_suites_have_settings_for_every_plugin():
    assert set(SETTINGS) == {plugin.name for plugin in plugins()}
