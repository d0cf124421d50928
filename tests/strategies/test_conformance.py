"""What every strategy of the catalogue must do on real processes, whatever it exchanges."""

from __future__ import annotations

import pickle
from itertools import pairwise

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import EarlyStopping
from lightning.pytorch.plugins.precision import MixedPrecision
from support.rank_processes import run_as_torchrun
from support.strategy_training import Run, flat, loader, samples, sgd, spread
from support.training import Regression, TwoOptimizers, by_hand, loss_of, trainer
from torch.utils.data import DataLoader, Sampler

pytestmark = pytest.mark.timeout(60)


class Validated(Regression):
    """Logs a loss of validation, of all ranks together."""

    def __init__(self, make=sgd, monitored=False):
        super().__init__(make)
        self.monitored = monitored

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", loss_of(self.net, batch), sync_dist=True)

    test_step = validation_step

    def predict_step(self, batch, batch_idx):
        return self.net(batch[0])

    def configure_optimizers(self):
        optimizer = super().configure_optimizers()
        if not self.monitored:
            return optimizer
        plateau = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, patience=0, threshold=0.5)
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": plateau, "monitor": "val_loss"},
        }


def finals(run):
    return [record["final"] for record in run.ranks]


def assert_equal_at_the_end(run):
    assert spread(finals(run)) == 0.0
    assert finals(run)[0].isfinite().all()
    assert torch.equal(flat(run.module), finals(run)[0])  # and in the main process


@pytest.mark.compatible("1 rank is ordinary training, bit by bit")
def test_one_rank_is_ordinary_training(make, tmp_path):
    run = Run(tmp_path, make(), ranks=1)
    expected = torch.cat([p.detach().reshape(-1) for p in by_hand(sgd)])
    assert torch.equal(finals(run)[0], expected)


@pytest.mark.parametrize("num_ranks", [2, 4])
@pytest.mark.compatible("equal weights on all ranks at the end (2, 4 ranks)")
def test_ranks_end_with_equal_weights(make, tmp_path, num_ranks):
    assert_equal_at_the_end(Run(tmp_path, make(), ranks=num_ranks))


@pytest.mark.parametrize("num_ranks", [2, 4])
@pytest.mark.compatible("evaluation of one model, without a trace")
def test_validation_sees_one_model_and_changes_nothing(make, tmp_path, num_ranks):
    plain = Run(tmp_path / "plain", make(), Regression(sgd), ranks=num_ranks)
    validated = Run(
        tmp_path / "validated",
        make(),
        Validated(),
        ranks=num_ranks,
        val=loader(num_ranks),
        val_check_interval=2,
        num_sanity_val_steps=1,
    )
    for ours, expected in zip(validated.ranks, plain.ranks, strict=True):
        assert all(map(torch.equal, ours["trace"], expected["trace"]))
        assert len(ours["validated"]) == 6
    for models in zip(*(record["validated"] for record in validated.ranks), strict=True):
        assert spread(models) == 0.0


class Accumulated(Regression):
    """Counts what the strategy counts."""

    def on_fit_end(self):
        (replica,) = self.trainer.strategy.replicas
        assert replica.num_steps == self.trainer.global_step == 2 * 4  # 3 groups of 2, and one of 1


@pytest.mark.compatible("gradient accumulation")
def test_accumulation_counts_steps_also_of_an_incomplete_group(make, tmp_path):
    run = Run(tmp_path, make(), Accumulated(sgd), accumulate_grad_batches=2)
    assert_equal_at_the_end(run)
    first, second, *_ = run.ranks[0]["trace"]
    assert torch.equal(first, flat(Regression(sgd)))
    assert not torch.equal(second, first)


@pytest.mark.parametrize("algorithm", ["norm", "value"])
@pytest.mark.compatible("gradient clipping")
def test_clipping(make, tmp_path, algorithm):
    settings = {"gradient_clip_val": 0.01, "gradient_clip_algorithm": algorithm}
    clipped = Run(tmp_path / "clipped", make(), **settings)
    plain = Run(tmp_path / "plain", make())
    assert_equal_at_the_end(clipped)
    steps = [
        float((run.ranks[0]["trace"][0] - flat(Regression(sgd))).norm()) for run in (clipped, plain)
    ]
    assert steps[0] < 0.2 * steps[1]


@pytest.mark.compatible("manual optimization, two optimizers")
def test_manual_optimization_with_two_optimizers(make, tmp_path):
    run = Run(tmp_path, make(), TwoOptimizers(sgd))
    assert_equal_at_the_end(run)
    assert run.ranks[0]["replica_steps"] == [14, 6]


