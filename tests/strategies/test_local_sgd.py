"""Local SGD against plain loops, torch's own averager, DDP, and counts of what is sent."""

from __future__ import annotations

import warnings
from functools import partial
from itertools import pairwise

import numpy as np
import pytest
import torch
import torch.distributed as dist
from lightning.pytorch import LightningModule, Trainer
from support.processes import run_ranks
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
    simulate,
    spread,
)
from support.training import Regression, loss_of, network, trainer
from torch.distributed.algorithms.model_averaging.averagers import PeriodicModelAverager

from lightning_sgd import LocalSGDStrategy, NoEffectWarning
from lightning_sgd.functional.distributed.local_sgd import PeriodSchedule, RunningMean
from lightning_sgd.functional.distributed.traffic import all_reduce_traffic

pytestmark = pytest.mark.timeout(90)
NUM_PARAMS = 4 * 8 + 8 + 8 + 1
HEADER_BYTES = 2 * 4


def local_sgd(**settings):
    return LocalSGDStrategy(**{**FORK, **settings})


def close(ours, expected, rtol):
    for step, (a, b) in enumerate(zip(ours, expected, strict=True), start=1):
        for rank, (x, y) in enumerate(zip(a, b, strict=True)):
            torch.testing.assert_close(x, y, rtol=rtol, atol=rtol, msg=f"step {step}, rank {rank}")


# --- the arithmetic


@pytest.mark.parametrize("num_ranks", [2, 4])
@pytest.mark.parametrize("period", [1, 3])
def test_every_step_of_every_rank_is_that_of_plain_loops(tmp_path, num_ranks, period):
    run = Run(tmp_path, local_sgd(period=period), ranks=num_ranks, precision="64-true")
    close(run.trace, simulate(sgd, num_ranks, lambda step: step % period == 0), 1e-13)


@pytest.mark.parametrize("nesterov", [False, True])
def test_period_one_is_parallel_sgd(tmp_path, nesterov):
    # The case with a known answer: averaging models is averaging gradients, for every linear optimizer.
    def make(params):
        return torch.optim.SGD(params, lr=0.1, momentum=0.9, nesterov=nesterov, weight_decay=0.01)

    run = Run(tmp_path, local_sgd(period=1), Regression(make), precision="64-true")
    close([[w] for w, _ in run.trace], simulate(make, 1, lambda _: False), 1e-12)


def test_period_one_is_what_ddp_does(tmp_path):
    ours = Run(tmp_path / "ours", local_sgd(period=1))
    theirs = Run(tmp_path / "ddp", ddp())
    close(ours.trace, theirs.trace, 1e-6)


def test_torchs_own_averager_agrees(tmp_path):
    period, steps = 3, 2 * NUM_BATCHES

    def train(rank):
        net = network()
        optimizer = sgd(net.parameters())
        averager = PeriodicModelAverager(period, warmup_steps=period - 1)
        x, y = samples().tensors
        for step in range(steps):
            begin = step % NUM_BATCHES * 8
            mine = slice(begin + rank, begin + 8, 2)
            optimizer.zero_grad()
            loss_of(net, (x[mine], y[mine])).backward()
            optimizer.step()
            averager.average_parameters(net.parameters())
        return flat(net)

    theirs = run_ranks(train, 2, tmp_path)
    ours = Run(tmp_path / "ours", local_sgd(period=period))
    close(ours.trace[-1:], [theirs], 1e-6)


def test_ranks_have_the_same_bits_after_an_average_and_not_before(tmp_path):
    run = Run(tmp_path, local_sgd(period=4), ranks=4)
    spreads = [spread(weights) for weights in run.trace]
    assert [s == 0.0 for s in spreads] == [(step + 1) % 4 == 0 for step in range(len(spreads))]
    assert spread([record["final"] for record in run.ranks]) == 0.0


def test_averages_keep_the_mean(tmp_path):
    run = Run(tmp_path, local_sgd(period=None), ranks=4, precision="64-true")
    mean = torch.stack(run.trace[-1]).mean(dim=0)
    torch.testing.assert_close(run.ranks[0]["final"], mean, rtol=1e-13, atol=1e-13)


# --- when


