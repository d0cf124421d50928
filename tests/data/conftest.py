"""Two runs that must agree, one uninterrupted and one resumed, recorded batch by batch on every rank."""

from __future__ import annotations

from datetime import timedelta

import pytest
import torch
from lightning.pytorch import Callback, LightningModule
from lightning.pytorch.strategies import DDPStrategy
from support.training import trainer
from torch.nn.functional import cross_entropy


class Recorded(LightningModule):
    """Momentum SGD on a linear layer; writes down what each rank saw and with which weights it ended."""

    def __init__(self, file, ask_early=False):
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.net = torch.nn.Linear(64, 10)
        self.file, self.ask_early, self.seen = str(file), ask_early, []

    def training_step(self, batch, batch_idx):
        images, labels = batch[0].flatten(1), batch[1]
        samples = list(zip(images.sum(dim=1).tolist(), labels.tolist(), strict=True))
        self.seen.append((self.current_epoch, batch_idx, samples))
        return cross_entropy(self.net(images), labels)

    def on_train_end(self):
        weights = torch.cat([p.detach().flatten() for p in self.parameters()])
        torch.save({"seen": self.seen, "weights": weights}, f"{self.file}.{self.global_rank}")

    def configure_optimizers(self):
        if self.ask_early:
            assert self.trainer.estimated_stepping_batches > 0
        return torch.optim.SGD(self.parameters(), lr=1e-3, momentum=0.9)


class Validated(Recorded):
    """Runs a validation too; Lightning warns of a step without data and of data without a step."""

    def validation_step(self, batch):
        pass


class SaveAfter(Callback):
    """Writes a checkpoint at the first call of a hook after ``step`` steps."""

    def __init__(self, step, file, hook):
        self.step, self.file, self.saved = step, file, False
        setattr(self, hook, self.save)

    def save(self, trainer, *_):
        if trainer.global_step == self.step and not self.saved:
            trainer.save_checkpoint(self.file)
            self.saved = True


@pytest.fixture
def recorded():
    """The module above, for tests that train it in their own way."""
    return Recorded


@pytest.fixture
def two_ranks():
    """Makes Trainer settings for two processes on the CPU that give up instead of hanging."""

    def settings():
        timeout = timedelta(seconds=30)
        return {"devices": 2, "strategy": DDPStrategy(start_method="fork", timeout=timeout)}

    return settings


@pytest.fixture
def assert_resumes(tmp_path, two_ranks):
    """Train without a break, then again from the checkpoint of step ``step``, and compare every rank's record.

    The resumed run sees exactly the remaining batches, in the same order, and ends with the same weights.
    """

    def fit(name, data, *, val, validate, ask_early, ranks, checkpoint=None, **settings):
        settings = {"max_epochs": 3, **settings, **(two_ranks() if ranks == 2 else {})}
        model = (Validated if validate or val is not None else Recorded)(tmp_path / name, ask_early)
        trainer(tmp_path, **settings).fit(
            model, data(), val, ckpt_path=checkpoint, weights_only=True
        )
        return [torch.load(f"{tmp_path / name}.{rank}") for rank in range(ranks)]

    def check(
        step,
        data,
        num_done,
        *,
        hook="on_train_batch_end",
        val=None,
        validate=False,
        ask_early=False,
        ranks=1,
        **settings,
    ):
        settings |= {"val": val, "validate": validate, "ask_early": ask_early, "ranks": ranks}
        file = tmp_path / "saved.ckpt"
        wholes = fit("whole", data, callbacks=[SaveAfter(step, file, hook)], **settings)
        rests = fit("rest", data, checkpoint=file, **settings)
        for whole, rest in zip(wholes, rests, strict=True):
            assert rest["seen"] == whole["seen"][num_done:]
            assert len(rest["seen"]) > 0
            assert torch.equal(rest["weights"], whole["weights"])

    return check