@pytest.mark.compatible("bf16-mixed precision")
def test_bf16_mixed(make, tmp_path):
    assert_equal_at_the_end(Run(tmp_path, make(), precision="bf16-mixed"))


@pytest.mark.compatible("bf16-true precision")
def test_bf16_true(make, tmp_path):
    run = Run(tmp_path, make(), precision="bf16-true")
    assert_equal_at_the_end(run)
    assert finals(run)[0].dtype == torch.bfloat16


class Overflowing(Regression):
    """One rank has an infinite loss in its third batch."""

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        overflows = (self.global_rank, batch_idx) == (1, 2)
        return loss * (float("inf") if overflows else 1.0)


@pytest.mark.compatible("GradScaler that skips a step on one rank")
def test_a_step_that_is_skipped_on_one_rank(make, tmp_path):
    scaler = torch.amp.GradScaler("cpu", init_scale=1.0)
    precision = MixedPrecision("16-mixed", "cpu", scaler)
    run = Run(tmp_path, make(), Overflowing(sgd), plugins=[precision])
    assert_equal_at_the_end(run)


class Uneven(Sampler):
    """One sample less for the last rank, so that its last batch is shorter."""

    def __init__(self, num_ranks):
        self.num_ranks = num_ranks

    def __iter__(self):
        rank = torch.distributed.get_rank()
        return iter(range(rank, len(samples()) - 1, self.num_ranks))

    def __len__(self):
        return len(samples()) // self.num_ranks


@pytest.mark.compatible("batches of different sizes on different ranks")
def test_a_shorter_last_batch_on_one_rank(make, tmp_path):
    data = DataLoader(samples(), 4, sampler=Uneven(2))
    run = Run(tmp_path, make(), data=data, use_distributed_sampler=False)
    assert_equal_at_the_end(run)
    assert run.ranks[0]["num_steps"] == 14


class Partial(Regression):
    """On every rank another layer goes without a gradient."""

    def __init__(self, make):
        super().__init__(make)
        with torch.random.fork_rng():
            torch.manual_seed(1)
            self.extra = torch.nn.ModuleList(torch.nn.Linear(1, 1) for _ in range(3))

    def training_step(self, batch, batch_idx):
        x, y = batch
        return torch.nn.functional.mse_loss(self.extra[self.global_rank](self.net(x)), y)


@pytest.mark.compatible("unused parameters")
def test_unused_parameters(make, tmp_path):
    assert_equal_at_the_end(Run(tmp_path, make(), Partial(sgd)))


class Unfreezing(Regression):
    """The last layer is trained from the second epoch on."""

    def configure_optimizers(self):
        return self.make(self.net[0].parameters())

    def on_train_epoch_start(self):
        if self.current_epoch == 1:
            self.optimizers().add_param_group({"params": list(self.net[2].parameters())})


@pytest.mark.compatible("layers that are unfrozen later")
def test_parameters_that_are_added_later(make, tmp_path):
    assert_equal_at_the_end(Run(tmp_path, make(), Unfreezing(sgd)))


class Agreement(Callback):
    """Writes down on every rank what others decide by."""

    def __init__(self, folder):
        self.folder = folder

    def on_fit_end(self, trainer, pl_module):
        (group,) = trainer.optimizers[0].param_groups
        decided = {"lr": group["lr"], "epochs": trainer.current_epoch}
        decided["val_loss"] = float(trainer.callback_metrics["val_loss"])
        torch.save(decided, f"{self.folder}/decided.{trainer.global_rank}")


@pytest.mark.compatible("EarlyStopping and ReduceLROnPlateau")
def test_all_ranks_decide_alike(make, tmp_path):
    stop = EarlyStopping("val_loss", patience=2, min_delta=0.05)
    callbacks = [stop, Agreement(tmp_path)]
    run = Run(
        tmp_path,
        make(),
        Validated(monitored=True),
        val=loader(2),
        callbacks=callbacks,
        max_epochs=20,
    )
    first, second = (torch.load(f"{tmp_path}/decided.{rank}") for rank in range(2))
    assert first == second
    assert first["epochs"] < 20
    assert first["lr"] < 0.1
    assert_equal_at_the_end(run)


