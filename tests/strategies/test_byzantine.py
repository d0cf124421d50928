"""ByzantineStrategy on real processes: the mean is DDP's, wrong ranks do not matter, replicas stay equal bit by bit."""

from __future__ import annotations

import math
import warnings

import pytest
import torch
import torch.distributed as dist
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import EarlyStopping
from lightning.pytorch.plugins.precision import MixedPrecision
from support.callback_training import Classifier, digits
from support.strategy_training import (
    FORK,
    GLOBAL_BATCH,
    NUM_BATCHES,
    Run,
    ddp,
    flat,
    loader,
    samples,
    sgd,
    spread,
)
from support.training import Regression, by_hand, loss_of, network, trainer
from support.watching import assert_equal
from torch.nn.utils import parameters_to_vector

import lightning_sgd
from lightning_sgd import (
    ALIE,
    IPM,
    BitFlip,
    ConstantAttack,
    GaussianAttack,
    Mean,
    Mimic,
    MinMax,
    NonFinite,
    SignFlip,
)
from lightning_sgd.functional.distributed.traffic import all_reduce_traffic

pytestmark = [
    pytest.mark.timeout(60),
    pytest.mark.filterwarnings("ignore:The dirpath has changed:UserWarning"),
]


def byzantine(*args, **settings):
    return lightning_sgd.ByzantineStrategy(*args, **{**FORK, **settings})


def finals(run):
    return [record["final"] for record in run.ranks]


def simulate(num_ranks, combine, epochs=2):
    """Weights after every step in plain PyTorch and double precision; ``combine(gradients)`` is used by SGD."""
    net = network().double()
    optimizer, trace = sgd(net.parameters()), []
    x, y = (tensor.double() for tensor in samples().tensors)
    for step in range(epochs * NUM_BATCHES):
        begin, gradients = step % NUM_BATCHES * GLOBAL_BATCH, []
        for rank in range(num_ranks):
            mine = slice(begin + rank, begin + GLOBAL_BATCH, num_ranks)
            loss = loss_of(net, (x[mine], y[mine]))
            gradients.append(
                parameters_to_vector(torch.autograd.grad(loss, list(net.parameters())))
            )
        combined, position = combine(torch.stack(gradients)), 0
        for param in net.parameters():
            param.grad = combined[position : position + param.numel()].view_as(param)
            position += param.numel()
        optimizer.step()
        trace.append(flat(net))
    return trace


def assert_follows(run, expected):
    for weights, exact in zip(run.trace, expected, strict=True):
        assert spread(weights) == 0.0
        torch.testing.assert_close(weights[0].double(), exact, rtol=1e-5, atol=1e-6)


# The mean.


@pytest.mark.parametrize("num_ranks", [2, 3, 4])
def test_the_mean_is_what_ddp_does(tmp_path, num_ranks):
    ours = Run(tmp_path / "ours", byzantine(Mean()), ranks=num_ranks)
    theirs = Run(tmp_path / "theirs", ddp(), ranks=num_ranks)
    for mine, expected in zip(ours.trace, theirs.trace, strict=True):
        torch.testing.assert_close(mine[0], expected[0], rtol=1e-6, atol=1e-6)
        assert spread(mine) == 0.0


@pytest.mark.parametrize("workers", ["rank", "both"])
def test_accumulation_and_clipping_as_ddp_does(tmp_path, workers):
    # The last group of an epoch is incomplete; Lightning divides its loss by the full number all the same.
    settings = {"accumulate_grad_batches": 2, "gradient_clip_val": 0.5}
    ours = Run(tmp_path / "ours", byzantine(Mean(), workers=workers), **settings)
    theirs = Run(tmp_path / "theirs", ddp(), **settings)
    for mine, expected in zip(ours.trace, theirs.trace, strict=True):
        torch.testing.assert_close(mine[0], expected[0], rtol=1e-6, atol=1e-6)


def test_momentum_of_workers_follows_a_loop_in_double_precision(tmp_path):
    momenta = torch.zeros(4, sum(p.numel() for p in network().parameters()), dtype=torch.float64)

    def combine(gradients):
        momenta.mul_(0.9).add_(gradients, alpha=0.1)
        return momenta.median(dim=0).values / 2 - (-momenta).median(dim=0).values / 2

    run = Run(tmp_path, byzantine("median", 1, worker_momentum=0.9), ranks=4)
    assert_follows(run, simulate(4, combine))


