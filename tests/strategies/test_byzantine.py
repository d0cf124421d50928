"""ByzantineStrategy on real processes: the mean is DDP's, wrong ranks do not matter, replicas stay equal bit by bit."""

from __future__ import annotations

import pytest
import torch
from lightning.pytorch import Trainer
from support.byzantine_training import (
    Silent,
    assert_follows,
    byzantine,
    simulate,
)
from support.callback_training import Classifier, digits
from support.strategy_training import (
    Run,
    ddp,
    flat,
    spread,
)

import lightning_sgd
from lightning_sgd import (
    ConstantAttack,
    Mean,
    MinMax,
    NonFinite,
    SignFlip,
)
from lightning_sgd.functional.distributed.traffic import all_reduce_traffic

pytestmark = [
    pytest.mark.timeout(60),
    pytest.mark.filterwarnings("ignore:The dirpath has changed:UserWarning"),
]


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


@pytest.mark.parametrize("attack", [NonFinite("nan"), NonFinite("inf"), ConstantAttack(1e30)])
def test_a_rank_that_is_dropped_leaves_the_mean_of_the_others(tmp_path, attack):
    # The filter expects no further wrong rank then, and is the mean.
    run = Run(tmp_path, byzantine("filter", 1, attack=attack, byzantine_ranks=[2]), ranks=4)
    assert_follows(run, simulate(4, lambda rows: rows[[0, 1, 3]].mean(dim=0)))


def test_more_broken_ranks_than_expected_are_dropped_with_a_warning(tmp_path):
    def strategy():
        return byzantine("median", 0, attack=NonFinite(), byzantine_ranks=[1])

    with pytest.raises(Exception, match="not finite and were dropped, more than num_byzantine=0"):
        Run(tmp_path / "raised", strategy())  # warnings are errors here
    run = Run(tmp_path / "warned", strategy(), callbacks=[Silent("The gradients of workers")])
    assert_follows(run, simulate(2, lambda rows: rows[0]))


@pytest.mark.parametrize("settings", [{"nonfinite": "raise"}, {"byzantine_ranks": [0, 1]}])
def test_what_cannot_be_gone_on_with_is_said_on_all_ranks_alike(tmp_path, settings):
    strategy = byzantine(attack=NonFinite(), **{"byzantine_ranks": [1], **settings})
    with pytest.raises(Exception, match="Expected at most 0 gradients not to be finite, but after"):
        Run(tmp_path, strategy)


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
        "combined with momentum 0.9 by NNM() + Krum(num_byzantine=2), audited every 5 steps, "
        "attacked on purpose by [1, 0]"
    )


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"aggregator": "nonsense"}, "Rules are mean"),
        ({"aggregator": Mean(2), "num_byzantine": 1}, "Give it once"),
        ({"num_byzantine": -1}, "a whole number from 0"),
        ({"worker_momentum": 1.0}, r"Expected `worker_momentum` to be in \[0, 1\), got 1.0"),
        ({"workers": "threads"}, "Expected `workers` to be one of rank, micro_batch, both"),
        ({"nonfinite": "keep"}, "Expected `nonfinite` to be one of drop, raise"),
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
