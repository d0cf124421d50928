"""The digits: the right data, split and dealt out once and for all, whatever the number of ranks."""

from __future__ import annotations

import json
import sys

import numpy as np
import pytest
import torch
from lightning.pytorch import LightningDataModule, LightningModule
from lightning.pytorch.cli import LightningCLI
from sklearn.datasets import load_digits
from support.training import trainer

from lightning_sgd import NoEffectWarning
from lightning_sgd.data.digits import DigitsDataModule


def ready(**settings):
    data = DigitsDataModule(**settings)
    data.setup("fit")
    return data


def keys(dataset):
    """Each image as bytes; the 1797 images are all different."""
    return [image.numpy().tobytes() for image in dataset.images]


def sets(data):
    return data.train_set, data.val_set, data.test_set


def test_the_three_sets_hold_every_digit_once():
    # Leakage between training and test would make every accuracy a lie.
    digits = load_digits()
    expected = {
        (image / 16).astype(np.float32).tobytes(): label
        for image, label in zip(digits.images, digits.target, strict=True)
    }
    assert len(expected) == 1797
    found = [
        (key, label.item())
        for dataset in sets(ready())
        for key, label in zip(keys(dataset), dataset.labels, strict=True)
    ]
    assert len(found) == 1797
    assert dict(found) == expected
    assert [len(dataset) for dataset in sets(ready(num_val=97, num_test=200))] == [1500, 97, 200]


def test_the_split_depends_on_the_seed_alone():
    torch.manual_seed(1)
    first = ready()
    torch.manual_seed(2)
    again = ready(batch_size=7, label_noise=0.5, partition_skew=1.0, batch_format="dict")
    assert [keys(dataset) for dataset in sets(first)] == [keys(dataset) for dataset in sets(again)]
    assert keys(ready(seed=1).train_set) != keys(first.train_set)


@pytest.mark.parametrize("num_workers", [0, 1])
def test_batches_have_the_promised_form(num_workers):
    images, labels = next(iter(ready(num_workers=num_workers).train_dataloader()))
    assert (images.shape, images.dtype) == ((64, 1, 8, 8), torch.float32)
    assert (labels.shape, labels.dtype) == ((64,), torch.int64)
    assert images.min() == 0.0
    assert images.max() == 1.0
    batch = next(iter(ready(batch_format="dict").train_dataloader()))
    assert torch.equal(batch["image"], images)
    assert torch.equal(batch["label"], labels)
    assert len(batch) == 2


def test_a_batch_holds_the_samples_of_its_indices():
    # The data set indexes whole batches at once; sample by sample must give the same.
    dataset = ready().train_set
    images, labels = dataset[[5, 3, 5]]
    for row, index in enumerate([5, 3, 5]):
        image, label = dataset[index]
        assert torch.equal(images[row], image)
        assert labels[row] == label
        assert image.shape == (1, 8, 8)


def test_an_epoch_sees_every_sample_once_in_an_order_of_its_own():
    data = ready(batch_size=32)
    loader = data.train_dataloader()

    def order():
        return [image.numpy().tobytes() for images, _ in loader for image in images]

    first = order()
    assert sorted(first) == sorted(keys(data.train_set))
    assert first != keys(data.train_set)
    assert order() == first
    loader.sampler.set_epoch(1)
    assert sorted(order()) == sorted(first)
    assert order() != first
    for evaluation, dataset in (
        (data.val_dataloader(), data.val_set),
        (data.test_dataloader(), data.test_set),
        (data.predict_dataloader(), data.test_set),
    ):
        assert torch.equal(torch.cat([images for images, _ in evaluation]), dataset.images)


def test_loading_leaves_the_global_random_state_alone():
    # Otherwise a change of the data settings would change the dropout of the model.
    before = torch.get_rng_state()
    data = ready(label_noise=0.2)
    for loader in (data.train_dataloader(), data.val_dataloader(), data.test_dataloader()):
        list(loader)
    assert torch.equal(torch.get_rng_state(), before)


