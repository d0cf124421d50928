"""What every callback must do when things break off: failures, restarts, copies; one function per promise."""

from __future__ import annotations

import pickle

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.utils._python_dispatch import TorchDispatchMode

from support.callback_training import Classifier, Training
from support.watching import assert_equal, assert_same_trace, num_hooks, snapshot

STEPS, INTERRUPTED_AT = 10, 5
FAILURE = "the measurement failed"
MEASURING = (
    "look",
    "on_train_batch_end",
    "on_before_optimizer_step",
    "on_train_batch_start",
    "on_train_epoch_end",
)
"""Methods in which callbacks measure; the first one that a callback has is made to fail."""


def check_failure_inside(subject, folder):
    """A measurement that fails is seen, and leaves everything as it was before: modes, gradients, random states."""
    whole = Training(folder).run().record.trace if subject.observes else None
    for share in (0.0, 0.25, 0.5, 0.75, 1.0):
        callback = failing(subject.make(), share)
        training = Training(folder, callback)
        with pytest.raises(RuntimeError, match=FAILURE):
            training.run()
        if subject.observes:
            now = snapshot(training.module, training.trainer.optimizers)
            _, before = training.before.trace[-1]
            assert_equal(now, {**before, "loss and batch": []}, "after the failure, the training")
            assert_same_trace(training.record.trace, whole, complete=False)
            assert_no_hooks(training.module)


def check_failure_inside_on_one_of_two_ranks(subject, folder, timeout=30):
    """The other rank does not wait for ever, and the message arrives."""
    training = Training(folder, failing(subject.make(), 0.5, rank=1), ranks=2, timeout=timeout)
    with pytest.raises(Exception, match=FAILURE):
        training.run()


def check_failure_outside(subject, folder):
    """When the module fails, its own message is seen, and the callback has not made it worse."""
    runs = []
    for callbacks in ([subject.make()], []):
        training = Training(folder, *callbacks, module=Classifier(failing_step=3))
        with pytest.raises(RuntimeError, match="the training step failed"):
            training.run()
        runs.append(training)
    assert_no_hooks(runs[0].module)
    if subject.observes:
        assert_same_trace(runs[0].record.trace, runs[1].record.trace)
        after = [snapshot(training.module, training.trainer.optimizers) for training in runs]
        assert_equal(*after, "after the failure, the training")


def check_failure_outside_on_one_of_two_ranks(subject, folder, timeout=30):
    """The other rank does not wait for ever, and the message arrives."""
    module = Classifier(failing_step=3, failing_rank=1)
    training = Training(folder, subject.make(), module=module, ranks=2, timeout=timeout)
    with pytest.raises(Exception, match="the training step failed"):
        training.run()


class Interruption(TorchDispatchMode):
    """Counts the operations of torch, and fails at one of them.

    Args:
        at: Number of the operation.
    """

    def __init__(self, at=None):
        super().__init__()
        self.at, self.count = at, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += 1
        if self.count == self.at:
            raise RuntimeError(FAILURE)
        return func(*args, **(kwargs or {}))


def failing(callback, share, rank=0):
    """Let the second measurement fail after a share of its operations, on one rank."""
    name = next((name for name in MEASURING if _has_its_own(callback, name)), "on_train_batch_end")
    measure, counts = getattr(callback, name), []

    def measure_or_fail(trainer, *args, **kwargs):
        fails = bool(counts) and trainer.global_rank == rank
        with Interruption(1 + int(share * counts[0]) if fails else None) as interruption:
            result = measure(trainer, *args, **kwargs)
        if fails:
            raise RuntimeError(FAILURE)
        counts.append(interruption.count)
        return result

    setattr(callback, name, measure_or_fail)
    return callback


def _has_its_own(callback, name):
    inherited = getattr(Callback, name, None)
    return getattr(type(callback), name, inherited) is not inherited


def assert_no_hooks(module):
    """Nothing hangs on to a module that is trained no more."""
    assert_equal(num_hooks(module), num_hooks(type(module)()), "the number of hooks")


def check_fit_twice(subject, folder):
    """A callback object can be used again: for a new training, and to go on with the old one."""
    callback = subject.make()
    first, second = Training(folder, callback).run(), Training(folder, callback).run()
    assert_same_trace(second.record.trace, first.record.trace)
    assert_equal(second.record.entries, first.record.entries, "what the second training logs")

    second.trainer.fit_loop.max_epochs += 1
    num_entries = len(second.record.entries)
    second.run()
    later = [entry for entry in second.record.entries[num_entries:] if subject.matches(entry[1])]
    assert later or not subject.metric_keys, "nothing is logged when a training goes on"


def check_copies(subject, folder):
    """Spawned processes get a pickled callback, before training; tuners copy it afterwards."""
    callback = pickle.loads(pickle.dumps(subject.make()))
    Training(folder, callback).run()
    pickle.loads(pickle.dumps(callback))


class _State(Callback):
    """Writes down the state with which another callback, before this one in the list, begins to train.

    Args:
        callback: The other one.
        file: Where the state of each rank goes.
    """

    def __init__(self, callback, file):
        self.callback, self.file = callback, file

    def on_train_start(self, trainer, pl_module):
        torch.save(self.callback.state_dict(), f"{self.file}.{trainer.global_rank}")


def check_resume(subject, folder, world_size=1, timeout=30):
    """After an interruption in mid-epoch, weights, optimizer and the callback's own state go on bit by bit."""
    through = _fit(subject, folder / "through", world_size, timeout)
    middle = through / f"step={INTERRUPTED_AT}.ckpt"
    resumed = _fit(subject, folder / "resumed", world_size, timeout, middle)
    saved, ours, expected = (
        torch.load(file, weights_only=True)
        for file in (middle, resumed / f"step={STEPS}.ckpt", through / f"step={STEPS}.ckpt")
    )
    key = subject.make().state_key
    for rank in range(world_size):
        restored = torch.load(f"{resumed / 'restored'}.{rank}", weights_only=True)
        assert_equal(restored, saved["callbacks"].get(key, {}), "the restored state")
    for part in ("state_dict", "optimizer_states", "lr_schedulers"):
        assert_equal(ours[part], expected[part], part)
    ends = (content["callbacks"].get(key) for content in (ours, expected))
    assert_equal(*ends, "the state at the end")
    assert_plain(expected["callbacks"].get(key))


def _fit(subject, folder, world_size, timeout, middle=None):
    callback = subject.make()
    checkpoints = ModelCheckpoint(
        folder, "{step}", every_n_train_steps=INTERRUPTED_AT, save_top_k=-1
    )
    folder.mkdir()
    training = Training(
        folder,
        callback,
        _State(callback, folder / "restored"),
        module=Classifier(dropout=0.0),
        ranks=world_size,
        timeout=timeout,
        others=[checkpoints],
        max_epochs=-1,
        max_steps=STEPS,
        enable_checkpointing=True,
        accumulate_grad_batches=2 if world_size == 1 else 1,
        num_sanity_val_steps=1,
        val_check_interval=3,
    )
    training.run(ckpt_path=middle)
    return folder


def assert_plain(state, place="state"):
    """Only what every reader of a checkpoint can load: tensors, numbers, strings, lists, dictionaries."""
    plain = (torch.Tensor, bool, int, float, str, type(None), list, dict)
    assert type(state) in plain, f"{place} is a {type(state).__name__}"
    if isinstance(state, (list, dict)):
        for key, value in state.items() if isinstance(state, dict) else enumerate(state):
            assert_plain(value, f"{place}/{key}")
