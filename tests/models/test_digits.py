"""The classifier: learns, logs exact means over all samples of all ranks, and works with what Lightning offers."""

from __future__ import annotations

import sys
from copy import deepcopy
from datetime import timedelta

import pytest
import torch
from lightning.pytorch import seed_everything
from lightning.pytorch.cli import LightningCLI
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.strategies import DDPStrategy
from sklearn.metrics import accuracy_score, log_loss
from support.training import trainer
from torch.utils.data import DataLoader

from lightning_sgd.data.digits import DigitsDataModule
from lightning_sgd.models.digits import DigitsClassifier

ARCHITECTURES = [
    {},
    {"batch_norm": True},
    {"architecture": "cnn"},
    {"architecture": "cnn", "batch_norm": True},
    {"hidden_sizes": []},
    {"hidden_sizes": [12, 8, 6]},
    {"architecture": "cnn", "hidden_sizes": [4, 4, 4, 4, 4]},
]


class Trained(DigitsClassifier):
    """With the optimizer that a user without the CLI would write."""

    lr = 0.05

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=self.lr, momentum=0.9, nesterov=True)


def model_of(**settings):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Trained(**settings)


@pytest.mark.slow
@pytest.mark.parametrize(("architecture", "at_least"), [("mlp", 0.95), ("cnn", 0.97)])
def test_learns_the_digits(tmp_path, architecture, at_least):
    # The figures that the documentation promises.
    model, data = model_of(architecture=architecture), DigitsDataModule(batch_size=16)
    fit = trainer(tmp_path, max_epochs=10)
    fit.fit(model, datamodule=data)
    assert {"train/loss", "val/loss", "val/accuracy"} <= set(fit.callback_metrics)
    (result,) = fit.test(model, datamodule=data, verbose=False)
    assert result["test/accuracy"] > at_least


@pytest.mark.parametrize("settings", ARCHITECTURES)
def test_takes_images_of_any_layout(settings):
    model = model_of(**settings).eval()
    images = torch.rand(3, 1, 8, 8)
    logits = model(images)
    assert logits.shape == (3, 10)
    assert torch.equal(model(images.flatten(1)), logits)
    assert torch.equal(model(images.squeeze(1)), logits)


@pytest.mark.parametrize("settings", ARCHITECTURES)
def test_parameters_are_those_of_the_textbook(settings):
    # Weights and biases of each layer, counted by hand; normalisation adds two numbers per channel.
    counts = [64 * 128 + 128 + 128 * 10 + 10] * 2 + [
        (9 * 16 + 16) + (16 * 9 * 32 + 32) + (2 * 2 * 32 * 10 + 10)
    ] * 2
    counts[1] += 2 * 128
    counts[3] += 2 * 16 + 2 * 32
    counts += [64 * 10 + 10, 64 * 12 + 12 + 12 * 8 + 8 + 8 * 6 + 6 + 6 * 10 + 10]
    counts += [(9 * 4 + 4) + 4 * (4 * 9 * 4 + 4) + (4 * 10 + 10)]
    expected = counts[ARCHITECTURES.index(settings)]
    assert sum(p.numel() for p in DigitsClassifier(**settings).parameters()) == expected


def test_initialisation_follows_the_global_seed():
    seed_everything(3, verbose=False)
    first = DigitsClassifier(architecture="cnn")
    seed_everything(3, verbose=False)
    second = DigitsClassifier(architecture="cnn")
    for a, b in zip(first.parameters(), second.parameters(), strict=True):
        assert torch.equal(a, b)


def expected_metrics(model, dataset):
    """Loss and accuracy as scikit-learn computes them from all samples at once."""
    with torch.no_grad():
        probabilities = model.eval()(dataset.images).double().softmax(dim=1).numpy()
    labels = dataset.labels.numpy()
    return (
        log_loss(labels, probabilities, labels=list(range(10))),
        accuracy_score(labels, probabilities.argmax(axis=1)),
    )


class Frozen(Trained):
    lr = 0.0


@pytest.mark.parametrize("batch_format", ["tuple", "dict"])
def test_metrics_are_means_over_all_samples(tmp_path, batch_format):
    # 297 validation samples make a last batch of 41, which must not weigh as much as the others.
    data = DigitsDataModule(batch_size=128, batch_format=batch_format)
    model, fit = Frozen(), trainer(tmp_path, max_epochs=1)
    (val,) = fit.validate(model, data, verbose=False)
    expected = expected_metrics(model, data.val_set)
    assert (val["val/loss"], val["val/accuracy"]) == pytest.approx(expected, abs=1e-6)
    (test,) = fit.test(model, data, verbose=False)
    expected = expected_metrics(model, data.test_set)
    assert (test["test/loss"], test["test/accuracy"]) == pytest.approx(expected, abs=1e-6)