# Wrong ranks.


@pytest.mark.parametrize("attack", [NonFinite("nan"), NonFinite("inf"), ConstantAttack(1e30)])
def test_a_rank_that_is_dropped_leaves_the_mean_of_the_others(tmp_path, attack):
    # The filter expects no further wrong rank then, and is the mean.
    run = Run(tmp_path, byzantine("filter", 1, attack=attack, byzantine_ranks=[2]), ranks=4)
    assert_follows(run, simulate(4, lambda rows: rows[[0, 1, 3]].mean(dim=0)))


@pytest.mark.parametrize("rule", ["filter", "nnm+trmean", "cclip"])
@pytest.mark.parametrize(
    "attack",
    [
        SignFlip(),
        SignFlip(omniscient=True),
        ConstantAttack(-50.0),
        NonFinite(),
        ALIE(1.5),
        IPM(0.5),
        GaussianAttack(std=10.0),
        Mimic(),
        BitFlip(3, 7),
    ],
    ids=lambda attack: f"{type(attack).__name__}-{attack.scope}",
)
def test_replicas_stay_equal_under_every_attack(tmp_path, rule, attack):
    strategy = byzantine(rule, 1, attack=attack, byzantine_ranks=[1], worker_momentum=0.9)
    run = Run(tmp_path, strategy, ranks=4, max_epochs=1)
    for weights in run.trace:
        assert spread(weights) == 0.0
        assert weights[0].isfinite().all()
    assert not torch.equal(run.trace[-1][0], run.trace[0][0])


def test_more_broken_ranks_than_expected_are_dropped_with_a_warning(tmp_path):
    def strategy():
        return byzantine("median", 0, attack=NonFinite(), byzantine_ranks=[1])

    with pytest.raises(Exception, match="not finite and were dropped, more than num_byzantine=0"):
        Run(tmp_path / "raised", strategy())  # warnings are errors here
    run = Run(tmp_path / "warned", strategy(), callbacks=[Silent("The gradients of workers")])
    assert_follows(run, simulate(2, lambda rows: rows[0]))


class Silent(Callback):
    """Lets a warning be a warning in the forked processes."""

    def __init__(self, *messages):
        for message in messages:
            warnings.filterwarnings("ignore", message)


@pytest.mark.parametrize("settings", [{"nonfinite": "raise"}, {"byzantine_ranks": [0, 1]}])
def test_what_cannot_be_gone_on_with_is_said_on_all_ranks_alike(tmp_path, settings):
    strategy = byzantine(attack=NonFinite(), **{"byzantine_ranks": [1], **settings})
    with pytest.raises(Exception, match="Expected at most 0 gradients not to be finite, but after"):
        Run(tmp_path, strategy)


class Skipping(Regression):
    """Some ranks have no loss in some batches."""

    def __init__(self, ranks):
        super().__init__(sgd)
        self.ranks = ranks

    def training_step(self, batch, batch_idx):
        if self.global_rank in self.ranks and batch_idx % 2:
            return None
        return super().training_step(batch, batch_idx)


def test_a_rank_without_a_loss_is_left_out_of_the_step(tmp_path):
    # Lightning refuses that with DDP, because it would wait for ever.
    steps = iter(range(2 * NUM_BATCHES))

    def combine(gradients):
        is_even = next(steps) % NUM_BATCHES % 2 == 0
        return (gradients if is_even else gradients[[0, 2, 3]]).mean(dim=0)

    run = Run(tmp_path, byzantine(Mean()), Skipping([1]), ranks=4)
    assert_follows(run, simulate(4, combine))


def test_one_rank_without_a_loss_is_as_with_lightning_alone(tmp_path):
    silent = Silent("`training_step` returned `None`")
    ours = Run(tmp_path / "ours", byzantine(), Skipping([0]), ranks=1, callbacks=[silent])
    theirs = Run(tmp_path / "theirs", "auto", Skipping([0]), ranks=1, callbacks=[silent])
    assert torch.equal(finals(ours)[0], finals(theirs)[0])


def test_without_a_loss_on_any_rank_there_is_no_step(tmp_path):
    silent = Silent("No step was taken")
    run = Run(tmp_path, byzantine(), Skipping([0, 1]), callbacks=[silent])
    for index, (before, after) in enumerate(zip(run.trace, run.trace[1:], strict=False), start=1):
        assert torch.equal(before[0], after[0]) == bool(index % NUM_BATCHES % 2)


