"""Gossip-PGA against dense matrix products in NumPy, its limits against other methods, and counts of what is sent."""

from __future__ import annotations

import math
import os
import signal
import warnings
from datetime import timedelta
from itertools import pairwise

import networkx as nx
import numpy as np
import pytest
import torch
import torch.distributed as dist
from lightning.pytorch import Callback, Trainer
from support.callback_training import Classifier, digits
from support.processes import run_ranks
from support.rank_processes import run_as_torchrun
from support.strategy_training import (
    FORK,
    NUM_BATCHES,
    Run,
    flat,
    loader,
    samples,
    sgd,
    simulate,
    spread,
)
from support.training import Regression, loss_of, network, trainer

from lightning_sgd import (
    Complete,
    Exponential,
    FromGraph,
    GossipPGAStrategy,
    Hypercube,
    NoEffectWarning,
    OnePeerExponential,
    Ring,
    Torus,
)
from lightning_sgd.functional.distributed.gossip_pga import (
    AdaptivePeriod,
    Smoothed,
    weighted_differences,
)
from lightning_sgd.strategies._comm.collectives import Collectives

pytestmark = [
    pytest.mark.timeout(90),
    # The resumed run keeps its files apart on purpose.
    pytest.mark.filterwarnings("ignore:The dirpath has changed:UserWarning"),
]
STEPS = 2 * NUM_BATCHES
SIZE = (4 * 8 + 8 + 8 + 1) * 4 + 2 * 4  # parameters, and the tag


def gossip(topology="one_peer_exponential", period=None, **settings):
    return GossipPGAStrategy(topology, period, **{**FORK, **settings})


def close(ours, expected, rtol):
    for step, (a, b) in enumerate(zip(ours, expected, strict=True), start=1):
        for rank, (x, y) in enumerate(zip(a, b, strict=True)):
            torch.testing.assert_close(x, y, rtol=rtol, atol=rtol, msg=f"step {step}, rank {rank}")


def put(net, row):
    torch.nn.utils.vector_to_parameters(torch.from_numpy(row), net.parameters())


def by_matrices(num_ranks, matrix_of, order="adapt_then_combine", num_steps=STEPS):
    """Every rank's weights after every step; ``matrix_of(step)`` is the matrix of that step, counted from 1.

    The models are the rows of one NumPy matrix; torch only takes each rank's own step.
    """
    nets = [network().double() for _ in range(num_ranks)]
    optimizers = [sgd(net.parameters()) for net in nets]
    x, y = (tensor.double() for tensor in samples().tensors)
    trace = []
    for step in range(1, num_steps + 1):
        begin = (step - 1) % NUM_BATCHES * 8
        before = np.stack([flat(net).numpy() for net in nets])
        for rank, (net, optimizer) in enumerate(zip(nets, optimizers, strict=True)):
            mine = slice(begin + rank, begin + 8, num_ranks)
            optimizer.zero_grad()
            loss_of(net, (x[mine], y[mine])).backward()
            optimizer.step()
        after = np.stack([flat(net).numpy() for net in nets])
        matrix = matrix_of(step)
        is_average = np.allclose(matrix, 1 / num_ranks)
        late = order == "overlap" and not is_average
        mixed = matrix @ before + (after - before) if late else matrix @ after
        for net, row in zip(nets, mixed, strict=True):
            put(net, row)
        trace.append([torch.from_numpy(row.copy()) for row in mixed])
    return trace


def neighbours(n, *hops):
    """A circulant matrix: each row gives the same weight to itself and to those so many places on."""
    matrix = np.zeros((n, n))
    for hop in {0, *hops}:
        matrix += np.roll(np.eye(n), hop, axis=1)
    return matrix / matrix.sum(axis=1, keepdims=True)


RING = neighbours(4, 1, -1)
CUBE = np.array([[1, 1, 1, 0], [1, 1, 0, 1], [1, 0, 1, 1], [0, 1, 1, 1]]) / 3
PATH = np.array([[2, 1, 0, 0], [1, 1, 1, 0], [0, 1, 1, 1], [0, 0, 1, 2]]) / 3
MATRICES = {
    "ring": (Ring(), lambda _: RING),
    "exponential": (Exponential(), lambda _: neighbours(4, 1, 2)),
    "one peer": (OnePeerExponential(), lambda r: neighbours(4, 2 ** (r % 2))),
    "hypercube": (Hypercube(), lambda _: CUBE),
    "path": (FromGraph(nx.path_graph(4)), lambda _: PATH),
}


