"""Scores and weights belong to samples, whatever the ``collate_fn`` does with their order and number.

The oracle: every sample carries its number into the batch, and the training step writes down the loss of each number
and the gradient by hand.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from support.priority_training import B, C, Clusters, D, Linear, N, fit, gloo, loader, parts, quiet
from torch.nn.functional import cross_entropy
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import default_collate

from lightning_sgd import InBatchSelection, Presampling


def by_norm(items):
    return default_collate(sorted(items, key=lambda item: -float(parts(item)[1].norm())))


def without_class_two(items):
    return default_collate([item for item in items if int(parts(item)[2]) != 2])


def some_in_reverse(items):
    """Leave every fifth sample out, so that ranks have different numbers of rows."""
    return default_collate([item for item in items if int(parts(item)[0]) % 5 != 0][::-1])


def padded(items):
    items = sorted(items, key=lambda item: int(item[0]), reverse=True)
    index, x, y = zip(*items, strict=True)
    return torch.stack(index), pad_sequence(list(x), batch_first=True), torch.stack(y)


class Watched(Linear):
    """Writes down the loss and the weight that each sample should have."""

    def __init__(self, **settings):
        super().__init__(**settings)
        self.true, self.gradients = {}, []

    def training_step(self, batch, batch_idx):
        index, x, y = parts(batch)
        with torch.no_grad():
            logits = self.layer(x)
        losses = cross_entropy(logits, y, reduction="none")
        self.true.update(zip(index.tolist(), losses.tolist(), strict=True))
        # Of a linear model: the mean over the rows of w · (softmax − one-hot) ⊗ (x, 1).
        run = self.trainer.callbacks[0].run
        p = dict(zip(run._draw.indices.tolist(), run._draw.probabilities.tolist(), strict=True))
        w = torch.tensor([(N * p[i]) ** -run_beta(self.trainer) for i in index.tolist()])
        outer = (logits.softmax(1) - torch.eye(C)[y])[:, :, None] * x[:, None]
        self.gradients.append(((w[:, None, None] * outer).mean(0), None))
        return super().training_step(batch, batch_idx)

    def on_before_optimizer_step(self, optimizer):
        self.gradients[-1] = self.gradients[-1][0], self.layer.weight.grad.clone()


def run_beta(trainer):
    return trainer.callbacks[0].beta


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("batch_format", ["tuple", "dict"])
@pytest.mark.parametrize("collate", [by_norm, without_class_two])
def test_every_sample_has_its_own_score_and_weight(tmp_path, collate, batch_format, num_workers):
    callback = quiet(score="loss", beta=1.0, uniform_mix=0.5, half_life=None, stratified=False)
    data = loader(batch_format, collate_fn=collate, num_workers=num_workers)
    module, _, _ = fit(tmp_path, callback, Watched(), data, watch=False, max_epochs=4)
    table = callback.run.sampler.table
    for number, loss in module.true.items():
        assert float(table.scores[number]) == pytest.approx(loss, abs=1e-5)
    for expected, got in module.gradients:
        torch.testing.assert_close(got, expected)
    dropped = [i for i in range(N) if i not in module.true]
    is_class_two = Clusters().y == 2
    assert dropped == ([] if collate is by_norm else is_class_two.nonzero()[:, 0].tolist())
    assert (table.measured_at[dropped] == -1).all()


def test_padded_sequences_keep_their_samples(tmp_path):
    callback = quiet(score="loss", half_life=None)
    data = loader(collate_fn=padded)
    module, _, _ = fit(tmp_path, callback, Watched(), data, watch=False, max_epochs=3)
    for number, loss in module.true.items():
        assert float(callback.run.sampler.table.scores[number]) == pytest.approx(loss, abs=1e-5)


class KeepTrue(Watched):
    """Writes its losses to a file of each rank."""

    def __init__(self, folder):
        super().__init__(lr=0.0)
        self.folder = folder

    def on_train_end(self):
        scores = self.trainer.callbacks[0].run.sampler.table.scores
        torch.save((self.true, scores), self.folder / f"{self.global_rank}.pt")


@pytest.mark.parametrize("collate", [by_norm, some_in_reverse])
def test_two_ranks_exchange_scores_by_sample(tmp_path, collate):
    callback = quiet(score="loss", half_life=None)
    num = 48  # full batches only: of a single sample nothing may be left
    data = loader(num=num, collate_fn=collate, batch_size=B // 2)
    settings = {"devices": 2, "strategy": gloo(), "max_epochs": 2}
    fit(tmp_path, callback, KeepTrue(tmp_path), data, watch=False, **settings)
    found = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2)]
    true = found[0][0] | found[1][0]
    assert torch.equal(found[0][1], found[1][1])
    assert len(true) == (num if collate is by_norm else num - 10)
    for number, loss in true.items():
        assert float(found[0][1][number]) == pytest.approx(loss, abs=1e-5)


@pytest.mark.parametrize(
    "selection", [Presampling(threshold=0.0), InBatchSelection(start=0.0, end=1.0)]
)
def test_rules_choose_by_the_scores_of_their_samples(tmp_path, selection):
    callback = quiet(score="loss", half_life=None, selection=selection)
    module = Linear(lr=0.0)
    with torch.no_grad():
        module.layer.weight.copy_(torch.arange(C * D).reshape(C, D) / 10)
    data = loader(collate_fn=some_in_reverse)
    fit(tmp_path, callback, module, data, watch=False, max_epochs=6)
    points, table = Clusters(), callback.run.sampler.table
    expected = cross_entropy(module.layer(points.x), points.y, reduction="none").detach()
    seen = table.measured_at >= 0
    assert seen.sum() > N // 2
    assert not seen[::5].any()
    torch.testing.assert_close(table.scores[seen], expected[seen])


def test_refreshed_scores_are_those_of_their_samples(tmp_path):
    callback = quiet(score="loss", half_life=None, refresh_every_n_epochs=1, warmup_epochs=0)
    module = Linear(lr=0.0)
    with torch.no_grad():
        module.layer.weight.copy_(torch.arange(C * D).reshape(C, D) / 10)
    fit(tmp_path, callback, module, loader(collate_fn=some_in_reverse), watch=False, max_epochs=2)
    points, table = Clusters(), callback.run.sampler.table
    expected = cross_entropy(module.layer(points.x), points.y, reduction="none").detach()
    kept = torch.arange(N) % 5 != 0
    torch.testing.assert_close(table.scores[kept], expected[kept])
    assert (table.measured_at[~kept] == -1).all()


def nothing_of_small_numbers(items):
    kept = [item for item in items if int(item[0]) >= N // 2]
    return default_collate(kept) if len(kept) == len(items) else None


@pytest.mark.filterwarnings("ignore:.*yielded None")
def test_batches_without_samples_are_left_out(tmp_path):
    callback = quiet(score="loss", half_life=None)
    data = loader(batch_size=2, collate_fn=nothing_of_small_numbers)
    module, _, _ = fit(tmp_path, callback, Watched(), data, watch=False, max_epochs=2)
    assert 0 < len(module.true) <= N // 2
    for number, loss in module.true.items():
        assert float(callback.run.sampler.table.scores[number]) == pytest.approx(loss, abs=1e-5)


def mixed_up(items):
    index, x, y = default_collate(items)
    return index, 0.7 * x + 0.3 * x.roll(1, 0), y


@pytest.mark.parametrize("num_workers", [0, 2])
def test_rows_of_several_samples_are_refused(tmp_path, num_workers):
    data = loader(collate_fn=mixed_up, num_workers=num_workers)
    message = r"`collate_fn` to be one that makes every row of one sample, got rows that mix .*training_step"
    with pytest.raises(ValueError, match=message):
        fit(tmp_path, quiet(), data=data, watch=False)


def opaque(items):
    x = torch.from_numpy(np.stack([np.asarray(item[1]) / 7 for item in items]))
    y = torch.from_numpy(np.stack([2 - np.asarray(item[2]) for item in items]))
    return torch.zeros(len(items)), x, y


def test_an_order_that_cannot_be_known_is_taken_on_trust_with_one_warning(tmp_path):
    with pytest.warns(
        UserWarning, match="cannot tell whether `collate_fn` keeps the order"
    ) as caught:
        fit(tmp_path, quiet(), data=loader(collate_fn=opaque), watch=False, max_epochs=2)
    assert len([each for each in caught if "cannot tell" in str(each.message)]) == 1


def opaque_and_fewer(items):
    return opaque(items[1:])


@pytest.mark.filterwarnings("ignore:PrioritySampling cannot tell")
def test_a_number_of_rows_that_nobody_knows_is_refused(tmp_path):
    message = "`collate_fn` to make one row for each of the 8 samples .*got 7 rows.*Subset"
    with pytest.raises(RuntimeError, match=message):
        fit(tmp_path, quiet(), data=loader(collate_fn=opaque_and_fewer), watch=False)


def test_a_number_as_text_is_that_number():
    texts = quiet(beta="0.5", uniform_mix="3e-1", warmup_epochs="1", refresh_every_n_epochs="2")
    assert texts.state_key == quiet(refresh_every_n_epochs=2).state_key
    assert (texts.beta, texts.refresh_every_n_epochs) == (0.5, 2)
    assert Presampling(factor="2").factor == 2
    assert InBatchSelection(keep="0.25", interrupt="3").interrupt == 3