class Rare(Regression):
    """One rank alone has gradients of the second layer."""

    def training_step(self, batch, batch_idx):
        x, y = batch
        hidden = self.net[1](self.net[0](x))
        out = self.net[2](hidden) if self.global_rank == 1 else hidden.sum(dim=1, keepdim=True)
        return torch.nn.functional.mse_loss(out, y)


@pytest.mark.parametrize("num_byzantine", [0, 1])
def test_a_parameter_that_no_honest_rank_need_have_used_gets_no_gradient(tmp_path, num_byzantine):
    run = Run(tmp_path, byzantine("median", num_byzantine), Rare(sgd), ranks=4)
    moved = finals(run)[0] != flat(Regression(sgd))
    assert bool(moved[-9:].any()) == (num_byzantine == 0)  # weight decay would move it
    assert moved[:40].all()


class Overflowing(Regression):
    """One rank has an infinite loss in its third batch."""

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        overflows = (self.global_rank, batch_idx) == (1, 2)
        return loss * (math.inf if overflows else 1.0)


class Scales(Callback):
    """Writes down the loss scale."""

    def __init__(self, folder):
        self.folder = folder

    def on_fit_end(self, trainer, pl_module):
        scale = trainer.precision_plugin.scaler.get_scale()
        torch.save(scale, f"{self.folder}/scale.{trainer.global_rank}")


@pytest.mark.parametrize("num_byzantine", [0, 1])
@pytest.mark.parametrize("beta", [0.0, 0.9])
def test_one_overflow_is_filtered_or_halves_the_scale_of_all_ranks(tmp_path, num_byzantine, beta):
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0, growth_interval=1000)
    precision = MixedPrecision("16-mixed", "cpu", scaler)
    strategy = byzantine("median", num_byzantine, worker_momentum=beta)
    settings = {"plugins": [precision], "callbacks": [Scales(tmp_path)], "max_epochs": 1}
    run = Run(tmp_path, strategy, Overflowing(sgd), ranks=4, **settings)
    scales = [torch.load(f"{tmp_path}/scale.{rank}") for rank in range(4)]
    assert scales == [8.0 if num_byzantine else 4.0] * 4
    assert all(spread(weights) == 0.0 for weights in run.trace)
    assert finals(run)[0].isfinite().all()
    assert torch.equal(run.trace[1][0], run.trace[2][0]) == (num_byzantine == 0)


def test_momentum_and_radii_do_not_depend_on_the_loss_scale(tmp_path):
    def run(scale):
        precision = MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=scale))
        strategy = byzantine("cclip(radius=0.05)", 1, worker_momentum=0.9)
        return finals(Run(tmp_path / str(scale), strategy, ranks=4, plugins=[precision]))[0]

    torch.testing.assert_close(run(64.0), run(1.0), rtol=2e-2, atol=1e-3)


# Micro-batches as workers.


class Alone(Callback):
    """Looks whether there is a process group."""

    def on_train_start(self, trainer, pl_module):
        assert not dist.is_initialized()


