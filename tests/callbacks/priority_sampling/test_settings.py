"""Settings and trainings that are refused, or named because they change nothing."""

from __future__ import annotations

import pytest
import torch
from support.priority_training import B, Clusters, N, fit, loader, quiet
from torch.utils.data import DataLoader, IterableDataset, WeightedRandomSampler

from lightning_sgd import NoEffectWarning, OutsideIntendedUseWarning, Presampling


class Stream(IterableDataset):
    def __iter__(self):
        yield 1


class Repeats(DataLoader):
    """Every batch twice."""

    def __iter__(self):
        for batch in super().__iter__():
            yield batch
            yield batch


class Short(DataLoader):
    def __len__(self):
        return 3


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (DataLoader(Stream()), "`dataset` to be one with indices, got 'Stream'"),
        ([loader(), loader()], "one DataLoader for priority sampling, got list"),
        (
            DataLoader(Clusters(), sampler=WeightedRandomSampler(torch.ones(N), 10)),
            "takes every sample once per epoch, got 'WeightedRandomSampler'",
        ),
        (
            DataLoader(Clusters(), batch_sampler=[[1, 2], [3]]),
            "plain one of a DataLoader with `batch_size`, got 'list'",
        ),
        (DataLoader(Clusters(), batch_size=None), "plain one of a DataLoader"),
        (Repeats(Clusters(), B), "without an iterator or a length of its own, got 'Repeats'"),
        (Short(Clusters(), B), "without an iterator or a length of its own, got 'Short'"),
        (loader(num_workers=1, in_order=False), "`in_order` to be true"),
        (
            loader(shuffle=False, sampler=torch.utils.data.DistributedSampler(Clusters(), 2, 0)),
            "`num_replicas` to be the number of ranks, 1, got 2",
        ),
    ],
)
def test_data_that_cannot_be_used_are_refused(tmp_path, data, message):
    with pytest.raises(ValueError, match=message):
        fit(tmp_path, quiet(), data=data)


def test_overfitting_on_purpose_is_refused(tmp_path):
    with pytest.raises(ValueError, match="`overfit_batches` to be 0 beside PrioritySampling"):
        fit(tmp_path, quiet(), overfit_batches=1)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"score": "entropy"}, "`score` to be one of grad_norm_bound, last_layer"),
        ({"beta": 1.5}, r"`beta` to be in \[0, 1\], got 1\.5"),
        ({"beta_end": -1.0}, r"`beta_end` to be in \[0, 1\]"),
        ({"weight_norm": "sum"}, "`weight_norm` to be one of none, mean, max"),
        ({"refresh_every_n_epochs": 0}, "`refresh_every_n_epochs` to be at least 1"),
        ({"pressure_end": 0.0}, "`pressure_end` to be at least 1"),
        ({"uniform_mix": 2.0}, r"`uniform_mix` to be in \[0, 1\]"),
        ({"score": "rho"}, "`irreducible_losses` to be given with score='rho'"),
        ({"irreducible_losses": "x"}, "`irreducible_losses` to be given with score='rho'"),
    ],
)
def test_bad_settings_are_refused_in_one_sentence(settings, message):
    with pytest.raises(ValueError, match=message):
        quiet(**settings)


@pytest.mark.parametrize(
    ("settings", "category", "message"),
    [
        ({"uniform_mix": 1.0}, NoEffectWarning, "no effect with `uniform_mix` 1"),
        ({"alpha": 0.0}, NoEffectWarning, "`alpha` 0"),
        (
            {"selection": Presampling(), "beta": 1.0, "uniform_mix": 0.5},
            NoEffectWarning,
            "beta, uniform_mix has no effect",
        ),
        (
            {"beta": 1.0, "uniform_mix": 0.1},
            OutsideIntendedUseWarning,
            "steps up to 10 times as large",
        ),
    ],
)
def test_settings_without_effect_and_dangerous_ones_are_named(settings, category, message):
    with pytest.warns(category, match=message):
        quiet(**settings)


def test_a_training_that_is_all_warm_up_is_named(tmp_path):
    with pytest.warns(NoEffectWarning, match="all 3 epochs are warm-up"):
        fit(tmp_path, quiet(warmup_epochs=3))
