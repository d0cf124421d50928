"""Overlap-Local-SGD against its matrix form in NumPy, its invariants, and what is in flight when."""

from __future__ import annotations

import os
import signal
import time
from datetime import timedelta
from functools import partial

import numpy as np
import pytest
import torch
import torch.distributed as dist
from lightning.pytorch import Callback, Trainer
from support.callback_training import Classifier, digits
from support.rank_processes import run_as_torchrun
from support.strategy_training import (
    FORK,
    NUM_BATCHES,
    Run,
    ddp,
    flat,
    loader,
    samples,
    sgd,
    spread,
)
from support.training import Regression, loss_of, network, trainer

from lightning_sgd import LocalSGDStrategy, OverlapLocalSGDStrategy
from lightning_sgd.functional.distributed.overlap_local_sgd import (
    effective_step,
    move_anchor_,
    pull_back_,
    velocity_scale,
)

pytestmark = [
    pytest.mark.timeout(90),
    # The resumed run keeps its files apart on purpose.
    pytest.mark.filterwarnings("ignore:The dirpath has changed:UserWarning"),
]
STEPS = 2 * NUM_BATCHES
SIZE = (4 * 8 + 8 + 8 + 1) * 4 + 2 * 4  # parameters, and the tag


def overlap(**settings):
    return OverlapLocalSGDStrategy(**{**FORK, **settings})


def close(ours, expected, rtol):
    for step, (a, b) in enumerate(zip(ours, expected, strict=True), start=1):
        for rank, (x, y) in enumerate(zip(a, b, strict=True)):
            torch.testing.assert_close(x, y, rtol=rtol, atol=rtol, msg=f"step {step}, rank {rank}")


def boundary_matrix(m, alpha):
    """Columns are the models and the anchor."""
    w = np.zeros((m + 1, m + 1))
    w[:m, :m] = (1 - alpha) * np.eye(m)
    w[:m, m] = (1 - alpha) / m
    w[m, :] = alpha
    return w


def by_recursion(num_ranks, period, alpha, beta, *, factor=1.0, lr=lambda _: 0.1, late=1, warmup=0):
    """Every rank's weights after every step, and the anchors, in NumPy; torch only takes each rank's own step.

    With ``late=1`` a boundary pulls towards the mean of the boundary before it.
    """
    nets = [network().double() for _ in range(num_ranks)]
    optimizers = [sgd(net.parameters()) for net in nets]
    x, y = (tensor.double() for tensor in samples().tensors)
    z = flat(nets[0]).numpy()
    v, means, last, trace, anchors = np.zeros_like(z), [], 0.0, [], []
    for step in range(1, STEPS + 1):
        begin = (step - 1) % NUM_BATCHES * 8
        for rank, (net, optimizer) in enumerate(zip(nets, optimizers, strict=True)):
            # Parallel SGD sees the samples of all ranks.
            mine = (
                slice(begin, begin + 8)
                if step <= warmup
                else slice(begin + rank, begin + 8, num_ranks)
            )
            optimizer.param_groups[0]["lr"] = (1 if step <= warmup else factor) * lr(step)
            optimizer.zero_grad()
            loss_of(net, (x[mine], y[mine])).backward()
            optimizer.step()
        models = np.stack([flat(net).numpy() for net in nets])
        if step <= warmup:
            z = models[0].copy()
        elif (step - warmup) % period == 0:
            if len(means) >= late:
                mean, scale = means[-late]
                v = beta * scale * v + (mean - z)
                z = z + v
            models = (1 - alpha) * models + alpha * z
            scale = lr(step) / last if last else 1.0
            means, last = [*means, (models.mean(axis=0), scale)], lr(step)
            for net, row in zip(nets, models, strict=True):
                torch.nn.utils.vector_to_parameters(torch.from_numpy(row), net.parameters())
        trace.append([torch.from_numpy(row.copy()) for row in models])
        anchors.append(z.copy())
    if means:  # drained
        mean, scale = means[-1]
        anchors.append(z + beta * scale * v + (mean - z))
    return trace, anchors


# --- the arithmetic of a boundary


