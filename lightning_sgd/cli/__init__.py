"""The console command ``lightning-sgd``: LightningCLI's four commands and our own.

Our own are ``list``, ``explain``, ``report`` and ``doctor``.

Lightning's parsers are built only by the four commands that need them, so that the others answer quickly.
"""

from lightning_sgd.cli.entry import main

__all__ = ["main"]