@pytest.mark.parametrize("entry", ["validate", "test", "predict"])
@pytest.mark.compatible("validate, test, predict alone")
def test_entries_without_training(make, tmp_path, entry):
    module = Validated()
    before = flat(module)
    quiet = trainer(
        tmp_path, devices=2, strategy=make(), use_distributed_sampler=entry == "predict"
    )
    kwargs = {"return_predictions": False} if entry == "predict" else {"verbose": False}
    getattr(quiet, entry)(module, loader(2), **kwargs)
    assert torch.equal(flat(module), before)


@pytest.mark.compatible("validate, test, predict alone")
def test_evaluation_after_training_takes_the_weights_it_is_given(make, tmp_path):
    # What the strategy knows of the training must not come in the place of weights that were loaded since.
    def work(rank):
        quiet = trainer(
            tmp_path, devices=2, strategy=make(start_method="popen"), use_distributed_sampler=False
        )
        module, seen = Validated(), []
        quiet.fit(module, loader(2), loader(2))
        torch.nn.init.zeros_(module.net[2].weight)
        before = flat(module)
        module.on_validation_epoch_start = lambda: seen.append(flat(module))
        quiet.validate(module, loader(2), verbose=False)
        return bool(torch.equal(seen[0], before) and torch.equal(flat(module), before))

    outcomes = run_as_torchrun(work, 2, tmp_path)
    assert [outcome.result for outcome in outcomes] == [True, True], outcomes[0].error


@pytest.mark.compatible("fast_dev_run and sanity check")
def test_fast_dev_run(make, tmp_path):
    run = Run(tmp_path, make(), Validated(), val=loader(2), fast_dev_run=True)
    assert_equal_at_the_end(run)


@pytest.mark.compatible("torch.compile of a module")
def test_compiled_modules(make, tmp_path):
    module = Regression(sgd)
    module.net[0] = torch.compile(module.net[0], backend="eager")
    assert_equal_at_the_end(Run(tmp_path, make(), module))


@pytest.mark.parametrize("every", [0, 3])
@pytest.mark.compatible("fewer broadcasts of SIGTERM")
def test_fewer_broadcasts_change_nothing(make, tmp_path, every):
    seldom = Run(tmp_path / "seldom", make(sigterm_every_n_batches=every))
    always = Run(tmp_path / "always", make())
    assert torch.equal(finals(seldom)[0], finals(always)[0])


def test_settings_survive_pickling(make):
    # Spawned processes get a pickled strategy.
    strategy = make()
    copied = pickle.loads(pickle.dumps(strategy))
    assert copied.describe() == strategy.describe()


class Lazy(Regression):
    """Knows the sizes of its layers after the first batch."""

    def __init__(self, make=sgd):
        super().__init__(make)
        linear, norm = torch.nn.LazyLinear(8), torch.nn.LazyBatchNorm1d()
        self.net = torch.nn.Sequential(linear, norm, torch.nn.LazyLinear(1))


def test_lazy_modules_train_on_one_rank(make, tmp_path):
    assert finals(Run(tmp_path, make(), Lazy(), ranks=1))[0].isfinite().all()


def test_lazy_modules_are_refused_on_several_ranks(make, tmp_path):
    with pytest.raises(
        Exception, match=r"without lazy parameters on several ranks.*'net.0.weight'"
    ):
        Run(tmp_path, make(), Lazy(), ranks=2)


class Different(Regression):
    """Is built in another way on rank 1."""

    def __init__(self, how):
        super().__init__(sgd)
        self.how = how

    def configure_model(self):
        if self.how == "order of layers":
            widths = (6, 2) if self.trainer.global_rank else (2, 6)
            layers = [torch.nn.Linear(a, b) for a, b in pairwise((4, *widths, 1))]
            self.net = torch.nn.Sequential(*layers)
        elif self.how == "precision" and self.trainer.global_rank:
            self.net.double()

    def training_step(self, batch, batch_idx):
        return loss_of(self.net, [x.to(self.net[0].weight.dtype) for x in batch])

    def configure_optimizers(self):
        params = list(self.net.parameters())
        turned = self.how == "order in the optimizer" and self.trainer.global_rank
        return sgd(params[::-1] if turned else params)


@pytest.mark.parametrize("how", ["order of layers", "precision", "order in the optimizer"])
def test_models_that_differ_are_refused_in_a_sentence(make, tmp_path, how):
    with pytest.raises(
        Exception, match=r"others on ranks \[1\]: .* on rank 1, .* on rank 0\. Build"
    ):
        Run(tmp_path, make(), Different(how))