def reference_schedule(table, num_steps):
    """The steps after which to average, in NumPy."""
    begins = np.array(sorted(table))
    due, last = [], 0
    for step in range(1, num_steps + 1):
        period = table[begins[begins <= step].max()]
        if step - last >= period:
            due.append(step)
            last = step
    return due


@pytest.mark.parametrize("table", [{0: 1}, {0: 5}, {0: 1, 4: 3}, {0: 4, 6: 2, 10: 1}])
def test_a_table_of_periods(tmp_path, table):
    run = Run(tmp_path, local_sgd(period=table))
    due = [step for step, weights in enumerate(run.trace, start=1) if spread(weights) == 0.0]
    assert due == reference_schedule(table, 2 * NUM_BATCHES)


@pytest.mark.parametrize("period", range(1, 8))
def test_the_number_of_averages_is_steps_over_period(period):
    schedule, num_averages, since = PeriodSchedule(period), 0, 0
    for step in range(1, 101):
        since += 1
        if schedule.is_due(step, since):
            num_averages, since = num_averages + 1, 0
    assert num_averages == 100 // period


def test_the_warm_up_is_ddp_for_any_optimizer(tmp_path):
    # Averaging models would not be: Adam divides by each rank's own second moments.
    module = partial(Regression, partial(torch.optim.Adam, lr=0.1))
    ours = Run(tmp_path / "ours", local_sgd(period=4, warmup_steps=6), module())
    theirs = Run(tmp_path / "ddp", ddp(), module())
    close(ours.trace[:6], theirs.trace[:6], 1e-6)
    spreads = [spread(weights) for weights in ours.trace]
    due = [step for step, s in enumerate(spreads, start=1) if s == 0.0]
    assert due == [1, 2, 3, 4, 5, 6, 10, 14]
    averaged_models = Run(tmp_path / "models", local_sgd(period=1), module())
    assert spread([averaged_models.trace[5][0], theirs.trace[5][0]]) > 1e-3


class Unused(Regression):
    """On every rank another layer goes without a gradient, and one layer on all ranks."""

    def __init__(self, make):
        super().__init__(make)
        self.extra = torch.nn.ModuleList(torch.nn.Linear(1, 1) for _ in range(3))

    def training_step(self, batch, batch_idx):
        x, y = batch
        return torch.nn.functional.mse_loss(self.extra[self.global_rank](self.net(x)), y)


def test_parameters_without_a_gradient(tmp_path):
    # During the warm-up as in DDP: zero counts where one rank has no gradient; none is none where no rank has.
    ours = Run(tmp_path / "ours", local_sgd(period=2, warmup_steps=5), Unused(sgd))
    theirs = Run(tmp_path / "ddp", ddp(), Unused(sgd))
    close(ours.trace[:5], theirs.trace[:5], 1e-6)
    assert spread([record["final"] for record in ours.ranks]) == 0.0
    untouched = [param.detach() for param in Unused(sgd).extra[2].parameters()]
    del (
        untouched
    )  # drawn at random; equality with DDP, which leaves it alone, is the assertion above


# --- one-shot averaging


@pytest.mark.parametrize("average", ["last", "tail"])
def test_one_shot_averaging(tmp_path, average):
    run = Run(tmp_path, local_sgd(period=None, average=average, tail_start=5), precision="64-true")
    trace = simulate(sgd, 2, lambda _: False)
    close(run.trace, trace, 1e-13)
    kept = trace[5:] if average == "tail" else trace[-1:]
    expected = torch.stack([torch.stack(weights).mean(dim=0) for weights in kept]).mean(dim=0)
    for record in run.ranks:
        torch.testing.assert_close(record["final"], expected, rtol=1e-12, atol=1e-12)


def test_a_tail_does_not_come_back_after_training(tmp_path):
    def work(rank):
        strategy = local_sgd(start_method="popen", period=None, average="tail", tail_start=2)
        quiet = trainer(tmp_path, devices=2, strategy=strategy, use_distributed_sampler=False)
        module = Regression(sgd)
        quiet.fit(module, loader(2))
        torch.nn.init.zeros_(module.net[2].weight)
        module.validation_step = lambda batch, batch_idx: None
        before, seen = flat(module), []
        module.on_validation_epoch_start = lambda: seen.append(flat(module))
        quiet.validate(module, loader(2), verbose=False)
        return bool(torch.equal(seen[0], before))

    outcomes = run_as_torchrun(work, 2, tmp_path)
    assert [outcome.result for outcome in outcomes] == [True, True], outcomes[0].error


