"""The training step and the data loader of the user during a training, and batches of any structure."""

from __future__ import annotations

import copy
import math
import pickle
from functools import wraps

import pytest
import torch
from lightning.pytorch import Callback, LightningDataModule
from lightning.pytorch.callbacks import ModelCheckpoint
from support.priority_training import BATCHES, B, C, Clusters, Draws, Linear, fit, loader, quiet
from support.training import trainer
from torch.utils.data import DataLoader

from lightning_sgd import PrioritySampler


@pytest.mark.parametrize("batch_format", ["tuple", "dict", "dataclass"])
@pytest.mark.parametrize("place", ["fit", "module", "data module"])
def test_batches_and_loaders_of_every_kind(tmp_path, batch_format, place):
    class Own(Linear):
        def train_dataloader(self):
            return loader(batch_format)

    class Data(LightningDataModule):
        def train_dataloader(self):
            return loader(batch_format)

    callback, draws = quiet(), Draws()
    running = trainer(tmp_path, max_epochs=2, callbacks=[callback, draws])
    module = Own() if place == "module" else Linear()
    data = {"fit": loader(batch_format), "module": None, "data module": Data()}[place]
    given = {"datamodule": data} if place == "data module" else {"train_dataloaders": data}
    running.fit(module, **given)
    assert module.seen == [draw.indices.tolist() for draw in draws.draws]
    assert "training_step" not in vars(module)
    if place != "fit":
        assert "train_dataloader" not in vars(data or module)


@pytest.mark.parametrize(
    "settings",
    [
        {"num_workers": 2},
        {"num_workers": 2, "persistent_workers": True, "prefetch_factor": 3},
        {"drop_last": True},
        {"batch_size": 64},
    ],
)
def test_every_batch_meets_its_draw(tmp_path, settings):
    # The test is in `Draws`.
    limits = {} if "batch_size" in settings else {"limit_train_batches": 5}
    _, draws, running = fit(tmp_path, quiet(), data=loader(**settings), **limits)
    assert len(draws) == 3 * running.num_training_batches


def test_reloaded_data_keep_their_priorities(tmp_path):
    class Data(LightningDataModule):
        def train_dataloader(self):
            return loader()

    callback = quiet()
    _, draws, _ = fit(tmp_path, callback, data=Data(), reload_dataloaders_every_n_epochs=1)
    assert len(draws) == 3 * BATCHES
    assert callback.run.num_by_priority == 2 * BATCHES


def test_monitors_that_run_the_training_step_see_no_weights(tmp_path):
    from lightning_sgd import TailIndexMonitor

    monitor = TailIndexMonitor(8, every_n_steps=2, max_overhead=None, save_figure=False)
    callback = quiet(beta=1.0, uniform_mix=0.5)
    with_it, draws, _ = fit(tmp_path, callback, callbacks=[monitor])
    without, others, _ = fit(tmp_path, quiet(beta=1.0, uniform_mix=0.5))
    assert [d.indices.tolist() for d in draws] == [d.indices.tolist() for d in others]
    assert torch.equal(with_it.layer.weight, without.layer.weight)


def test_a_sampler_of_the_users_own_is_kept(tmp_path):
    data = Clusters()
    sampler = PrioritySampler(data, B, warmup_epochs=0, uniform_mix=0.2)
    callback = quiet()
    fit(tmp_path, callback, data=DataLoader(data, B, sampler=sampler))
    assert callback.run.sampler is sampler
    assert sampler.table.num_updates == 3 * BATCHES


def test_closures_that_run_several_times(tmp_path):
    class Twice(Linear):
        def configure_optimizers(self):
            return torch.optim.LBFGS(self.parameters(), lr=0.1, max_iter=3)

    module, draws, _ = fit(tmp_path, quiet(), Twice(), max_epochs=2)
    assert len(module.seen) > len(draws)


def test_a_decorated_training_step_gets_what_it_asks_for(tmp_path):
    def counted(step):
        @wraps(step)
        def call(*args, **kwargs):
            return step(*args, **kwargs)

        return call

    class Decorated(Linear):
        @counted
        def training_step(self, batch):
            return super().training_step(batch, 0)

    module, draws, _ = fit(tmp_path, quiet(), Decorated())
    assert module.seen == [draw.indices.tolist() for draw in draws]


class Copies(Callback):
    """Copies and pickles the module in mid-training, as EMA callbacks and spawned workers do."""

    def __init__(self):
        self.num = 0

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        for copied in (copy.deepcopy(pl_module), pickle.loads(pickle.dumps(pl_module))):
            for param in copied.parameters():
                param.data.zero_()
            # All logits are 0, so the loss is that of a uniform guess.
            assert copied.training_step(batch, 0).item() == pytest.approx(math.log(C))
            self.num += 1


def test_copies_of_the_module_train_by_their_own_weights(tmp_path):
    copies = Copies()
    fit(tmp_path, quiet(beta=1.0, uniform_mix=0.5), callbacks=[copies], max_epochs=2)
    assert copies.num == 4 * BATCHES


@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`:UserWarning")
def test_a_training_goes_on_without_the_callback(tmp_path):
    keep = ModelCheckpoint(tmp_path, "middle", every_n_train_steps=BATCHES)
    fit(tmp_path, quiet(), callbacks=[keep], enable_checkpointing=True, max_epochs=1)
    resumed = trainer(tmp_path, max_epochs=2)
    resumed.fit(Linear(), loader(), ckpt_path=tmp_path / "middle.ckpt")
    assert resumed.global_step == 2 * BATCHES
