"""The report, from hand-written logs to numbers, table and plot."""

from __future__ import annotations

import io
import math
import os
import sys

import pytest
from rich.console import Console

from lightning_sgd.report import ReportError, report
from lightning_sgd.report.files import Series, find_metrics, read_config, read_metrics
from lightning_sgd.report.plot import choose, save_plot
from lightning_sgd.report.summary import (
    Extreme,
    Summary,
    describe,
    describe_run,
    is_loss,
    moving_average,
    summarise,
)
from lightning_sgd.report.tables import metrics_table, results_panel

LOG = """\
epoch,step,grad/norm,test/accuracy,test/loss,train/loss,val/accuracy,val/loss
0,0,4.0,,,2.5,,
0,1,9.0,,,0.5,,
0,1,,,,,0.25,1.5
1,2,1.0,,,nan,,
1,3,2.0,,,1.0,,
1,3,,,,,0.75,1.25
2,5,,,,,0.5,1.75
3,6,,0.625,1.125,,,
"""
CONFIG = """\
# lightning.pytorch==2.6.6
seed_everything: 3
trainer: {strategy: auto, max_epochs: 3, callbacks: null}
model: {class_path: my.package.Net, init_args: {width: 8, dropout: 0.0, bias: false}}
data: null
optimizer:
  class_path: lightning_sgd.MaSS
  init_args: {lr: 0.2, alpha: 0.05, foreach: null}
"""


@pytest.fixture
def run(tmp_path):
    """The folder of a run."""
    folder = tmp_path / "runs" / "mass"
    folder.mkdir(parents=True)
    (folder / "metrics.csv").write_text(LOG)
    (folder / "config.yaml").write_text(CONFIG)
    return folder


@pytest.fixture
def printed():
    """What the report prints, blanks and frames reduced to single spaces."""

    def run(path):
        console = Console(width=120, record=True, file=io.StringIO())
        report(path, console)
        return [
            " ".join(line.translate(FRAMES).split()) for line in console.export_text().splitlines()
        ]

    return run


FRAMES = {ord(sign): " " for sign in "│┃╭╮╰╯─━┏┓┡┩└┘┳╇┴"}


def test_empty_cells_belong_to_no_metric(run):
    metrics = read_metrics(run / "metrics.csv")
    assert list(metrics) == sorted(metrics)
    assert metrics["val/loss"] == Series(steps=[1, 3, 5], values=[1.5, 1.25, 1.75])
    assert metrics["test/accuracy"] == Series(steps=[6], values=[0.625])
    assert metrics["train/loss"].steps == [0, 1, 2, 3]
    assert "step" not in metrics
    assert "epoch" not in metrics


def test_nan_is_never_the_best(run):
    # min() of Python would return whatever stands before a NaN.
    metrics = read_metrics(run / "metrics.csv")
    assert summarise(metrics["train/loss"]) == Summary(
        first=2.5, last=1.0, lowest=Extreme(0.5, step=1), highest=Extreme(2.5, step=0)
    )


@pytest.mark.parametrize("values", [[math.nan, 3.0], [3.0, math.nan]])
def test_nan_counts_as_first_and_last(values):
    summary = summarise(Series(steps=[0, 1], values=values))
    assert [summary.first, summary.last] == pytest.approx(values, nan_ok=True)
    assert summary.lowest.value == summary.highest.value == 3.0


def test_the_best_is_where_it_was_reached_first():
    summary = summarise(Series(steps=[4, 5, 6], values=[0.5, 0.9, 0.9]))
    assert summary.highest == Extreme(0.9, step=5)


def test_a_run_that_only_diverged(tmp_path, printed):
    (tmp_path / "metrics.csv").write_text("epoch,step,train/loss\n0,0,nan\n0,1,nan\n")
    assert "train/loss nan – – nan" in printed(tmp_path)
    assert (tmp_path / "report.png").stat().st_size > 1000