def test_a_tail_as_a_share_of_all_steps(tmp_path):
    share = Run(tmp_path / "a", local_sgd(period=None, average="tail", tail_start=0.5))
    step = Run(tmp_path / "b", local_sgd(period=None, average="tail", tail_start=NUM_BATCHES))
    assert torch.equal(share.ranks[0]["final"], step.ranks[0]["final"])


def test_a_share_of_unknown_length_is_refused(tmp_path):
    strategy = local_sgd(period=None, average="tail")
    with pytest.raises(Exception, match=r"Expected `tail_start` to be a step where .* got 0\.5"):
        Run(tmp_path, strategy, max_epochs=-1, max_time="00:00:00:05")


def test_the_running_mean_is_the_mean_also_of_bfloat16():
    values = torch.linspace(-1, 2, 1001).bfloat16()
    mean = RunningMean([values[:1]])
    for value in values:
        mean.update([value.reshape(1)])
    torch.testing.assert_close(mean.values[0], values.float().mean().reshape(1))
    assert mean.values[0].dtype == torch.float32


# --- what is sent


class Counting:
    """Counts collectives and bytes in every process that is forked from this one."""

    def __init__(self, monkeypatch):
        self.sizes = []
        for name in ("all_reduce", "broadcast", "all_gather", "gather", "reduce"):
            monkeypatch.setattr(dist, name, self._counting(name, getattr(dist, name)))

    def _counting(self, name, collective):
        def counted(tensor, *args, **kwargs):
            if kwargs.get("group") not in (None, dist.group.WORLD):  # one of our own
                self.sizes.append([name, tensor.nbytes])
            return collective(tensor, *args, **kwargs)

        return counted


class Counted(Regression):
    """Writes down, at the end, what its rank has sent."""

    def __init__(self, make, counting, folder):
        super().__init__(make)
        self.counting, self.folder = counting, folder

    def on_fit_end(self):
        exchange = self.trainer.strategy.exchange
        counted = {"calls": self.counting.sizes, "bytes": exchange.traffic.num_bytes}
        torch.save(counted, f"{self.folder}/counted.{self.global_rank}")


@pytest.mark.parametrize(
    ("settings", "num_collectives"),
    [
        ({"period": 4}, 3 + 1),  # after steps 4, 8, 12, and at the end
        ({"period": 7}, 2),  # after steps 7, 14; nothing is left to do at the end
        ({"period": 1}, 14),
        ({"period": None}, 1),
        ({"period": None, "average": "tail"}, 1),
    ],
)
def test_collectives_and_bytes(tmp_path, monkeypatch, settings, num_collectives):
    module = Counted(sgd, Counting(monkeypatch), tmp_path)
    Run(tmp_path, local_sgd(**settings), module, ranks=4)
    size = NUM_PARAMS * 4 + HEADER_BYTES
    for rank in range(4):
        counted = torch.load(tmp_path / f"counted.{rank}")
        assert counted["calls"] == [["all_reduce", size]] * num_collectives
        assert counted["bytes"] == num_collectives * 2 * 3 / 4 * size


def test_bytes_of_a_ring_all_reduce():
    # 2 (n - 1) messages of an n-th each.
    assert all_reduce_traffic(1200, 2) == (1200, 2)
    assert all_reduce_traffic(1200, 3) == (1600, 4)
    assert all_reduce_traffic(1200, 1) == (0, 0)


def test_traffic_is_logged_per_step(tmp_path):
    run = Run(tmp_path, local_sgd(period=2), log_every_n_steps=4)
    size = NUM_PARAMS * 4 + HEADER_BYTES
    for record in run.ranks:
        assert "comm/bytes_per_step" not in record["metrics"][2]
        logged = record["metrics"][3]
        assert logged["comm/bytes_per_step"] == 2 * size / 4
        assert logged["comm/messages_per_step"] == 2 * 2 / 4
        assert logged["comm/blocked_seconds_per_step"] > 0