def test_metrics_are_means_over_all_ranks(tmp_path):
    # 149 samples on each rank; the ranks see different ones, in batches of 100 and 49.
    data = DigitsDataModule(batch_size=100, num_val=298, num_test=499)
    model = Frozen()
    data.setup("fit")
    expected = expected_metrics(deepcopy(model), data.val_set)
    strategy = DDPStrategy(start_method="fork", timeout=timedelta(seconds=30))
    fit = trainer(tmp_path, max_epochs=1, devices=2, strategy=strategy)
    fit.fit(model.train(), datamodule=data)
    metrics = fit.callback_metrics
    found = (float(metrics["val/loss"]), float(metrics["val/accuracy"]))
    assert found == pytest.approx(expected, abs=1e-6)


def test_the_training_loss_is_that_of_the_batch(tmp_path):
    logger = CSVLogger(tmp_path, name="", version="")
    model, data = Frozen(), DigitsDataModule(batch_size=600)
    trainer(tmp_path, max_epochs=1, logger=logger, log_every_n_steps=1).fit(model, data)
    rows = (tmp_path / "metrics.csv").read_text().splitlines()
    column = rows[0].split(",").index("train/loss")
    found = [float(value) for row in rows[1:] if (value := row.split(",")[column])]
    losses = []
    for images, labels in data.train_dataloader():
        probabilities = model(images).double().softmax(dim=1).detach().numpy()
        losses.append(log_loss(labels.numpy(), probabilities, labels=list(range(10))))
    assert found == pytest.approx(losses, abs=1e-6)


def test_prediction_gives_probabilities(tmp_path):
    model, data = model_of(), DigitsDataModule()
    probabilities = torch.cat(trainer(tmp_path).predict(model, datamodule=data))
    assert probabilities.shape == (500, 10)
    torch.testing.assert_close(probabilities.sum(dim=1), torch.ones(500))
    assert torch.equal(probabilities.argmax(1), model.eval()(data.test_set.images).argmax(1))
    plain = DataLoader(data.test_set.images, batch_size=500)
    torch.testing.assert_close(trainer(tmp_path).predict(model, plain)[0], probabilities)


@pytest.mark.parametrize("architecture", ["mlp", "cnn"])
def test_trains_in_mixed_precision(tmp_path, architecture):
    model = model_of(architecture=architecture)
    fit = trainer(tmp_path, max_epochs=2, precision="bf16-mixed")
    fit.fit(model, datamodule=DigitsDataModule())
    assert fit.callback_metrics["val/accuracy"] > 0.5
    assert next(model.parameters()).dtype == torch.float32


@pytest.mark.slow
def test_trains_with_a_compiled_network(tmp_path):
    # The "eager" backend traces as others do, without a compiler.
    plain, compiled = model_of(), model_of()
    compiled.net = torch.compile(compiled.net, backend="eager")
    for model in (plain, compiled):
        trainer(tmp_path, max_epochs=1).fit(model, datamodule=DigitsDataModule())
    for a, b in zip(plain.parameters(), compiled.parameters(), strict=True):
        torch.testing.assert_close(a, b)


def test_loads_from_a_checkpoint(tmp_path):
    model, fit = model_of(architecture="cnn", hidden_sizes=[4], batch_norm=True), trainer(tmp_path)
    fit.fit(model, datamodule=DigitsDataModule(batch_size=500))
    fit.save_checkpoint(tmp_path / "saved.ckpt")
    loaded = DigitsClassifier.load_from_checkpoint(tmp_path / "saved.ckpt", weights_only=True)
    images = torch.rand(2, 1, 8, 8)
    assert torch.equal(loaded.eval()(images), model.eval()(images))


def test_the_optimizer_comes_from_the_config(tmp_path, monkeypatch):
    # LightningCLI would warn if the class had an optimizer of its own.
    arguments = [
        *("digits", "fit"),
        "--optimizer=SGD",
        "--optimizer.lr=0.07",
        "--model.architecture=cnn",
        "--model.hidden_sizes=[3]",
        "--data.batch_size=500",
        "--trainer.accelerator=cpu",
        "--trainer.max_epochs=1",
        "--trainer.logger=false",
        "--trainer.enable_checkpointing=false",
        "--trainer.enable_progress_bar=false",
        f"--trainer.default_root_dir={tmp_path}",
    ]
    monkeypatch.setattr(sys, "argv", arguments)
    # LightningCLI itself uses a method that jsonargparse has deprecated.
    monkeypatch.setenv("JSONARGPARSE_DEPRECATION_WARNINGS", "off")
    cli = LightningCLI(
        DigitsClassifier, DigitsDataModule, save_config_callback=None, seed_everything_default=0
    )
    assert cli.trainer.optimizers[0].param_groups[0]["lr"] == 0.07
    assert cli.trainer.global_step == 2


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"architecture": "rnn"}, "Expected `architecture` to be one of mlp, cnn, got 'rnn'"),
        (
            {"hidden_sizes": [16, 0]},
            r"Expected `hidden_sizes` to be positive numbers, got \[16, 0\]",
        ),
    ],
)
def test_bad_arguments_are_named(settings, message):
    with pytest.raises(ValueError, match=message):
        DigitsClassifier(**settings)
