"""TrajectoryRegularization against TRSGD, closed forms, and training written out by hand."""

from __future__ import annotations

import copy

import pytest
import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.callbacks import Callback, LearningRateMonitor, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.plugins import MixedPrecision
from support.training import NUM_BATCHES, Regression, TwoOptimizers, batches, trainer
from torch.optim.lr_scheduler import LambdaLR, StepLR

from lightning_sgd import (
    TRSGD,
    MaSS,
    NoEffectWarning,
    NovoGrad,
    ResumableDataLoader,
    TRAdam,
    TrajectoryRegularization,
)

STAGES = {"lambda_w": 0.02, "inner_steps": 3}


def sgd(params, **settings):
    # By a loop: the fused kernel contracts multiplication and addition in other places.
    chosen = {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.01, "foreach": False, **settings}
    return torch.optim.SGD(params, **chosen)


def trsgd(params, **settings):
    chosen = {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.01, **STAGES, **settings}
    return TRSGD(params, foreach=False, fused=False, **chosen)


def fit(folder, make, *callbacks, module=Regression, schedule=None, **settings):
    """Train; returns the module."""
    trained = module(make) if schedule is None else module(make, schedule=schedule)
    trainer(folder, callbacks=list(callbacks), **settings).fit(trained, batches())
    return trained


def assert_same(ours, theirs):
    pairs = zip(ours.parameters(), theirs.parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


def step_lr(optimizer):
    return {"scheduler": LambdaLR(optimizer, lambda t: 0.9**t), "interval": "step"}


@pytest.mark.parametrize(
    "settings",
    [{}, {"accumulate_grad_batches": 3}, {"precision": "bf16-mixed"}],
    ids=["plain", "accumulation", "bf16-mixed"],
)
@pytest.mark.parametrize("schedule", [None, step_lr], ids=["constant", "every step"])
@pytest.mark.parametrize("decay", ["harmonic", "none"])
def test_with_sgd_it_is_trsgd(tmp_path, settings, schedule, decay):
    callback = TrajectoryRegularization(inner_lr_decay=decay, **STAGES)
    ours = fit(tmp_path, sgd, callback, schedule=schedule, **settings)
    theirs = fit(tmp_path, lambda p: trsgd(p, inner_lr_decay=decay), schedule=schedule, **settings)
    assert_same(ours, theirs)


def test_with_adam_it_is_tradam_up_to_the_place_of_epsilon(tmp_path):
    settings = {"lr": 0.01, "eps": 1e-16, "weight_decay": 0.01}
    ours = fit(
        tmp_path, lambda p: torch.optim.Adam(p, **settings), TrajectoryRegularization(**STAGES)
    )
    theirs = fit(tmp_path, lambda p: TRAdam(p, **settings, **STAGES))
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=2e-4, atol=2e-6)


def test_two_optimizers_are_staged_each_for_itself(tmp_path):
    ours = fit(tmp_path, sgd, TrajectoryRegularization(**STAGES), module=TwoOptimizers)
    assert_same(ours, fit(tmp_path, trsgd, module=TwoOptimizers))


class Frozen(Regression):
    """Trains the last layer alone."""

    def configure_optimizers(self):
        return self.make(self.net[2].parameters())


class Unfreezes(Callback):
    """Adds the first layer at the start of a stage, with a smaller step size."""

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if trainer.global_step == 6:
            group = {"params": list(pl_module.net[0].parameters()), "lr": 0.05}
            trainer.optimizers[0].add_param_group(group)


def test_groups_that_are_added_later_are_pulled_too(tmp_path):
    callback = TrajectoryRegularization(**STAGES)
    ours = fit(tmp_path, sgd, callback, Unfreezes(), module=Frozen)
    assert_same(ours, fit(tmp_path, trsgd, Unfreezes(), module=Frozen))


@pytest.mark.parametrize("optimizer_class", [MaSS, NovoGrad, torch.optim.RMSprop])
def test_switched_off_it_changes_nothing_of_any_optimizer(tmp_path, optimizer_class):
    off = TrajectoryRegularization(lambda_w=0.0, inner_lr_decay="none")
    ours = fit(tmp_path, lambda p: optimizer_class(p, lr=0.01), off)
    assert_same(ours, fit(tmp_path, lambda p: optimizer_class(p, lr=0.01)))


@pytest.mark.parametrize("optimizer_class", [MaSS, NovoGrad, torch.optim.RMSprop])
def test_falling_steps_alone_are_a_schedule_for_any_optimizer(tmp_path, optimizer_class):
    def schedule(optimizer):
        factors = LambdaLR(optimizer, lambda t: 1 / (t % 3 + 1))
        return {"scheduler": factors, "interval": "step"}

    ours = fit(
        tmp_path,
        lambda p: optimizer_class(p, lr=0.01),
        TrajectoryRegularization(lambda_w=0.0, inner_steps=3),
    )
    theirs = fit(tmp_path, lambda p: optimizer_class(p, lr=0.01), schedule=schedule)
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)


