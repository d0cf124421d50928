"""Figure, last line and logged values of a training with priorities."""

from __future__ import annotations

import csv
import math

import numpy as np
import pytest
import torch
from lightning.pytorch.loggers import CSVLogger
from support.priority_training import BATCHES, C, Linear, N, fit, quiet

from lightning_sgd import PrioritySampling


@pytest.mark.slow
def test_the_figure_has_two_panels(tmp_path):
    callback = PrioritySampling()
    with pytest.raises(RuntimeError, match="Plot after training"):
        callback.plot()
    fit(tmp_path, callback)
    left, right = callback.plot().axes
    assert left.lines[0].get_xdata().tolist() == [BATCHES, 2 * BATCHES, 3 * BATCHES]
    shares = right.lines[0].get_ydata()
    assert shares[-1] == pytest.approx(1.0)
    assert (np.diff(shares) > 0).all()
    assert (tmp_path / "priority_sampling.png").is_file()


def test_the_last_line_names_what_is_hardest(tmp_path, caplog):
    caplog.set_level("INFO")
    callback = quiet(half_life=None)
    fit(tmp_path, callback)
    line = caplog.messages[-1]
    table = callback.run.sampler.table
    hardest = table.scores.argsort(descending=True)[:10].tolist()
    assert f"{2 * BATCHES} of {3 * BATCHES} batches drawn by priority" in line
    named = line.split("hardest samples ")[1].split(", ")
    assert [int(entry.split()[0]) for entry in named] == hardest
    means = [table.scores[torch.arange(c, N, C)].mean().item() for c in range(C)]
    assert f"hardest classes {int(np.argmax(means))} (" in line


@pytest.mark.parametrize("accumulate", [1, 2])
def test_values_stand_beside_the_loss_of_their_step(tmp_path, accumulate):
    # A chart over steps would be shifted by one against Lightning's own metrics otherwise.
    class Logs(Linear):
        def training_step(self, batch, batch_idx):
            loss = super().training_step(batch, batch_idx)
            self.log("loss", loss, on_step=True, on_epoch=False)
            return loss

    settings = {"log_every_n_steps": 3, "accumulate_grad_batches": accumulate}
    logger = CSVLogger(tmp_path, name="csv")
    fit(tmp_path, quiet(), Logs(), logger=logger, max_epochs=6 * accumulate, **settings)
    with (tmp_path / "csv" / "version_0" / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))

    def steps_of(key):
        return [int(row["step"]) for row in rows if row[key]]

    assert (
        steps_of("priority/gain") == steps_of("loss") == list(range(2, steps_of("loss")[-1] + 1, 3))
    )
    num_steps = math.ceil(BATCHES / accumulate)  # an epoch's last batch always steps
    ends = [num_steps * epoch - 1 for epoch in range(1, 6 * accumulate + 1)]
    assert steps_of("priority/never_drawn") == ends
