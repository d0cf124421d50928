"""Priority sampling in a Trainer against the same training written out in NumPy and plain PyTorch."""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass
from datetime import timedelta
from functools import wraps

import numpy as np
import pytest
import torch
from lightning.pytorch import Callback, LightningDataModule, LightningModule
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import DDPStrategy
from support.training import trainer
from support.watching import assert_equal
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, Dataset, IterableDataset, WeightedRandomSampler

import lightning_sgd
from lightning_sgd import (
    InBatchSelection,
    NoEffectWarning,
    OutsideIntendedUseWarning,
    Presampling,
    PrioritySampler,
    PrioritySampling,
    priority_mean,
)

N, B, D, C = 50, 8, 5, 3
BATCHES = math.ceil(N / B)
pytestmark = pytest.mark.filterwarnings("ignore:The dirpath has changed:UserWarning")


@dataclass
class Sample:
    index: torch.Tensor
    x: torch.Tensor
    y: torch.Tensor


class Clusters(Dataset):
    """Three clusters in five dimensions, some samples far from theirs; sample i knows its number."""

    def __init__(self, batch_format="tuple", num=N):
        generator = torch.Generator().manual_seed(0)
        self.y = torch.arange(num) % C
        centres = torch.randn(C, D, generator=generator)
        self.x = centres[self.y] + 0.7 * torch.randn(num, D, generator=generator)
        self.batch_format = batch_format

    def __len__(self):
        return len(self.y)

    def __getitem__(self, i):
        item = torch.tensor(i), self.x[i], self.y[i]
        return (
            dict(zip(("index", "x", "y"), item, strict=True))
            if self.batch_format == "dict"
            else item
        )


def as_sample(items):
    return Sample(*map(torch.stack, zip(*items, strict=True)))


def parts(batch):
    if isinstance(batch, dict):
        return batch["index"], batch["x"], batch["y"]
    return (batch.index, batch.x, batch.y) if isinstance(batch, Sample) else batch


class Linear(LightningModule):
    """Logistic regression that writes down which samples it got."""

    def __init__(self, reduce="mean", lr=0.5, **settings):
        super().__init__()
        self.layer = torch.nn.Linear(D, C)
        with torch.no_grad():
            self.layer.weight.zero_()
            self.layer.bias.zero_()
        self.reduce, self.lr, self.settings = reduce, lr, settings
        self.seen, self.losses = [], []

    def training_step(self, batch, batch_idx):
        index, x, y = parts(batch)
        self.seen.append(index.tolist())
        loss = self.loss(self.layer(x), y)
        self.losses.append(None if loss is None else loss.item())
        return loss

    def loss(self, logits, y):
        if self.reduce == "priority_mean":
            return priority_mean(cross_entropy(logits, y, reduction="none"))
        if self.reduce == "own":
            losses = logits.logsumexp(1) - logits.gather(1, y[:, None])[:, 0]
            return priority_mean(losses, logits)
        return cross_entropy(logits, y, **self.settings)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=self.lr)


class Draws(Callback):
    """Writes down what was drawn for every batch, after the callback under test."""

    def __init__(self):
        self.draws, self.tables = [], []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        callback = next(c for c in trainer.callbacks if isinstance(c, PrioritySampling))
        draw = callback.run._draw
        self.draws.append(draw)
        own = draw.part(draw.indices, callback.run.sampler.rank, callback.run.sampler.num_replicas)
        assert parts(batch)[0].tolist() == own.tolist()


def loader(batch_format="tuple", num=N, **settings):
    collate = as_sample if batch_format == "dataclass" else None
    defaults = {"batch_size": B, "shuffle": True, "collate_fn": collate}
    return DataLoader(Clusters(batch_format, num), **{**defaults, **settings})


def fit(tmp_path, callback, module=None, data=None, ckpt_path=None, callbacks=(), **settings):
    """Train; returns module, draws, and the Trainer."""
    module, draws = module or Linear(), Draws()
    defaults = {"max_epochs": 3, "callbacks": [callback, draws, *callbacks]}
    running = trainer(tmp_path, **{**defaults, **settings})
    running.fit(module, loader() if data is None else data, ckpt_path=ckpt_path)
    return module, draws.draws, running


def quiet(**settings):
    return PrioritySampling(**{"save_figure": False, **settings})


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


def gloo():
    return DDPStrategy(start_method="fork", timeout=timedelta(seconds=30))


