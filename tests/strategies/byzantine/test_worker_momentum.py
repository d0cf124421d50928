"""The momentum of workers: as in a loop in double precision, resumed exactly, and not stored twice."""

from __future__ import annotations

import pytest
import torch
from lightning.pytorch import Callback
from support.byzantine_training import (
    SaveEvery,
    Silent,
    assert_follows,
    byzantine,
    simulate,
)
from support.callback_training import Classifier, digits
from support.strategy_training import (
    Run,
    flat,
    sgd,
)
from support.training import Regression, network
from support.watching import assert_equal

from lightning_sgd import (
    GaussianAttack,
)

pytestmark = [
    pytest.mark.timeout(60),
    pytest.mark.filterwarnings("ignore:The dirpath has changed:UserWarning"),
]


def test_momentum_of_workers_follows_a_loop_in_double_precision(tmp_path):
    momenta = torch.zeros(4, sum(p.numel() for p in network().parameters()), dtype=torch.float64)

    def combine(gradients):
        momenta.mul_(0.9).add_(gradients, alpha=0.1)
        return momenta.median(dim=0).values / 2 - (-momenta).median(dim=0).values / 2

    run = Run(tmp_path, byzantine("median", 1, worker_momentum=0.9), ranks=4)
    assert_follows(run, simulate(4, combine))


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
        attack = {"attack": GaussianAttack(), "byzantine_ranks": [3]} if num_ranks == 4 else {}
        strategy = byzantine(**settings, **attack, worker_momentum=0.9)
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