def test_the_report_in_the_terminal(run, printed):
    lines = printed(run)
    for expected in (
        "model Net(width=8)",
        "optimizer MaSS(lr=0.2, alpha=0.05)",
        "epochs 3",
        "seed 3",
        "Metric First Best at step Last",
        "train/loss 2.5 0.5 1 1",
        "val/accuracy 0.25 0.75 3 0.5",
        "val/loss 1.5 1.25 3 1.75",
        "grad/norm 4 1 … 9 2 … 1 2",  # neither direction is better
        "Test set",
        "test/accuracy 0.625",
        "test/loss 1.125",
        f"metrics {run}/metrics.csv",
        f"config {run}/config.yaml",
        f"plot {run}/report.png",
        f"page {run}/report.html",
    ):
        assert expected in lines, "\n".join(lines)
    assert not any("auto" in line for line in lines), "what Lightning chose itself is left out"


def test_the_plot_is_a_picture(run, printed):
    printed(run)
    assert (run / "report.png").read_bytes().startswith(b"\x89PNG")


def test_only_test_results(tmp_path, printed):
    (tmp_path / "metrics.csv").write_text("epoch,step,test/accuracy\n0,0,0.5\n")
    lines = printed(tmp_path)
    assert "test/accuracy 0.5" in lines
    assert "Metric First Best at step Last" not in lines, "a table without rows says nothing"
    assert "config none was saved" in lines
    assert (tmp_path / "report.png").is_file()


def test_no_plot_without_loss_and_accuracy(tmp_path, printed):
    (tmp_path / "metrics.csv").write_text("epoch,step,grad/norm\n0,0,0.5\n")
    assert "plot none: no loss and no accuracy was logged" in printed(tmp_path)
    assert not (tmp_path / "report.png").exists()


def test_without_matplotlib_the_table_still_comes(run, printed, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    lines = printed(run)
    assert "train/loss 2.5 0.5 1 1" in lines
    assert "plot none: `pip install 'lightning-sgd[report]'` brings matplotlib" in lines
    assert "page none: `pip install 'lightning-sgd[report]'` brings matplotlib and Jinja2" in lines


@pytest.mark.slow
@pytest.mark.parametrize("config", ["", "- a list", "{broken", "!!python/object:os.x {}", None])
def test_a_config_that_cannot_be_read_is_done_without(tmp_path, printed, config):
    (tmp_path / "metrics.csv").write_text(LOG)
    if config is not None:
        (tmp_path / "config.yaml").write_text(config)
    assert read_config(tmp_path) == {}
    assert "train/loss 2.5 0.5 1 1" in printed(tmp_path)


def test_the_newest_run_below_a_folder_is_taken(run):
    old = run / "version_0"
    old.mkdir()
    (old / "metrics.csv").write_text(LOG)
    os.utime(old / "metrics.csv", (1, 1))
    top = run.parent
    assert find_metrics(top) == run / "metrics.csv"
    os.utime(run / "metrics.csv", (0, 0))
    assert find_metrics(top) == old / "metrics.csv"


def test_the_folder_itself_goes_before_what_is_below_it(run):
    newer = run / "version_1"
    newer.mkdir()
    (newer / "metrics.csv").write_text(LOG)
    assert find_metrics(run) == run / "metrics.csv"
    assert find_metrics(newer / "metrics.csv") == newer / "metrics.csv"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, r"no metrics\.csv in or below '.*': train with Lightning's CSVLogger"),
        ("", r"'.*metrics\.csv' holds no metrics"),
        ("epoch,step,train/loss\n", r"'.*metrics\.csv' holds no metrics"),
        ("epoch,step,train/loss\n0,0,\n", r"'.*metrics\.csv' holds no metrics"),
        ("epoch,step,train/loss\n0,0,low\n", r"'.*metrics\.csv' is no log of numbers: found 'low'"),
    ],
)
def test_nothing_to_report_on(tmp_path, content, message):
    if content is not None:
        (tmp_path / "metrics.csv").write_text(content)
    with pytest.raises(ReportError, match=message):
        report(tmp_path)