# --- the arithmetic


@pytest.mark.parametrize("order", ["adapt_then_combine", "overlap"])
@pytest.mark.parametrize("name", MATRICES)
def test_gossip_is_the_product_with_a_dense_matrix(tmp_path, name, order):
    topology, matrix = MATRICES[name]
    run = Run(tmp_path, gossip(topology, order=order), ranks=4, precision="64-true")
    # With overlap the first model is that of all ranks, and the first round mixes the second one.
    first = 2 if order == "overlap" else 1
    expected = by_matrices(4, lambda step: matrix(max(step - first, 0)), order)
    close(run.trace, expected, 1e-12)


@pytest.mark.parametrize("n", [2, 3])
def test_few_ranks_in_a_ring(tmp_path, n):
    # Two ranks are each other's neighbours on both sides.
    run = Run(tmp_path, gossip("ring"), ranks=n, precision="64-true", limit_train_batches=7)
    ring = np.full((n, n), 1 / n)
    if n == 2:
        close(run.trace, by_matrices(n, lambda _: ring), 1e-12)
    assert max(map(spread, run.trace)) < 1e-14


def test_a_torus_of_nine_ranks(tmp_path):
    # More ranks than cores; each has a model and no batches of its own, so that the mixing alone is seen.
    def work(rank):
        exchange = Collectives(timedelta(seconds=30))
        values = torch.arange(9.0).double()[rank : rank + 1] ** 2
        mixing = Torus().on(9)
        receive = {peer: [torch.zeros(3).double()] for peer in mixing.receive(rank, 0)}
        outgoing = torch.cat([torch.zeros(2).double(), values])
        exchange.wait_send_recv(
            exchange.send_recv_async([outgoing], mixing.send(rank, 0), receive, 0)
        )
        weights = list(mixing.receive(rank, 0).values())
        received = [buffers[0] for buffers in receive.values()]
        return values + weighted_differences(outgoing, received, weights, torch.float64)[2:]

    mixed = torch.cat(run_ranks(work, 9, tmp_path))
    grid = nx.to_numpy_array(nx.grid_2d_graph(3, 3, periodic=True)) + np.eye(9)
    np.testing.assert_allclose(mixed.numpy(), grid @ (np.arange(9.0) ** 2) / 5, rtol=1e-14)


@pytest.mark.parametrize("order", ["adapt_then_combine", "overlap"])
@pytest.mark.parametrize("period", [2, 3, 5])
def test_periodic_global_averages(tmp_path, period, order):
    run = Run(tmp_path, gossip("ring", period, order=order), ranks=4, precision="64-true")
    average = np.full((4, 4), 0.25)

    def matrix(step):
        return average if step % period == 0 else RING

    close(run.trace, by_matrices(4, matrix, order), 1e-12)
    spreads = [spread(weights) for weights in run.trace]
    assert [s == 0.0 for s in spreads] == [step % period == 0 for step in range(1, STEPS + 1)]


@pytest.mark.parametrize("topology", ["ring", Complete()])
def test_period_one_and_the_complete_graph_are_parallel_sgd(tmp_path, topology):
    period = 1 if topology == "ring" else None
    run = Run(tmp_path, gossip(topology, period), ranks=4, precision="64-true")
    close([weights[:1] for weights in run.trace], simulate(sgd, 1, lambda _: False), 1e-12)


def test_a_graph_without_edges_is_local_sgd(tmp_path):
    lonely = FromGraph(nx.empty_graph(4))
    run = Run(tmp_path, gossip(lonely, 3), ranks=4, precision="64-true")
    close(run.trace, simulate(sgd, 4, lambda step: step % 3 == 0), 1e-13)


class Still(Regression):
    """Ranks with different weights that no step changes; the steps are there for the rounds alone."""

    def on_train_start(self):
        draw(self, self.global_rank)