# --- buffers and optimizer state


class Normalised(LightningModule):
    """Has batch statistics."""

    def __init__(self):
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.net = torch.nn.Sequential(torch.nn.BatchNorm1d(4), torch.nn.Linear(4, 1))

    def training_step(self, batch, batch_idx):
        return loss_of(self.net, batch)

    def configure_optimizers(self):
        return sgd(self.parameters())


def statistics(num_ranks):
    """Each rank's running mean of its inputs after two epochs, without any exchange."""
    x, _ = samples().tensors
    means = torch.zeros(num_ranks, 4)
    for step in range(2 * NUM_BATCHES):
        begin = step % NUM_BATCHES * 8
        for rank in range(num_ranks):
            batch = x[begin + rank : begin + 8 : num_ranks]
            means[rank] = 0.9 * means[rank] + 0.1 * batch.mean(dim=0)
    return means


@pytest.mark.parametrize("policy", ["average", "local", "rank0"])
def test_buffers(tmp_path, policy):
    run = Run(tmp_path, local_sgd(period=None, buffers=policy), Normalised(), ranks=2)
    means = statistics(2)
    expected = {"average": means.mean(dim=0, keepdim=True).expand(2, -1), "local": means}
    expected["rank0"] = means[:1].expand(2, -1)
    for rank, record in enumerate(run.ranks):
        mean = next(buffer for buffer in record["buffers"] if buffer.shape == (4,))
        torch.testing.assert_close(mean, expected[policy][rank])


def momenta(record):
    state = record["optimizers"][0]["state"]
    return torch.cat([state[index]["momentum_buffer"].reshape(-1) for index in sorted(state)])


def test_optimizer_state_is_kept_reset_or_averaged(tmp_path):
    kept, averaged = (
        Run(tmp_path / policy, local_sgd(period=7, optimizer_state=policy))
        for policy in ("keep", "average")
    )
    assert spread([momenta(record) for record in kept.ranks]) > 1e-3
    assert spread([momenta(record) for record in averaged.ranks]) == 0.0
    reset = Run(tmp_path / "reset", local_sgd(period=7, optimizer_state="reset"))
    assert all(record["optimizers"][0]["state"] == {} for record in reset.ranks)


def test_averaged_momentum_makes_local_sgd_shared_between_rounds(tmp_path):
    # One round, then one step: with state averaged, that step differs between ranks by the new gradient alone.
    run = Run(
        tmp_path, local_sgd(period=7, optimizer_state="average"), max_steps=7, precision="64-true"
    )
    trace = simulate(sgd, 2, lambda step: step == 7, epochs=1)
    close(run.trace, trace, 1e-13)
    means = torch.stack([momenta(record) for record in run.ranks]).mean(dim=0)
    assert torch.allclose(momenta(run.ranks[0]), means, rtol=1e-13)


def test_state_that_one_rank_lacks_is_left_alone_and_said(tmp_path):
    strategy = local_sgd(period=2, optimizer_state="average")

    class Lazy(Unused):
        def __init__(self):
            super().__init__(sgd)
            self.extra.append(torch.nn.Linear(2, 1))

        def training_step(self, batch, batch_idx):
            x, y = batch
            out = self.net(x)
            if self.global_rank == 1:
                out = out + self.extra[3](torch.cat([out, out], dim=1))
            return torch.nn.functional.mse_loss(out, y)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", NoEffectWarning)  # in the forked processes
        run = Run(tmp_path, strategy, Lazy())
    assert spread([record["final"] for record in run.ranks]) == 0.0
    assert spread([momenta(record)[:NUM_PARAMS] for record in run.ranks]) > 0.0


# --- settings


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"period": 0}, r"Expected `period` to be at least 1.*got 0"),
        ({"period": {1: 4}}, r"Expected `period` to be at least 1, from step 0 on, got \{1: 4\}"),
        ({"warmup_steps": -1}, r"Expected `warmup_steps` to be at least 0, got -1"),
        ({"average": "tail"}, r"Expected `average` to be 'last' with a period, got 'tail'"),
        (
            {"tail_start": 1.0},
            r"Expected `tail_start` to be a step or a share in \[0, 1\), got 1.0",
        ),
        ({"sigterm_every_n_batches": -1}, r"Expected `sigterm_every_n_batches` to be at least 0"),
    ],
)
def test_settings_out_of_range_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        LocalSGDStrategy(**settings)