class Keep(Callback):
    """Writes down what each rank did."""

    def __init__(self, folder):
        self.folder = folder

    def on_train_end(self, trainer, pl_module):
        callback, draws = trainer.callbacks[0], trainer.callbacks[1].draws
        content = {
            "indices": [draw.indices for draw in draws],
            "p": [draw.probabilities for draw in draws],
            "state": callback.state_dict(),
            "weight": pl_module.layer.weight.detach().clone(),
        }
        torch.save(content, self.folder / f"{trainer.global_rank}.pt")


def ranks(tmp_path, num, strategy=None, settings=None, data=None, **more):
    folder = tmp_path / f"{num}"
    folder.mkdir()
    devices = {"devices": num, "strategy": strategy or gloo()} if num > 1 else {}
    callback = quiet(**(settings or {}))
    fit(
        tmp_path,
        callback,
        data=loader(num=48, batch_size=B // num) if data is None else data,
        callbacks=[Keep(folder)],
        **devices,
        **more,
    )
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(num)]


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


# What cannot be done is said.


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


class Stream(IterableDataset):
    def __iter__(self):
        yield 1


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (DataLoader(Stream()), "`dataset` to be one with indices, got 'Stream'"),
        ([loader(), loader()], "one DataLoader for priority sampling, got list"),
        (
            DataLoader(Clusters(), sampler=WeightedRandomSampler(torch.ones(N), 10)),
            "takes every sample once per epoch, got 'WeightedRandomSampler'",
        ),
        (
            DataLoader(Clusters(), batch_sampler=[[1, 2], [3]]),
            "plain one of a DataLoader with `batch_size`, got 'list'",
        ),
        (DataLoader(Clusters(), batch_size=None), "plain one of a DataLoader"),
        (loader(num_workers=1, in_order=False), "`in_order` to be true"),
        (
            loader(shuffle=False, sampler=torch.utils.data.DistributedSampler(Clusters(), 2, 0)),
            "`num_replicas` to be the number of ranks, 1, got 2",
        ),
    ],
)
def test_data_that_cannot_be_used_are_refused(tmp_path, data, message):
    with pytest.raises(ValueError, match=message):
        fit(tmp_path, quiet(), data=data)


def test_overfitting_on_purpose_is_refused(tmp_path):
    with pytest.raises(ValueError, match="`overfit_batches` to be 0 beside PrioritySampling"):
        fit(tmp_path, quiet(), overfit_batches=1)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"score": "entropy"}, "`score` to be one of grad_norm_bound, last_layer"),
        ({"beta": 1.5}, r"`beta` to be in \[0, 1\], got 1\.5"),
        ({"beta_end": -1.0}, r"`beta_end` to be in \[0, 1\]"),
        ({"weight_norm": "sum"}, "`weight_norm` to be one of none, mean, max"),
        ({"refresh_every_n_epochs": 0}, "`refresh_every_n_epochs` to be at least 1"),
        ({"pressure_end": 0.0}, "`pressure_end` to be at least 1"),
        ({"uniform_mix": 2.0}, r"`uniform_mix` to be in \[0, 1\]"),
        ({"score": "rho"}, "`irreducible_losses` to be given with score='rho'"),
        ({"irreducible_losses": "x"}, "`irreducible_losses` to be given with score='rho'"),
    ],
)
def test_bad_settings_are_refused_in_one_sentence(settings, message):
    with pytest.raises(ValueError, match=message):
        quiet(**settings)


@pytest.mark.parametrize(
    ("settings", "category", "message"),
    [
        ({"uniform_mix": 1.0}, NoEffectWarning, "no effect with `uniform_mix` 1"),
        ({"alpha": 0.0}, NoEffectWarning, "`alpha` 0"),
        (
            {"selection": Presampling(), "beta": 1.0, "uniform_mix": 0.5},
            NoEffectWarning,
            "beta, uniform_mix has no effect",
        ),
        (
            {"beta": 1.0, "uniform_mix": 0.1},
            OutsideIntendedUseWarning,
            "steps up to 10 times as large",
        ),
    ],
)
def test_settings_without_effect_and_dangerous_ones_are_named(settings, category, message):
    with pytest.warns(category, match=message):
        quiet(**settings)


def test_a_training_that_is_all_warm_up_is_named(tmp_path):
    with pytest.warns(NoEffectWarning, match="all 3 epochs are warm-up"):
        fit(tmp_path, quiet(warmup_epochs=3))


# Scores.


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


