"""The weighted gradient is unbiased for any scores, with the variance of the formula, measured on a real network."""

from __future__ import annotations

import math

import pytest
import torch
from torch.func import functional_call, grad, vmap
from torch.nn.functional import cross_entropy

from lightning_sgd.functional.sampling import priority_sampling as ps
from lightning_sgd.functional.sampling.sample_scores import cross_entropy_score
from lightning_sgd.sampling import PrioritySampler

N, B, NUM_BATCHES = 60, 16, 4000


def network(seed):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        net = torch.nn.Sequential(torch.nn.Linear(6, 8), torch.nn.Tanh(), torch.nn.Linear(8, 3))
    return net.double()


def problem():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(N, 6, generator=generator, dtype=torch.float64)
    return x, torch.randint(3, (N,), generator=generator)


@pytest.fixture(scope="module")
def gradients():
    """The gradient of every sample, of shape (N, number of parameters)."""
    net, (x, y) = network(1), problem()
    params = dict(net.named_parameters())

    def loss(params, row, label):
        return cross_entropy(functional_call(net, params, row[None]), label[None])

    parts = vmap(grad(loss), (None, 0, 0))(params, x, y)
    return torch.cat([part.flatten(1) for part in parts.values()], dim=1).detach()


def scores_of(seed):
    x, y = problem()
    return cross_entropy_score(network(seed)(x).detach(), y)


def estimates(gradients, scores, beta, stratified, mix=0.3):
    """Mean weighted gradients of many batches, with weights of the draws."""
    sampler = PrioritySampler(
        N, B, warmup_epochs=0, uniform_mix=mix, stratified=stratified, half_life=None
    )
    sampler.table.update(torch.arange(N), scores)
    sampler.table.rebuild(1)
    rows = []
    for _ in range(NUM_BATCHES):
        draw = sampler.draw()
        weights = draw.weights(N, beta)
        weights = torch.ones(B) if weights is None else weights
        rows.append((weights.double()[:, None] * gradients[sampler.take().indices]).mean(0))
    return torch.stack(rows), sampler.probabilities()


def z_values(gradients, rows):
    error = rows.std(0) / math.sqrt(NUM_BATCHES)
    return (rows.mean(0) - gradients.mean(0)) / error


@pytest.mark.parametrize("stratified", [False, True])
@pytest.mark.parametrize("seed", [1, 2], ids=["scores of this network", "scores of another one"])
def test_the_weighted_gradient_is_unbiased_for_any_scores(gradients, seed, stratified):
    rows, _ = estimates(gradients, scores_of(seed), 1.0, stratified)
    z = z_values(gradients, rows)
    assert z.abs().max() < 4
    assert 0.3 < z.square().mean().item() < 1.7  # 1, but coordinates depend on each other


def test_without_weights_it_is_biased(gradients):
    # Guards the test above against being vacuous.
    rows, _ = estimates(gradients, scores_of(1), 0.0, stratified=False)
    assert z_values(gradients, rows).abs().max() > 10


@pytest.mark.slow
def test_the_variance_is_that_of_the_formula_and_less_than_uniform(gradients):
    norms, mean_norm = gradients.norm(dim=1), gradients.mean(0).norm().item()
    found = {}
    for name, scores, mix in (
        ("uniform", torch.ones(N), 0.0),
        ("bound", scores_of(1), 0.3),
        ("exact", norms, 0.0),
    ):
        rows, p = estimates(gradients, scores, 1.0, stratified=False, mix=mix)
        measured = (rows - gradients.mean(0)).square().sum(1)
        expected = ps.gradient_variance(norms, p, mean_norm) / B
        error = measured.std().item() / math.sqrt(NUM_BATCHES)
        assert measured.mean().item() == pytest.approx(expected, abs=4 * error), name
        found[name] = expected
    assert found["exact"] < found["bound"] < found["uniform"]


@pytest.mark.slow
@pytest.mark.parametrize("mix", [0.0, 0.3])
def test_stratified_draws_do_not_have_more_variance(gradients, mix):
    variances = []
    for stratified in (True, False):
        rows, _ = estimates(gradients, scores_of(2), 1.0, stratified, mix)
        variances.append((rows - gradients.mean(0)).square().sum(1).mean().item())
    assert variances[0] < variances[1]


@pytest.mark.slow
def test_the_self_normalised_weights_are_nearly_unbiased(gradients):
    # `weight_norm="mean"`: a bias of the order of 1/b, as the docs say.
    sampler = PrioritySampler(N, B, warmup_epochs=0, half_life=None)
    sampler.table.update(torch.arange(N), scores_of(1))
    sampler.table.rebuild(1)
    rows = []
    for _ in range(NUM_BATCHES):
        draw = sampler.draw()
        weights = draw.weights(N, 1.0, "mean")
        assert weights.mean().item() == pytest.approx(1.0)
        rows.append((weights.double()[:, None] * gradients[draw.indices]).mean(0))
    bias = (torch.stack(rows).mean(0) - gradients.mean(0)).norm()
    assert bias < gradients.norm(dim=1).mean() / B
