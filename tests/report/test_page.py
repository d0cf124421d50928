"""The page of a run: what is on it, that it needs nothing but itself, and how it looks in a browser."""

from __future__ import annotations

import base64
import csv
import io
import json
import math
import re
import shutil
import subprocess
from html.parser import HTMLParser
from xml.etree import ElementTree as ET

import pytest
from rich.console import Console

from lightning_sgd.report import report
from lightning_sgd.report.files import Series
from lightning_sgd.report.sections import in_words, panels, sections

BROWSER = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)
LAYERS = [f"backbone.encoder.layers.{i}.attention.out_projection.weight" for i in range(12)]
MONITORS = "RankMonitor", "TailIndexMonitor", "CommunicationMonitor", "ByzantineMonitor"


def metrics_of_all_monitors():
    """Rows of a log, by step."""
    for step in range(0, 60, 10):
        decay = math.exp(-step / 20)
        values = {
            "train/loss": decay,
            "val/accuracy": 1 - decay / 2,
            "rank/effective_rank": 10 + decay,
            "rank/num_dead": 0.0,
            "tail_index/coordinate": 2 - decay / 3,
            "tail_index/coordinate_error": 0.1,
            "tail_index/pooled": math.nan if step == 0 else 1.2 + decay,
            "communication/bytes_per_step": 4096.0 + step,
            "lr-SGD": 0.1 * decay,
        }
        values |= {f"rank/effective_rank/{name}": 9 + i * decay for i, name in enumerate(LAYERS)}
        values |= {f"byzantine/weight/rank_{rank}": (0.3, 0.1)[rank] * decay for rank in range(2)}
        yield step, values
    yield 60, {"test/accuracy": 0.625}


@pytest.fixture
def run(tmp_path):
    """A folder with a log of everything, long names, and sentences with signs that HTML reserves."""
    folder = tmp_path / "a run"
    folder.mkdir()
    rows = [{"step": step, **values} for step, values in metrics_of_all_monitors()]
    with (folder / "metrics.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, [*rows[0], "test/accuracy"])
        writer.writeheader()
        writer.writerows(rows)
    long = "{class_path: " + "a.very.long.name" * 20 + ", init_args: {width: 8}}"
    (folder / "config.yaml").write_text(f"model: {long}\n# <script>alert(1)</script>\n")
    (folder / "map.svg").write_text(
        '<svg xmlns="http://www.w3.org/2000/svg" width="700" height="90"/>'
    )
    said = {
        name: {"start": f"{name} begins", "end": f"{name} found α < 2 & more"} for name in MONITORS
    }
    findings = {
        "versions": {"torch": "2.13.0"},
        "run": {
            "ranks": 2,
            "device": "cpu",
            "precision": "32-true",
            "started": "2026-01-02T03:04:05+00:00",
        },
        "plugins": {**said, "SomebodysMonitor": {"start": "looks", "end": "saw nothing"}},
        "figures": {"rank/heat_map": "/where/the/run/was/map.svg"},
    }
    (folder / "findings.json").write_text(json.dumps(findings))
    return folder


@pytest.fixture
def page(run):
    """Text of the page."""
    report(run, Console(file=io.StringIO()))
    return (run / "report.html").read_text(encoding="utf-8")


class Elements(HTMLParser):
    """What a page holds."""

    def __init__(self, text):
        super().__init__()
        self.found = []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.found.append((tag, dict(attrs)))

    def all(self, tag):
        return [attributes for name, attributes in self.found if name == tag]


def decoded(address):
    return base64.b64decode(address.partition("base64,")[2])


def test_every_monitor_has_a_section_with_what_it_found(page):
    anchors = [section["id"] for section in Elements(page).all("section")]
    assert anchors == ["results", "course", *MONITORS, "SomebodysMonitor", "more", "settings"]
    for name in MONITORS:
        assert (
            page.count(f"{name} found α &lt; 2 &amp; more") == 2
        )  # at the top, and in its section
    assert "Saw nothing" in page
    assert "2 ranks on cpu" in page
    assert "Rank monitor" in page
    assert "Log how the rank of weight matrices falls during training." in page
    links = [a["href"] for a in Elements(page).all("a")]
    assert {link.removeprefix("#") for link in links} <= {*anchors}


def test_the_page_needs_nothing_but_itself(page):
    elements = Elements(page)
    assert not elements.all("script")
    assert not re.search(r"(src|href)=\"(?!data:|#)", page)
    assert "url(" not in page
    assert "default-src 'none'" in page
    assert "<script>" not in page
    assert "&lt;script&gt;" in page, "the configuration is shown, not run"


def test_pictures_are_whole_and_have_a_text(page):
    pictures = Elements(page).all("img")
    for picture in pictures:
        ET.fromstring(decoded(picture["src"]))
        assert picture["alt"]
    texts = [picture["alt"] for picture in pictures]
    assert texts[:2] == ["train/loss", "val/accuracy"]
    assert "rank/heat_map" in texts, "a figure is found where the run has been moved to"
    assert "byzantine/weight" in texts
    assert "rank/num_dead" not in texts, "a straight line says less than its number"
    assert "rank/num_dead <b>0</b>" in page


@pytest.mark.slow
def test_equal_runs_give_equal_pages(run, page):
    report(run, Console(file=io.StringIO()))
    assert (run / "report.html").read_text(encoding="utf-8") == page


def test_curves_of_layers_share_a_chart_with_their_mean():
    series = Series([0, 1], [1.0, 2.0])
    metrics = {"rank/a": series, "rank/a/x": series, "rank/a/y.z": series, "rank/a_error": series}
    (panel,) = panels(metrics)
    assert (panel.title, panel.main) == ("rank/a", "rank/a")
    assert list(panel.curves) == ["rank/a", "x", "y.z"]
    assert panel.error is series


def test_without_a_record_monitors_are_known_by_their_metrics():
    series = Series([0], [1.0])
    found = sections({"rank/stable_rank": series, "val/loss": series}, {})
    assert [section.plugin for section in found] == ["RankMonitor"]
    assert list(found[0].metrics) == ["rank/stable_rank"]


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("RankMonitor", "Rank monitor"),
        ("LocalSGDStrategy", "Local SGD strategy"),
        ("GossipPGAStrategy", "Gossip PGA strategy"),
        ("TrajectoryRegularization", "Trajectory regularization"),
    ],
)
def test_names_in_words(name, words):
    assert in_words(name) == words


