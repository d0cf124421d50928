"""What every callback must do, whatever it is for; one function per promise.

Callbacks that observe are compared, bit by bit, with the same training without them. The others, which are there to
change training, are compared with a second run of themselves: they must repeat.
"""

from __future__ import annotations

import csv
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase

import torch
from lightning.pytorch import Callback
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger

from support.callback_training import (
    NUM_BATCHES,
    NUM_EPOCHS,
    Classifier,
    ManualClassifier,
    Training,
    UnevenClock,
)
from support.watching import assert_equal, assert_same_trace, num_hooks


@dataclass(frozen=True)
class Subject:
    """A callback under test.

    Attributes:
        make: Builds it with the settings of the suite, and with those that are given instead.
        metric_keys: Patterns of the keys that it logs.
        observes: Whether it leaves training as it is.
        other_settings: What distinguishes a second instance in the same Trainer.
        deprecated: Pattern of the old keys that are kept in ``trainer.callback_metrics``, and no longer logged.
    """

    make: Callable[..., Callback]
    metric_keys: tuple[str, ...] = ()
    observes: bool = True
    other_settings: Mapping[str, object] = field(default_factory=dict)
    deprecated: str | None = None

    @property
    def logged_keys(self):
        """The patterns whose values go to loggers."""
        return [key for key in self.metric_keys if not fnmatchcase(key, self.deprecated or "")]

    def matches(self, key):
        """Whether a key is one of those that it is known to log."""
        return any(fnmatchcase(key, pattern) for pattern in self.metric_keys)


def compare(subject, folder, *, make_module=Classifier, entry="fit", **settings):
    """Run with the callback and without it, and compare every hook on every rank; returns both runs."""
    runs = [
        Training(folder, *callbacks, module=make_module(), **settings).run(entry)
        for callbacks in ([subject.make()], [] if subject.observes else [subject.make()])
    ]
    for ours, expected in zip(runs[0].records, runs[1].records, strict=True):
        assert_same_trace(ours.trace, expected.trace)
    assert_equal(num_hooks(runs[0].module), num_hooks(runs[1].module), "the number of hooks")
    return runs


def keys_of(subject, folder, **settings):
    """The keys that the callback adds to those of the module."""
    with_it = Training(folder, subject.make(), **settings).run().record
    return with_it.keys - Training(folder, **settings).run().record.keys


def check_training_is_unchanged(subject, folder):
    """Losses, gradients, weights, momentum, buffers, modes, batches, random states: at every hook as without it."""
    compare(subject, folder)


def check_metric_keys(subject, folder):
    """What is logged is what the catalogue says, all of it, and never while Lightning tries the validation out."""
    plain, record = Training(folder).run().record, Training(folder, subject.make()).run().record
    logged = (record.keys | record.metrics) - (plain.keys | plain.metrics)
    unknown = {key for key in logged if not subject.matches(key)}
    assert not unknown, f"logged, but not in the catalogue: {sorted(unknown)}"
    for pattern in subject.logged_keys:
        assert any(fnmatchcase(key, pattern) for key in record.keys), f"never logged: {pattern}"
    for pattern in set(subject.metric_keys) - set(subject.logged_keys):
        assert any(fnmatchcase(key, pattern) for key in record.metrics), f"never kept: {pattern}"
        assert not any(fnmatchcase(key, pattern) for key in record.keys), f"logged: {pattern}"


def check_progress_bar(subject, folder):
    """The progress bar belongs to the user."""
    plain, record = Training(folder).run().record, Training(folder, subject.make()).run().record
    assert record.bar == plain.bar, f"on the progress bar: {sorted(record.bar - plain.bar)}"


def check_lines(subject, folder):
    """One line at the start says what is going to happen, one at the end what came of it."""
    said = Training(folder, subject.make()).run().record.lines
    usual = Counter(text for _, text in Training(folder).run().record.lines)
    lines = []
    for num_batches, text in said:
        if usual[text]:
            usual[text] -= 1
        else:
            lines.append((num_batches, text))
    assert len(lines) == 2, f"expected one line at the start and one at the end, got {lines}"
    assert not any("\n" in text for _, text in lines)
    assert [num_batches for num_batches, _ in lines] == [0, NUM_BATCHES * NUM_EPOCHS]


def check_no_logger(subject, folder):
    """Most people try without a logger first."""
    compare(subject, folder, logger=False)


def check_csv_logger(subject, folder):
    """Every value arrives in the file."""
    Training(folder, subject.make(), logger=CSVLogger(folder, name="csv")).run()
    (file,) = folder.glob("csv/*/metrics.csv")
    with file.open() as lines:
        _assert_arrived(subject, next(csv.reader(lines)))


