"""Every optimizer of the catalogue continues bit by bit after an interruption in the middle of an epoch."""

from __future__ import annotations

from datetime import timedelta

import pytest
import torch
from lightning.pytorch import seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import DDPStrategy
from support.training import trainer

from lightning_sgd import DigitsClassifier, DigitsDataModule

STEPS, INTERRUPTED_AT = 14, 5


def classifier(make):
    """A network with buffers, trained by what ``make`` builds."""

    class Classifier(DigitsClassifier):
        def configure_optimizers(self):
            return make(self.parameters())

    return Classifier(batch_norm=True)


def fit(make, world_size, folder, resume_from=None):
    """Train for a fixed number of steps over several epochs; return the folder of the checkpoints."""
    seed_everything(0 if resume_from is None else 1, verbose=False)
    # DDP rearranges its buckets after the first step of every start, which changes the order in which three and more
    # ranks are added up; it leaves them alone when it has to look for unused parameters.
    ddp = DDPStrategy(
        start_method="fork", timeout=timedelta(seconds=30), find_unused_parameters=True
    )
    checkpoints = ModelCheckpoint(folder, "{step}", every_n_train_steps=1, save_top_k=-1)
    data = DigitsDataModule(batch_size=64 // world_size, num_val=897, num_test=500)
    trainer(
        folder,
        devices=world_size,
        strategy="auto" if world_size == 1 else ddp,
        max_epochs=-1,
        max_steps=STEPS,
        enable_checkpointing=True,
        callbacks=[checkpoints],
        accumulate_grad_batches=2 if world_size == 1 else 1,
        val_check_interval=3,
    ).fit(classifier(make), datamodule=data, ckpt_path=resume_from)
    return folder


def content(folder, step):
    return torch.load(folder / f"step={step}.ckpt", weights_only=True)


def assert_equal(a, b, path="checkpoint"):
    """Equal values of equal types, to the last bit."""
    assert type(a) is type(b), path
    if isinstance(a, torch.Tensor):
        assert a.dtype == b.dtype, path
        assert torch.equal(a, b), path
    elif isinstance(a, dict):
        assert a.keys() == b.keys(), path
        for key in a:
            assert_equal(a[key], b[key], f"{path}/{key}")
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b), path
        for index, pair in enumerate(zip(a, b, strict=True)):
            assert_equal(*pair, f"{path}/{index}")
    else:
        assert a == b, path


# The resumed run keeps its files apart on purpose.
@pytest.mark.filterwarnings("ignore:The dirpath has changed:UserWarning")
@pytest.mark.parametrize("world_size", [1, 2, 4])
@pytest.mark.compatible("exact resume in mid-epoch (1, 2 and 4 ranks)")
def test_resume_in_the_middle_of_an_epoch_is_bit_exact(make, plugin, world_size, tmp_path):
    through = fit(make, world_size, tmp_path / "through")
    middle = through / f"step={INTERRUPTED_AT}.ckpt"
    resumed = fit(make, world_size, tmp_path / "resumed", resume_from=middle)
    for key in ("state_dict", "optimizer_states"):
        assert_equal(content(resumed, STEPS)[key], content(through, STEPS)[key], key)
    assert content(resumed, STEPS)["global_step"] == STEPS
    with pytest.raises(
        AssertionError
    ):  # the comparison can fail: training went on after the interruption
        assert_equal(
            content(through, INTERRUPTED_AT)["state_dict"], content(through, STEPS)["state_dict"]
        )
