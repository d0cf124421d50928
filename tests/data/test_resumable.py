"""A resumed run sees the remaining batches of the epoch, and nothing else tells it from an uninterrupted one."""

from __future__ import annotations

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from support.training import trainer
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    DistributedSampler,
    IterableDataset,
    RandomSampler,
)

from lightning_sgd.data.resumable import ResumableDataLoader

NUM_BATCHES = 10


class Numbers(Dataset):
    """Twenty samples made of their own number; remembers which were loaded."""

    def __init__(self):
        self.loaded = []

    def __len__(self):
        return 2 * NUM_BATCHES

    def __getitem__(self, index):
        self.loaded.append(index)
        return torch.full((64,), float(index)), torch.tensor(index % 10)


def sampler(dataset, **settings):
    return DistributedSampler(dataset, **{"num_replicas": 1, "rank": 0, "seed": 1, **settings})


def numbers(**settings):
    dataset = Numbers()
    return ResumableDataLoader(dataset, 2, sampler=sampler(dataset), **settings)


def validation():
    return DataLoader(Numbers(), batch_size=10)


def labels(batches):
    return [batch[1].tolist() for batch in batches]


@pytest.mark.parametrize("step", [3, 10, 13, 29])
@pytest.mark.parametrize("num_workers", [0, 2])
def test_resumes_at_the_next_batch(assert_resumes, step, num_workers):
    # In the first epoch, exactly at the end of one, in the second one, before the last batch of all.
    assert_resumes(step, lambda: numbers(num_workers=num_workers), num_done=step)


@pytest.mark.parametrize(
    ("settings", "step", "num_done"),
    [
        ({"accumulate_grad_batches": 2}, 8, 16),
        ({"accumulate_grad_batches": 3}, 5, 13),  # an epoch has 3 + 3 + 3 + 1 batches
        ({"limit_train_batches": 4}, 6, 6),
        ({"limit_train_batches": 4}, 8, 8),  # the loader itself is not at its end
        ({"max_steps": 25, "max_epochs": -1}, 13, 13),
        ({"max_steps": 25, "max_epochs": -1}, 10, 10),
        ({"reload_dataloaders_every_n_epochs": 1}, 13, 13),
        ({"val_check_interval": 0.3, "val": validation()}, 13, 13),
        ({"val_check_interval": 0.3, "val": validation()}, 16, 16),  # validated at this very step
        ({"hook": "on_validation_end", "val_check_interval": 0.5, "val": validation()}, 15, 15),
        ({"hook": "on_validation_end", "val": validation()}, 10, 10),
        ({"hook": "on_train_epoch_end", "val": validation()}, 20, 20),
    ],
)
def test_resumes_with_settings_of_the_trainer(assert_resumes, settings, step, num_done):
    assert_resumes(step, numbers, num_done, **settings)


@pytest.mark.parametrize(
    "settings",
    [
        {"batch_size": 3, "drop_last": True},
        {"batch_size": 3, "num_workers": 1, "persistent_workers": True},
        {"batch_sampler": BatchSampler(sampler(Numbers()), 3, drop_last=False)},
    ],
)
def test_resumes_with_settings_of_the_loader(assert_resumes, settings):
    def data():
        order = {} if "batch_sampler" in settings else {"sampler": sampler(Numbers())}
        return ResumableDataLoader(Numbers(), **settings, **order)

    assert_resumes(4, data, num_done=4)


@pytest.mark.parametrize("settings", [{}, {"accumulate_grad_batches": 2}])
def test_resumes_on_every_rank(assert_resumes, settings):
    # Only the state of rank 0 is saved. Lightning gives a loader without shuffling its own sampler and rebuilds it.
    num_done = 3 * settings.get("accumulate_grad_batches", 1)

    def data():
        return ResumableDataLoader(Numbers(), batch_size=1)

    assert_resumes(3, data, num_done, ranks=2, **settings)


@pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty:UserWarning")
def test_resumes_after_a_crash(tmp_path, recorded):
    # The way users meet it: ModelCheckpoint, a run that breaks down, the last checkpoint.
    class Crashing(recorded):
        def on_train_batch_end(self, *_):
            if self.trainer.global_step == 15:
                raise KeyError("power")

    def checkpoints():
        return ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=4, save_top_k=-1)

    def fit(module, name, **settings):
        model = module(tmp_path / name)
        run = trainer(tmp_path, enable_checkpointing=True, callbacks=[checkpoints()])
        run.fit(model, numbers(), **settings)
        return model

    whole = fit(recorded, "whole")
    with pytest.raises(KeyError, match="power"):
        fit(Crashing, "crashed")
    rest = fit(recorded, "rest", ckpt_path=tmp_path / "step=12.ckpt", weights_only=True)
    assert rest.seen == whole.seen[12:]
    assert torch.equal(rest.net.weight, whole.net.weight)


@pytest.mark.parametrize(("first", "second"), [(10, 14), (10, 20), (10, 13), (13, 20), (20, 23)])
@pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty:UserWarning")
@pytest.mark.filterwarnings("ignore:The dirpath has changed:UserWarning")
def test_resumes_twice(tmp_path, recorded, first, second):
    # A run that is resumed at the last batch of an epoch writes checkpoints that can be resumed, too.
    def fit(name, **settings):
        model = recorded(tmp_path / name)
        saving = ModelCheckpoint(
            tmp_path / name,
            "{step}",
            every_n_train_steps=1,
            save_top_k=-1,
            auto_insert_metric_name=False,
        )
        run = trainer(tmp_path, max_epochs=3, enable_checkpointing=True, callbacks=[saving])
        run.fit(model, numbers(), **settings)
        return model

    whole = fit("whole")
    fit("once", ckpt_path=tmp_path / "whole" / f"{first}.ckpt", weights_only=True)
    twice = fit("twice", ckpt_path=tmp_path / "once" / f"{second}.ckpt", weights_only=True)
    assert twice.seen == whole.seen[second:]
    assert torch.equal(twice.net.weight, whole.net.weight)


@pytest.mark.parametrize(
    "settings",
    [
        {"ask_early": True},  # issue 20550
        {"hook": "on_train_epoch_end", "max_steps": 30, "max_epochs": -1},  # issue 19617
        {"hook": "on_train_batch_start"},
    ],
)
@pytest.mark.xfail(raises=AssertionError, reason="named in the docstring; Lightning decides")
def test_limits_set_by_lightning(assert_resumes, settings):
    # When one of these works, the docstring should no longer warn of it.
    step = 10 if "max_steps" in settings else 13
    assert_resumes(step, numbers, num_done=step, **settings)


def test_skipped_batches_are_not_loaded():
    # Decoding a million images again would make the restart as slow as the lost work.
    dataset = Numbers()
    loader = ResumableDataLoader(dataset, 2, sampler=sampler(dataset))
    loader.load_state_dict({"epoch": 0, "num_batches": 7, "num_batches_in_epoch": NUM_BATCHES})
    assert len(list(loader)) == 3
    assert dataset.loaded == list(sampler(dataset))[14:]
    assert len(loader) == NUM_BATCHES, "Lightning counts from the start of the epoch"
    assert len(list(loader)) == NUM_BATCHES, "the next epoch is complete"


@pytest.mark.parametrize("num_workers", [0, 2])
def test_the_position_counts_what_was_handed_out(num_workers):
    # Two workers have prefetched several batches by then.
    loader = numbers(num_workers=num_workers)
    batches = iter(loader)
    next(batches), next(batches)
    assert loader.state_dict() == {
        "epoch": 0,
        "num_batches": 2,
        "num_batches_in_epoch": NUM_BATCHES,
    }
    del batches


def test_a_position_belongs_to_its_epoch():
    loader = numbers()
    loader.load_state_dict({"epoch": 1, "num_batches": 7, "num_batches_in_epoch": NUM_BATCHES})
    assert loader.state_dict()["num_batches"] == 7, "a checkpoint before the first batch keeps it"
    batches = iter(loader)  # Lightning tells the epoch only after this
    loader.sampler.set_epoch(2)
    assert len(list(batches)) == NUM_BATCHES


