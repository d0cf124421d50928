"""GaussianityMonitor on noise of known laws, beside the functions that it calls on gradients taken by hand."""

from __future__ import annotations

import logging
import math
from functools import partial

import pytest
import torch
from lightning.pytorch import Callback, LightningModule
from lightning.pytorch.loggers import CSVLogger
from support.training import Regression, TwoOptimizers, batches, loss_of, trainer
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from lightning_sgd import GaussianityMonitor, TailIndexMonitor, gradient_gaussianity
from lightning_sgd.callbacks.gaussianity_monitor import GaussianityHistory

SGD = partial(torch.optim.SGD, lr=0.1)


def watch(**settings):
    defaults = {"num_batches": 40, "num_directions": 32, "every_n_steps": 7}
    return GaussianityMonitor(
        **{**defaults, "max_overhead": None, "save_figure": False, **settings}
    )


def lines_of(caplog):
    return [text for text in caplog.messages if text.startswith("GaussianityMonitor")]


class Noise(LightningModule):
    """The gradient of the weights is the mean of the samples of a batch, whatever the weights."""

    def __init__(self, size):
        super().__init__()
        self.first = torch.nn.Parameter(torch.zeros(size // 2))
        self.second = torch.nn.Parameter(torch.zeros(size - size // 2))

    def training_step(self, batch):
        return (torch.cat([self.first, self.second]) * batch[0]).sum(dim=1).mean()

    def configure_optimizers(self):
        return SGD(self.parameters())


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


LAWS = {
    "Gaussian": lambda: normal(4000, 300),
    "Gaussian on random directions only": lambda: normal(4000, 300).sign(),
    "not Gaussian": lambda: normal(4000, 300) * normal(4000, 1, seed=1).exp(),
}


def fit_noise(tmp_path, monitor, law, batch_size=1, **settings):
    data = DataLoader(TensorDataset(LAWS[law]()), batch_size=batch_size)
    run = trainer(tmp_path, callbacks=[monitor], max_steps=1, max_epochs=-1, **settings)
    run.fit(Noise(300), data)
    return {key: value.item() for key, value in run.callback_metrics.items()}


# The measurement


@pytest.mark.parametrize("law", LAWS)
def test_noise_of_a_known_law_is_recognised(tmp_path, law):
    monitor = watch(num_batches=128, num_directions=100, log_layers=True)
    found = fit_noise(tmp_path, monitor, law)
    assert monitor.history.verdicts == [law] * 2
    assert (found["gaussianity/p_value"] < 0.006) == (law == "not Gaussian")
    assert (found["gaussianity/coordinate_p_value"] < 0.006) == (law != "Gaussian")
    for prefix in ("", "coordinate_"):
        share, limit = (found[f"gaussianity/{prefix}{name}"] for name in ("rejected", "limit"))
        assert (share > limit) == (found[f"gaussianity/{prefix}p_value"] < 0.006)
        assert found[f"gaussianity/{prefix}expected"] == pytest.approx(0.05, abs=0.01)
    heavy = law == "not Gaussian"
    for key in ("rejected_anderson_darling", "rejected/first", "rejected/second"):
        assert (found[f"gaussianity/{key}"] > 0.5) == heavy
    assert (found["gaussianity/norm_kurtosis"] > 1) == heavy
    gap = found["gaussianity/expected_statistic"] - found["gaussianity/statistic"]
    assert (gap > 0.01) == heavy


@pytest.mark.slow
def test_averaging_over_a_batch_makes_noise_gaussian(tmp_path):
    # The reason why the answer holds for one batch size only.
    verdicts = []
    for size in (1, 400):
        monitor = watch(num_batches=100, batch_size=size)
        fit_noise(tmp_path, monitor, "not Gaussian")
        verdicts.append(monitor.history.verdicts[-1])
        assert monitor.history.tested["batch_size"] == size
    assert verdicts == ["not Gaussian", "Gaussian"]


class Samples(Callback):
    """Keeps what the collector of the callback before it gathers after the last step."""

    def on_train_end(self, trainer, pl_module):
        self.sample = trainer.callbacks[0].collector.sample(trainer, pl_module)


def test_values_are_those_of_the_gradients(tmp_path):
    keep, monitor = Samples(), watch(num_coordinates=None, seed=3, test="jarque_bera")
    run = trainer(tmp_path, callbacks=[monitor, keep], max_epochs=1)
    run.fit(Regression(SGD), batches())
    generator = torch.Generator().manual_seed(3)
    found = gradient_gaussianity(keep.sample.rows, generator, monitor.settings)
    assert keep.sample.rows.shape == (40, 49)
    for name, value in found.values.items():
        assert run.callback_metrics[f"gaussianity/{name}"].item() == pytest.approx(value)
    assert monitor.history.verdicts[-1] == found.verdict


def test_monitors_of_noise_share_their_gradients(tmp_path):
    calls = []

    def counted(module, batch):
        calls.append(None)
        return loss_of(module.net, batch)

    settings = {"num_batches": 20, "loss_fn": counted, "every_n_steps": 7, "max_overhead": None}
    pair = watch(**settings), TailIndexMonitor(**settings, save_figure=False)
    trainer(tmp_path, callbacks=list(pair), max_epochs=1).fit(Regression(SGD), batches())
    assert len(calls) == 2 * 20
    assert pair[0].collector is pair[1].collector


@pytest.mark.parametrize("law", ["Gaussian", "not Gaussian"])
def test_micro_batches_of_a_step_are_tested_without_passes_of_their_own(tmp_path, law):
    # The step of 100 batches, of one sample each, is known to the last number: these very samples, in their order.
    monitor = watch(source="microbatches", every_n_steps=1, num_coordinates=None)
    found = fit_noise(tmp_path, monitor, law, accumulate_grad_batches=100)
    generator = torch.Generator().manual_seed(0)
    expected = gradient_gaussianity(LAWS[law]()[:100], generator, monitor.settings)
    assert expected.verdict == law
    assert monitor.history.verdicts == [law]
    for name, value in expected.values.items():
        assert found[f"gaussianity/{name}"] == pytest.approx(value, rel=1e-4, abs=1e-6)


def test_a_step_with_too_few_gradients_is_not_tested(tmp_path, caplog):
    monitor = watch(source="microbatches", every_n_steps=1)
    with caplog.at_level(logging.INFO):
        fit_noise(tmp_path, monitor, "Gaussian", accumulate_grad_batches=19)
    first, last = lines_of(caplog)
    assert "19 micro-batches of a step" in first
    assert "too few to test, which takes 20" in first
    assert last == "GaussianityMonitor: no gradient noise was measured."


# What is said


@pytest.mark.parametrize(
    ("law", "words"),
    [
        ("Gaussian", "nothing speaks against Gaussian noise in batches of 1: "),
        ("not Gaussian", "noise is not Gaussian in batches of 1: "),
        ("Gaussian on random directions only", "noise is not Gaussian by coordinate, though "),
    ],
)
def test_the_verdict_comes_with_its_reason(tmp_path, caplog, law, words):
    monitor = watch(num_batches=128, save_figure=True, num_directions=50)
    with caplog.at_level(logging.INFO, "lightning.pytorch.utilities.rank_zero"):
        fit_noise(tmp_path, monitor, law)
    first, last = lines_of(caplog)
    assert "128 gradients of extra batches, 300 coordinates, 0.154 MB, 50 random" in first
    assert last.startswith(f"GaussianityMonitor: at step 1 {words}")
    values = {name: series[-1] for name, series in monitor.history.values.items()}
    for what, prefix in (("random directions", ""), ("coordinates", "coordinate_")):
        share, limit = values[f"{prefix}rejected"], values[f"{prefix}limit"]
        assert f"{share:.0%} of 50 {what} (Gaussian noise: at most {limit:.0%}, p = " in last
    assert "rejected at the 0.05 level are " in last
    assert "calibrated at a rate of false alarms of 0.01." in last
    times = "2 of 2 looks, first at step 0." if law == "not Gaussian" else "0 of 2 looks."
    assert f"Not Gaussian on random directions at {times}" in last
    assert (tmp_path / "gaussianity.png").stat().st_size > 10_000
    quantiles, shares = monitor.plot().axes
    assert len(quantiles.get_lines()[0].get_xdata()) == 128
    assert list(shares.get_lines()[0].get_xdata()) == [0, 1]


def test_no_noise_is_no_verdict(tmp_path, caplog):
    # A model that predicts without error has gradients zero.
    class Flat(Noise):
        def training_step(self, batch):
            return 0 * super().training_step(batch)

    monitor = watch(save_figure=True)
    with caplog.at_level(logging.INFO, "lightning.pytorch.utilities.rank_zero"):
        run = trainer(tmp_path, callbacks=[monitor], max_steps=1, max_epochs=-1)
        run.fit(Flat(6), DataLoader(TensorDataset(normal(10, 6)), batch_size=2))
    assert "there is no noise that could be tested in batches of 2." in lines_of(caplog)[1]
    assert not (tmp_path / "gaussianity.png").exists()
    assert math.isnan(run.callback_metrics["gaussianity/p_value"])


def test_what_was_found_goes_on_after_a_checkpoint(tmp_path):
    monitor, other = watch(), watch()
    fit_noise(tmp_path, monitor, "Gaussian")
    state = monitor.state_dict()
    other.load_state_dict(torch.load(_saved(state, tmp_path), weights_only=True))
    assert other.history == monitor.history
    other.load_state_dict(state)
    other.history.times.append(9)
    assert monitor.history.times == [0, 1]
    assert state["history"]["times"] == [0, 1]
    assert watch(test="jarque_bera").state_key != monitor.state_key


def _saved(state, folder):
    torch.save(state, folder / "state.pt")
    return folder / "state.pt"


def test_nothing_noted_twice_and_nothing_to_draw():
    history, monitor = GaussianityHistory(), watch()
    found = gradient_gaussianity(normal(20, 5))
    history.record(3, found, 4)
    history.record(3, found, 4)
    assert history.times == [3]
    assert len(history.values["rejected"]) == 1
    assert len(monitor.plot().axes) == 2


class Stream(IterableDataset):
    def __iter__(self):
        return iter(normal(20, 4))


@pytest.mark.parametrize(
    ("module", "data", "reason"),
    [
        (lambda: TwoOptimizers(SGD), batches, "in manual optimization only `loss_fn` can say"),
        (lambda: Noise(4), lambda: DataLoader(_Rows(), batch_size=4), "with a map-style data set"),
    ],
    ids=["manual optimization", "iterable data set"],
)
def test_what_stands_in_the_way_is_said(tmp_path, caplog, module, data, reason):
    with caplog.at_level(logging.INFO, "lightning.pytorch.utilities.rank_zero"):
        trainer(tmp_path, callbacks=[watch()], max_epochs=1).fit(module(), data())
    lines = lines_of(caplog)
    assert "nothing can be measured, because " in lines[0]
    assert reason in lines[0]
    assert lines[1] == "GaussianityMonitor: no gradient noise was measured."


class _Rows(Stream):
    def __iter__(self):
        return iter([(row,) for row in normal(20, 4)])


def test_values_go_to_the_logger_without_any_of_the_passes(tmp_path):
    logger = CSVLogger(tmp_path, name="", version="")
    fit_noise(tmp_path, watch(), "Gaussian", logger=logger)
    header = (tmp_path / "metrics.csv").read_text().splitlines()[0].split(",")
    assert set(header) == {"step", *(f"gaussianity/{name}" for name in _names())}


def _names():
    return gradient_gaussianity(normal(20, 5)).values


def test_it_looks_every_500_steps_at_256_gradients_by_default():
    monitor = GaussianityMonitor()
    assert (monitor.schedule.every, monitor.schedule.max_overhead) == (500, 0.02)
    assert (monitor.collector.num_gradients, monitor.settings.num_directions) == (256, 256)
    assert GaussianityMonitor(every_n_epochs=2).unit == "epoch"


@pytest.mark.parametrize(
    ("settings", "argument"),
    [
        ({"num_batches": 19}, "num_batches"),
        ({"num_batches": 5001}, "num_batches"),
        ({"num_directions": 0}, "num_directions"),
        ({"num_coordinates": 0}, "num_coordinates"),
        ({"batch_size": 0}, "batch_size"),
        ({"test": "kolmogorov"}, "test"),
        ({"level": 1.0}, "level"),
        ({"false_alarm_rate": 0.001}, "num_bootstraps"),
        ({"max_overhead": 0.0}, "max_overhead"),
        ({"every_n_steps": 5, "every_n_epochs": 1}, "every_n_epochs"),
    ],
)
def test_impossible_settings_are_refused(settings, argument):
    with pytest.raises(ValueError, match=f"Expected `{argument}` to be"):
        GaussianityMonitor(**settings)
