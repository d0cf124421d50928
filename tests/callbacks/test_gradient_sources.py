"""Gradients of micro-batches and of ranks, against gradients by hand; and training, which must not notice."""

from __future__ import annotations

import pickle

import numpy as np
import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import GradientAccumulationScheduler
from lightning.pytorch.plugins import MixedPrecision
from support import callback_checks as checks
from support import callback_interruptions as interruptions
from support.callback_checks import Subject, compare
from support.callback_training import Classifier, Training, end_children
from support.strategy_training import FORK, GLOBAL_BATCH, Run, ddp, samples, sgd
from support.training import Regression, TwoOptimizers, batches, loss_of, network, trainer
from support.watching import assert_equal, num_hooks
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from lightning_sgd import (
    ByzantineStrategy,
    GossipPGAStrategy,
    LocalSGDStrategy,
    NoEffectWarning,
    OverlapLocalSGDStrategy,
    TailIndexMonitor,
)
from lightning_sgd.callbacks._monitoring.gradient_collector import GradientCollector
from lightning_sgd.callbacks._monitoring.gradient_monitor import GradientMonitor

pytestmark = pytest.mark.timeout(60)


class Sampler(GradientMonitor):
    """Keeps every sample, and the weights at the beginning of every step.

    Args:
        **settings: Of the collector.
    """

    def __init__(self, every_n_steps=1, every_n_epochs=None, file=None, **settings):
        defaults = {"num_gradients": 2, "num_coordinates": None}
        collector = GradientCollector(**{**defaults, **settings})
        super().__init__(collector, every_n_steps, every_n_epochs, None)
        self.samples, self.weights, self.file = [], {}, file

    @property
    def state_key(self):
        return f"Sampler every {self.schedule.every}"

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        params = [param.detach().clone() for param in pl_module.parameters()]
        self.weights.setdefault(trainer.global_step, params)
        super().on_train_batch_start(trainer, pl_module, batch, batch_idx)

    def look(self, trainer, pl_module):
        self.samples.append(self.collector.sample(trainer, pl_module))
        return {"sampler/step": float(self.samples[-1].step)}

    def describe_end(self, trainer, pl_module):
        return f"{len(self.samples)} samples."

    def describe_findings(self):
        raise NotImplementedError

    def on_fit_end(self, trainer, pl_module):
        if self.file is not None:
            parts = [(sample.step, sample.batch_size, sample.rows) for sample in self.samples]
            torch.save((parts, self.weights), f"{self.file}.{trainer.global_rank}")


def by_hand(weights, batch):
    """The gradient of the loss of a batch, in one row."""
    net = network()
    with torch.no_grad():
        for param, value in zip(net.parameters(), weights, strict=True):
            param.copy_(value)
    gradients = torch.autograd.grad(loss_of(net, batch), list(net.parameters()))
    return torch.cat([gradient.flatten() for gradient in gradients])


def short_last_batch():
    """Batches of eight samples, the last one of four."""
    x, y = batches().dataset.tensors
    return DataLoader(TensorDataset(x[:-4], y[:-4]), batch_size=8)


# The gradients


@pytest.mark.parametrize(
    ("data", "rows_of_last_step"), [(batches, 3), (short_last_batch, 2)], ids=["whole", "short"]
)
def test_micro_batches_are_the_gradients_of_the_batches_of_one_step(
    tmp_path, data, rows_of_last_step
):
    # Seven batches in groups of four: the last group is incomplete, and a short batch has noise of another size.
    sampler = Sampler(source="microbatches")
    run = trainer(tmp_path, callbacks=[sampler], accumulate_grad_batches=4, max_epochs=1)
    run.fit(Regression(sgd), data())
    every = list(data())
    assert [sample.step for sample in sampler.samples] == [0, 1]
    assert [len(sample.rows) for sample in sampler.samples] == [4, rows_of_last_step]
    assert [sample.batch_size for sample in sampler.samples] == [8, 8]
    for sample, group in zip(sampler.samples, (every[:4], every[4:]), strict=True):
        for row, batch in zip(sample.rows, group, strict=False):
            expected = by_hand(sampler.weights[sample.step], batch)
            torch.testing.assert_close(row, expected, rtol=1e-5, atol=1e-7)
    columns = sampler.samples[0].layers["net.2.weight"]
    assert columns.stop - columns.start == 8