def test_a_missing_folder(tmp_path):
    with pytest.raises(ReportError, match=r"run folder '.*absent' does not exist"):
        report(tmp_path / "absent")


@pytest.mark.parametrize(
    ("spec", "text"),
    [
        ({"class_path": "a.b.C"}, "C()"),
        ({"class_path": "C", "init_args": {"x": 1, "y": None, "z": False, "w": 0.0}}, "C(x=1)"),
        (
            {"class_path": "C", "init_args": {"d": {"class_path": "D", "init_args": {"x": 2}}}},
            "C(d=D(x=2))",
        ),
        ("gossip_pga", "gossip_pga"),
        (3, "3"),
    ],
)
def test_settings_in_words(spec, text):
    assert describe(spec) == text


def test_what_is_not_in_the_config_is_not_described():
    assert describe_run({}) == {}
    assert describe_run({"trainer": None, "optimizer": None, "seed_everything": 0}) == {"seed": "0"}


def test_curves_come_in_the_order_of_a_run():
    series = Series(steps=[0], values=[1.0])
    names = ["other/loss", "test/loss", "train/loss", "val_loss", "val/accuracy"]
    chosen = choose(dict.fromkeys(names, series), is_loss)
    assert list(chosen) == ["train/loss", "val_loss", "test/loss", "other/loss"]


@pytest.fixture
def figure(monkeypatch, tmp_path):
    """The figure of the last plot."""
    from matplotlib.figure import Figure

    figures = []
    save = Figure.savefig
    monkeypatch.setattr(
        Figure, "savefig", lambda self, path: (figures.append(self), save(self, path))[1]
    )

    def draw(metrics, title="MaSS"):
        save_plot(metrics, title, tmp_path / "report.png")
        return figures[-1]

    return draw


def test_the_panels_of_the_plot(run, figure):
    drawn = figure(read_metrics(run / "metrics.csv"), "MaSS(lr=0.2)")
    loss, accuracy = drawn.axes
    assert drawn.get_suptitle() == "MaSS(lr=0.2)"
    assert (loss.get_yscale(), accuracy.get_yscale()) == ("log", "linear")
    assert [text.get_text() for text in loss.get_legend().texts] == [
        "train/loss, best 0.5",
        "val/loss, best 1.25",
        "test/loss 1.125",
    ]
    assert list(loss.lines[1].get_xdata()) == [1, 3, 5]
    assert list(loss.lines[1].get_ydata()) == [1.5, 1.25, 1.75]
    assert list(loss.lines[2].get_ydata()) == [1.125, 1.125]


def test_many_noisy_values_are_averaged(figure):
    # 80 values: windows of 5. Alternating 1 and 3, the middle of a window of 5 is 1.8 or 2.2.
    series = Series(steps=list(range(80)), values=[1.0, 3.0] * 40)
    raw, mean = figure({"train/loss": series}).axes[0].lines
    assert list(raw.get_ydata()) == series.values
    assert list(mean.get_ydata())[2:4] == pytest.approx([1.8, 2.2])
    assert mean.get_label() == "train/loss, mean of 5"


def test_a_moving_average_leaves_nan_out():
    values = [math.nan, 2.0, 4.0, math.nan, math.nan, math.nan]
    expected = [2.0, 3.0, 3.0, 4.0, math.nan, math.nan]
    assert moving_average(values, window=3) == pytest.approx(expected, nan_ok=True)


@pytest.mark.parametrize("lowest", [0.0, -1.0])
def test_losses_that_are_not_positive_have_a_linear_axis(figure, lowest):
    series = Series(steps=[0, 1], values=[1.0, lowest])
    assert figure({"train/loss": series}).axes[0].get_yscale() == "linear"


def test_tables_without_rows_are_left_out():
    assert results_panel({"val/loss": Series([0], [1.0])}) is None
    assert metrics_table({"test/loss": Series([0], [1.0])}) is None