class _Skips(Callback):
    """Counts the steps that moved no weight, and looks at the step size after each."""

    def __init__(self):
        self.count, self.step_sizes = 0, []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.before = [p.detach().clone() for p in pl_module.parameters()]

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        now = pl_module.parameters()
        self.count += all(torch.equal(a, b) for a, b in zip(self.before, now, strict=True))
        self.step_sizes.append(trainer.optimizers[0].param_groups[0]["lr"])


def test_a_skipped_step_is_not_counted(tmp_path):
    # 2³⁰ overflows half precision for several steps, and the scaler leaves them out.
    def plugin():
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**30, growth_interval=1000)
        return MixedPrecision("16-mixed", "cpu", scaler)

    skips = _Skips()
    callback = TrajectoryRegularization(**STAGES)
    ours = fit(tmp_path, sgd, callback, skips, plugins=[plugin()])
    theirs = fit(tmp_path, trsgd, plugins=[plugin()])
    assert_same(ours, theirs)
    (stage,) = callback.state_dict()["stages"]
    assert 0 < skips.count < 2 * NUM_BATCHES
    assert stage["num_steps"] == 2 * NUM_BATCHES - skips.count
    assert set(skips.step_sizes) == {0.1}


def test_schedules_and_monitors_see_the_step_size_of_the_schedule(tmp_path):
    monitor = LearningRateMonitor("step")  # reads between the steps
    fit(
        tmp_path,
        sgd,
        TrajectoryRegularization(**STAGES),
        monitor,
        schedule=lambda optimizer: StepLR(optimizer, 1),
        logger=CSVLogger(tmp_path),
        log_every_n_steps=1,
    )
    expected = [0.1] * NUM_BATCHES + [0.01] * NUM_BATCHES
    assert monitor.lrs["lr-SGD"] == pytest.approx(expected)


def test_a_failure_within_a_step_gives_the_step_size_back(tmp_path):
    class Failing(Regression):
        def training_step(self, batch, batch_idx):
            if self.global_step == 4:
                raise RuntimeError("in the closure")
            return super().training_step(batch, batch_idx)

    module = Failing(sgd)
    running = trainer(tmp_path, callbacks=[TrajectoryRegularization(**STAGES)])
    with pytest.raises(RuntimeError, match="in the closure"):
        running.fit(module, batches())
    (optimizer,) = running.optimizers
    assert optimizer.param_groups[0]["lr"] == 0.1
    assert not optimizer._optimizer_step_pre_hooks
    assert not optimizer._optimizer_step_post_hooks


def test_two_instances_leave_the_step_size_as_it_was(tmp_path):
    module = Regression(sgd)
    pair = [TrajectoryRegularization(inner_steps=3), TrajectoryRegularization(inner_steps=2)]
    running = trainer(tmp_path, callbacks=pair)
    running.fit(module, batches())
    assert running.optimizers[0].param_groups[0]["lr"] == 0.1


class _Groups(LightningModule):
    """Two weights in two groups, which get no gradient but the pull."""

    def __init__(self, make):
        super().__init__()
        self.one, self.two = (torch.nn.Parameter(torch.ones(2)) for _ in range(2))
        self.make = make

    def training_step(self, batch, batch_idx):
        return 0.0 * (self.one.sum() + self.two.sum())

    def on_train_batch_end(self, outputs, batch, batch_idx):
        if batch_idx == 0:
            with torch.no_grad():
                self.one.add_(1.0)
                self.two.add_(1.0)

    def configure_optimizers(self):
        groups = [{"params": [self.one]}, {"params": [self.two], "lr": 0.4}]
        return self.make(groups)


@pytest.mark.parametrize("own", [None, 0.25])
def test_every_group_has_its_own_strength(tmp_path, own):
    # From a deviation of 1 a step at position k leaves 1 − 2λ_w/(k + 1), with λ_w a tenth of the group's step size.
    def make(groups):
        if own is not None:
            groups[1]["lambda_w"] = own
        return torch.optim.SGD(groups, lr=0.1)

    callback = TrajectoryRegularization()
    module = fit(tmp_path, make, callback, module=_Groups, max_steps=3)
    one, two = 0.01, 0.04 if own is None else own
    assert callback.state_dict()["stages"][0]["strengths"] == pytest.approx([one, two])
    for weight, strength in ((module.one, one), (module.two, two)):
        expected = 1 + (1 - 2 * strength / 2) * (1 - 2 * strength / 3)
        torch.testing.assert_close(weight.detach(), torch.full((2,), expected))


def test_the_strength_is_that_of_the_base_step_size_also_under_warm_up(tmp_path):
    # A warm-up has set the group's step size to a small value before training starts.
    callback = TrajectoryRegularization()
    fit(
        tmp_path,
        sgd,
        callback,
        schedule=lambda optimizer: LambdaLR(optimizer, lambda t: 0.0 if t == 0 else 1.0),
    )
    assert callback.state_dict()["stages"][0]["strengths"] == pytest.approx([0.01])


