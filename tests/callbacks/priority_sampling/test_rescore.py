"""Scores of samples, as they are trained on and by a pass over the data, against closed forms."""

from __future__ import annotations

import math

import pytest
import torch
from lightning.pytorch import Callback
from support.priority_training import C, Clusters, Linear, N, fit, parts, quiet
from torch.nn.functional import cross_entropy


@pytest.mark.parametrize("score", ["last_layer", "loss", "grad_norm"])
def test_scores_are_what_they_say(tmp_path, score):
    # Logistic regression: the exact norm is that of its only layer.
    callback = quiet(
        score=score, refresh_every_n_epochs=2, beta=1.0, uniform_mix=0.5, half_life=None
    )
    module, _, _ = fit(tmp_path, callback, Linear(lr=0.0))
    data = Clusters()
    logits = module.layer(data.x).detach()
    expected = cross_entropy(logits, data.y, reduction="none")
    if score != "loss":
        pull = (logits.softmax(1) - torch.eye(C)[data.y]).norm(dim=1)
        expected = pull * (data.x.square().sum(1) + 1).sqrt()
    torch.testing.assert_close(callback.run.sampler.table.scores, expected)


def test_a_score_can_be_a_function(tmp_path):
    def index_of(batch, outputs):
        assert outputs.shape[1] == C
        return parts(batch)[0].float()

    callback = quiet(score=index_of, half_life=None)
    fit(tmp_path, callback)
    assert callback.run.sampler.table.scores.tolist() == list(range(N))


def test_reducible_losses_are_losses_less_a_table(tmp_path):
    table = torch.linspace(0, 2, N)
    torch.save(table, tmp_path / "irreducible.pt")
    callback = quiet(
        score="rho", irreducible_losses=str(tmp_path / "irreducible.pt"), half_life=None
    )
    fit(tmp_path, callback, Linear(lr=0.0))
    expected = (math.log(C) - table).clamp(min=0)
    torch.testing.assert_close(callback.run.sampler.table.scores, expected)
    torch.save(table[:3], tmp_path / "irreducible.pt")
    with pytest.raises(ValueError, match=r"a tensor of shape \(50,\), one for each sample"):
        fit(tmp_path, callback)


def test_refreshed_scores_are_those_of_the_weights_as_they_are(tmp_path):
    class Seen(Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            if trainer.current_epoch == 2 and batch_idx == 0:
                data = Clusters()
                logits = pl_module.layer(data.x).detach()
                expected = (logits.softmax(1) - torch.eye(C)[data.y]).norm(dim=1)
                torch.testing.assert_close(callback.run.sampler.table.scores, expected)
                self.checked = True

    callback, seen = quiet(refresh_every_n_epochs=2, half_life=None), Seen()
    fit(tmp_path, callback, callbacks=[seen])
    assert seen.checked


def test_losses_that_are_not_finite_are_survived_and_named(tmp_path):
    class Broken(Linear):
        def loss(self, logits, y):
            logits = logits.clone()
            logits[0] = math.nan
            return cross_entropy(logits, y)

    callback = quiet()
    with pytest.warns(UserWarning, match="met losses that are not finite"):
        fit(tmp_path, callback, Broken(lr=0.0))
    assert torch.isfinite(callback.run.sampler.probabilities()).all()
