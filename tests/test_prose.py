"""The first line of a docstring says what a function does, without the code beside it."""

from __future__ import annotations

import ast

import pytest

ROOMS = ("lightning_sgd", "callbacks", "strategies")
NO_VERB = frozenset(
    "What Whether Where How Who Go By With Of As For To These Those".split()  # noqa: SIM905  # one line
)
UNMENDED = (
    "lightning_sgd/functional/sampling/",
    "lightning_sgd/sampling/",
    "callbacks/priority_sampling/run.py",
)


def offenders(source):
    """Find the functions, apart from properties, whose docstring begins with one of these words."""
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        if any("property" in ast.unparse(decorator) for decorator in node.decorator_list):
            continue
        words = (ast.get_docstring(node) or "").split()
        if words and words[0].rstrip(",.:;") in NO_VERB:
            yield node.name, " ".join(words[:8])


@pytest.mark.parametrize("room", ROOMS)
def test_docstrings_of_functions_begin_with_a_verb(root, room):
    # Folders of links would be read twice: pathlib does not follow them.
    found = {
        f"{path.relative_to(root)}: {name}": line
        for path in sorted((root / room).rglob("*.py"))
        if not str(path.relative_to(root)).startswith(UNMENDED)
        for name, line in offenders(path.read_text())
    }
    assert not found


def test_the_check_finds_what_it_is_for():
    source = """
def rank(): "Of this process."
def is_due(): "Whether a look is due."
def average(): "Average the weights."
class Model:
    @property
    def is_ready(self): "Whether it is ready."
    def close(self): "Go on."
"""
    assert [name for name, _ in offenders(source)] == ["rank", "is_due", "close"]
