"""What plug-ins say is printed once, and kept beside the metrics."""

from __future__ import annotations

import json

import pytest
from lightning.pytorch import Trainer
from lightning.pytorch.demos.boring_classes import BoringModel
from lightning.pytorch.loggers import CSVLogger

from lightning_sgd import RankMonitor

QUIET = {
    "max_steps": 2,
    "limit_val_batches": 0,
    "accelerator": "cpu",
    "enable_progress_bar": False,
    "enable_model_summary": False,
    "enable_checkpointing": False,
    "num_sanity_val_steps": 0,
}
pytestmark = pytest.mark.filterwarnings("ignore:The 'train_dataloader' does not have many workers")


def fit(folder, logger, **settings):
    monitor = RankMonitor(every_n_steps=1, max_overhead=None, min_side=2)
    trainer = Trainer(
        **{
            **QUIET,
            "logger": logger,
            "default_root_dir": folder,
            "callbacks": [monitor],
            **settings,
        }
    )
    trainer.fit(BoringModel())
    return trainer


def test_first_and_last_line_and_figures_are_kept(tmp_path, caplog):
    fit(tmp_path, CSVLogger(tmp_path, name="run", version=""))
    record = json.loads((tmp_path / "run" / "findings.json").read_text())
    lines = record["plugins"]["RankMonitor"]
    assert lines["start"].endswith("values go to CSVLogger.")
    assert "effective rank" in lines["end"]
    for line in lines.values():
        assert caplog.messages.count(f"RankMonitor: {line}") == 1
    assert record["figures"] == {"rank/heat_map": f"{tmp_path}/run/rank_heat_map.svg"}
    assert record["run"].keys() == {"ranks", "device", "precision", "started", "ended"}
    assert {"lightning-sgd", "torch", "Python"} <= record["versions"].keys()
    assert sorted(p.name for p in (tmp_path / "run").iterdir() if p.suffix == ".part") == []


@pytest.mark.parametrize("settings", [{"logger": False}, {"fast_dev_run": True}])
def test_nothing_is_kept_where_no_metrics_are(tmp_path, settings):
    fit(tmp_path, **{"logger": CSVLogger(tmp_path, name="run", version=""), **settings})
    assert list(tmp_path.rglob("findings.json")) == []


@pytest.mark.filterwarnings("ignore:Experiment logs directory")
def test_another_run_in_the_folder_replaces_what_was_said(tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "findings.json").write_text('{"plugins": {"Other": {"end": "long ago"}}}')
    fit(tmp_path, CSVLogger(tmp_path, name="run", version=""))
    assert json.loads((folder / "findings.json").read_text())["plugins"].keys() == {"RankMonitor"}
