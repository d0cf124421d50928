"""Audits and comparisons of weights: a rank that returns something wrong is detected and corrected."""

from __future__ import annotations

import pytest
import torch
from lightning.pytorch import Callback
from support.byzantine_training import (
    Silent,
    byzantine,
    exchange,
    finals,
    replica,
    row,
)
from support.processes import run_ranks
from support.strategy_training import (
    FORK,
    Run,
    loader,
    sgd,
    spread,
)
from support.training import Regression, loss_of

import lightning_sgd
from lightning_sgd import (
    GaussianAttack,
)
from lightning_sgd.strategies.byzantine.shard_audit import ShardAudit, pair

pytestmark = [
    pytest.mark.timeout(60),
    pytest.mark.filterwarnings("ignore:The dirpath has changed:UserWarning"),
]


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
    attack = {"attack": GaussianAttack(), "byzantine_ranks": [3]}
    plain = Run(tmp_path / "plain", byzantine(**settings, **attack), ranks=4)
    audited = Run(tmp_path / "audited", byzantine(**settings, **attack, audit_every=2), ranks=4)
    assert all(torch.equal(a[0], b[0]) for a, b in zip(audited.trace, plain.trace, strict=True))


def test_every_rank_audits_every_other():
    for n in (2, 3, 5):
        pairs = [pair(number, n) for number in range(n * (n - 1))]
        assert len(set(pairs)) == len(pairs)
        assert all(owner != auditor for owner, auditor in pairs)


def mean_of(index, columns):
    return columns.mean(dim=0)


@pytest.mark.filterwarnings("ignore:Rank . returned a wrong part:UserWarning")
@pytest.mark.filterwarnings("ignore:Rank . audited wrongly:UserWarning")
@pytest.mark.parametrize("liar", ["owner", "auditor"])
def test_a_wrong_part_is_found_out_and_put_right_and_the_liar_is_named(tmp_path, liar):
    # A rank that lies in the last exchange controls its part of all models.
    n, d = 4, 10
    owner, auditor = pair(1, n)
    wrong = owner if liar == "owner" else auditor

    def work(rank):
        ours = exchange()
        mine = replica(row(rank, d), n)
        columns, _ = mine.scatter(ours, mine.gradients.rows)
        shard = columns.mean(dim=0)
        if rank == wrong and liar == "owner":
            shard = shard + 1
        result = mine.gather(ours, shard)
        audit = ShardAudit(ours)
        lies = rank == wrong and liar == "auditor"
        recompute = (lambda index, cols: cols.mean(dim=0) + 2) if lies else mean_of
        audit(1, mine.gradients.rows, result, recompute, 0)
        return result[:d], list(audit.num_wrong)

    expected = torch.stack([row(rank, d) for rank in range(n)]).mean(dim=0)
    for result, num_wrong in run_ranks(work, n, tmp_path):
        torch.testing.assert_close(result, expected)
        assert num_wrong == [int(rank == wrong) for rank in range(n)]


def test_an_audit_without_a_finding_changes_nothing(tmp_path):
    def work(rank):
        ours = exchange()
        mine = replica(row(rank, 10), 3)
        columns, _ = mine.scatter(ours, mine.gradients.rows)
        result = mine.gather(ours, columns.mean(dim=0))
        before, audit = result.clone(), ShardAudit(ours)
        for number in range(6):
            audit(number, mine.gradients.rows, result, mean_of, number)
        return bool(torch.equal(result, before)), sum(audit.num_wrong)

    assert run_ranks(work, 3, tmp_path) == [(True, 0)] * 3