def test_the_matrix_of_a_boundary():
    # The fixed vector, and the norm of what is left: the reason why mixing never moves y and contracts by 1 − α.
    m, alpha = 5, 0.6
    w = boundary_matrix(m, alpha)
    u = np.array([(1 - alpha) / m] * m + [alpha])
    np.testing.assert_allclose(w.sum(axis=0), np.ones(m + 1), atol=1e-15)
    assert np.abs(w.sum(axis=1) - 1).max() > 0.1  # rows do not
    np.testing.assert_allclose(w @ u, u, atol=1e-15)
    assert np.linalg.norm(w - np.outer(u, np.ones(m + 1)), 2) == pytest.approx(1 - alpha)


def cross(models, anchor, velocity, alpha, beta):
    """A boundary and the arrival of what it starts, by the functions that the strategy uses."""
    pull_back_(models, anchor, alpha)
    move_anchor_(anchor, velocity, models.mean(dim=0), beta)


def drawn(m=4, d=7):
    generator = torch.Generator().manual_seed(0)
    return (torch.randn(n, d, generator=generator, dtype=torch.float64) for n in (m, 1))


def test_a_boundary_is_the_product_with_the_matrix():
    models, anchor = drawn()
    expected = np.concatenate([models, anchor]).T @ boundary_matrix(4, 0.6)
    cross(models, anchor, torch.zeros(1, 7).double(), 0.6, 0.0)
    np.testing.assert_allclose(np.concatenate([models, anchor]).T, expected, atol=1e-12)


