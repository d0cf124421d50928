"""What plug-ins say is printed once, and kept beside the metrics."""

from __future__ import annotations

import json
import warnings

import pytest
from lightning.fabric.utilities.cloud_io import get_filesystem
from lightning.pytorch import Trainer
from lightning.pytorch.demos.boring_classes import BoringModel
from lightning.pytorch.loggers import CSVLogger

from lightning_sgd import CommunicationMonitor, RankMonitor

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


# A report may never end a training


def table_and_figure():
    return [
        CommunicationMonitor(),
        RankMonitor(every_n_steps=1, max_overhead=None, min_side=2),
    ]


def warnings_of(run):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        run()
    return [
        str(warning.message) for warning in caught if "training goes on" in str(warning.message)
    ]


def test_a_folder_that_cannot_be_written_costs_the_files_and_not_the_training(tmp_path, caplog):
    blocked = tmp_path / "file"
    blocked.write_text("a file where a folder should be")
    fitted = []
    said = warnings_of(
        lambda: fitted.append(fit(blocked / "run", False, callbacks=table_and_figure()))
    )
    assert fitted[0].state.finished
    assert len(said) == 2
    assert "communication.md cannot be written" in said[0]
    assert "NotADirectoryError" in said[0]
    assert "rank_heat_map.png" in said[1]
    assert "No table: see the warning." in caplog.text
    assert "No heat map: see the warning." in caplog.text


def test_findings_that_cannot_be_written_warn_once(tmp_path):
    (tmp_path / "run" / "findings.json" / "folder").mkdir(parents=True)
    logger = CSVLogger(tmp_path, name="run", version="")
    said = warnings_of(lambda: fit(tmp_path, logger))
    assert ["findings.json cannot be written" in line for line in said] == [True]
    assert list(tmp_path.rglob("*.part")) == []


def test_files_go_to_a_remote_root(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    root = f"memory://{tmp_path.name}/run"
    said = warnings_of(lambda: fit(root, False, callbacks=table_and_figure()))
    assert said == []
    assert list(tmp_path.iterdir()) == []
    names = ["communication.md", "rank_heat_map.png", "rank_heat_map.svg"]
    files = get_filesystem(root)
    assert sorted(path.rpartition("/")[2] for path in files.ls(root, detail=False)) == names
    assert files.cat_file(f"{root}/rank_heat_map.png").startswith(b"\x89PNG")


class OtherSignature(CSVLogger):
    def log_image(self, image, name):
        raise AssertionError("never called with these names")


class RefusesImages(CSVLogger):
    def log_image(self, key, images, step=None):
        raise ConnectionError("no network")


class RefusesMetrics(CSVLogger):
    def log_metrics(self, metrics, step=None):
        raise ConnectionError("no network")


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        (OtherSignature, "did not take the figure rank/heat_map; training goes on. TypeError"),
        (RefusesImages, "did not take the figure rank/heat_map; training goes on. ConnectionError"),
        (RefusesMetrics, "did not take metrics; training goes on. ConnectionError: no network"),
    ],
)
def test_a_logger_that_fails_ends_no_training(tmp_path, kind, reason):
    fitted = []
    logger = kind(tmp_path, name="run", version="")
    said = warnings_of(lambda: fitted.append(fit(tmp_path, logger, log_every_n_steps=10)))
    assert fitted[0].state.finished
    assert len(said) == 1
    assert f"{kind.__name__} {reason}" in said[0]
    assert (tmp_path / "run" / "rank_heat_map.png").exists()


def test_a_figure_that_cannot_be_drawn_ends_no_training(tmp_path, monkeypatch):
    def fail(self):
        raise ZeroDivisionError("no data")

    monkeypatch.setattr(RankMonitor, "_heat_map", fail)
    said = warnings_of(lambda: fit(tmp_path, False))
    assert [line.endswith("ZeroDivisionError: no data") for line in said] == [True]