def test_micro_batches_of_one_device_need_no_process_group(tmp_path):
    # With the mean it is ordinary accumulation, also for the incomplete group at the end of an epoch.
    run = Run(
        tmp_path,
        byzantine(Mean(), workers="micro_batch"),
        ranks=1,
        callbacks=[Alone()],
        accumulate_grad_batches=3,
    )
    expected = parameters_to_vector(by_hand(sgd, accumulate=3)).detach()
    torch.testing.assert_close(finals(run)[0], expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("entry", ["validate", "test", "predict"])
def test_one_device_evaluates_without_a_process_group(tmp_path, entry):
    class Evaluated(Regression):
        def validation_step(self, batch, batch_idx):
            assert not dist.is_initialized()
            return loss_of(self.net, batch)

        test_step = predict_step = validation_step

    of = lightning_sgd.ByzantineStrategy(workers="micro_batch")
    quiet = trainer(tmp_path, strategy=of)
    assert getattr(quiet, entry)(Evaluated(sgd), loader(1)) is not None


class BrokenBatches(Regression):
    """Every third batch is NaN."""

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        return loss * (math.nan if batch_idx % 3 == 1 else 1.0)


def test_a_broken_micro_batch_is_left_out(tmp_path):
    run = Run(
        tmp_path,
        byzantine("filter", 1, workers="micro_batch"),
        BrokenBatches(sgd),
        ranks=1,
        accumulate_grad_batches=3,
        limit_train_batches=6,
        callbacks=[Silent("1 of 3 workers may be wrong")],
    )
    net = network()
    optimizer = sgd(net.parameters())
    data = [batch for _ in range(2) for batch in list(loader(1))[:6]]
    for group in range(4):
        optimizer.zero_grad()
        for index in (0, 2):
            (loss_of(net, data[3 * group + index]) / 2).backward()
        optimizer.step()
    torch.testing.assert_close(finals(run)[0], flat(net), rtol=1e-5, atol=1e-6)


def test_an_incomplete_group_that_the_rule_cannot_judge_is_refused(tmp_path):
    strategy = byzantine("median", 1, workers="micro_batch")
    with pytest.raises(Exception, match="Set limit_train_batches to a multiple of 5"):
        Run(tmp_path, strategy, ranks=1, accumulate_grad_batches=5)


# Checkpoints.


class SaveEvery(Callback):
    """Writes a checkpoint after every step."""

    def __init__(self, folder):
        self.folder = folder

    def on_train_batch_end(self, trainer, *_):
        trainer.save_checkpoint(f"{self.folder}/{trainer.global_step}.ckpt")


@pytest.mark.parametrize(
    ("num_ranks", "settings"),
    [
        (1, {"aggregator": "cclip"}),
        (2, {"aggregator": "cclip"}),
        (2, {"aggregator": "bucketing+median"}),
        (4, {"aggregator": "cclip", "num_byzantine": 1}),
        (4, {"aggregator": "filter(mode='hard')", "num_byzantine": 1, "audit_every": 2}),
    ],
)
def test_momenta_centres_and_draws_resume_exactly(tmp_path, num_ranks, settings):
    def fit(name, resume=None):
        folder = tmp_path / name
        drill = {"attack": GaussianAttack(), "byzantine_ranks": [3]} if num_ranks == 4 else {}
        strategy = byzantine(**settings, **drill, worker_momentum=0.9)
        return Run(
            folder,
            strategy,
            Classifier(),
            ranks=num_ranks,
            data=digits(num_ranks),
            resume=resume,
            callbacks=[SaveEvery(folder)],
            max_epochs=-1,
            max_steps=10,
            limit_val_batches=1,
            val_check_interval=3,
        )

    through = fit("through")
    resumed = fit("resumed", tmp_path / "through" / "5.ckpt")
    for ours, expected in zip(resumed.ranks, through.ranks, strict=True):
        assert_equal(ours["trace"], expected["trace"][5:], "the weights")
        assert_equal(ours["buffers"], expected["buffers"], "the buffers")


class SaveAtTheEnd(Callback):
    """Writes a checkpoint when training is over, as a script does after ``fit``."""

    def __init__(self, file):
        self.file = file

    def on_fit_end(self, trainer, pl_module):
        trainer.save_checkpoint(self.file)


def test_a_checkpoint_written_after_training_holds_the_momenta_of_all_ranks(tmp_path):
    at_the_end = tmp_path / "end.ckpt"
    callbacks = [SaveEvery(tmp_path), SaveAtTheEnd(at_the_end)]
    limits = {"max_steps": 4, "max_epochs": -1}
    Run(tmp_path, byzantine(worker_momentum=0.9), callbacks=callbacks, **limits)
    files = tmp_path / "4.ckpt", at_the_end
    after_the_step, after_training = (
        [part["lightning_sgd"]["own"]["momenta"]["0"] for part in saved["lightning_sgd"]["ranks"]]
        for saved in (torch.load(file, weights_only=True) for file in files)
    )
    assert len(after_training) == 2
    assert not torch.equal(*after_training)
    assert_equal(after_training, after_the_step, "the momenta")


def test_momenta_begin_anew_on_another_number_of_ranks_but_centres_go_on(tmp_path):
    strategy = byzantine("cclip", 1, worker_momentum=0.9)
    Run(tmp_path / "four", strategy, ranks=4, callbacks=[SaveEvery(tmp_path)], max_epochs=1)
    file = tmp_path / "4.ckpt"
    content = torch.load(file, weights_only=True)["lightning_sgd"]
    num_weights = flat(Regression(sgd)).numel()
    assert all(part["lightning_sgd"]["own"]["momenta"]["0"].shape == (1, num_weights)
               for part in content["ranks"])  # fmt: skip
    assert content["shared"]["rules"][0]["previous"].isfinite().all()

    class Look(Callback):
        def on_train_start(self, trainer, pl_module):
            state = trainer.strategy.shared_state()["rules"][0]
            assert torch.equal(
                state["previous"][:num_weights].cpu(),
                content["shared"]["rules"][0]["previous"][:num_weights],
            )
            assert trainer.strategy.own_state() == {"momenta": {}}

    silent = Silent(
        "The checkpoint is of 4 ranks, this is a training on 3: every rank starts without",
        "You're resuming from a checkpoint that ended before the epoch ended",
        "1 of 3 workers may be wrong",
    )
    strategy = byzantine("cclip", 1, worker_momentum=0.9)
    Run(tmp_path / "three", strategy, ranks=3, resume=file, callbacks=[Look(), silent])


def test_a_checkpoint_holds_the_weights_once(tmp_path):
    Run(tmp_path, byzantine(), ranks=4, callbacks=[SaveEvery(tmp_path)], max_epochs=1)
    saved = torch.load(tmp_path / "3.ckpt", weights_only=True)
    for part in saved["lightning_sgd"]["ranks"]:
        assert part["state_dict"] == {}
        assert "optimizer_states" not in part


# What ranks tell each other beside gradients.


class WrongBuffers(Classifier):
    """The statistics of one rank are ruined after every batch."""

    def __init__(self, rank=0):
        super().__init__(dropout=0.0)
        self.rank, self.seen = rank, []

    def on_after_backward(self):
        if self.global_rank == self.rank:
            for buffer in self.buffers():
                buffer.fill_(77)

    def on_validation_epoch_start(self):
        self.seen = [buffer.clone() for buffer in self.buffers()]

    def on_validation_end(self):
        torch.save(self.seen, f"{self.trainer.default_root_dir}/seen.{self.global_rank}")


@pytest.mark.parametrize("rule", ["median", "mean", "rank0", "local"])
def test_buffers_of_a_wrong_rank_do_not_reach_evaluation_and_checkpoints(tmp_path, rule):
    run = Run(
        tmp_path,
        byzantine(buffers=rule),
        WrongBuffers(),
        ranks=3,
        data=digits(3),
        max_epochs=1,
        limit_val_batches=1,
        callbacks=[SaveEvery(tmp_path)],
    )
    saved = torch.load(tmp_path / "5.ckpt", weights_only=True)
    names = [name for name, _ in Classifier().named_buffers()]
    written = [saved["state_dict"][name] for name in names]
    is_ruined = [bool((buffer == 77).all()) for buffer in written]
    assert all(is_ruined) == (rule in ("rank0", "local"))
    assert any(is_ruined) == (rule in ("rank0", "local"))
    seen = [torch.load(tmp_path / f"seen.{rank}") for rank in range(3)]
    if rule != "local":
        for other in seen[1:]:
            assert_equal(other, seen[0], "buffers in validation")
        assert (
            spread([torch.cat([b.double().flatten() for b in r["buffers"]]) for r in run.ranks])
            == 0
        )
    if rule == "median":
        own = [part["state_dict"] for part in saved["lightning_sgd"]["ranks"]]
        for name, buffer in zip(names, written, strict=True):
            parts = torch.stack([state[name].double() for state in own])
            expected = parts.median(dim=0).values if buffer.is_floating_point() else parts[1]
            assert torch.equal(buffer.double(), expected.float().double())


class Diary(Regression):
    """Logs a loss that is NaN on one rank."""

    def __init__(self, rank=1):
        super().__init__(sgd)
        self.rank = rank

    def validation_step(self, batch, batch_idx):
        value = math.nan if self.global_rank == self.rank else 1.0 + self.global_rank
        self.log("val_loss", value, sync_dist=True, batch_size=4)
        self.log("val_sum", value, sync_dist=True, reduce_fx="sum", batch_size=4)
        self.log("val_max", 1.0 * self.global_rank, sync_dist=True, reduce_fx="max")

    def on_validation_epoch_end(self):
        votes = [self.trainer.strategy.reduce_boolean_decision(self.global_rank == self.rank, all=a)
                 for a in (True, False)]  # fmt: skip
        assert votes == [False, not self.trainer.strategy.robust_metrics]

    def on_train_end(self):
        values = {key: float(value) for key, value in self.trainer.callback_metrics.items()}
        torch.save((values, self.trainer.current_epoch),
                   f"{self.trainer.default_root_dir}/{self.global_rank}.diary")  # fmt: skip


@pytest.mark.parametrize("is_robust", [False, True])
def test_one_rank_that_logs_nan_stops_nobody(tmp_path, is_robust):
    stop = EarlyStopping("val_loss", patience=10, check_finite=True)
    strategy = byzantine(robust_metrics=is_robust)
    Run(tmp_path, strategy, Diary(), ranks=4, val=loader(4), callbacks=[stop], max_epochs=3)
    for rank in range(4):
        values, epochs = torch.load(tmp_path / f"{rank}.diary")
        assert epochs == (3 if is_robust else 1)
        assert values["val_loss"] == pytest.approx(3.0 if is_robust else math.nan, nan_ok=True)
        assert values["val_max"] == 3.0
        if is_robust:
            batches = NUM_BATCHES
            assert values["val_sum"] == pytest.approx(4 * 3.0 * batches)


class Flipping(Callback):
    """A bit flips in the memory of some ranks."""

    def __init__(self, ranks, step=4):
        self.ranks, self.step = ranks, step

    def on_train_batch_end(self, trainer, pl_module, *args):
        if trainer.global_step == self.step and trainer.global_rank in self.ranks:
            with torch.no_grad():
                next(pl_module.parameters())[0, 0] += 1.0


class Validated(Regression):
    """Has a validation."""

    def validation_step(self, batch, batch_idx):
        return loss_of(self.net, batch)


@pytest.mark.parametrize("audit_every", [0, 3])
def test_a_rank_that_has_strayed_gets_the_weights_of_the_majority(tmp_path, audit_every):
    callbacks = [Flipping([0]), Silent(r"Ranks \[0\] had other weights than the majority")]
    strategy = byzantine(audit_every=audit_every)
    module, settings = Validated(sgd), {"callbacks": callbacks, "max_epochs": 1}
    run = Run(tmp_path, strategy, module, ranks=4, val=loader(4), **settings)
    assert spread(run.trace[4]) > 0  # after the flip
    # The sixth step is audited; else validation finds out.
    assert (spread(run.trace[6]) > 0) == (audit_every == 0)
    assert spread(finals(run)) == 0.0


def test_weights_without_a_majority_end_the_training(tmp_path):
    with pytest.raises(
        Exception, match=r"none are those of a majority\. Start again from the last"
    ):
        Run(tmp_path, byzantine(), ranks=2, callbacks=[Flipping([0])])


class Lying(lightning_sgd.ByzantineStrategy):
    """One rank returns a wrong part."""

    def aggregate(self, replica, columns, absent):
        shard = super().aggregate(replica, columns, absent)
        return shard + (self.global_rank == 2)


class Verdicts(Callback):
    """Writes down what the audits found."""

    def __init__(self, folder):
        self.folder = folder

    def on_fit_end(self, trainer, pl_module):
        wrong = trainer.strategy.audit.num_wrong
        torch.save(wrong, f"{self.folder}/verdicts.{trainer.global_rank}")


@pytest.mark.parametrize("audit_every", [0, 1, 3])
def test_a_rank_that_returns_wrong_parts_is_found_out_in_audits(tmp_path, audit_every):
    callbacks = [Silent("Rank 2 returned a wrong part"), Verdicts(tmp_path)]
    settings = {"ranks": 4, "callbacks": callbacks, "max_epochs": 1}
    run = Run(tmp_path, Lying(audit_every=audit_every, **FORK), **settings)
    assert spread(finals(run)) == 0.0
    found = {0: 0, 1: 2, 3: 0}[audit_every]  # the third and the seventh audit look at rank 2
    for rank in range(4):
        assert torch.load(tmp_path / f"verdicts.{rank}") == [0, 0, found, 0]


def test_audits_change_nothing_where_all_is_well(tmp_path):
    settings = {"aggregator": "nnm+trmean", "num_byzantine": 1}
    drill = {"attack": GaussianAttack(), "byzantine_ranks": [3]}
    plain = Run(tmp_path / "plain", byzantine(**settings, **drill), ranks=4)
    audited = Run(tmp_path / "audited", byzantine(**settings, **drill, audit_every=2), ranks=4)
    assert all(torch.equal(a[0], b[0]) for a, b in zip(audited.trace, plain.trace, strict=True))


# What it costs, what it says, and what it refuses.


def test_bytes_are_counted(tmp_path):
    run = Run(tmp_path, byzantine("filter", 1), Classifier(), ranks=4, data=digits(4),
              max_epochs=1, log_every_n_steps=1, limit_val_batches=0)  # fmt: skip
    num_weights = flat(Classifier()).numel()
    shard = -(-num_weights // 4)
    by_hand = 3 * (2 * 4 * shard + 8 * (4 + 16) + 5 * 8)
    metrics = run.ranks[0]["metrics"][-1]
    assert metrics["comm/bytes_per_step"] == by_hand
    assert by_hand < 1.2 * all_reduce_traffic(4 * num_weights, 4)[0]  # of 1226 weights


@pytest.mark.parametrize("name", ["byzantine", "byzantine_fork", "byzantinestrategy"])
def test_the_trainer_finds_it_by_name(name):
    trainer = Trainer(strategy=name, accelerator="cpu", devices=2, logger=False)
    assert isinstance(trainer.strategy, lightning_sgd.ByzantineStrategy)


def test_it_says_what_it_does():
    strategy = byzantine("nnm+krum", 2, worker_momentum=0.9, audit_every=5,
                         attack=SignFlip(), byzantine_ranks=[1, 0])  # fmt: skip
    assert strategy.describe() == (
        "combined with momentum 0.9 by NNM() + Krum(num_byzantine=2), audited every 5 steps, attacked on purpose by [1, 0]"
    )


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"aggregator": "nonsense"}, "Rules are mean"),
        ({"aggregator": Mean(2), "num_byzantine": 1}, "Give it once"),
        ({"num_byzantine": -1}, "a whole number from 0"),
        ({"worker_momentum": 1.0}, r"Expected `worker_momentum` to be in \[0, 1\), got 1.0"),
        ({"workers": "threads"}, "Expected `workers` to be one of rank, micro_batch, both"),
        ({"nonfinite": "keep"}, "Expected `nonfinite` to be 'drop' or 'raise'"),
        ({"buffers": "mode"}, "Expected `buffers` to be one of median"),
        ({"audit_every": -1}, "Expected `audit_every` to be at least 0"),
        ({"attack": SignFlip()}, "A simulated attack needs both `attack` and `byzantine_ranks`"),
        ({"byzantine_ranks": [1]}, "A simulated attack needs both `attack` and `byzantine_ranks`"),
        ({"sigterm_every_n_batches": -1}, "Expected `sigterm_every_n_batches` to be at least 0"),
    ],
)
def test_settings_are_checked(settings, message):
    with pytest.raises(ValueError, match=message):
        byzantine(**settings)


