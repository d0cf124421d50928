"""Losses of the samples are found in training steps that return a mean."""

from __future__ import annotations

import pytest
import torch
from lightning.pytorch import Callback
from support.priority_training import BATCHES, B, C, Clusters, D, Linear, N, fit, quiet
from torch.nn.functional import cross_entropy, mse_loss

from lightning_sgd import InBatchSelection


class OwnLoss(Linear):
    def loss(self, logits, y):
        return (logits.logsumexp(1) - logits.gather(1, y[:, None])[:, 0]).mean()


class Flattened(Linear):
    def loss(self, logits, y):
        return cross_entropy(logits.repeat(2, 1), y.repeat(2))


@pytest.mark.parametrize(
    ("module", "message"),
    [
        (OwnLoss(), "samples, got none of them. Return lightning_sgd.priority_mean"),
        (Flattened(), "for each of the 8 samples, got 16 rows. Return lightning_sgd.priority_m"),
    ],
)
def test_a_loss_that_cannot_be_taken_apart_is_refused(tmp_path, module, message):
    # Training without the weights would be biased, and nobody would know.
    with pytest.raises(RuntimeError, match=message):
        fit(tmp_path, quiet(), module)
    assert "training_step" not in vars(module)


@pytest.mark.filterwarnings("ignore:`training_step` returned `None`:UserWarning")
def test_steps_may_be_skipped(tmp_path):
    class Skips(Linear):
        def training_step(self, batch, batch_idx):
            return None if batch_idx % 2 else super().training_step(batch, batch_idx)

    callback = quiet()
    module, draws, _ = fit(tmp_path, callback, Skips(), limit_train_batches=3, max_epochs=2)
    measured = callback.run.sampler.table.measured_at >= 0
    assert len(draws) == 6
    assert {i for batch in module.seen for i in batch} == set(measured.nonzero().flatten().tolist())


def test_class_weights_and_smoothing_of_the_module_stay(tmp_path):
    callback = quiet(beta=1.0, uniform_mix=0.5)
    settings = {"weight": torch.tensor([1.0, 2.0, 0.5]), "label_smoothing": 0.1}
    module, draws, _ = fit(tmp_path, callback, Linear(lr=0.0, **settings))
    data = Clusters()
    for draw, loss in zip(draws, module.losses, strict=True):
        i = draw.indices
        losses = cross_entropy(torch.zeros(len(i), C), data.y[i], reduction="none", **settings)
        w = 1 / (N * draw.probabilities.float())
        mass = (w * settings["weight"][data.y[i]]).sum() / w.sum()
        assert loss == pytest.approx(((w * losses).sum() / len(i) / mass).item(), rel=1e-4)


class Changing(Linear):
    """From the second epoch on it takes another way to its logits."""

    def training_step(self, batch, batch_idx):
        index, x, y = batch
        self.seen.append(index.tolist())
        late = self.current_epoch > 0
        logits = x @ self.layer.weight.T + self.layer.bias if late else self.layer(x)
        loss = cross_entropy(logits, y)
        self.losses.append(loss.item())
        return loss


def test_a_step_that_takes_another_way_is_named_and_found_again(tmp_path):
    # Only the part of the module that the losses came from in the first step is listened to.
    callback = quiet(beta=1.0, uniform_mix=0.5, half_life=None)
    with pytest.warns(UserWarning, match="did not find the loss of a batch"):
        module, draws, _ = fit(tmp_path, callback, Changing(lr=0.0))
    data = Clusters()
    for draw, loss in list(zip(draws, module.losses, strict=True))[BATCHES + 1 :]:
        w = 1 / (N * draw.probabilities)
        losses = cross_entropy(torch.zeros(B, C), data.y[draw.indices], reduction="none")
        assert loss == pytest.approx((w * losses).mean().item(), rel=1e-5)


@pytest.mark.parametrize(("reduce", "num_hooks"), [("mean", 1), ("priority_mean", 1), ("own", 0)])
def test_from_the_second_step_on_one_part_is_listened_to(tmp_path, reduce, num_hooks):
    class Hooks(Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            parts = list(pl_module.modules())
            assert [len(part._forward_hooks) for part in parts] == [0, num_hooks]
            assert type(outputs["loss"]) is torch.Tensor

    fit(tmp_path, quiet(), Linear(reduce), callbacks=[Hooks()])


class LogsMore(Linear):
    """Logs a second loss of the same outputs, before or after the one that it returns."""

    def __init__(self, first, **settings):
        super().__init__(**settings)
        self.first, self.logged = first, []

    def loss(self, logits, y):
        other = self.other(logits, y) if self.first else None
        loss = super().loss(logits, y)
        self.logged.append((self.other(logits, y) if other is None else other).item())
        return loss

    def other(self, logits, y):
        return mse_loss(logits, torch.zeros_like(logits))


@pytest.mark.parametrize("first", [False, True])
def test_losses_that_are_only_logged_do_not_count(tmp_path, first):
    settings = {"score": "loss", "beta": 1.0, "uniform_mix": 0.5}
    plain, others = quiet(**settings), quiet(**settings)
    expected, _, _ = fit(tmp_path, plain)
    module, draws, _ = fit(tmp_path, others, LogsMore(first))
    assert torch.equal(others.run.sampler.table.scores, plain.run.sampler.table.scores)
    assert torch.equal(module.layer.weight, expected.layer.weight)
    # Plain: the module of the last batch is known by its weights before it.
    assert len(module.logged) == len(draws)


def test_what_is_logged_has_no_weights(tmp_path):
    callback = quiet(beta=1.0, uniform_mix=0.5)
    module = LogsMore(True, lr=0.0)
    with torch.no_grad():
        module.layer.bias.copy_(torch.arange(C))
        module.layer.weight.copy_(torch.arange(C * D).reshape(C, D) / 10)
    _, draws, _ = fit(tmp_path, callback, module)
    data = Clusters()
    logits = (data.x @ module.layer.weight.T + module.layer.bias).detach()
    for draw, logged in zip(draws, module.logged, strict=True):
        assert logged == pytest.approx(logits[draw.indices].square().mean().item(), rel=1e-5)


class OnlyLogs(Linear):
    def loss(self, logits, y):
        cross_entropy(logits, y)
        return logits.square().mean()


def test_a_returned_loss_that_cannot_be_taken_apart_is_refused_beside_one_that_is_logged(tmp_path):
    with pytest.raises(RuntimeError, match="got none of them that it returns"):
        fit(tmp_path, quiet(), OnlyLogs())


class Turns(Linear):
    """Returns the loss that it only logged before, from the second epoch on."""

    def loss(self, logits, y):
        losses = [cross_entropy(logits, y), mse_loss(logits, torch.zeros_like(logits))]
        return losses[self.current_epoch > 0]


def test_a_loss_that_is_returned_later_is_named(tmp_path):
    with pytest.warns(UserWarning, match="gave no weight to a loss of a batch"):
        fit(tmp_path, quiet(beta=1.0, uniform_mix=0.5), Turns(lr=0.1))


def test_selections_look_at_the_returned_loss_alone(tmp_path):
    # Largest losses of the returned kind: after zero weights all are equal, and the first step decides.
    rule = {"keep": 0.25, "rule": "top", "start": 0.0, "end": 1.0, "interrupt": 0}
    seen = [
        fit(tmp_path, quiet(selection=InBatchSelection(**rule), score="loss"), module)[0].seen
        for module in (Linear(), LogsMore(False), LogsMore(True))
    ]
    assert seen[0] == seen[1] == seen[2]