def check_tensorboard_logger(subject, folder):
    """Every value arrives in the event file."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    Training(folder, subject.make(), logger=TensorBoardLogger(folder, name="tensorboard")).run()
    (version,) = folder.glob("tensorboard/*")
    _assert_arrived(subject, EventAccumulator(str(version)).Reload().Tags()["scalars"])


def _assert_arrived(subject, keys):
    for pattern in subject.logged_keys:
        assert any(fnmatchcase(key, pattern) for key in keys), f"missing in the log: {pattern}"


def check_fast_dev_run(subject, folder):
    """One batch of everything, without loggers and checkpoints."""
    compare(subject, folder, fast_dev_run=True)


def check_sanity_check(subject, folder):
    """Validation comes before training then, and must neither be logged nor change what follows."""
    with_it, _ = compare(subject, folder, num_sanity_val_steps=1)
    early = {key for _, key, _, checking in with_it.record.entries if checking}
    assert not early, f"logged in the sanity check: {sorted(early)}"
    plain = Training(folder, subject.make()).run()
    entries = (
        [entry for entry in run.record.entries if subject.matches(entry[1])]
        for run in (with_it, plain)
    )
    assert_equal(*entries, "what is logged after a sanity check")


def check_limited_batches(subject, folder):
    """A part of an epoch, and no training at all."""
    for limit in (0.5, 2, 0):
        compare(subject, folder, limit_train_batches=limit)


def check_accumulation(subject, folder):
    """Steps are not batches: nothing is logged twice for the same step, also not for the incomplete last group."""
    with_it, _ = compare(subject, folder, accumulate_grad_batches=3)
    counts = Counter((step, key) for step, key, *_ in with_it.record.entries)
    # At 0 stands the look before the first step, and beside it the one after, as Lightning counts steps from 0.
    twice = [
        (step, key)
        for (step, key), count in counts.items()
        if count > (2 if step == 0 else 1) and subject.matches(key)
    ]
    assert not twice, f"logged more than once for a step: {twice[:5]}"


def check_clipping(subject, folder):
    """Clipping by norm and by value."""
    for value, algorithm in ((0.05, "norm"), (0.01, "value")):
        compare(subject, folder, gradient_clip_val=value, gradient_clip_algorithm=algorithm)


def check_manual_optimization(subject, folder):
    """Two optimizers that step at different times."""
    compare(subject, folder, make_module=ManualClassifier)


def check_bf16_mixed(subject, folder):
    """Autocast is on around the steps of the module, not around those of a callback."""
    compare(subject, folder, precision="bf16-mixed")


def check_compiled_modules(subject, folder):
    """The eager backend traces without a C++ compiler; layers keep the names that they have in the user's code."""
    with_it, without = compare(subject, folder, make_module=lambda: Classifier(compiled=True))
    keys = with_it.record.keys - without.record.keys
    if subject.observes:
        assert keys == keys_of(subject, folder), sorted(keys)


def check_two_ranks(subject, folder, timeout=30):
    """Training is unchanged on both, only the first one speaks, and clocks that disagree do not end in a deadlock."""
    with_it, without = compare(subject, folder, ranks=2, timeout=timeout, clock=UnevenClock())
    plain = without if subject.observes else Training(folder, ranks=2, timeout=timeout).run()
    (first, second), (_, silent) = with_it.records, plain.records
    said = Counter(text for _, text in second.lines) - Counter(text for _, text in silent.lines)
    assert not said, f"said on the second rank: {list(said)}"
    for pattern in subject.logged_keys:
        assert any(fnmatchcase(key, pattern) for key in first.keys), f"never logged: {pattern}"


def check_two_instances(subject, folder):
    """Both have a place of their own in the checkpoint."""
    pair = [subject.make(), subject.make(**subject.other_settings)]
    training = Training(folder, *pair).run()
    states = [callback.state_dict() for callback in pair]
    if subject.observes:
        assert_same_trace(training.record.trace, Training(folder).run().record.trace)
    if any(states):
        assert pair[0].state_key != pair[1].state_key
        assert pair[0].state_key == subject.make().state_key, "the key changes from run to run"
        training.trainer.save_checkpoint(folder / "two.ckpt")
        saved = torch.load(folder / "two.ckpt", weights_only=True)["callbacks"]
        for callback, state in zip(pair, states, strict=True):
            assert_equal(saved[callback.state_key], state, "the state of one of two")


def check_entries_without_training(subject, folder):
    """Validation, test and prediction alone need no optimizers, no training data and no steps."""
    for entry in ("validate", "test", "predict"):
        compare(subject, folder, entry=entry)
