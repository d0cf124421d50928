"""Losses of the samples are found in training steps that return a mean."""

from __future__ import annotations

import pytest
import torch
from lightning.pytorch import Callback
from support.priority_training import BATCHES, B, C, Clusters, Linear, N, fit, quiet
from torch.nn.functional import cross_entropy


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