def test_label_noise_makes_that_fraction_wrong_in_training_only():
    clean, noisy = ready(), ready(label_noise=0.3)
    wrong = clean.train_set.labels != noisy.train_set.labels
    assert wrong.sum() == 300
    assert torch.equal(clean.val_set.labels, noisy.val_set.labels)
    assert torch.equal(clean.test_set.labels, noisy.test_set.labels)
    # The other nine labels are equally likely: 1000 wrong labels, 111 expected for each shift, deviation 10.
    shifts = (ready(label_noise=1.0).train_set.labels - clean.train_set.labels) % 10
    counts = shifts.bincount(minlength=10)
    assert counts[0] == 0
    assert (counts[1:] - 111).abs().max() < 50


class Sees(LightningModule):
    """Writes down the labels and images that its rank trains and validates on."""

    def __init__(self, file):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.file, self.train_seen, self.val_seen = str(file), [], []

    def training_step(self, batch):
        self.train_seen.append(batch)
        return self.weight * batch[0].mean()

    def validation_step(self, batch):
        self.val_seen.append(batch)

    def on_train_end(self):
        torch.save((self.train_seen, self.val_seen), f"{self.file}.{self.global_rank}")

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


@pytest.fixture
def seen_by_two(tmp_path, two_ranks):
    """What two ranks see in the given number of epochs, and in how many batches."""

    def run(epochs=1, **settings):
        fit = trainer(tmp_path, max_epochs=epochs, num_sanity_val_steps=0, **two_ranks())
        fit.fit(Sees(tmp_path / "seen"), datamodule=DigitsDataModule(**settings))
        return [torch.load(f"{tmp_path / 'seen'}.{rank}") for rank in range(2)]

    return run


def labels(batches):
    return torch.cat([batch[1] for batch in batches])


def bytes_of(batches):
    return [image.numpy().tobytes() for images, _ in batches for image in images]


def test_two_ranks_share_an_epoch(seen_by_two):
    data = ready(num_val=298, num_test=499)
    (train0, val0), (train1, val1) = seen_by_two(num_val=298, num_test=499)
    assert len(train0) == len(train1) == 8
    assert sorted(bytes_of(train0) + bytes_of(train1)) == sorted(keys(data.train_set))
    assert sorted(bytes_of(val0) + bytes_of(val1)) == sorted(keys(data.val_set))
    assert len(bytes_of(val0)) == 149


@pytest.mark.parametrize(("skew", "num_labels"), [(0.0, (10, 10)), (1.0, (5, 6))])
def test_a_partition_stays_with_its_rank(seen_by_two, skew, num_labels):
    (train0, _), (train1, _) = seen_by_two(epochs=2, partition_skew=skew)
    assert len(train0) == len(train1) == 2 * 8
    for train in (train0, train1):
        first, second = bytes_of(train[:8]), bytes_of(train[8:])
        assert sorted(first) == sorted(second)
        assert first != second
        assert num_labels[0] <= len(labels(train).unique()) <= num_labels[1]
    assert not set(bytes_of(train0)) & set(bytes_of(train1))


def test_a_partition_for_one_rank_is_told_to_have_no_effect():
    with pytest.warns(NoEffectWarning, match="`partition_skew` has no effect on one rank"):
        assert len(ready(partition_skew=0.5).train_dataloader()) == 16


@pytest.mark.parametrize("ask_early", [False, True])
@pytest.mark.parametrize("settings", [{}, {"ranks": 2}, {"accumulate_grad_batches": 2}])
def test_a_resumed_run_continues_with_the_next_batch(assert_resumes, ask_early, settings):
    # Asking for `estimated_stepping_batches`, as one-cycle schedules do, makes Lightning forget the loader's position.
    num_done = 6 * settings.get("accumulate_grad_batches", 1)
    assert_resumes(
        6,
        lambda: DigitsDataModule(batch_size=32),
        num_done=num_done,
        ask_early=ask_early,
        validate=True,
        val_check_interval=0.5,
        **settings,
    )


def test_a_partitioned_run_resumes(assert_resumes):
    assert_resumes(
        11, lambda: DigitsDataModule(partition_skew=0.8), num_done=11, validate=True, ranks=2
    )