def test_a_bare_log_gives_a_page(tmp_path):
    (tmp_path / "metrics.csv").write_text("epoch,step,grad/norm\n0,0,0.5\n0,1,nan\n")
    report(tmp_path, Console(file=io.StringIO()))
    text = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert [section["id"] for section in Elements(text).all("section")] == ["more", "settings"]
    assert "grad/norm <b>0.5</b>" in text


@pytest.mark.parametrize("text", ["", "[]", "{broken"])
def test_a_record_that_cannot_be_read_is_done_without(run, text):
    (run / "findings.json").write_text(text)
    report(run, Console(file=io.StringIO()))
    assert "Rank monitor" in (run / "report.html").read_text(encoding="utf-8")


HARNESS = """<!DOCTYPE html><html><body>
<iframe id="frame" src="{page}" style="width: {width}px; height: 900px; border: 0"></iframe>
<pre id="seen"></pre><script>
frame.onload = () => {{
  const root = frame.contentDocument.documentElement;
  root.querySelectorAll("details").forEach(d => {{ d.open = true; }});
  const seen = [...root.querySelectorAll("section")].map(
    s => [s.id, s.getBoundingClientRect().height, s.checkVisibility()]);
  const images = [...root.querySelectorAll("img")].map(i => i.naturalWidth);
  document.getElementById("seen").textContent = JSON.stringify(
    {{wide: root.scrollWidth, room: root.clientWidth, seen: seen, images: images}});
}};
</script></body></html>"""


@pytest.mark.skipif(BROWSER is None, reason="no chromium: `apt-get install chromium` brings it")
@pytest.mark.parametrize("width", [390, 1200])
@pytest.mark.timeout(120)
def test_in_a_browser_all_is_visible_and_nothing_scrolls_sideways(run, page, tmp_path, width):
    harness = tmp_path / "harness.html"
    harness.write_text(HARNESS.format(page="a run/report.html", width=width))
    command = [
        *(BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"),
        *("--allow-file-access-from-files", f"--user-data-dir={tmp_path}/profile"),
        *("--enable-logging=stderr", "--virtual-time-budget=10000", "--window-size=1400,1000"),
        *("--hide-scrollbars", "--dump-dom", harness.as_uri()),
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100, check=True)
    assert "CONSOLE" not in done.stderr, done.stderr
    found = re.search(r'<pre id="seen">(.*)</pre>', done.stdout)
    assert found, done.stdout
    seen = json.loads(found.group(1))
    assert seen["room"] == width
    assert seen["wide"] <= width
    assert [name for name, height, visible in seen["seen"] if height < 30 or not visible] == []
    assert len(seen["seen"]) == 9
    assert all(natural > 0 for natural in seen["images"]), "every picture could be read"