def test_the_scale_of_a_grad_scaler_is_divided_out_also_when_it_changes(tmp_path):
    samplers = []
    for scaler in (None, torch.amp.GradScaler("cpu", init_scale=2.0**12, growth_interval=1)):
        plugins = [MixedPrecision("16-mixed", "cpu", scaler)] if scaler else None
        sampler = Sampler(source="microbatches")
        settings = {"accumulate_grad_batches": 2, "max_epochs": 1, "plugins": plugins}
        trainer(tmp_path, callbacks=[sampler], **settings).fit(Regression(sgd), batches())
        samplers.append(sampler)
    assert scaler.get_scale() > 2.0**12
    assert len(samplers[0].samples) == len(samplers[1].samples) == 3  # the last batch is alone
    for plain, scaled in zip(samplers[0].samples, samplers[1].samples, strict=True):
        torch.testing.assert_close(scaled.rows, plain.rows, rtol=0.05, atol=0.01)


def test_what_overflows_is_left_out(tmp_path):
    # An infinite row would make every statistic infinite; the scaler skips the step, and goes on with half the scale.
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**30)
    sampler = Sampler(source="microbatches")
    settings = {"accumulate_grad_batches": 2, "max_epochs": 6}
    plugins = [MixedPrecision("16-mixed", "cpu", scaler)]
    run = trainer(tmp_path, callbacks=[sampler], plugins=plugins, **settings)
    run.fit(Regression(sgd), batches())
    assert 0 < len(sampler.samples) < run.global_step - 6
    assert all(sample.rows.isfinite().all() for sample in sampler.samples)


def test_clipping_comes_after(tmp_path):
    rows = []
    for clip in (None, 1e-3):
        sampler = Sampler(source="microbatches")
        settings = {"accumulate_grad_batches": 2, "max_steps": 1, "gradient_clip_val": clip}
        trainer(tmp_path, callbacks=[sampler], **settings).fit(Regression(sgd), batches())
        rows.append(sampler.samples[0].rows)
    assert torch.equal(*rows)


class Partly(Regression):
    """Leaves the first layer out in every other batch, uses the last one twice, and has checkpoints of activations."""

    def training_step(self, batch, batch_idx):
        x, y = batch
        nested = {"use_reentrant": batch_idx == 0}
        hidden = checkpoint(self.net[0], x.requires_grad_(), **nested)
        hidden = hidden + checkpoint(self.net[0], 2 * x, **nested)
        if batch_idx % 2:
            hidden = x.repeat(1, 2)
        once = self.net[2](hidden.tanh())
        return torch.nn.functional.mse_loss(once + self.net[2](hidden.cos()), y)


def test_unused_and_shared_parameters(tmp_path):
    sampler, module = Sampler(source="microbatches"), Partly(sgd)
    settings = {"accumulate_grad_batches": 2, "max_steps": 1}
    trainer(tmp_path, callbacks=[sampler], **settings).fit(module, batches())
    (sample,) = sampler.samples
    weights = sampler.weights[0]
    with torch.no_grad():
        for param, value in zip(module.parameters(), weights, strict=True):
            param.copy_(value)
    for index, (row, batch) in enumerate(zip(sample.rows, batches(), strict=False)):
        loss = module.training_step(batch, index + 2)  # the same without nested passes
        gradients = torch.autograd.grad(loss, list(module.parameters()), allow_unused=True)
        parts = zip(gradients, weights, strict=True)
        flat = [(torch.zeros_like(w) if g is None else g).flatten() for g, w in parts]
        torch.testing.assert_close(row, torch.cat(flat), rtol=1e-5, atol=1e-7)
    assert (sample.rows[1, :40] == 0).all()


