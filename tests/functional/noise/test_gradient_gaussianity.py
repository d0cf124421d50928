"""The verdict on noise of known laws: rate of false alarms, power, and what random directions cannot see."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy import stats

from lightning_sgd import GaussianitySettings, gradient_gaussianity, gram_projections
from lightning_sgd.functional.noise.gaussian_null import direction_tests
from lightning_sgd.functional.noise.gradient_gaussianity import MIN_GRADIENTS
from lightning_sgd.functional.noise.gram_projections import noise_gram

QUICK = GaussianitySettings(num_directions=64, false_alarm_rate=0.05, num_bootstraps=39)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=generator(seed))


def student(*shape, seed=0):
    return normal(*shape, seed=seed) / normal(*shape, 3, seed=seed + 1).square().mean(-1).sqrt()


def spectrum(power, size):
    return torch.arange(1, size + 1) ** (-power / 2)


# False alarms


@pytest.mark.slow
@pytest.mark.parametrize("power", [0, 1, 2, 4], ids=lambda power: f"spectrum of power {power}")
def test_gaussian_noise_is_rarely_called_something_else(power):
    # 240 runs at a stated rate of 5 %; more than 21 false alarms have a probability below 0.5 % then.
    alarms, raw = 0, []
    for seed in range(240):
        rows = normal(48, 300, seed=seed) * spectrum(power, 300)
        found = gradient_gaussianity(rows, generator(seed + 1000), QUICK)
        alarms += found.verdict != "Gaussian"
        raw.append(found.random.rejected)
    assert alarms <= stats.binom.ppf(0.995, 240, 0.05) == 21
    # The comparison would be needless if the raw shares stayed near 5 %.
    assert (max(raw) > 0.3) == (power >= 2)


@pytest.mark.slow
def test_each_family_has_its_rate():
    # In one effective dimension and over many bootstraps p-values are near uniform, in many they are cautious.
    p_values = []
    for seed in range(300):
        rows = normal(40, 100, seed=seed) * spectrum(4, 100)
        projections = gram_projections(noise_gram(rows), 30, generator(seed))
        p_values.append(
            direction_tests(projections, generator(seed + 1), num_bootstraps=19).p_value
        )
    for level in (0.1, 0.25, 0.5):
        assert np.mean(np.array(p_values) <= level) < level + 3 * math.sqrt(
            level * (1 - level) / 300
        )


# Power, and what hides


def exponential(seed):
    return torch.empty(100, 400).exponential_(generator=generator(seed))


LAWS = {
    # Rows, and in how many of 30 runs random directions may see it: sums of light coordinates look Gaussian.
    "exponential by coordinate": (exponential, (0, 4)),
    "t(3) by coordinate": (lambda seed: student(100, 400, seed=seed), (0, 30)),
    "rare events": (lambda seed: (normal(100, 400, seed=seed) > 2).float(), (0, 12)),
    "multivariate t(3)": (
        lambda seed: normal(100, 400, seed=seed) * student(100, 1, seed=seed + 7),
        (30, 30),
    ),
    "mixture of scales": (
        lambda seed: normal(100, 400, seed=seed) * (0.5 * normal(100, 1, seed=seed + 7)).exp(),
        (29, 30),
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("law", LAWS)
def test_other_noise_is_found_and_where(law):
    rows, (least, most) = LAWS[law]
    found = [gradient_gaussianity(rows(seed), generator(seed), QUICK) for seed in range(30)]
    assert all(each.coordinate.p_value == 0.025 for each in found)
    assert all(each.coordinate.rejected > 0.3 for each in found)
    verdicts = [each.verdict for each in found]
    assert least <= verdicts.count("not Gaussian") <= most
    assert verdicts.count("Gaussian on random directions only") == 30 - verdicts.count(
        "not Gaussian"
    )


@pytest.mark.slow
def test_the_level_of_one_direction_is_that_of_the_test():
    rows = normal(100, 3000)
    for test in ("shapiro_wilk", "anderson_darling", "jarque_bera"):
        for level in (0.05, 0.2):
            settings = GaussianitySettings(400, test, level, 0.05, 39)
            found = gradient_gaussianity(rows, generator(), settings)
            low = 0.4 if test == "jarque_bera" else 0.7
            assert low * level < found.random.rejected < 1.4 * level
            assert low * level < found.random.expected < 1.4 * level


# The calibration


def test_gaussian_noise_of_the_calibration_has_the_covariance_of_the_projections():
    from lightning_sgd.functional.noise.gaussian_null import _gaussian_like

    projections = normal(3, 50) * torch.tensor([[1.0], [2.0], [5.0]]) + normal(1, 50, seed=1)
    projections -= projections.mean(dim=1, keepdim=True)
    sets = torch.cat(list(_gaussian_like(projections, generator(), 4000)))
    assert sets.shape == (4000, 3, 50)
    together = sets.transpose(0, 1).reshape(3, -1)
    spread = (50 * projections.var(dim=1, correction=0)).sqrt()
    torch.testing.assert_close(together.std(dim=1), spread, rtol=0.02, atol=0)
    torch.testing.assert_close(together.corrcoef(), projections.corrcoef(), rtol=0, atol=0.02)
    assert stats.kstest(together[0].numpy() / together[0].std().item(), "norm").pvalue > 0.001


def test_the_limit_and_the_p_value_say_the_same():
    for seed in range(40):
        rows = normal(30, 50, seed=seed) * (0.25 * normal(30, 1, seed=seed + 1)).exp()
        found = direction_tests(rows.T, generator(seed), false_alarm_rate=0.1, num_bootstraps=59)
        assert (found.rejected > found.limit) == (found.p_value <= 0.1)
    assert (
        direction_tests(rows.T, generator(), false_alarm_rate=0.01, num_bootstraps=59).limit
        == math.inf
    )


def test_the_reference_depends_on_the_number_of_gradients():
    # Mean W under normality, from the literature of the test: 0.9762, 0.9926 for 50, 200.
    for num, mean in ((50, 0.9762), (200, 0.9926)):
        found = direction_tests(normal(2000, num), generator(), num_bootstraps=19)
        assert found.expected_statistic == pytest.approx(mean, abs=3e-4)
        assert found.statistic == pytest.approx(mean, abs=5e-4)


# What is told besides


def test_layers_are_tested_each_by_itself():
    rows = normal(100, 600)
    rows[:, 200:400] *= (0.8 * normal(100, 1, seed=3)).exp()
    rows[:, 400:] = 0
    layers = {"first": slice(0, 200), "second": slice(200, 400), "dead": slice(400, 600)}
    found = gradient_gaussianity(rows, generator(), QUICK, layers)
    assert list(found.layers) == list(layers)
    assert found.layers["first"] < 0.2 < 0.9 < found.layers["second"]
    assert math.isnan(found.layers["dead"])
    # A third of the coordinates are dead: left out, and counted.
    assert found.coordinate.num_directions + found.coordinate.num_constant == 64
    assert 10 < found.coordinate.num_constant < 35


def test_quantiles_are_mean_order_statistics():
    found = gradient_gaussianity(normal(100, 2000), generator(), GaussianitySettings())
    scores = stats.norm.ppf((np.arange(1, 101) - 0.375) / 100.25)
    np.testing.assert_allclose(found.random_quantiles, scores, atol=0.06)
    np.testing.assert_allclose(found.coordinate_quantiles, scores, atol=0.06)
    heavy = gradient_gaussianity(normal(100, 2000) ** 3, generator(), GaussianitySettings())
    assert heavy.coordinate_quantiles[-1] > 4
    assert abs(heavy.random_quantiles[-1] - scores[-1]) < 0.1


def test_a_mean_far_away_does_not_matter():
    # Late in training noise is small beside the gradient; it must not become noise around zero, nor be rounded off.
    rows = student(64, 300).double()
    expected = gradient_gaussianity(rows, generator(), QUICK)
    found = gradient_gaussianity(1e-10 * rows + 3, generator(), QUICK)
    assert found.coordinate.rejected == expected.coordinate.rejected
    assert found.coordinate.limit == pytest.approx(expected.coordinate.limit)
    assert found.verdict == expected.verdict


@pytest.mark.parametrize("scale", [1e-90, 1e-30, 1e12, 1e80])
def test_the_scale_does_not_matter(scale):
    rows = student(64, 300)
    expected = gradient_gaussianity(rows.double(), generator(), QUICK)
    found = gradient_gaussianity(scale * rows.double(), generator(), QUICK)
    assert found.verdict == expected.verdict
    assert found.coordinate.rejected == expected.coordinate.rejected
    assert found.coordinate.p_value == expected.coordinate.p_value
    assert found.random.rejected == pytest.approx(expected.random.rejected, abs=0.02)


@pytest.mark.parametrize(
    "rows", [torch.zeros(30, 5), torch.ones(30, 5), torch.randn(MIN_GRADIENTS - 1, 5)]
)
def test_without_noise_or_with_too_little_nothing_is_decided(rows):
    found = gradient_gaussianity(rows)
    assert found.verdict == "undecided"
    assert math.isnan(found.random.p_value)


def test_overflow_is_not_called_noise():
    rows = normal(30, 50)
    rows[3, 4] = torch.inf
    assert gradient_gaussianity(rows).verdict == "undecided"


@pytest.mark.parametrize(
    ("settings", "argument"),
    [
        ({"num_directions": 0}, "num_directions"),
        ({"test": "lilliefors"}, "test"),
        ({"level": 0.0}, "level"),
        ({"false_alarm_rate": 1.0}, "false_alarm_rate"),
        ({"num_bootstraps": 198}, "num_bootstraps"),
        ({"false_alarm_rate": 0.005}, "num_bootstraps"),
    ],
)
def test_impossible_settings_are_refused(settings, argument):
    with pytest.raises(ValueError, match=f"Expected `{argument}` to be"):
        GaussianitySettings(**settings)


def test_more_than_5000_gradients_are_refused():
    with pytest.raises(ValueError, match="Expected `rows` to be at most 5000, got 5001"):
        gradient_gaussianity(torch.ones(5001, 1))