def test_beta_is_annealed_over_the_training(tmp_path):
    callback = quiet(beta=0.0, beta_end=1.0, uniform_mix=0.5, warmup_epochs=0, half_life=None)
    module, draws, _ = fit(tmp_path, callback, Linear(lr=0.0))
    data = Clusters()
    for step, (draw, loss) in enumerate(zip(draws, module.losses, strict=True)):
        w = (N * draw.probabilities) ** -(step / (3 * BATCHES))
        losses = cross_entropy(torch.zeros(B, C), data.y[draw.indices], reduction="none")
        assert loss == pytest.approx((w * losses).mean().item(), rel=1e-5)


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


# Looking at more than is trained on.


def test_presampling_is_on_where_it_pays(tmp_path):
    # The gain is 0 before the first step, and never below 1 afterwards.
    rule = Presampling(factor=3.0, threshold=0.5, decay=0.0)
    module, draws, _ = fit(tmp_path, quiet(selection=rule), max_epochs=1)
    assert [len(draw.indices) for draw in draws] == [B] + [3 * B] * (BATCHES - 1)
    assert [len(batch) for batch in module.seen] == [B] * BATCHES
    for batch, draw in zip(module.seen, draws, strict=True):
        assert set(batch) <= set(draw.indices.tolist())
    assert module.seen[0] == draws[0].indices.tolist()


@pytest.mark.parametrize("num_workers", [0, 1])
def test_presampling_stays_off_where_it_does_not(tmp_path, num_workers):
    rule = Presampling(factor=3.0, threshold=9.0)
    data = loader(num_workers=num_workers)
    module, draws, _ = fit(tmp_path, quiet(selection=rule), data=data)
    assert module.seen == [draw.indices.tolist() for draw in draws]
    assert rule.num_on == 0
    assert 0 < rule.gain < 2


def test_presampling_is_the_paper_by_hand(tmp_path):
    # One candidate batch at zero weights and one training step of it.
    rule = Presampling(factor=3.0, threshold=0.5, decay=0.0)
    callback = quiet(selection=rule, score="last_layer")
    module, draws, _ = fit(tmp_path, callback, max_epochs=1, max_steps=2, limit_val_batches=0)
    data, first = Clusters(), draws[0].indices
    weight = torch.zeros(C, D + 1)
    x = torch.cat([data.x, torch.ones(N, 1)], dim=1)
    pull = (x[first] @ weight.T).softmax(1) - torch.eye(C)[data.y[first]]
    weight -= 0.5 * pull.T @ x[first] / B
    candidates = draws[1].indices
    pull = (x[candidates] @ weight.T).softmax(1) - torch.eye(C)[data.y[candidates]]
    scores = pull.norm(dim=1) * x[candidates].norm(dim=1)
    gamma = scores / scores.sum()
    loss = torch.zeros(())
    for number in module.seen[1]:
        row = candidates.tolist().index(number)
        logits = x[number] @ weight.T
        loss = loss + cross_entropy(logits, data.y[number]) / (3 * B * gamma[row]) / B
    assert module.losses[1] == pytest.approx(loss.item(), rel=1e-5)


@pytest.mark.slow
def test_presampling_is_unbiased():
    # Any scores: the weighted mean over draws of b of B candidates is the mean over the candidates.
    generator = torch.Generator().manual_seed(0)
    rule, values = Presampling(), torch.randn(24, generator=generator)
    rule.prepare(8)
    scores = torch.rand(24, generator=generator)
    means = []
    for _ in range(4000):
        rows, weights = rule.choose(scores, torch.rand(24, generator=generator))
        means.append((weights * values[rows]).mean())
    found = torch.stack(means)
    error = found.std() / math.sqrt(len(found))
    assert abs(found.mean() - values.mean()) < 4 * error


