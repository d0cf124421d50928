"""``lightning-sgd list`` and ``lightning-sgd explain``."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.resources import files

from rich.console import Console
from rich.markdown import Markdown
from rich.table import Table

from lightning_sgd.catalogue import CATALOGUE, Kind, Method, find
from lightning_sgd.cli.cards import to_terminal_markdown
from lightning_sgd.cli.errors import UsageError, did_you_mean


def print_methods(kind: Kind | None = None) -> None:
    """Print the table of methods.

    Args:
        kind: Show only methods with a class of this kind.
    """
    chosen = [
        method
        for method in CATALOGUE
        if kind is None or kind in {plugin.kind for plugin in method.plugins}
    ]
    console = Console()
    if chosen:
        console.print(methods_table(chosen))
        console.print("[dim]`lightning-sgd explain NAME` shows the card of one method.[/dim]")
    else:
        console.print(f"No method of this version is of the kind {kind}.")


def methods_table(methods: Sequence[Method]) -> Table:
    """Make a table with one row per method.

    Args:
        methods: The methods to show.
    """
    table = Table(title="Methods", header_style="bold")
    table.add_column("Method", style="bold")
    table.add_column("Kind")
    table.add_column("Classes", style="cyan")
    table.add_column("What it does", ratio=1)
    table.add_column("Paper", justify="right")
    for method in methods:
        table.add_row(
            method.title,
            "\n".join(dict.fromkeys(plugin.kind for plugin in method.plugins)),
            "\n".join(plugin.name for plugin in method.plugins),
            method.summary,
            str(method.paper.year),
        )
    return table


def print_card(name: str) -> None:
    """Print the card of one method.

    Args:
        name: Key or title of the method, or one of its public names, in any case.

    Raises:
        UsageError: If no method has that name.
    """
    method = find(name)
    if method is None:
        names = [text for one in CATALOGUE for text in (one.key, one.title, *one.symbols)]
        hint = did_you_mean(name, names, "see `lightning-sgd list`")
        raise UsageError(f"unknown method '{name}': {hint}")
    Console().print(Markdown(to_terminal_markdown(read_card(method))))


def read_card(method: Method) -> str:
    """Read the card of a method, as it is installed with the package.

    Args:
        method: The method.
    """
    card = files("lightning_sgd") / "cards" / f"{method.key}.md"
    return card.read_text(encoding="utf-8")