def test_a_position_at_the_end_begins_the_next_epoch():
    loader = ResumableDataLoader(range(6), batch_size=2)
    list(loader)
    assert loader.state_dict()["num_batches"] == 3
    loader.load_state_dict(loader.state_dict())
    assert [batch.tolist() for batch in loader] == [[0, 1], [2, 3], [4, 5]]


def test_a_look_through_the_data_does_not_move_the_position():
    # Callbacks that measure the full gradient iterate over the loader in the middle of an epoch.
    loader, expected = numbers(), labels(numbers())
    batches = iter(loader)
    seen = labels([next(batches) for _ in range(4)])
    assert labels(loader) == expected
    next(iter(loader))
    assert loader.state_dict()["num_batches"] == 4
    assert seen + labels(batches) == expected
    assert loader.state_dict()["num_batches"] == NUM_BATCHES


def test_a_look_through_the_data_before_the_restart_does_not_take_the_position():
    loader, expected = numbers(), labels(numbers())
    loader.load_state_dict({"epoch": 0, "num_batches": 4, "num_batches_in_epoch": NUM_BATCHES})
    batches = iter(loader)  # Lightning makes its iterator before `on_train_start`
    assert labels(loader) == expected
    first = labels([next(batches)])
    assert labels(loader) == expected, "nor does the position shorten another look"
    assert first + labels(batches) == expected[4:]


def test_an_epoch_that_was_left_early_does_not_count():
    loader = numbers()
    batches = iter(loader)
    next(batches)
    batches = iter(loader)
    assert len(list(batches)) == NUM_BATCHES
    assert loader.state_dict()["num_batches"] == NUM_BATCHES


def test_another_number_of_batches_is_told():
    # After a change of batch size or world size the samples that were seen are not the ones that are skipped.
    loader = numbers()
    loader.load_state_dict({"epoch": 0, "num_batches": 4, "num_batches_in_epoch": 5})
    with pytest.warns(UserWarning, match="had 5 batches and now has 10"):
        assert len(list(loader)) == 6


@pytest.mark.parametrize("num_workers", [0, 2])
def test_skipping_leaves_the_global_random_state_alone(num_workers):
    loader = numbers(num_workers=num_workers, generator=torch.Generator())
    before = torch.get_rng_state()
    loader.load_state_dict({"epoch": 0, "num_batches": 7, "num_batches_in_epoch": NUM_BATCHES})
    list(loader)
    assert torch.equal(torch.get_rng_state(), before)


class Stream(IterableDataset):
    def __iter__(self):
        yield from range(3)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"shuffle": True},
            "Expected `sampler` to be one whose order .* got 'RandomSampler'. Pass",
        ),
        (
            {"batch_sampler": BatchSampler(RandomSampler(range(3)), 2, drop_last=False)},
            "got 'RandomSampler'",
        ),
        ({"dataset": Stream()}, "Expected `dataset` to be one with indices, got 'Stream'. Give"),
    ],
)
def test_orders_that_cannot_be_repeated_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        ResumableDataLoader(**{"dataset": range(3), **settings})


def test_prediction_and_overfitting_rebuild_the_loader(tmp_path, recorded):
    # Lightning makes new loaders of the same class for both.
    class Predicts(recorded):
        def predict_step(self, batch):
            return batch[1]

    model = Predicts(tmp_path / "model")
    assert len(trainer(tmp_path).predict(model, numbers())) == NUM_BATCHES
    with pytest.warns(UserWarning, match="You requested to overfit"):
        trainer(tmp_path, overfit_batches=3).fit(model, numbers())
    assert [batch_idx for _, batch_idx, _ in model.seen] == [0, 1, 2] * 2
    assert model.seen[0][2] == model.seen[3][2] == [(0.0, 0), (64.0, 1)]