@pytest.mark.parametrize(
    ("settings", "trainer_settings", "message"),
    [
        ({"num_byzantine": 1}, {}, "less than half of 2 ranks, got 1. Use at least 3 workers"),
        ({"aggregator": "bulyan", "num_byzantine": 1}, {"devices": 4}, "for Bulyan"),
        ({"workers": "micro_batch"}, {}, "with several ranks use 'both'"),
        ({}, {"sync_batchnorm": True}, "use GroupNorm"),
        ({"attack": SignFlip(), "byzantine_ranks": [2]}, {}, "Expected `byzantine_ranks` to be below 2"),
        ({"attack": MinMax(), "byzantine_ranks": [1]}, {}, "Try it with micro-batches as workers"),
    ],
)  # fmt: skip
def test_combinations_that_cannot_work_are_refused_with_the_remedy(
    tmp_path, settings, trainer_settings, message
):
    with pytest.raises(Exception, match=message):
        ranks = trainer_settings.pop("devices", 2)
        Run(
            tmp_path,
            byzantine(**settings),
            Classifier(),
            ranks=ranks,
            data=digits(2),
            **trainer_settings,
        )


def test_more_than_a_quarter_of_wrong_workers_is_outside_of_the_proofs(tmp_path):
    with pytest.raises(
        Exception, match=r"1 of 3 workers may be wrong\. The proofs of the spectral"
    ):
        Run(tmp_path, byzantine("filter", 1), ranks=3)  # warnings are errors here