def test_steps_with_several_points_are_left_out(tmp_path):
    class Sharp(Regression):
        """Sharpness-aware: a second backward pass at other weights, in the same step."""

        def optimizer_step(self, epoch, batch_idx, optimizer, closure):
            def twice():
                closure()
                with torch.no_grad():
                    for param in self.parameters():
                        param.add_(param.grad, alpha=0.01)
                return closure()

            super().optimizer_step(epoch, batch_idx, optimizer, twice)

    sampler = Sampler(source="microbatches")
    run = trainer(tmp_path, callbacks=[sampler], accumulate_grad_batches=2, max_epochs=1)
    run.fit(Sharp(sgd), batches())
    assert sampler.samples == []


# When it looks


def test_looks_are_at_the_same_weights_as_with_passes_of_its_own(tmp_path):
    for interval in ({"every_n_steps": 2}, {"every_n_steps": None, "every_n_epochs": 1}):
        steps = []
        for source in ("extra", "microbatches"):
            sampler = Sampler(source=source, **interval)
            run = trainer(tmp_path, callbacks=[sampler], accumulate_grad_batches=2)
            run.fit(Regression(sgd), batches())
            steps.append([sample.step for sample in sampler.samples])
        assert steps[0][-1] == run.global_step == 8
        assert steps[1] == steps[0][:-1]  # after the last step there is none that could be caught


def test_hooks_are_there_only_in_the_steps_that_are_caught(tmp_path):
    num = []

    class Count(Callback):
        def on_before_zero_grad(self, trainer, pl_module, optimizer):
            num.append(sum(len(p._backward_hooks or ()) for p in pl_module.parameters()))

    sampler = Sampler(source="microbatches", every_n_steps=3)
    callbacks = [sampler, Sampler(source="microbatches", every_n_steps=6), Count()]
    run = trainer(tmp_path, callbacks=callbacks, accumulate_grad_batches=2)
    run.fit(Regression(sgd), batches())
    # Steps 3 and 7 have a single batch, which is not enough: a look is put off until there are two.
    assert num == [4, 0, 0, 4, 4, 0, 4, 4]
    assert [sample.step for sample in callbacks[0].samples] == [0, 4]
    assert callbacks[0].samples[0] is callbacks[1].samples[0]
    assert [sample.step for sample in callbacks[1].samples] == [0, 6]


