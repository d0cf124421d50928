"""The reproductions show what the paper claims and what the controls say of it; the documentation shows the runs."""

from __future__ import annotations

import json

import pytest
import torch
from scipy import stats
from support.reproductions import load

NAMES = (
    "gradient_gaussianity_digits",
    "gradient_gaussianity_calibration",
    "gradient_noise_sweep",
)


def rows_of(root, name):
    return json.loads((root / f"docs/results/{name}.json").read_text())


# The scripts


@pytest.mark.parametrize("net", ["MLP", "CNN"])
def test_gradients_of_whole_batches_are_autograds(net):
    script = load(NAMES[0])
    x, y = torch.rand(3, 64), torch.tensor([0, 1, 2])
    model = script.NETS[net]()
    generator = torch.Generator().manual_seed(0)
    rows = script.batch_gradients(model, x, y, size=1, num=20, generator=generator)
    singles = []
    for index in range(3):
        model.zero_grad()
        part = slice(index, index + 1)
        torch.nn.functional.cross_entropy(model(x[part]), y[part]).backward()
        singles.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
    assert rows.shape == (20, len(singles[0]))
    assert (rows[:, None] - torch.stack(singles)).norm(dim=2).min(dim=1).values.max() < 1e-5


def test_the_noise_of_the_calibration_has_the_laws_of_its_names(root):
    script = load(NAMES[1])
    generator = torch.Generator().manual_seed(0)
    laws = {**script.GAUSSIAN, **script.OTHER}
    rows = {name: draw(generator) for name, draw in laws.items()}
    assert {each.shape for each in rows.values()} == {script.SHAPE}
    scales = rows["Gaussian, spectrum 1/i²"].std(dim=0)
    assert scales[0] / scales[99] == pytest.approx(100, rel=0.3)
    for name, law in (
        ("Gaussian, flat spectrum", "norm"),
        ("exponential by coordinate", "expon"),
    ):
        assert stats.kstest(rows[name].flatten()[::50].numpy(), law).pvalue > 0.001
    student = rows["t(3) by coordinate"].flatten()[::50].numpy()
    assert stats.kstest(student, stats.t(3).cdf).pvalue > 0.001


# The documented runs


def test_random_directions_show_what_the_paper_claims(root):
    # From batches of 256 on Gaussian in the early phase, and no longer in the late one.
    for row in rows_of(root, NAMES[0]):
        gaussian = row["rejected"] <= row["limit"]
        assert gaussian == (row["p_value"] > 0.005)
        if row["step"] <= 200 and row["batch_size"] >= 256:
            assert gaussian
        if row["step"] == 3000 or row["batch_size"] == 4:
            assert not gaussian
        assert row["control"] <= 0.08


def test_coordinates_say_no_at_any_batch_size(root):
    for row in rows_of(root, NAMES[0]):
        assert row["coordinate"] > 0.2
        assert row["coordinate_control"] < 0.1
        assert row["verdict"] in {"not Gaussian", "Gaussian on random directions only"}


def test_shares_fall_with_the_batch_size_and_rise_over_the_training(root):
    rows = rows_of(root, NAMES[0])
    for net in ("MLP", "CNN"):
        late = [r["rejected"] for r in rows if (r["net"], r["step"]) == (net, 3000)]
        assert late == sorted(late, reverse=True)
        first, *_, last = (r for r in rows if (r["net"], r["batch_size"]) == (net, 32))
        assert first["rejected"] < last["rejected"]


def test_false_alarms_are_as_rare_as_stated(root):
    rows = rows_of(root, NAMES[1])
    gaussian = [row for row in rows if row["law"].startswith("Gaussian")]
    assert len(gaussian) == 4
    for row in gaussian:
        assert row["runs"] >= 200
        assert row["any"] * row["runs"] <= stats.binom.ppf(0.995, row["runs"], 0.05)
    assert max(row["uncalibrated"] for row in gaussian) > 0.1
    for row in rows[4:]:
        assert row["any"] > 0.95


def test_the_pooled_index_does_not_tell_what_the_others_tell(root):
    rows = rows_of(root, NAMES[2])
    assert {(row["width"], row["depth"]) for row in rows} == {
        (width, depth) for width in (8, 32, 128, 512) for depth in (2, 4, 8)
    }
    assert all(0.8 < row["pooled"] < 1.2 for row in rows)
    first = [row for row in rows if row["step"] == 0]
    assert all(row["coordinate"] > 2 for row in first)
    assert sum(row["rejected"] <= row["limit"] for row in first) == 11
    series = ([row[key] for row in rows] for key in ("coordinate", "rejected"))
    assert stats.spearmanr(*series).statistic == pytest.approx(-0.96, abs=0.01)


def test_the_cards_show_the_tables_of_the_runs(root):
    card = (root / "docs/methods/gradient_gaussianity.md").read_text()
    other = (root / "docs/methods/tail_index.md").read_text()
    for name in (*NAMES, "gradient_gaussianity_ink"):
        assert (root / f"docs/results/{name}.md").read_text().strip() in card
    assert (root / f"docs/results/{NAMES[2]}.md").read_text().strip() in other
    times = (root / "docs/results/gradient_gaussianity_cpu.md").read_text()
    lines = [line for line in times.splitlines() if " | float" in line]
    assert len(lines) == 6
    assert all(line in card for line in lines)
