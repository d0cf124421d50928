"""LightningCLI with every class of this package at hand, and with mistakes told in one line."""

from __future__ import annotations

import sys
from typing import Any, NoReturn

import lightning.pytorch.demos.boring_classes  # noqa: F401 - lets users name Lightning's demo models
from lightning.pytorch import LightningModule
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.cli import (
    ArgsType,
    LightningArgumentParser,
    LightningCLI,
    LRSchedulerTypeUnion,
    ReduceLROnPlateau,
)
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch.optim import Optimizer

from lightning_sgd.cli.checks import about_strategy, is_missing_checkpoint, is_unknown_strategy
from lightning_sgd.cli.diagnosis import find_misspelling
from lightning_sgd.cli.errors import UsageError
from lightning_sgd.cli.messages import one_line, told_by_constructor
from lightning_sgd.cli.settings import missing_file, read_settings


class Parser(LightningArgumentParser):
    """Raises :class:`UsageError` where its base class prints the usage and ends the program."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Report a mistake in the settings.

        Args:
            message: What is wrong, in several lines.
            ex: The exception behind it.

        Raises:
            UsageError: Always, but for the parsers of nested classes, whose callers continue.
        """
        if not self.exit_on_error:
            super().error(message, ex)
        raise UsageError(message) from ex


class CommandLine(LightningCLI):
    """The commands ``fit``, ``validate``, ``test`` and ``predict``.

    Differs from LightningCLI in this:

    * every class of this package, of torch and of Lightning is known by its bare name;
    * a learning-rate scheduler with an attribute ``interval`` is stepped at that interval, not always per epoch;
    * ``fit --test_after_fit true`` ends with a test of the best weights;
    * ``config.yaml`` in the log folder is overwritten, because the CSV logger starts the metrics in that folder
      anew as well: settings and results have to be those of the same run;
    * options are never abbreviated, and a mistake is told in one line.

    Args:
        args: The words of the command line; those of the shell by default.

    Raises:
        UsageError: If the settings do not parse or a constructor refuses them.
    """

    def __init__(self, args: list[str] | None = None) -> None:
        super().__init__(
            parser_class=Parser,
            parser_kwargs={"prog": "lightning-sgd", "allow_abbrev": False},
            save_config_kwargs={"overwrite": True},
            args=args,
        )

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add our own options; every command takes them, so that each can read a config saved by ``fit``."""
        parser.add_argument(
            "--test_after_fit",
            type=bool,
            default=False,
            help="Whether `fit` ends with a test of the best weights, or of the last ones if none were saved.",
        )

    def parse_arguments(self, parser: LightningArgumentParser, args: ArgsType) -> None:
        """Parse the command line, and look for a misspelt name if that fails."""
        words = args if isinstance(args, list) else sys.argv[1:]
        try:
            super().parse_arguments(parser, args)
        except UsageError as error:
            raise UsageError(self._explain(str(error), words)) from error
        self._check_names(words)

    def _explain(self, message: str, words: list[str]) -> str:
        command = next((word for word in words if word in self.subcommands()), "fit")
        settings = read_settings(words, command)
        try:
            misspelling = find_misspelling(self._parser(command), settings, command)
        except (AttributeError, TypeError, ValueError):
            misspelling = None  # a search that fails must not hide the message that it explains
        return misspelling or one_line(message, settings, command)

    def _check_names(self, words: list[str]) -> None:
        """Check what the parser takes for any text and Lightning would refuse with a traceback."""
        command = self.config.subcommand
        chosen = self.config[command]
        if is_missing_checkpoint(chosen.get("ckpt_path")):
            raise UsageError(missing_file("checkpoint", chosen.ckpt_path))
        if is_unknown_strategy(chosen.trainer.strategy):
            settings = {setting.path: setting for setting in read_settings(words, command)}
            given = settings.get(("trainer", "strategy"))
            raise UsageError(about_strategy(chosen.trainer.strategy, given))

    def instantiate_classes(self) -> None:
        """Build model, data, optimizer and trainer."""
        try:
            super().instantiate_classes()
        except Exception as error:
            if message := told_by_constructor(error):
                raise UsageError(message) from error
            raise

    @staticmethod
    def configure_optimizers(
        lightning_module: LightningModule,  # noqa: ARG004 - the signature is LightningCLI's
        optimizer: Optimizer,
        lr_scheduler: LRSchedulerTypeUnion | None = None,
    ) -> Any:
        """Hand optimizer and scheduler to Lightning, with the interval that the scheduler asks for."""
        if lr_scheduler is None:
            return optimizer
        settings = {
            "scheduler": lr_scheduler,
            "interval": getattr(lr_scheduler, "interval", "epoch"),
        }
        if isinstance(lr_scheduler, ReduceLROnPlateau):
            settings["monitor"] = lr_scheduler.monitor
        return {"optimizer": optimizer, "lr_scheduler": settings}

    def before_fit(self) -> None:
        """Refuse, before hours of training, a test that cannot be made after it."""
        if not self._get(self.config, "test_after_fit"):
            return
        if not is_overridden("test_step", self.model):
            raise UsageError(_cannot_test(self.model, "test_step"))
        source = self.datamodule or self.model
        if not is_overridden("test_dataloader", source):
            raise UsageError(_cannot_test(source, "test_dataloader"))

    def after_fit(self) -> None:
        """Test if asked to; the same trainer writes into the same log."""
        if self._get(self.config, "test_after_fit"):
            self.trainer.test(
                self.model, datamodule=self.datamodule, ckpt_path=self._best_checkpoint()
            )

    def _best_checkpoint(self) -> str | None:
        """Find the file with the best weights; one chosen by a metric goes before one that is merely the last."""
        saved = [
            callback
            for callback in self.trainer.checkpoint_callbacks
            if isinstance(callback, ModelCheckpoint) and callback.best_model_path
        ]
        saved.sort(key=lambda callback: callback.monitor is None)
        return saved[0].best_model_path if saved else None


def _cannot_test(source: object, method: str) -> str:
    return f"'--test_after_fit' needs a {method}, and {type(source).__name__} has none: add it or leave the option out"