def test_synchronised_batch_norm_is_refused(tmp_path):
    with pytest.raises(Exception, match=r"Expected `sync_batchnorm` to be False with LocalSGD"):
        Run(tmp_path, local_sgd(), Normalised(), sync_batchnorm=True)


def test_wrapped_modules_are_refused(tmp_path):
    class FullyShardedDataParallel(torch.nn.Linear):
        pass

    module = Regression(sgd)
    module.wrapped = FullyShardedDataParallel(1, 1)
    with pytest.raises(Exception, match=r"Expected `model` to be a plain module"):
        Run(tmp_path, local_sgd(), module, ranks=1)


def test_sparse_gradients_are_refused_in_the_warm_up(tmp_path):
    class Sparse(Regression):
        def __init__(self):
            super().__init__(torch.optim.SparseAdam)
            self.net = torch.nn.Embedding(3, 1, sparse=True)

        def training_step(self, batch, batch_idx):
            return self.net(torch.tensor([self.global_rank])).sum()

    assert spread([r["final"] for r in Run(tmp_path / "a", local_sgd(), Sparse()).ranks]) == 0.0
    with pytest.raises(Exception, match="Expected `gradients` to be dense during the warm-up"):
        Run(tmp_path / "b", local_sgd(warmup_steps=1), Sparse())


class Unseeded(Regression):
    """Other weights on every rank."""

    def configure_model(self):
        torch.nn.init.constant_(self.net[0].weight, float(self.global_rank))


def test_weights_of_rank_0_are_broadcast(tmp_path):
    run = Run(tmp_path, local_sgd(period=1, warmup_steps=1), Unseeded(sgd))
    assert spread(run.trace[0]) == 0.0


def test_different_weights_are_found_out(tmp_path):
    strategy = local_sgd(initial_weights="verify")
    with pytest.raises(Exception, match=r"`initial_weights` to be the same on all ranks, got .*1"):
        Run(tmp_path / "a", strategy, Unseeded(sgd))
    Run(tmp_path / "b", local_sgd(initial_weights="verify"), Regression(sgd))


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("local_sgd", {"period": 8, "_start_method": "popen"}),
        ("Local_SGD_fork", {"period": 8, "_start_method": "fork"}),
        ("localsgdstrategy", {"period": 8, "_start_method": "popen"}),
        ("LocalSGDStrategy_spawn", {"period": 8, "_start_method": "spawn"}),
        ("one_shot_averaging", {"period": None, "average_of": "tail", "_start_method": "popen"}),
        ("one_shot_averaging_fork", {"period": None, "_start_method": "fork"}),
    ],
)
def test_strategy_strings(name, expected):
    trainer = Trainer(strategy=name, accelerator="cpu", devices=2, logger=False)
    assert isinstance(trainer.strategy, LocalSGDStrategy)
    assert expected.items() <= vars(trainer.strategy).items()


def test_steps_that_the_strategy_cannot_see_are_said(tmp_path):
    # `optimizer.step()` of the bare torch optimizer goes past every strategy, and nothing would ever be averaged.
    class Bare(Regression):
        def __init__(self):
            super().__init__(sgd)
            self.automatic_optimization = False

        def training_step(self, batch, batch_idx):
            optimizer = self.optimizers(use_pl_optimizer=False)
            optimizer.zero_grad()
            self.manual_backward(loss_of(self.net, batch))
            optimizer.step()

    with pytest.raises(Exception, match="saw no step of optimizer 0"):
        Run(tmp_path, local_sgd(), Bare())


def test_the_period_goes_over_the_end_of_an_epoch(tmp_path):
    run = Run(tmp_path, local_sgd(period=5))
    due = [step for step, weights in enumerate(run.trace, start=1) if spread(weights) == 0.0]
    assert due == [5, 10]
    assert all(b - a == 5 for a, b in pairwise(due))