def test_gradients_that_others_take_between_are_not_caught(tmp_path):
    class Other(Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            torch.autograd.grad(100 * loss_of(pl_module.net, batch), list(pl_module.parameters()))

    rows = []
    for others in ([], [Other()]):
        sampler = Sampler(source="microbatches")
        settings = {"accumulate_grad_batches": 2, "max_steps": 1}
        run = trainer(tmp_path, callbacks=[*others, sampler], **settings)
        run.fit(Regression(sgd), batches())
        rows.append(sampler.samples[0].rows)
    assert torch.equal(*rows)


def test_a_data_set_that_can_only_be_iterated_will_do(tmp_path):
    class Stream(IterableDataset):
        def __iter__(self):
            return iter(samples())

    sampler = Sampler(source="microbatches")
    run = trainer(tmp_path, callbacks=[sampler], accumulate_grad_batches=2, max_epochs=1)
    run.fit(Regression(sgd), DataLoader(Stream(), batch_size=8))
    assert len(sampler.samples) == 3


# Several ranks


def local_batches(rank, num_ranks, num_batches):
    """What a rank gets in the first step, if it takes so many batches."""
    x, y = samples().tensors
    size = GLOBAL_BATCH // num_ranks
    mine = slice(rank, None, num_ranks)
    return [
        (x[mine][i * size : (i + 1) * size], y[mine][i * size : (i + 1) * size])
        for i in range(num_batches)
    ]


STRATEGIES = {
    "DDP": ddp,
    "Local SGD": lambda: LocalSGDStrategy(period=2, **FORK),
    "gossip": lambda: GossipPGAStrategy(period=3, **FORK),
    "overlap": lambda: OverlapLocalSGDStrategy(period=2, warmup_steps=2, **FORK),
    "Byzantine": lambda: ByzantineStrategy("median", **FORK),
}
EVERY = [0, 1, 2, 3, 4, 5, 6]
SHARED = {
    "DDP": EVERY,
    "Local SGD": [0, 2, 4, 6],
    "gossip": [0, 3, 6],
    "overlap": [0, 1, 2],
    "Byzantine": EVERY,
}
"""The steps that all ranks begin with the same weights."""


def collect(tmp_path, strategy, ranks=2, **settings):
    """For each rank the samples, and the weights at the beginning of every step."""
    given = {key: settings.pop(key) for key in ("source", "every_n_steps") if key in settings}
    sampler = Sampler(file=tmp_path / "samples", **given)
    Run(tmp_path / "run", strategy, ranks=ranks, callbacks=[sampler], max_epochs=1, **settings)
    files = (f"{tmp_path}/samples.{rank}" for rank in range(ranks))
    return [torch.load(file, weights_only=False) for file in files]


@pytest.mark.parametrize("name", STRATEGIES)
@pytest.mark.parametrize(
    ("source", "accumulate"), [("ranks", 1), ("ranks", 2), ("microbatches", 2)]
)
def test_the_gradients_of_ranks_before_they_are_exchanged(tmp_path, name, source, accumulate):
    found = collect(tmp_path, STRATEGIES[name](), source=source, accumulate_grad_batches=accumulate)
    samples, weights = found[0]
    for others, _ in found[1:]:
        assert_equal(others, samples, "the sample of another rank")
    step, size, rows = samples[0]
    num_rows = 2 if source == "ranks" else 4
    assert (step, size, len(rows)) == (0, 4 * accumulate * 2 // num_rows, num_rows)
    gradients = torch.stack(
        [
            torch.stack([by_hand(weights[0], batch) for batch in local_batches(r, 2, accumulate)])
            for r in range(2)
        ]
    )
    expected = gradients.mean(1) if source == "ranks" else gradients.transpose(0, 1).flatten(0, 1)
    torch.testing.assert_close(rows, expected, rtol=1e-5, atol=1e-7)
    if accumulate == 1:
        assert [step for step, *_ in samples] == SHARED[name]


def test_four_ranks(tmp_path):
    found = collect(tmp_path, ddp(), ranks=4, source="microbatches", accumulate_grad_batches=2)
    samples, weights = found[0]
    assert all(torch.equal(rows, samples[0][2]) for others, _ in found for _, _, rows in others[:1])
    expected = [
        by_hand(weights[0], local_batches(rank, 4, 2)[number])
        for number in range(2)
        for rank in range(4)
    ]
    torch.testing.assert_close(samples[0][2], torch.stack(expected), rtol=1e-5, atol=1e-7)
    assert samples[0][1] == 2


def test_a_rank_with_a_short_batch_is_left_out(tmp_path):
    # Batches of three samples have more noise than batches of four.
    class Short(Regression):
        def on_before_batch_transfer(self, batch, index):
            return [part[: 3 if self.global_rank else 4] for part in batch]

    sampler = Sampler(source="microbatches", file=tmp_path / "samples")
    Run(
        tmp_path / "run",
        ddp(),
        Short(sgd),
        callbacks=[sampler],
        max_epochs=1,
        accumulate_grad_batches=2,
    )
    for rank in range(2):
        parts, _ = torch.load(f"{tmp_path}/samples.{rank}", weights_only=False)
        assert [(size, len(rows)) for _, size, rows in parts] == [(4, 2)] * 3


# Training does not notice


def monitor(source, **settings):
    defaults = {"every_n_steps": 1, "max_overhead": 1.0, "save_figure": False, "num_batches": 2}
    return TailIndexMonitor(**{**defaults, "source": source, **settings})


KEYS = ("tail_index/coordinate", "tail_index/pooled", "tail_index/zero_fraction")
MICRO = Subject(lambda **settings: monitor("microbatches", **settings), KEYS)
RANKS = Subject(lambda **settings: monitor("ranks", **settings), KEYS)


@pytest.mark.slow
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"precision": "bf16-mixed"},
        {"gradient_clip_val": 0.05},
        {"make_module": lambda: Classifier(compiled=True)},
        {"limit_train_batches": 4},
        {"fast_dev_run": True},
        {"logger": False},
    ],
    ids=lambda settings: next(iter(settings), "plain"),
)
def test_training_is_unchanged_by_micro_batches(tmp_path, settings):
    # Dropout, batch statistics, random states, gradients and weights at every hook, as without the monitor.
    with_it, _ = compare(MICRO, tmp_path, accumulate_grad_batches=3, **settings)
    if "logger" not in settings and "fast_dev_run" not in settings:
        assert with_it.record.keys >= set(KEYS)


