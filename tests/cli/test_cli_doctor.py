"""``lightning-sgd doctor``: what it finds, and how its exit code says so."""

from __future__ import annotations

import re
import sys

import pytest
import yaml
from lightning.pytorch import Trainer

from lightning_sgd import ByzantineStrategy, GossipPGAStrategy, LocalSGDStrategy
from lightning_sgd.cli import main
from lightning_sgd.cli.doctor import about_lightning, about_shared_memory, about_strategy

DIGITS = {"class_path": "DigitsDataModule"}


@pytest.fixture
def doctor(command, capsys):
    """Its lines by subject, and its exit code."""

    def run(*words):
        code = 0
        try:
            command("doctor", *words)
        except SystemExit as stop:
            code = stop.code
        lines = [
            re.fullmatch(r"(\w+) +([^:]+): (.*)", x) for x in capsys.readouterr().out.splitlines()
        ]
        return {line[2]: (line[1], line[3]) for line in lines}, code

    return run


@pytest.fixture
def config(tmp_path):
    """A file that trains the digits, with changes."""

    def write(**changes):
        trainer = {
            "accelerator": "cpu",
            "devices": 1,
            "logger": False,
            **changes.pop("trainer", {}),
        }
        tree = {
            "model": "DigitsClassifier",
            "data": DIGITS,
            "optimizer": "MaSS",
            "trainer": trainer,
        }
        file = tmp_path / "config.yaml"
        file.write_text(yaml.safe_dump({"seed_everything": 0, **tree, **changes}))
        return file

    return write


def test_every_line_says_what_was_examined_and_the_versions_are_those_installed(doctor):
    found, code = doctor()
    assert list(found) == ["versions", "advisories", "GPU", "shared memory"]
    assert re.search(
        r"python [\d.]+, torch \S+, lightning \S+, lightning-sgd \S+", found["versions"][1]
    )
    assert code == 0


@pytest.mark.parametrize(
    ("installed", "level", "remedy"),
    [
        ("2.6.2", "problem", "replace every secret"),
        ("2.6.3", "problem", "GHSA-w37p-236h-pfx3"),
        ("2.5.0.post0", "warning", "upgrade to 2.6.6"),
        ("2.6.5", "warning", "checkpoints that you trust"),
        ("2.6.6", "ok", ""),
        ("2.10.0", "ok", ""),
    ],
)
def test_malicious_and_unsafe_releases_of_lightning_are_named(installed, level, remedy):
    finding = about_lightning(installed)
    assert finding.level == level
    assert remedy in finding.text


def test_a_malicious_release_ends_with_exit_code_1(doctor, monkeypatch):
    monkeypatch.setattr("lightning_sgd.cli.doctor.version", lambda name: "2.6.3")
    found, code = doctor()
    assert found["advisories"][0] == "problem"
    assert code == 1


@pytest.mark.parametrize(
    ("free", "level"), [(None, "ok"), (64 * 2**20, "warning"), (8 * 2**30, "ok")]
)
def test_little_shared_memory_is_a_warning(free, level):
    assert about_shared_memory(free).level == level


def test_a_config_is_built_but_not_trained(doctor, config):
    found, code = doctor("--config", config())
    assert found["config"] == ("ok", f"{config()} builds a DigitsClassifier")
    assert found["data"] == ("ok", "the training loader resumes in the middle of an epoch")
    assert found["strategy"] == ("ok", "SingleDeviceStrategy on 1 rank")
    assert code == 0


def test_a_loader_that_forgets_its_position_is_a_warning(doctor, config):
    found, code = doctor("--config", config(model="Descent", data={"class_path": "Numbers"}))
    assert found["data"][0] == "warning"
    assert "ResumableDataLoader" in found["data"][1]
    assert code == 0


def test_a_loader_that_fails_is_a_problem(doctor, config):
    found, code = doctor(
        "--config", config(model="DigitsClassifier", data={"class_path": "NoLoader"})
    )
    assert found["data"] == (
        "problem",
        "`train_dataloader` of NoLoader fails: FileNotFoundError: no images here",
    )
    assert code == 1


@pytest.mark.parametrize(("wrong", "told"), [({"optimizer": "Mass"}, "did you mean 'MaSS'?")])
def test_a_config_that_cannot_be_built_is_a_problem_told_in_one_line(doctor, config, wrong, told):
    found, code = doctor("--config", config(**wrong))
    assert found["config"][0] == "problem"
    assert told in found["config"][1]
    assert code == 1


@pytest.mark.parametrize(
    ("strategy", "devices", "level", "text"),
    [
        (LocalSGDStrategy(), 1, "warning", "nothing to exchange"),
        (LocalSGDStrategy(), 2, "ok", "LocalSGDStrategy on 2 ranks"),
        (ByzantineStrategy("median", 1), 2, "problem", "less than 2/2"),
        (ByzantineStrategy("median", 1), 3, "ok", ""),
        (ByzantineStrategy("median", 1, workers="micro_batch"), 1, "ok", ""),
        (GossipPGAStrategy("hypercube"), 3, "problem", "3 ranks"),
        (GossipPGAStrategy("hypercube"), 4, "ok", ""),
    ],
    ids=lambda value: type(value).__name__ if not isinstance(value, (str, int)) else str(value),
)
def test_a_strategy_must_fit_its_ranks(strategy, devices, level, text, tmp_path, monkeypatch):
    monkeypatch.setattr("os.cpu_count", lambda: 8)
    trainer = Trainer(
        default_root_dir=tmp_path,
        accelerator="cpu",
        devices=devices,
        strategy=strategy,
        logger=False,
        accumulate_grad_batches=3,
    )
    finding = about_strategy(trainer)
    assert finding.level == level
    assert text in finding.text


def test_more_processes_than_cores_are_a_warning(tmp_path, monkeypatch):
    monkeypatch.setattr("os.cpu_count", lambda: 2)
    trainer = Trainer(default_root_dir=tmp_path, accelerator="cpu", devices=4, logger=False)
    assert about_strategy(trainer).level == "warning"


OWN_MODULE = """
import sys
from lightning.pytorch import LightningDataModule
from lightning_sgd import DigitsClassifier

class Own(DigitsClassifier):
    pass

class Leaves(LightningDataModule):
    def prepare_data(self):
        sys.exit(0)
"""


def test_classes_in_the_working_directory_are_found(config, tmp_path, monkeypatch, capsys):
    # The console script does not have it on the path, other than `python -m`.
    (tmp_path / "module_of_mine.py").write_text(OWN_MODULE)
    file = config(model={"class_path": "module_of_mine.Own"})
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [path for path in sys.path if path])
    monkeypatch.setattr(sys, "argv", ["lightning-sgd", "doctor", "--config", str(file)])
    main()
    assert f"{file} builds a Own" in capsys.readouterr().out


def test_a_config_that_is_no_text_is_a_problem(doctor, tmp_path):
    file = tmp_path / "config.yaml"
    file.write_bytes(b"\xff\xfe\x00caf\xe9: 1\n")
    found, code = doctor("--config", file)
    assert found["config"][0] == "problem"
    assert "not UTF-8" in found["config"][1]
    assert code == 1


def test_a_data_module_that_leaves_python_is_a_problem(doctor, config, tmp_path, monkeypatch):
    (tmp_path / "data_that_leaves.py").write_text(OWN_MODULE)
    monkeypatch.syspath_prepend(tmp_path)
    found, code = doctor("--config", config(data={"class_path": "data_that_leaves.Leaves"}))
    assert found["data"][0] == "problem"
    assert "SystemExit" in found["data"][1]
    assert code == 1