@pytest.mark.parametrize("rule", ["quantile", "percentile", "top"])
def test_a_part_of_each_batch_is_trained_on(tmp_path, rule):
    selection = InBatchSelection(keep=0.5, rule=rule, start=0.0, end=1.0, interrupt=0)
    callback = quiet(selection=selection, score="loss")
    module, draws, _ = fit(tmp_path, callback)
    drawn = [draw.indices.tolist() for draw in draws]
    assert all(set(part) <= set(whole) for part, whole in zip(module.seen, drawn, strict=True))
    if rule != "percentile":
        sizes = [max(1, len(whole) // 2) for whole in drawn]
        assert [len(part) for part in module.seen] == sizes
    assert callback.run.num_trained == sum(map(len, module.seen))
    everything = [index for whole in drawn for index in whole]
    assert sorted(everything[:N]) == list(range(N)), "epochs stay permutations"


def test_the_largest_losses_are_trained_on(tmp_path):
    selection = InBatchSelection(keep=0.25, rule="top", start=0.0, end=1.0, interrupt=0)
    module, draws, _ = fit(tmp_path, quiet(selection=selection, score="loss"), max_epochs=1)
    data = Clusters()
    first = draws[0].indices
    weight, bias = torch.zeros(C, D), torch.zeros(C)
    rows = sorted(first.tolist()[:2])  # all losses are equal at first
    assert len(module.seen[0]) == len(rows)
    chosen = torch.tensor(module.seen[0])
    pull = torch.full((2, C), 1 / C) - torch.eye(C)[data.y[chosen]]
    weight, bias = -0.5 * pull.T @ data.x[chosen] / 2, -0.5 * pull.mean(0)
    second = draws[1].indices
    losses = cross_entropy(data.x[second] @ weight.T + bias, data.y[second], reduction="none")
    assert set(module.seen[1]) == set(second[losses.topk(2).indices].tolist())


def test_selection_begins_ends_and_pauses(tmp_path):
    selection = InBatchSelection(keep=0.5, rule="top", start=0.25, end=0.75, interrupt=3)
    module, _, _ = fit(tmp_path, quiet(selection=selection), max_epochs=4)
    total = 4 * BATCHES
    expected = []
    for step in range(total):
        size = N % B if step % BATCHES == BATCHES - 1 else B
        is_on = 0.25 <= step / total < 0.75 and (step + 1) % 3
        expected.append(size // 2 if is_on else size)
    assert [len(batch) for batch in module.seen] == expected


def test_looking_leaves_no_trace(tmp_path):
    # Batch statistics and logs of the candidates would be counted twice.
    class Normed(Linear):
        def __init__(self):
            super().__init__()
            self.norm = torch.nn.BatchNorm1d(D)

        def training_step(self, batch, batch_idx):
            _, x, y = batch
            self.log("size", float(len(y)), on_step=False, on_epoch=True, reduce_fx="sum")
            return cross_entropy(self.layer(self.norm(x)), y)

    selection = InBatchSelection(keep=0.5, rule="top", start=0.0, end=1.0, interrupt=0)
    data = loader(num=48)
    module, _, running = fit(tmp_path, quiet(selection=selection), Normed(), data, max_epochs=1)
    assert module.norm.num_batches_tracked == 6
    assert module.norm.training
    assert running.callback_metrics["size"] == 6 * (B // 2)


@pytest.mark.parametrize("rule", ["presampling", "quantile"])
def test_selection_on_two_ranks(tmp_path, rule):
    selection = (
        Presampling(threshold=0.0)
        if rule == "presampling"
        else InBatchSelection(start=0.0, end=1.0, interrupt=0)
    )
    first, second = ranks(tmp_path, 2, settings={"selection": selection})
    assert_equal(first["indices"], second["indices"], "what was drawn")
    assert_equal(first["state"], second["state"], "the state")
    assert torch.equal(first["weight"], second["weight"])


# Company.


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


@pytest.mark.slow
def test_the_figure_has_two_panels(tmp_path):
    callback = PrioritySampling()
    with pytest.raises(RuntimeError, match="Plot after training"):
        callback.plot()
    fit(tmp_path, callback)
    left, right = callback.plot().axes
    assert left.lines[0].get_xdata().tolist() == [BATCHES, 2 * BATCHES, 3 * BATCHES]
    shares = right.lines[0].get_ydata()
    assert shares[-1] == pytest.approx(1.0)
    assert (np.diff(shares) > 0).all()
    assert (tmp_path / "priority_sampling.png").is_file()


def test_the_last_line_names_what_is_hardest(tmp_path, caplog):
    caplog.set_level("INFO")
    callback = quiet(half_life=None)
    fit(tmp_path, callback)
    line = caplog.messages[-1]
    table = callback.run.sampler.table
    hardest = table.scores.argsort(descending=True)[:10].tolist()
    assert f"{2 * BATCHES} of {3 * BATCHES} batches drawn by priority" in line
    named = line.split("hardest samples ")[1].split(", ")
    assert [int(entry.split()[0]) for entry in named] == hardest
    means = [table.scores[torch.arange(c, N, C)].mean().item() for c in range(C)]
    assert f"hardest classes {int(np.argmax(means))} (" in line