def test_training_is_unchanged_under_a_grad_scaler(tmp_path):
    def plugins():
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**16, growth_interval=2)
        return [MixedPrecision("16-mixed", "cpu", scaler)]

    runs = [
        Training(tmp_path, *callbacks, accumulate_grad_batches=2, plugins=plugins()).run()
        for callbacks in ([MICRO.make()], [])
    ]
    checks.assert_same_trace(runs[0].record.trace, runs[1].record.trace)


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_a_compiled_module_is_not_compiled_again(tmp_path, backend):
    # Hooks come and go between steps; if they were part of what is compiled, every look would cost minutes.
    def train(*callbacks):
        torch._dynamo.reset()
        module = Regression(sgd)
        module.net = torch.compile(module.net, backend=backend)
        with torch._dynamo.config.patch(error_on_recompile=True):
            settings = {"accumulate_grad_batches": 2, "callbacks": list(callbacks)}
            trainer(tmp_path, **settings).fit(module, batches())
        return [param.detach().clone() for param in module.parameters()]

    sampler = Sampler(source="microbatches", every_n_steps=2)
    assert_equal(train(sampler), train(), "the weights")
    assert [sample.step for sample in sampler.samples] == [0, 2, 4, 6]
    assert "net.2.weight" in sampler.samples[0].layers


@pytest.mark.parametrize("subject", [MICRO, RANKS], ids=["microbatches", "ranks"])
def test_training_on_two_ranks_is_unchanged(tmp_path, subject):
    checks.check_two_ranks(subject, tmp_path)


@pytest.mark.parametrize("subject", [MICRO, RANKS], ids=["microbatches", "ranks"])
@pytest.mark.filterwarnings("ignore:The dirpath has changed:UserWarning")
@pytest.mark.parametrize("world_size", [2, 4])
def test_resume_on_several_ranks(tmp_path, subject, world_size):
    interruptions.check_resume(subject, tmp_path, world_size)


@pytest.mark.filterwarnings("ignore:The dirpath has changed:UserWarning")
def test_resume_on_one_rank(tmp_path):
    interruptions.check_resume(MICRO, tmp_path)


def test_failures_leave_no_hooks(tmp_path):
    for failing_step in (0, 3):
        module = Classifier(failing_step=failing_step)
        training = Training(tmp_path, MICRO.make(), module=module, accumulate_grad_batches=2)
        with pytest.raises(RuntimeError, match="the training step failed"):
            training.run()
        interruptions.assert_no_hooks(training.module)
    training = Training(
        tmp_path, interruptions.failing(MICRO.make(), 0.5), accumulate_grad_batches=2
    )
    with pytest.raises(RuntimeError, match="the measurement failed"):
        training.run()
    assert_equal(num_hooks(training.module), num_hooks(Classifier()), "the number of hooks")


@pytest.mark.parametrize("subject", [MICRO, RANKS], ids=["microbatches", "ranks"])
def test_a_failure_on_one_rank_does_not_hang_the_other(tmp_path, subject):
    interruptions.check_failure_outside_on_one_of_two_ranks(subject, tmp_path)
    end_children()


def test_one_object_serves_two_trainings_and_copies(tmp_path):
    callback = MICRO.make()
    for _ in range(2):
        Training(tmp_path, callback, accumulate_grad_batches=2).run()
        assert callback.times == [0, 1, 2, 4, 5, 6]  # the last batch of an epoch is alone
        pickle.loads(pickle.dumps(callback))


# What is said and what is refused


def test_a_single_rank_and_a_single_batch_are_refused(tmp_path):
    for source, remedy in (("ranks", "there is one"), ("microbatches", "accumulate_grad_batches")):
        match = f"Expected `source` to be 'extra'.*, got '{source}'.*{remedy}"
        with pytest.raises(ValueError, match=match):
            trainer(tmp_path, callbacks=[monitor(source)]).fit(Regression(sgd), batches())