def test_a_position_is_for_the_resumed_run_alone(tmp_path, recorded):
    # A data module that has read a checkpoint for a test is used for a new training.
    class Tested(recorded):
        def validation_step(self, batch):
            pass

        def test_step(self, batch):
            pass

    data = DigitsDataModule()
    fit = trainer(tmp_path, max_steps=5, max_epochs=-1)
    fit.fit(Tested(tmp_path / "short"), datamodule=data)
    fit.save_checkpoint(tmp_path / "short.ckpt")
    model = Tested(tmp_path / "new")
    trainer(tmp_path).test(
        model, datamodule=data, ckpt_path=tmp_path / "short.ckpt", weights_only=True, verbose=False
    )
    trainer(tmp_path, max_epochs=1).fit(model, datamodule=data)
    assert len(model.seen) == 16


def test_looking_at_the_data_in_a_resumed_epoch_shows_all_of_it(tmp_path, recorded):
    # A callback asks the data module for a loader of its own.
    lengths = []

    class Looks(recorded):
        def validation_step(self, batch):
            pass

        def on_train_batch_end(self, *_):
            if self.trainer.global_step == 5:
                self.trainer.save_checkpoint(tmp_path / "saved.ckpt")
            if self.trainer.global_step == 9:
                lengths.append(len(list(self.trainer.datamodule.train_dataloader())))

    data = DigitsDataModule()
    trainer(tmp_path, max_epochs=1).fit(Looks(tmp_path / "whole"), datamodule=data)
    rest, run = Looks(tmp_path / "rest"), trainer(tmp_path, max_epochs=1)
    run.fit(rest, datamodule=data, ckpt_path=tmp_path / "saved.ckpt", weights_only=True)
    assert len(rest.seen) == 11
    assert lengths == [16, 16]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"batch_size": 0}, "Expected `batch_size` to be at least 1, got 0"),
        ({"num_val": 0}, "Expected `num_val` to be at least 1, got 0"),
        ({"num_test": -1}, "Expected `num_test` to be at least 1, got -1"),
        (
            {"num_val": 1000, "num_test": 797},
            r"Expected `num_val \+ num_test` to be less than the 1797 samples that there are, got 1797",
        ),
        ({"num_workers": -1}, "Expected `num_workers` to be at least 0, got -1"),
        ({"label_noise": 1.1}, r"Expected `label_noise` to be in \[0, 1\], got 1.1"),
        ({"partition_skew": -0.1}, r"Expected `partition_skew` to be in \[0, 1\], got -0.1"),
        ({"batch_format": "list"}, "Expected `batch_format` to be one of tuple, dict, got 'list'"),
    ],
)
def test_bad_arguments_are_named(settings, message):
    with pytest.raises(ValueError, match=message):
        DigitsDataModule(**settings)


def test_a_missing_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(
        ImportError, match=r"needs scikit-learn: pip install 'lightning-sgd\[examples"
    ):
        ready()


@pytest.mark.slow
def test_a_config_round_trips(tmp_path, capsys, monkeypatch):
    # `--print_config` is how users start a config of their own.
    # LightningCLI itself uses a method that jsonargparse has deprecated.
    monkeypatch.setenv("JSONARGPARSE_DEPRECATION_WARNINGS", "off")

    def cli(*args):
        monkeypatch.setattr(sys, "argv", ["fit", *args])
        settings = {"subclass_mode_model": True, "run": False, "seed_everything_default": 0}
        return LightningCLI(LightningModule, DigitsDataModule, **settings)

    model = "--model=lightning.pytorch.demos.boring_classes.BoringModel"
    with pytest.raises(SystemExit):
        cli(model, "--data.batch_size=8", "--data.partition_skew=0.5", "--print_config")
    file = tmp_path / "config.yaml"
    file.write_text(capsys.readouterr().out)
    data = cli(f"--config={file}").datamodule
    assert isinstance(data, LightningDataModule)
    assert (data.batch_size, data.partition_skew, data.batch_format) == (8, 0.5, "tuple")
    assert json.loads(json.dumps(dict(data.hparams)))["batch_size"] == 8