class _Gradients(Callback):
    """Looks at the gradients after the pull."""

    def __init__(self):
        self.seen = []

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        self.seen += [p.grad for p in pl_module.parameters()]


def test_gradients_stay_free_of_history(tmp_path):
    # A gradient that remembers how it came about keeps every step in memory.
    gradients = _Gradients()
    fit(tmp_path, sgd, TrajectoryRegularization(**STAGES), gradients)
    assert gradients.seen
    assert not any(grad.requires_grad for grad in gradients.seen)


def test_clipping_clips_the_pull_too(tmp_path):
    # Otherwise than in TRSGD, which is told after clipping: the card says so.
    strong = {"lambda_w": 0.3, "inner_steps": 3}
    clip = {"gradient_clip_val": 0.05}
    ours = fit(tmp_path, sgd, TrajectoryRegularization(**strong), **clip)
    theirs = fit(tmp_path, lambda p: trsgd(p, **strong), **clip)
    assert not all(
        torch.equal(a, b) for a, b in zip(ours.parameters(), theirs.parameters(), strict=True)
    )


@pytest.mark.filterwarnings("ignore:The dirpath has changed:UserWarning")
@pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint that ended before the epoch")
@pytest.mark.parametrize("reset_each_epoch", [False, True])
@pytest.mark.parametrize("interrupted_at", [7, 8, 9, 10])
def test_resume_at_every_position_of_a_stage(tmp_path, interrupted_at, reset_each_epoch):
    # 7 steps an epoch: at its end, and at positions 1, 2 and 0 of stages of three steps in the second one.
    settings = {**STAGES, "reset_each_epoch": reset_each_epoch}

    def run(folder, resume_from=None):
        keep = ModelCheckpoint(folder, "{step}", every_n_train_steps=1, save_top_k=-1)
        callback = TrajectoryRegularization(**settings)
        running = trainer(
            folder, max_epochs=3, callbacks=[callback, keep], enable_checkpointing=True
        )
        loader = ResumableDataLoader(batches().dataset, batch_size=8)
        module = Regression(sgd, schedule=step_lr)
        running.fit(module, loader, ckpt_path=resume_from)
        return module, callback.state_dict()

    through, state = run(tmp_path / "through")
    middle = tmp_path / "through" / f"step={interrupted_at}.ckpt"
    resumed, resumed_state = run(tmp_path / "resumed", middle)
    assert_same(resumed, through)
    assert resumed_state["stages"][0]["position"] == state["stages"][0]["position"]
    assert state["stages"][0]["position"] == (7 % 3 if reset_each_epoch else 21 % 3)


def test_reset_stage_forgets_the_anchors(tmp_path):
    class Exchange(Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            if batch_idx == 0:
                callback.reset_stage()

    callback = TrajectoryRegularization(lambda_w=0.3)
    module = fit(
        tmp_path,
        lambda g: torch.optim.SGD(g, lr=0.1),
        callback,
        Exchange(),
        module=_Groups,
        max_steps=3,
    )
    torch.testing.assert_close(module.one.detach(), torch.full((2,), 2.0))


def test_copies_made_during_training_have_no_hooks(tmp_path):
    class Copies(Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            assert copy.deepcopy(callback)._handles == []

    callback = TrajectoryRegularization(**STAGES)
    fit(tmp_path, sgd, callback, Copies())


def test_optimizers_with_stages_of_their_own_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"to be one without stages, got TRSGD\. Leave"):
        fit(tmp_path, trsgd, TrajectoryRegularization())


def test_sparse_gradients_are_refused(tmp_path):
    class Sparse(Regression):
        def __init__(self, make):
            super().__init__(make)
            self.net = torch.nn.Embedding(4, 2, sparse=True)

        def training_step(self, batch, batch_idx):
            return self.net(torch.tensor([1])).sum()

    with pytest.raises(ValueError, match="gradients to be dense for TrajectoryRegularization"):
        fit(
            tmp_path,
            lambda p: torch.optim.SGD(p, lr=0.1),
            TrajectoryRegularization(),
            module=Sparse,
        )


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"lambda_w": -0.1}, r"Expected `lambda_w` to be a number ≥ 0, got -0\.1\."),
        ({"inner_steps": 0}, r"Expected `inner_steps` to be an integer ≥ 1, got 0\."),
        ({"inner_lr_decay": "cosine"}, r"Expected `inner_lr_decay` to be one of harmonic, none"),
    ],
)
def test_bad_settings_are_refused_in_one_sentence(settings, message):
    with pytest.raises(ValueError, match=message):
        TrajectoryRegularization(**settings)


def test_a_pull_without_effect_is_named():
    with pytest.warns(NoEffectWarning, match="stages of one step"):
        TrajectoryRegularization(inner_steps=1, lambda_w=0.1)