def lbfgs(params):
    return torch.optim.LBFGS(params, max_iter=2)


@pytest.mark.parametrize(
    ("module", "reason"),
    [
        (lambda: TwoOptimizers(sgd), "in manual optimization it is not known which backward"),
        (lambda: Regression(lbfgs), "LBFGS takes several gradients at different points"),
    ],
)
def test_what_stands_in_the_way_is_said(tmp_path, caplog, module, reason):
    callbacks = [monitor("microbatches"), GradientAccumulationScheduler({1: 2})]
    if "manual" in reason:
        callbacks.pop()
        callbacks[0].collector.steps.refuse_single_gradients = lambda trainer: None
    with caplog.at_level("INFO", "lightning.pytorch.utilities.rank_zero"):
        trainer(tmp_path, callbacks=callbacks).fit(module(), batches())
    lines = [text for text in caplog.messages if text.startswith("TailIndexMonitor")]
    assert f"nothing can be measured, because {reason}" in lines[0]
    assert lines[1] == "TailIndexMonitor: no gradient noise was measured."


def test_accumulation_that_begins_later(tmp_path):
    sampler = Sampler(source="microbatches")
    callbacks = [sampler, GradientAccumulationScheduler({1: 2})]
    trainer(tmp_path, callbacks=callbacks).fit(Regression(sgd), batches())
    assert [sample.step for sample in sampler.samples] == [7, 8, 9]


def test_the_line_at_the_start_says_what_is_caught_and_what_it_takes(tmp_path, caplog):
    with caplog.at_level("INFO", "lightning.pytorch.utilities.rank_zero"):
        settings = {"callbacks": [monitor("microbatches")], "accumulate_grad_batches": 4}
        trainer(tmp_path, **settings).fit(Regression(sgd), batches())
    (first,) = (text for text in caplog.messages if "every step" in text)
    assert "gradients of the 4 micro-batches of a step, 49 coordinates, 0.00157 MB" in first


@pytest.mark.parametrize(
    "settings", [{"batch_size": 4}, {"train_mode": False}, {"loss_fn": lambda *_: None}]
)
def test_settings_without_effect_warn(settings):
    with pytest.warns(NoEffectWarning, match=f"`{next(iter(settings))}` has no effect"):
        GradientCollector(2, None, source="ranks", **settings)


def test_an_unknown_source_is_refused():
    with pytest.raises(ValueError, match="Expected `source` to be one of extra, microbatches"):
        GradientCollector(2, None, source="steps")


def test_noise_of_one_step_has_the_covariance_of_the_batches(tmp_path):
    # Differences within a step, by hand: what the statistics are made of.
    sampler = Sampler(source="microbatches")
    settings = {"accumulate_grad_batches": 4, "max_steps": 1}
    trainer(tmp_path, callbacks=[sampler], **settings).fit(Regression(sgd), batches())
    (sample,) = sampler.samples
    expected = torch.stack([by_hand(sampler.weights[0], batch) for batch in list(batches())[:4]])
    np.testing.assert_allclose(
        sample.noise.square().mean(dim=0), expected.var(dim=0), rtol=1e-4, atol=1e-8
    )


@pytest.mark.parametrize("source", ["extra", "microbatches"])
def test_a_sketch_has_the_norms_of_whole_gradients(tmp_path, source):
    rows = []
    for settings in ({"sketch": True, "num_coordinates": 800}, {}):
        sampler = Sampler(source=source, num_gradients=4, **settings)
        module = Regression(sgd)
        module.net = torch.nn.Sequential(torch.nn.Linear(4, 2000), torch.nn.Linear(2000, 1))
        with torch.no_grad():
            for param in module.parameters():
                param.copy_(torch.linspace(-0.1, 0.1, param.numel()).view_as(param))
        settings = {"accumulate_grad_batches": 4, "max_steps": 1, "callbacks": [sampler]}
        trainer(tmp_path, **settings).fit(module, batches())
        rows.append(sampler.samples[0].rows)
    assert rows[0].shape[1] < 1000 < rows[1].shape[1]
    gram, exact = (each @ each.T for each in rows)
    assert (gram - exact).abs().max() < 0.25 * exact.abs().max()
