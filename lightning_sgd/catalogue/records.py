"""The schema of the catalogue: the fields of a method's record."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from importlib import import_module
from types import MappingProxyType
from typing import Literal, TypeAlias

Kind: TypeAlias = Literal["optimizer", "lr_scheduler", "callback", "strategy", "model", "data"]

FOLDERS: Mapping[Kind, str] = MappingProxyType(
    {
        "optimizer": "lightning_sgd/optimizers",
        "lr_scheduler": "lightning_sgd/lr_schedulers",
        "callback": "callbacks",
        "strategy": "strategies",
        "model": "lightning_sgd/models",
        "data": "lightning_sgd/data",
    }
)
"""The folder of each kind's adapters, relative to the root of the repository."""

Topic: TypeAlias = Literal["steps", "network", "workers", "insight", "data"]

TOPICS: Mapping[Topic, str] = MappingProxyType(
    {
        "steps": "Steps are unstable, or their size is unknown",
        "network": "The network is slow",
        "workers": "Some workers are wrong",
        "insight": "What is going on in my training?",
        "data": "The data holds more than training needs",
    }
)
"""The heading of each topic on the page that leads from a symptom to a method."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Paper:
    """The publication of a method."""

    title: str
    authors: str
    venue: str
    year: int
    url: str

    def __str__(self) -> str:
        return f"{self.authors}. {self.title}. {self.venue}, {self.year}. {self.url}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Plugin:
    """One class that a user switches on in YAML.

    Attributes:
        name: Public name, ``lightning_sgd.<name>``.
        kind: What sort of object it is; decides the folder and the conformance suite.
    """

    name: str
    kind: Kind

    @property
    def class_path(self) -> str:
        """The spelling that works in every LightningCLI config."""
        return f"lightning_sgd.{self.name}"

    @property
    def metric_keys(self) -> tuple[str, ...]:
        """The keys that the class declares to log; ``*`` stands for a layer, a rank or the like."""
        cls = getattr(import_module("lightning_sgd"), self.name)
        keys: tuple[str, ...] = getattr(cls, "metric_keys", ())
        return keys


@dataclass(frozen=True, slots=True, kw_only=True)
class Method:
    """One published method and the fixed set of places that belong to it.

    Attributes:
        key: File stem shared by the test, the example and the card.
        core: Module below ``lightning_sgd.functional`` that holds the mathematics, such as ``optim.mass``.
        topic: The symptoms among which the method is listed.
        title: Name of the method as the paper spells it.
        summary: One sentence: what it does.
        use_when: One sentence: the symptom that leads a user to it.
        paper: The reference.
        plugins: The classes that YAML can name, main one first.
        helpers: Further public names, functions and result types.
    """

    key: str
    core: str
    topic: Topic
    title: str
    summary: str
    use_when: str
    paper: Paper
    plugins: tuple[Plugin, ...]
    helpers: tuple[str, ...] = ()

    @property
    def symbols(self) -> tuple[str, ...]:
        """The public names of the method."""
        return (*(plugin.name for plugin in self.plugins), *self.helpers)

    @property
    def example(self) -> str:
        """The YAML that trains with the method, relative to the root of the repository."""
        return f"examples/{self.key}.yaml"

    @property
    def card(self) -> str:
        """The documentation of the method, relative to the root of the repository."""
        return f"docs/methods/{self.key}.md"

    @property
    def tests(self) -> tuple[str, ...]:
        """The files that test the method, relative to the root of the repository."""
        folders = [FOLDERS[plugin.kind].removeprefix("lightning_sgd/") for plugin in self.plugins]
        return tuple(dict.fromkeys(f"tests/{folder}/test_{self.key}.py" for folder in folders))


@dataclass(frozen=True, slots=True, kw_only=True)
class Group:
    """Public names that belong together, and to no single method.

    Attributes:
        title: Heading in the API reference.
        symbols: The names, the most important ones first.
    """

    title: str
    symbols: tuple[str, ...]