@torch.no_grad()
def draw(net, rank):
    """Other weights for every rank."""
    for param in net.parameters():
        param.normal_(generator=torch.Generator().manual_seed(rank))
    return flat(net)


def still(params):
    return torch.optim.SGD(params, lr=0.0)


def mix_alone(tmp_path, strategy, ranks=4, **settings):
    """Spread and mean of the models after every round."""
    run = Run(tmp_path, strategy, Still(still), ranks=ranks, **settings)
    return run, [torch.stack(weights) for weights in run.trace]


def test_two_one_peer_rounds_average_four_ranks_exactly(tmp_path):
    run, models = mix_alone(tmp_path, gossip(), limit_train_batches=4, max_epochs=1)
    assert spread(run.trace[0]) > 0.1
    mean = models[0].double().mean(dim=0).float()
    for weights in run.trace[1:]:
        torch.testing.assert_close(torch.stack(weights), mean.expand(4, -1), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("topology", ["ring", "exponential", "hypercube"])
def test_rounds_contract_by_beta_squared_and_keep_the_mean(tmp_path, topology):
    strategy = gossip(topology)
    _, models = mix_alone(tmp_path, strategy, max_epochs=1, precision="64-true")
    beta = 1 / 3  # of all three for four ranks
    apart = [float(((x - x.mean(dim=0)) ** 2).sum()) for x in models]
    for before, after in pairwise(apart):
        assert after <= beta**2 * before * (1 + 1e-9) + 1e-25
    for x in models:
        torch.testing.assert_close(x.mean(dim=0), models[0].mean(dim=0), rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("order", ["adapt_then_combine", "overlap"])
def test_numbers_of_16_bits_keep_the_mean_and_stay_within_the_stated_error(tmp_path, order):
    strategy = gossip("ring", wire_dtype="bfloat16", order=order)
    _, models = mix_alone(tmp_path / "half", strategy, max_epochs=1)
    _, full = mix_alone(tmp_path / "full", gossip("ring", order=order), max_epochs=1)
    for x in models:
        torch.testing.assert_close(x.mean(dim=0), models[0].mean(dim=0), rtol=0, atol=2e-6)
    largest = max(float(draw(network(), rank).abs().max()) for rank in range(4))
    first = 0 if order == "adapt_then_combine" else 1
    assert 0 < float((models[first] - full[first]).abs().max()) < 2**-8 * largest
    floor = float((models[-1] - models[-1].mean(dim=0)).abs().max())
    assert floor < 2**-8 * largest


def test_the_change_of_a_round_by_hand():
    # 1/4·(3 − 1) + 1/2·(−1 − 1) = −1/2; ranks that agree are left alone to the last bit.
    one, three, minus = (torch.tensor([value]) for value in (1.0, 3.0, -1.0))
    assert weighted_differences(one, [three, minus], [0.25, 0.5], torch.float32).item() == -0.5
    same = torch.rand(1000)
    change = weighted_differences(same, [same, same], [1 / 3, 1 / 3], torch.float32)
    assert torch.equal(change, torch.zeros(1000))


# --- the adaptive period


@pytest.mark.parametrize(
    ("first", "later", "expected"), [(6.9, 3.0, 5), (6.9, 2.0, 6), (11.0, 1.77, 7), (1.0, 16.0, 2)]
)
def test_the_adaptive_period_by_hand(first, later, expected):
    # ⌈(6.9/3)^¼·4⌉ = ⌈4.93⌉, ⌈(6.9/2)^¼·4⌉ = ⌈5.45⌉, ⌈(11/1.77)^¼·4⌉ = ⌈6.32⌉, ⌈(1/16)^¼·4⌉ = 2
    period = AdaptivePeriod(4)
    period.update(4, first)
    assert period.value == 4
    period.update(8, later)
    assert period.value == expected


def test_the_reference_is_the_running_mean_of_the_warm_up():
    # 8, then (8 + 4)/2 = 6, then (6 + 2)/2 = 4; after it ⌈(4/0.25)^¼·2⌉ = 4.
    period = AdaptivePeriod(2, warmup_steps=10)
    for step, loss, reference in ((2, 8.0, 8.0), (4, 4.0, 6.0), (6, 2.0, 4.0)):
        period.update(step, loss)
        assert (period.reference, period.value) == (reference, 2)
    period.update(10, 0.25)
    assert (period.reference, period.value) == (4.0, 4)


@pytest.mark.parametrize("loss", [math.nan, math.inf, 0.0, -1.0])
def test_losses_that_make_no_sense_change_nothing(loss):
    period = AdaptivePeriod(4)
    for step, value in enumerate([2.0, 1.0, loss]):
        period.update(step, value)
    assert (period.value, period.reference) == (5, 2.0)


def test_the_period_stays_between_its_bounds_and_grows_while_the_loss_falls():
    period, values = AdaptivePeriod(4, smallest=3, largest=9), []
    for step in range(60):
        period.update(step, 2.0**-step)
        values.append(period.value)
    assert values == sorted(values)
    assert values[-1] == 9
    period.update(60, 1e6)
    assert period.value == 3


def test_the_moving_average_of_losses_by_hand():
    smoothed = Smoothed(0.75)
    for loss in (8.0, math.inf, 4.0, math.nan):
        smoothed.update(torch.tensor(loss))
    assert smoothed.value.item() == 0.75 * 8 + 0.25 * 4


class Falling(Still):
    """Losses that fall, differently on every rank; rank 1 has one that is not finite."""

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        value = (self.global_rank + 1) * 16.0 ** -(self.global_step // 2)
        broken = self.global_rank == 1 and self.global_step == 0
        return loss * 0 + (math.nan if broken else value)

    def on_train_batch_end(self, *_):
        (period,) = self.trainer.strategy._periods
        periods = getattr(self, "seen", [])
        self.seen = [*periods, period.value]

    def on_fit_end(self):
        torch.save(self.seen, f"{self.folder}/periods.{self.global_rank}")


def test_all_ranks_have_the_same_period(tmp_path):
    # Two ranks, period 2: mean losses 1.5 (after step 2), then 1.5/256 after step 4 with loss_smoothing=0, so that
    # ⌈2·(256)^¼⌉ = 8, kept at 6; the third average comes after step 10, the loss is lower still.
    module = Falling(still)
    module.folder = tmp_path
    strategy = gossip("ring", 2, adaptive=True, max_period=6, loss_smoothing=0.0)
    run = Run(tmp_path, strategy, module, log_every_n_steps=2)
    periods = [torch.load(tmp_path / f"periods.{rank}") for rank in range(2)]
    assert periods[0] == periods[1]
    assert periods[0][:5] == [2, 2, 2, 4, 4]
    assert run.ranks[0]["metrics"][3]["gossip/period"] == 4
    assert all(a <= b <= 6 for a, b in pairwise(periods[0]))
    assert periods[0][-1] == 6


def test_losses_that_nobody_returns_are_said(tmp_path):
    class Manual(Regression):
        def __init__(self):
            super().__init__(sgd)
            self.automatic_optimization = False

        def training_step(self, batch, batch_idx):
            optimizer = self.optimizers()
            optimizer.zero_grad()
            self.manual_backward(loss_of(self.net, batch))
            optimizer.step()

    with pytest.raises(Exception, match="adaptive=True needs the losses"):
        Run(tmp_path / "raised", gossip(period=2, adaptive=True), Manual())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", NoEffectWarning)
        run = Run(tmp_path / "ignored", gossip(period=3, adaptive=True), Manual())
    assert spread(run.trace[11]) == 0.0


# --- what is sent


@pytest.mark.parametrize("order", ["adapt_then_combine", "overlap"])
@pytest.mark.parametrize(
    ("topology", "messages"),
    [("one_peer_exponential", 1), ("ring", 2), ("exponential", 2), ("complete", 3)],
)
def test_messages_and_bytes(tmp_path, monkeypatch, topology, messages, order):
    # Counted twice: by the strategy, and by whoever sends.
    sent, post = [], dist.batch_isend_irecv

    def counted(operations):
        kinds = ["irecv" if op.op is dist.irecv else "isend" for op in operations]
        assert kinds == sorted(kinds)  # receives are posted before anything is sent
        sent.extend(op.tensor.nbytes for op in operations if op.op is dist.isend)
        return post(operations)

    monkeypatch.setattr(dist, "batch_isend_irecv", counted)

    class Counted(Regression):
        def on_fit_end(self):
            traffic = self.trainer.strategy.exchange.traffic
            torch.save((sent, traffic.num_bytes, traffic.num_messages), f"{tmp_path}/counted")

    strategy = gossip(topology, 4, order=order)
    Run(tmp_path, strategy, Counted(sgd), ranks=4)
    sent, num_bytes, num_messages = torch.load(tmp_path / "counted")
    # Averages after steps 4, 8, 12 and at the end; with overlap a round follows steps 1, 2, 5, 6, 9, 10, 13, 14.
    rounds = 11 if order == "adapt_then_combine" else 8
    assert sent == [SIZE] * rounds * messages
    assert num_messages == rounds * messages + 4 * 6
    assert num_bytes == SIZE * (rounds * messages + 4 * 1.5)


def test_16_bits_are_half_the_bytes(tmp_path):
    run = Run(tmp_path, gossip(wire_dtype="bfloat16"), log_every_n_steps=2)
    assert run.ranks[0]["metrics"][1]["comm/bytes_per_step"] == SIZE / 2


def test_the_consensus_distance_is_logged_at_global_averages(tmp_path):
    # The models do not train, so that the third round leaves them as the average after step 4 finds them.
    run, models = mix_alone(tmp_path, gossip("ring", 4), log_every_n_steps=1, precision="64-true")
    apart = models[2] - models[2].mean(dim=0)
    for rank, record in enumerate(run.ranks):
        logged = [step.get("gossip/consensus_distance") for step in record["metrics"]]
        assert logged[:3] == [None] * 3
        assert logged[3:7] == [pytest.approx(float(apart[rank].norm()), rel=1e-6)] * 4
        assert logged[7] == 0.0
        assert "gossip/period" not in record["metrics"][7]


@pytest.mark.parametrize("name", ["ring", "one_peer_exponential"])
def test_parameters_keep_their_storage(tmp_path, name):
    class Pointed(Regression):
        def on_train_start(self):
            self.pointers = [param.data_ptr() for param in self.parameters()]

        def on_train_end(self):
            assert self.pointers == [param.data_ptr() for param in self.parameters()]

    Run(tmp_path, gossip(name, 3, order="overlap"), Pointed(sgd))


# --- resume


class SaveEvery(Callback):
    """Writes a checkpoint after every step."""

    def __init__(self, folder):
        self.folder = folder

    def on_train_batch_end(self, trainer, *_):
        trainer.save_checkpoint(f"{self.folder}/{trainer.global_step}.ckpt")


ADAPTIVE = {"period": 2, "adaptive": True, "adaptive_warmup_steps": 3, "max_period": 4}
VARIANTS = {
    "in flight": (5, 4, {"topology": "ring", "period": 6, "order": "overlap"}),
    "second of two rounds": (5, 4, {"topology": "one_peer_exponential", "period": None}),
    "16 bits": (2, 2, {"topology": "ring", "order": "overlap", "wire_dtype": "bfloat16"}),
    "adaptive": (5, 2, ADAPTIVE),
}


def fit(folder, ranks, resume=None, **settings):
    return Run(
        folder,
        gossip(**settings),
        Classifier(dropout=0.1),
        ranks=ranks,
        data=digits(ranks),
        resume=resume,
        callbacks=[SaveEvery(folder)],
        max_epochs=-1,
        max_steps=11,
        limit_val_batches=2,
        val_check_interval=3,
    )


@pytest.mark.parametrize("variant", VARIANTS)
def test_resume_is_exact_in_the_middle_of_a_cycle_and_in_flight(tmp_path, variant):
    at, ranks, settings = VARIANTS[variant]
    through = fit(tmp_path / "through", ranks, **settings)
    resumed = fit(tmp_path / "resumed", ranks, tmp_path / "through" / f"{at}.ckpt", **settings)
    for ours, expected in zip(resumed.ranks, through.ranks, strict=True):
        rest = expected["trace"][at:]
        assert len(ours["trace"]) == len(rest)
        assert all(map(torch.equal, ours["trace"], rest))
        assert torch.equal(ours["final"], expected["final"])


def test_checkpoints_and_validation_leave_no_trace_of_what_is_in_flight(tmp_path):
    settings = {"topology": "ring", "period": 6, "order": "overlap"}
    saved = fit(tmp_path / "saved", 2, **settings)
    plain = Run(
        tmp_path / "plain",
        gossip(**settings),
        Classifier(dropout=0.1),
        data=digits(2),
        max_epochs=-1,
        max_steps=11,
        limit_val_batches=0,
    )
    for ours, expected in zip(saved.ranks, plain.ranks, strict=True):
        assert all(map(torch.equal, ours["trace"], expected["trace"]))


# --- ranks that are not where the others are


class Ahead(Regression):
    """Rank 1 counts a step more, as after a step that the others did not take."""

    def on_train_batch_end(self, *_):
        (replica,) = self.trainer.strategy.replicas
        if self.global_rank == 1 and replica.num_steps == 4:
            replica.num_steps += 1


@pytest.mark.parametrize("order", ["adapt_then_combine", "overlap"])
def test_a_message_of_another_round_is_found_out(tmp_path, order):
    def work(rank):
        strategy = gossip("ring", order=order, start_method="popen", timeout=timedelta(seconds=6))
        quiet = trainer(tmp_path, devices=2, strategy=strategy, use_distributed_sampler=False)
        quiet.fit(Ahead(sgd), loader(2))

    outcomes = run_as_torchrun(work, 2, tmp_path)
    for outcome in outcomes:
        assert "ExchangeError" in outcome.error
        assert "The ranks are not at the same place" in outcome.error
        assert "rank 0: gossip after step 5; rank 1: gossip after step 6" in outcome.error
    assert any("sent it a message of another one" in outcome.error for outcome in outcomes)


class Killed(Regression):
    """Rank 1 is killed while messages are on their way."""

    def training_step(self, batch, batch_idx):
        if self.global_rank == 1 and self.global_step == 5:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().training_step(batch, batch_idx)


def test_a_rank_that_is_killed_with_messages_in_flight_is_named(tmp_path):
    def work(rank):
        settings = {"start_method": "popen", "timeout": timedelta(seconds=6)}
        strategy = gossip("ring", order="overlap", sigterm_every_n_batches=0, **settings)
        quiet = trainer(tmp_path, devices=3, strategy=strategy, use_distributed_sampler=False)
        quiet.fit(Killed(sgd), loader(3))

    outcomes = run_as_torchrun(work, 3, tmp_path)
    for rank in (0, 2):
        assert "Rank 1 does not answer" in outcomes[rank].error
        assert outcomes[rank].seconds < 20


# --- settings


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"topology": "star"}, r"Expected `topology` to be a graph or the name of one, got 'star'"),
        ({"period": 0}, r"Expected `period` to be at least 1, got 0"),
        ({"period": None, "adaptive": True}, r"Expected `period` to be a number, got None"),
        ({"period": 6, "adaptive": True, "max_period": 5}, r"`period` to be in \[1, 5\], got 6"),
        (
            {"adaptive": True, "adaptive_warmup_steps": -1},
            r"`adaptive_warmup_steps` to be at least 0",
        ),
        ({"loss_smoothing": 1.0}, r"Expected `loss_smoothing` to be in \[0, 1\), got 1.0"),
    ],
)
def test_settings_out_of_range_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        GossipPGAStrategy(**settings)


def test_graphs_that_do_not_exist_are_refused_before_training(tmp_path):
    with pytest.raises(Exception, match=r"got Hypercube\(\)\. It needs a power of two, such as 2"):
        Run(tmp_path, gossip("hypercube"), ranks=3)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("gossip_pga", {"period": 6, "adaptive": False, "_start_method": "popen"}),
        ("gossip_pga_fork", {"period": 6, "_start_method": "fork"}),
        ("Gossip_AGA_spawn", {"period": 4, "adaptive": True, "_start_method": "spawn"}),
        ("gossip", {"period": None, "adaptive": False}),
        ("GossipPGAStrategy_fork", {"period": 6, "_start_method": "fork"}),
    ],
)
def test_strategy_strings(name, expected):
    built = Trainer(strategy=name, accelerator="cpu", devices=2, logger=False).strategy
    assert isinstance(built, GossipPGAStrategy)
    assert expected.items() <= vars(built).items()