def test_a_boundary_leaves_y_where_it_is_and_contracts_by_one_minus_alpha():
    models, anchor = drawn()
    velocity, alpha = torch.zeros_like(anchor), 0.6
    y = 0.4 * models.mean(dim=0) + 0.6 * anchor
    for _ in range(25):
        apart = (models - models.mean(dim=0)).norm()
        cross(models, anchor, velocity.zero_(), alpha, 0.0)
        after = (models - models.mean(dim=0)).norm()
        assert float(after / apart) == pytest.approx(1 - alpha, rel=1e-6)
        torch.testing.assert_close(0.4 * models.mean(dim=0) + 0.6 * anchor, y)
    torch.testing.assert_close(models, y.expand(4, -1), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(("alpha", "beta"), [(0.6, 0.7), (0.6, 0.0), (0.3, 0.5)])
def test_the_drift_under_a_constant_gradient(alpha, beta):
    # γτ(1 − α)/(1 − αβ)·g per round in the steady state.
    models, anchor = torch.zeros(2, 1).double(), torch.zeros(1, 1).double()
    velocity, before = torch.zeros(1, 1).double(), 0.0
    for _ in range(200):
        before = float(anchor)
        models -= 0.1 * 3 * 2.0
        cross(models, anchor, velocity, alpha, beta)
    drift = before - float(anchor)
    assert drift == pytest.approx(0.1 * 3 * 2.0 * (1 - alpha) / (1 - alpha * beta), rel=1e-4)
    assert effective_step(alpha, beta) == pytest.approx((1 - alpha) / (1 - alpha * beta))


def test_private_velocities_as_in_the_authors_code_are_the_same():
    # There each rank keeps v_i ← β v_i + (x_i − z), and z is the mean of z + v_i.
    models, anchor = drawn()
    shared, velocity = models.clone(), torch.zeros_like(anchor)
    z, private = anchor.clone(), torch.zeros_like(models)
    for step in range(6):
        change = torch.sin(models + step)
        models, shared = models - 0.1 * change, shared - 0.1 * change
        pull_back_(models, z, 0.6)
        private = 0.7 * private + (models - z)
        z = (z + private).mean(dim=0, keepdim=True)
        cross(shared, anchor, velocity, 0.6, 0.7)
        torch.testing.assert_close(shared, models, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(anchor, z, rtol=1e-12, atol=1e-12)


def test_a_pullback_of_one_freezes_and_of_zero_leaves_alone():
    models, anchor = drawn()
    start = anchor.clone()
    for _ in range(5):
        models = models + 1.0
        cross(models, anchor, torch.zeros_like(anchor), 1.0, 0.0)
    torch.testing.assert_close(models, start.expand(4, -1))
    before = models.clone()
    pull_back_(models, torch.full((1, 7), 9.0).double(), 0.0)
    assert torch.equal(models, before)


def test_velocities_keep_their_proportion_to_positive_step_sizes():
    assert velocity_scale(0.01, 0.1) == pytest.approx(0.1)
    assert [velocity_scale(*pair) for pair in ((0.0, 0.1), (0.1, 0.0))] == [1.0, 1.0]


# --- on processes


@pytest.mark.parametrize("num_ranks", [2, 4])
@pytest.mark.parametrize(("period", "beta"), [(1, 0.7), (2, 0.7), (3, 0.0)])
def test_every_step_of_every_rank_is_that_of_the_recursion(tmp_path, num_ranks, period, beta):
    strategy = overlap(period=period, anchor_momentum=beta)
    run = Run(tmp_path, strategy, ranks=num_ranks, precision="64-true")
    trace, _ = by_recursion(num_ranks, period, 0.6, beta)
    close(run.trace, trace, 1e-12)
    # Pulled back to the mean of two boundaries ago, it would be another training.
    staler, _ = by_recursion(num_ranks, period, 0.6, beta, late=2)
    assert spread([run.trace[-1][0], staler[-1][0]]) > 1e-4


@pytest.mark.parametrize("period", [1, 2])
def test_the_warm_up_is_parallel_sgd_and_the_anchor_starts_from_it(tmp_path, period):
    settings = {"warmup_steps": 5, "lr_compensation": True}
    run = Run(tmp_path, overlap(period=period, **settings), ranks=4, precision="64-true")
    factor = (1 - 0.6 * 0.7) / (1 - 0.6)
    trace, _ = by_recursion(4, period, 0.6, 0.7, factor=factor, warmup=5)
    close(run.trace, trace, 1e-12)
    spreads = [spread(weights) for weights in run.trace]
    assert [s == 0.0 for s in spreads] == [True] * 5 + [False] * (STEPS - 5)


def test_the_warm_up_is_ddp_for_any_optimizer(tmp_path):
    module = partial(Regression, partial(torch.optim.Adam, lr=0.1))
    ours = Run(tmp_path / "ours", overlap(warmup_steps=6), module())
    theirs = Run(tmp_path / "ddp", ddp(), module())
    close(ours.trace[:6], theirs.trace[:6], 1e-6)


class InFlight(Regression):
    """Writes down after every step how many exchanges are in flight."""

    def on_train_start(self):
        self.seen = []

    def on_train_batch_end(self, *_):
        self.seen.append(len(self.trainer.strategy.exchange._in_flight))

    def on_fit_end(self):
        torch.save(self.seen, f"{self.trainer.default_root_dir}/seen")


def test_without_overlap_every_rank_waits_and_the_training_is_the_same(tmp_path):
    runs, seen = {}, {}
    for overlaps in (True, False):
        folder = tmp_path / str(overlaps)
        runs[overlaps] = Run(folder, overlap(period=3, overlap=overlaps), InFlight(sgd), ranks=4)
        seen[overlaps] = torch.load(folder / "seen")
    assert seen[True] == [0, 0] + [1] * (STEPS - 2)
    assert seen[False] == [0] * STEPS
    for ours, theirs in zip(runs[True].ranks, runs[False].ranks, strict=True):
        assert all(map(torch.equal, ours["trace"], theirs["trace"]))
        assert torch.equal(ours["final"], theirs["final"])


class Anchored(Regression):
    """Writes down the anchor and its velocity at the end, and looks at pointers on the way."""

    def __init__(self, make, folder):
        super().__init__(make)
        self.folder = folder

    def on_train_batch_end(self, *_):
        (anchor,) = self.trainer.strategy._anchors
        mine = {param.untyped_storage().data_ptr() for param in self.parameters()}
        for each in (anchor.in_flight, anchor.anchor, anchor.velocity):
            assert not mine & {b.untyped_storage().data_ptr() for b in each.buffers}

    def on_fit_end(self):
        (anchor,) = self.trainer.strategy._anchors
        views = [
            torch.cat([view.reshape(-1) for view in each.views])
            for each in (anchor.anchor, anchor.velocity)
        ]
        torch.save(views, f"{self.folder}/anchor.{self.global_rank}")


def test_anchors_are_the_same_bits_on_all_ranks_and_the_last_mean_arrives(tmp_path):
    Run(tmp_path, overlap(), Anchored(sgd, tmp_path), ranks=4, precision="64-true")
    saved = [torch.load(tmp_path / f"anchor.{rank}") for rank in range(4)]
    for place, velocity in saved[1:]:
        assert torch.equal(place, saved[0][0])
        assert torch.equal(velocity, saved[0][1])
    _, anchors = by_recursion(4, 2, 0.6, 0.7)
    torch.testing.assert_close(saved[0][0], torch.from_numpy(anchors[-1]), rtol=1e-12, atol=1e-12)


def test_compensated_steps_are_larger_and_nobody_else_sees_it(tmp_path):
    class Watched(Regression):
        def on_train_batch_end(self, *_):
            assert self.optimizers().param_groups[0]["lr"] == 0.1

    strategy = overlap(lr_compensation=True)
    run = Run(tmp_path, strategy, Watched(sgd), precision="64-true")
    trace, _ = by_recursion(2, 2, 0.6, 0.7, factor=(1 - 0.6 * 0.7) / (1 - 0.6))
    close(run.trace, trace, 1e-12)


@pytest.mark.parametrize("scales", [True, False])
def test_the_velocity_after_a_drop_of_the_step_size(tmp_path, scales):
    def schedule(optimizer):
        drop = torch.optim.lr_scheduler.MultiStepLR(optimizer, [5], gamma=0.1)
        return {"scheduler": drop, "interval": "step"}

    strategy = overlap(scale_velocity_with_lr=scales)
    run = Run(tmp_path, strategy, Regression(sgd, schedule), precision="64-true")

    def lr(step):
        return 0.1 if step <= 5 else 0.01

    trace, _ = by_recursion(2, 2, 0.6, 0.7, lr=lr)
    if scales:
        close(run.trace, trace, 1e-12)
    else:
        assert spread([run.trace[-1][0], trace[-1][0]]) > 1e-4


@pytest.mark.parametrize(
    ("settings", "num_means"), [({"period": 4}, 3), ({"period": 7}, 2), ({"period": 15}, 0)]
)
def test_messages_and_bytes(tmp_path, monkeypatch, settings, num_means):
    started, reduce = [], dist.all_reduce

    def counted(tensor, *args, **kwargs):
        if kwargs.get("group") not in (None, dist.group.WORLD):
            started.append((tensor.nbytes, kwargs.get("async_op", False)))
        return reduce(tensor, *args, **kwargs)

    class Counted(Regression):
        def on_fit_end(self):
            traffic = self.trainer.strategy.exchange.traffic
            torch.save((started, traffic.num_bytes), f"{tmp_path}/counted")

    monkeypatch.setattr(dist, "all_reduce", counted)
    Run(tmp_path, overlap(**settings), Counted(sgd), ranks=4)
    started, num_bytes = torch.load(tmp_path / "counted")
    assert started == [(SIZE, True)] * num_means + [(SIZE, False)]  # and the mean at the end
    assert num_bytes == (num_means + 1) * SIZE * 1.5


class Late(Regression):
    """Rank 1 is late once, before the first boundary; then every step takes a while."""

    def __init__(self, make, folder):
        super().__init__(make)
        self.folder, self.waited = folder, []

    def training_step(self, batch, batch_idx):
        if self.global_step == 2 and self.global_rank == 1:
            time.sleep(0.8)
        if self.global_step > 3 and self.global_rank == 0:
            time.sleep(0.3)
        self.waited.append(self.trainer.strategy.exchange.traffic.seconds)
        return super().training_step(batch, batch_idx)

    def on_fit_end(self):
        torch.save(self.waited, f"{self.folder}/waited.{self.global_rank}")


def test_nobody_waits_for_a_rank_that_is_late_once(tmp_path):
    # Rank 0 is at the first boundary 0.8 s early, and at the second one when the mean has long arrived.
    settings = {"period": 4, "sigterm_every_n_batches": 0, "max_steps": 9}
    limit = settings.pop("max_steps")
    for strategy, waits in ((overlap(**settings), False), (local(**settings), True)):
        folder = tmp_path / type(strategy).__name__
        Run(folder, strategy, Late(sgd, folder), max_steps=limit)
        waited = torch.load(folder / "waited.0")
        assert (waited[8] > 0.5) == waits
        assert waits or waited[8] < 0.15


def local(**settings):
    return LocalSGDStrategy(**{**FORK, **settings})


@pytest.mark.parametrize("model", ["mean", "anchor", "local"])
def test_what_is_evaluated(tmp_path, model):
    # Validation after steps 3, 6, … of each epoch: with period 2 something has been in flight.
    run = Run(
        tmp_path,
        overlap(eval_model=model),
        Validated(sgd),
        precision="64-true",
        val=loader(2),
        val_check_interval=3,
    )
    trace, anchors = by_recursion(2, 2, 0.6, 0.7)
    close(run.trace, trace, 1e-12)
    steps = [3, 6, 10, 13]
    for rank, record in enumerate(run.ranks):
        assert len(record["validated"]) == 4
        for step, seen in zip(steps, record["validated"], strict=True):
            mean = torch.stack(trace[step - 1]).mean(dim=0)
            # The mean of the last boundary has arrived: it is the anchor that the next boundary pulls to.
            later = torch.from_numpy(anchors[min(step // 2 * 2 + 1, STEPS)])
            expected = {"mean": mean, "local": trace[step - 1][rank], "anchor": later}[model]
            torch.testing.assert_close(seen, expected, rtol=1e-12, atol=1e-12)
    finals = [record["final"] for record in run.ranks]
    assert spread(finals) == 0.0
    end = torch.from_numpy(anchors[-1]) if model == "anchor" else torch.stack(trace[-1]).mean(dim=0)
    torch.testing.assert_close(finals[0], end, rtol=1e-12, atol=1e-12)


class Validated(Regression):
    """Has something to validate."""

    def validation_step(self, batch, batch_idx):
        return loss_of(self.net, batch)


class SaveEvery(Callback):
    """Writes a checkpoint after every step."""

    def __init__(self, folder):
        self.folder = folder

    def on_train_batch_end(self, trainer, *_):
        trainer.save_checkpoint(f"{self.folder}/{trainer.global_step}.ckpt")


def fit(folder, ranks, resume=None, saves=True, **settings):
    return Run(
        folder,
        overlap(**settings),
        Classifier(dropout=0.1),
        ranks=ranks,
        data=digits(ranks),
        resume=resume,
        callbacks=[SaveEvery(folder)] if saves else [],
        max_epochs=-1,
        max_steps=11,
        limit_val_batches=0,
    )


@pytest.mark.parametrize(
    ("at", "ranks", "warmup"), [(4, 4, 0), (5, 2, 0), (1, 2, 0), (2, 2, 3), (6, 2, 3)]
)
def test_resume_is_exact_in_flight_and_in_the_middle_of_a_round(tmp_path, at, ranks, warmup):
    settings = {"period": 2, "lr_compensation": True, "warmup_steps": warmup}
    plain = fit(tmp_path / "plain", ranks, saves=False, **settings)
    through = fit(tmp_path / "through", ranks, **settings)
    resumed = fit(tmp_path / "resumed", ranks, tmp_path / "through" / f"{at}.ckpt", **settings)
    for ours, expected, alone in zip(resumed.ranks, through.ranks, plain.ranks, strict=True):
        assert all(map(torch.equal, expected["trace"], alone["trace"]))
        rest = expected["trace"][at:]
        assert len(ours["trace"]) == len(rest)
        assert all(map(torch.equal, ours["trace"], rest))
        assert torch.equal(ours["final"], expected["final"])


def test_anchors_are_written_once_for_all_ranks(tmp_path):
    fit(tmp_path, 2)
    ranks = torch.load(tmp_path / "5.ckpt", weights_only=True)["lightning_sgd"]["ranks"]
    (first,), (second,) = (part["lightning_sgd"]["own"]["anchors"] for part in ranks)
    assert {"anchor", "velocity"} <= first.keys()
    assert second.keys() == {"lr", "has_anchor"}


def test_the_anchor_distance_is_logged(tmp_path):
    run = Run(tmp_path, overlap(), log_every_n_steps=1, precision="64-true")
    trace, anchors = by_recursion(2, 2, 0.6, 0.7)
    for rank, record in enumerate(run.ranks):
        assert "overlap/anchor_distance" not in record["metrics"][0]
        # What the pullback left is 1 − α of the distance before it.
        left = (trace[3][rank] - torch.from_numpy(anchors[3])).norm()
        logged = record["metrics"][3]["overlap/anchor_distance"]
        assert logged == pytest.approx(float(left) / 0.4, rel=1e-5)


class Failing(Regression):
    """Ranks get a signal, or raise.

    Args:
        failures: By rank and number of the step, counted from 0, the signal; ``None`` to raise.
    """

    def __init__(self, failures):
        super().__init__(sgd)
        self.failures = failures

    def training_step(self, batch, batch_idx):
        place = self.global_rank, self.global_step
        if place in self.failures and self.failures[place] is None:
            raise ValueError("the data are gone")
        if place in self.failures:
            os.kill(os.getpid(), self.failures[place])
        return super().training_step(batch, batch_idx)


def fail(tmp_path, failures, ranks, every, meanwhile=None):
    """Outcomes by rank, where a boundary follows step 4 and nobody gives up within 30 seconds."""

    def work(rank):
        settings = {"start_method": "popen", "timeout": timedelta(seconds=30)}
        strategy = overlap(period=4, sigterm_every_n_batches=every, **settings)
        quiet = trainer(tmp_path, devices=ranks, strategy=strategy, use_distributed_sampler=False)
        quiet.fit(Failing(failures), loader(ranks))

    return run_as_torchrun(work, ranks, tmp_path, meanwhile=meanwhile)


@pytest.mark.parametrize("every", [0, 1])
@pytest.mark.parametrize("step", [3, 5])
def test_a_rank_that_is_killed_is_named_at_once(tmp_path, step, every):
    # In step 3 it has not sent what the others send next, so that their mean never arrives; after 5 it has.
    outcomes = fail(tmp_path, {(1, step): signal.SIGKILL}, ranks=4, every=every)
    for rank in (0, 2, 3):
        assert "Rank 1 does not answer" in outcomes[rank].error
        assert outcomes[rank].seconds < 20


def bury(processes):
    """Kill the stopped rank when the one that raises has ended."""
    processes[1].join(40)
    os.kill(processes[2].pid, signal.SIGKILL)


def test_a_rank_that_raises_does_not_wait_for_a_mean_that_never_arrives(tmp_path):
    # Rank 2 stands still before the boundary, rank 1 raises after it: what it has in flight stays there.
    failures = {(2, 3): signal.SIGSTOP, (1, 4): None}
    outcomes = fail(tmp_path, failures, ranks=3, every=0, meanwhile=bury)
    assert outcomes[1].error == "ValueError: the data are gone"
    assert outcomes[1].seconds < 20
    assert "Rank 1 raised ValueError: the data are gone" in outcomes[0].error


class Ahead(Regression):
    """Rank 1 counts two steps more, as after steps that the others did not take."""

    def on_train_batch_end(self, *_):
        (replica,) = self.trainer.strategy.replicas
        if self.global_rank == 1 and replica.num_steps == 2:
            replica.num_steps += 2


def test_a_mean_of_another_step_is_found_out(tmp_path):
    def work(rank):
        strategy = overlap(start_method="popen", timeout=timedelta(seconds=6))
        quiet = trainer(tmp_path, devices=2, strategy=strategy, use_distributed_sampler=False)
        quiet.fit(Ahead(sgd), loader(2))

    for outcome in run_as_torchrun(work, 2, tmp_path):
        assert "rank 0: anchor after step 4; rank 1: anchor after step 6" in outcome.error


# --- settings


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"period": 0}, r"Expected `period` to be at least 1, got 0"),
        (
            {"pullback": 1.0},
            r"Expected `pullback` to be in \(0, 1\), got 1.0. With 1 training stan",
        ),
        ({"pullback": 0.0}, r"Expected `pullback` to be in \(0, 1\), got 0.0"),
        ({"warmup_steps": -1}, r"Expected `warmup_steps` to be at least 0, got -1"),
        ({"anchor_momentum": 1.0}, r"Expected `anchor_momentum` to be in \[0, 1\), got 1.0"),
    ],
)
def test_settings_out_of_range_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        OverlapLocalSGDStrategy(**settings)


@pytest.mark.parametrize(
    ("name", "method"),
    [
        ("overlap_local_sgd", "popen"),
        ("Overlap_Local_SGD_fork", "fork"),
        ("OverlapLocalSGDStrategy_spawn", "spawn"),
    ],
)
def test_strategy_strings(name, method):
    built = Trainer(strategy=name, accelerator="cpu", devices=2, logger=False).strategy
    assert isinstance(built, OverlapLocalSGDStrategy)
    expected = {"period": 2, "pullback": 0.6, "anchor_momentum": 0.7, "_start_method": method}
    assert expected.items() <= vars(built).items()
