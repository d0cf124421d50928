"""Priority sampling in a Trainer against the same training written out in NumPy and plain PyTorch."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from support.priority_training import (
    BATCHES,
    B,
    C,
    Clusters,
    D,
    Linear,
    N,
    fit,
    loader,
    quiet,
    ranks,
)
from support.watching import assert_equal
from torch.nn.functional import cross_entropy

import lightning_sgd
from lightning_sgd import InBatchSelection, Presampling

pytestmark = pytest.mark.filterwarnings("ignore:The dirpath has changed:UserWarning")


def by_hand(draws, beta, mix, offset=1e-3, lr=0.5):
    """Algorithm A in NumPy, given which indices were drawn: probabilities and weights of the network."""
    data = Clusters()
    x = np.concatenate([data.x.numpy().astype(float), np.ones((N, 1))], axis=1)
    weight, scores, floor = np.zeros((C, D + 1)), np.ones(N), offset
    probabilities = []
    for step, draw in enumerate(draws):
        i = draw.indices.numpy()
        p = np.full(N, 1 / N)
        if step >= BATCHES:
            if step % BATCHES == 0:
                floor = offset * scores.mean()
                values = scores + floor
            p = (1 - mix) * values / values.sum() + mix / N
        probabilities.append(p[i])
        w = (N * p[i]) ** -beta
        z = x[i] @ weight.T
        pull = np.exp(z - z.max(1, keepdims=True))
        pull = pull / pull.sum(1, keepdims=True) - np.eye(C)[data.y.numpy()[i]]
        weight -= lr * (w[:, None] * pull).T @ x[i] / len(i)
        scores[i] = np.linalg.norm(pull, axis=1)
        if step >= BATCHES:
            values[i] = scores[i] + floor
    return probabilities, weight


@pytest.mark.parametrize(("beta", "mix"), [(0.5, 0.3), (1.0, 0.5), (0.0, 0.1)])
@pytest.mark.parametrize("reduce", ["mean", "priority_mean", "own"])
def test_the_training_is_the_one_by_hand(tmp_path, beta, mix, reduce):
    callback = quiet(beta=beta, uniform_mix=mix, half_life=None)
    module, draws, _ = fit(tmp_path, callback, Linear(reduce))
    probabilities, weight = by_hand(draws, beta, mix)
    assert len(draws) == 3 * BATCHES
    for draw, expected in zip(draws, probabilities, strict=True):
        assert draw.probabilities.numpy() == pytest.approx(expected, rel=1e-4)
    ours = torch.cat([module.layer.weight, module.layer.bias[:, None]], dim=1).detach().numpy()
    assert ours == pytest.approx(weight, abs=1e-5)
    counts = np.bincount(np.concatenate([d.indices.numpy() for d in draws[BATCHES:]]), minlength=N)
    assert counts.std() > 1, "hard samples are drawn more often"


def test_without_weights_the_loss_is_untouched(tmp_path):
    # With β = 0, and in the warm-up, the module computes what it always did, to the last bit.
    class Plain(Linear):
        def loss(self, logits, y):
            loss = super().loss(logits, y)
            assert torch.equal(loss, cross_entropy(logits.detach(), y))
            return loss

    fit(tmp_path, quiet(beta=0.0), Plain())


@pytest.mark.parametrize("num_ranks", [2, 4])
@pytest.mark.parametrize("num_workers", [0, 1])
def test_ranks_draw_and_train_like_one_process(tmp_path, num_ranks, num_workers):
    def data(num):
        return loader(num=48, batch_size=B // num, num_workers=num_workers)

    (one,) = ranks(tmp_path, 1, data=data(1))
    many = ranks(tmp_path, num_ranks, data=data(num_ranks))
    for rank in many:
        assert_equal(rank["indices"], one["indices"], "what was drawn")
        assert_equal(rank["state"], many[0]["state"], "the state")
        # Means over ranks round differently; so do the scores that come of them.
        torch.testing.assert_close(rank["p"], one["p"], rtol=1e-4, atol=0)
        torch.testing.assert_close(rank["weight"], one["weight"], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", ["LocalSGDStrategy", "GossipPGAStrategy", "ByzantineStrategy"])
def test_our_strategies_keep_priorities_alike(tmp_path, name):
    given = {"aggregator": "median"} if name.startswith("Byz") else {"period": 2}
    strategy = getattr(lightning_sgd, name)(**given, start_method="fork")
    first, second = ranks(tmp_path, 2, strategy)
    assert_equal(first["indices"], second["indices"], "what was drawn")
    assert_equal(first["state"], second["state"], "the state")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("interrupted_at", "num_workers"), [(3, 0), (7, 0), (9, 0), (14, 0), (16, 0), (9, 2)]
)
@pytest.mark.parametrize(
    "make",
    [
        lambda: quiet(),
        lambda: quiet(order="rank", pressure_end=5.0),
        lambda: quiet(refresh_every_n_epochs=1),
        lambda: quiet(selection=Presampling(threshold=0.0)),
        lambda: quiet(selection=InBatchSelection(rule="percentile", start=0.2), score="loss"),
    ],
    ids=["stale", "rank", "refresh", "presampling", "percentile"],
)
def test_going_on_is_exact_with_prefetched_batches(tmp_path, make, interrupted_at, num_workers):
    def run(folder, resume_from=None):
        keep = ModelCheckpoint(folder, "{step}", every_n_train_steps=1, save_top_k=-1)
        data = loader(num_workers=num_workers)
        callback = make()
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "You're resuming from a checkpoint that ended before")
            module, _, _ = fit(
                folder,
                callback,
                data=data,
                ckpt_path=resume_from,
                callbacks=[keep],
                enable_checkpointing=True,
            )
        return module, callback.state_dict()

    through, state = run(tmp_path / "through")
    middle = tmp_path / "through" / f"step={interrupted_at}.ckpt"
    resumed, resumed_state = run(tmp_path / "resumed", middle)
    assert resumed.seen[-1] == through.seen[-1]
    assert_equal(resumed.state_dict(), through.state_dict(), "the weights")
    assert_equal(resumed_state, state, "the state")


def test_beta_is_annealed_over_the_training(tmp_path):
    callback = quiet(beta=0.0, beta_end=1.0, uniform_mix=0.5, warmup_epochs=0, half_life=None)
    module, draws, _ = fit(tmp_path, callback, Linear(lr=0.0))
    data = Clusters()
    for step, (draw, loss) in enumerate(zip(draws, module.losses, strict=True)):
        w = (N * draw.probabilities) ** -(step / (3 * BATCHES))
        losses = cross_entropy(torch.zeros(B, C), data.y[draw.indices], reduction="none")
        assert loss == pytest.approx((w * losses).mean().item(), rel=1e-5)
