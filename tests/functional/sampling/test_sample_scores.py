"""Scores against automatic differentiation, sample by sample, and weighted losses against torch's own."""

from __future__ import annotations

import pytest
import torch
from torch.func import functional_call, grad, vmap
from torch.nn import functional as F  # noqa: N812  # its usual name

from lightning_sgd.functional.sampling import sample_losses, sample_scores

B, C, D = 6, 4, 3
GENERATOR = torch.Generator().manual_seed(0)


def rand(*shape):
    return torch.rand(*shape, generator=GENERATOR)


def classes(*shape):
    return torch.randint(C, shape, generator=GENERATOR)


LABELS, MASKED = classes(B), classes(B, D)
MASKED[0, 1] = MASKED[3, 0] = MASKED[3, 2] = -100
HOLES = LABELS.clone()
HOLES[2] = 7
ONE_HOT = F.one_hot(LABELS, C).float()
WEIGHT = rand(C) + 0.5
LOSSES = [
    pytest.param(F.cross_entropy, (B, C), LABELS, {}, id="cross-entropy"),
    pytest.param(F.cross_entropy, (B, C), LABELS, {"label_smoothing": 0.1}, id="smoothing"),
    pytest.param(F.cross_entropy, (B, C), LABELS, {"weight": WEIGHT}, id="class weights"),
    pytest.param(
        F.cross_entropy, (B, C), LABELS, {"weight": WEIGHT, "label_smoothing": 0.2}, id="both"
    ),
    pytest.param(F.cross_entropy, (B, C), HOLES, {"ignore_index": 7}, id="an ignored sample"),
    pytest.param(F.cross_entropy, (B, C, D), MASKED, {}, id="masked positions"),
    pytest.param(F.cross_entropy, (B, C, D), MASKED, {"weight": WEIGHT}, id="masked, weights"),
    pytest.param(F.cross_entropy, (B, C), rand(B, C).softmax(1), {}, id="soft targets"),
    pytest.param(
        F.cross_entropy,
        (B, C, D),
        rand(B, C, D).softmax(1),
        {"label_smoothing": 0.1, "weight": WEIGHT},
        id="soft targets, smoothing, weights",
    ),
    pytest.param(F.binary_cross_entropy_with_logits, (B, C), ONE_HOT, {}, id="bce"),
    pytest.param(F.binary_cross_entropy_with_logits, (B,), rand(B), {}, id="bce of one output"),
    pytest.param(
        F.binary_cross_entropy_with_logits,
        (B, C),
        rand(B, C),
        {"pos_weight": WEIGHT, "weight": rand(C)},
        id="bce with weights",
    ),
    pytest.param(F.mse_loss, (B, C, D), rand(B, C, D), {}, id="mse"),
    pytest.param(F.mse_loss, (B,), rand(B), {}, id="mse of one output"),
    pytest.param(F.mse_loss, (B, C), rand(B, C), {"weight": rand(B, C)}, id="mse with weights"),
    pytest.param(F.l1_loss, (B, C), rand(B, C), {}, id="l1"),
    pytest.param(F.l1_loss, (B, C), rand(B, C), {"weight": rand(B, C)}, id="l1 with weights"),
    pytest.param(F.huber_loss, (B,), rand(B), {"weight": rand(B)}, id="huber with weights"),
    pytest.param(F.smooth_l1_loss, (B, C), rand(B, C), {"beta": 0.5}, id="smooth l1"),
    pytest.param(F.huber_loss, (B, C), rand(B, C), {"delta": 0.5}, id="huber"),
    pytest.param(F.poisson_nll_loss, (B, C), rand(B, C), {}, id="poisson"),
]
LOSS = pytest.mark.parametrize(("function", "shape", "target", "settings"), LOSSES)


def take(function, outputs, target, settings):
    arguments = {"input": outputs, "target": target, **settings}
    return function, sample_losses.RULES[function], arguments


@LOSS
def test_scores_are_gradient_norms_of_single_samples(function, shape, target, settings):
    outputs = torch.randn(shape, generator=GENERATOR)
    scores = sample_losses.sample_scores(*take(function, outputs, target, settings))
    for i in range(B):
        # One sample at a time, with a sum over its positions; `mse_loss` and its like are means over them.
        row = outputs[i : i + 1].clone().requires_grad_()
        single = {
            k: v[i : i + 1] if k == "weight" and len(v) == B else v for k, v in settings.items()
        }
        mean = function is not F.cross_entropy
        losses = function(row, target[i : i + 1], **{**single, "reduction": "none"})
        (losses.mean() if mean else losses.sum()).backward()
        factor = C if function is F.binary_cross_entropy_with_logits and len(shape) > 1 else 1
        assert scores[i].item() == pytest.approx(factor * row.grad.norm().item(), abs=2e-6)


@pytest.mark.parametrize("name", ["nll_loss", "kl_div", "binary_cross_entropy"])
def test_losses_of_probabilities_have_the_scores_of_their_logits(name):
    # With respect to log-probabilities the gradient would be the same for all samples.
    logits = torch.randn(B, C, generator=GENERATOR).requires_grad_()
    soft = rand(B, C).softmax(1)
    outputs, target = {
        "nll_loss": (logits.log_softmax(1), LABELS),
        "kl_div": (logits.log_softmax(1), soft),
        "binary_cross_entropy": (logits.sigmoid(), soft),
    }[name]
    function = getattr(F, name)
    scores = sample_losses.sample_scores(*take(function, outputs, target, {}))
    losses = function(outputs, target, reduction="none").reshape(B, -1).sum(1)
    (rows,) = torch.autograd.grad(losses.sum(), logits)
    torch.testing.assert_close(scores, rows.norm(dim=1), atol=2e-6, rtol=1e-5)


@LOSS
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_with_weights_of_one_a_loss_is_what_torch_says(
    function, shape, target, settings, reduction
):
    outputs = torch.randn(shape, generator=GENERATOR)
    settings = {**settings, "reduction": reduction}
    apart = sample_losses.sample_losses(*take(function, outputs, target, settings))
    expected = function(outputs, target, **settings)
    torch.testing.assert_close(apart.reduced(torch.ones(B), reduction), expected)


@LOSS
def test_a_weight_of_two_counts_a_sample_twice(function, shape, target, settings):
    # A sample that is drawn with half of the uniform probability stands for two.
    outputs = torch.randn(shape, generator=GENERATOR)
    settings = {**settings, "reduction": "sum"}
    weights = torch.ones(B)
    weights[1] = 2.0
    twice = torch.tensor([0, 1, 1, 2, 3, 4, 5])
    apart = sample_losses.sample_losses(*take(function, outputs, target, settings))
    more = {k: v[twice] if k == "weight" and len(v) == B else v for k, v in settings.items()}
    expected = function(outputs[twice], target[twice], **more)
    torch.testing.assert_close(apart.reduced(weights, "sum"), expected)


def test_a_weighted_mean_is_divided_by_the_number_of_samples():
    # Dividing by the sum of the weights would make it biased.
    outputs, weights = torch.randn(B, C, generator=GENERATOR), rand(B)
    apart = sample_losses.sample_losses(*take(F.cross_entropy, outputs, LABELS, {}))
    losses = F.cross_entropy(outputs, LABELS, reduction="none")
    torch.testing.assert_close(apart.reduced(weights, "mean"), (weights * losses).sum() / B)


def test_a_weighted_mean_with_class_weights_has_a_weighted_mean_mass():
    outputs, weights = torch.randn(B, C, generator=GENERATOR), rand(B)
    apart = sample_losses.sample_losses(*take(F.cross_entropy, outputs, LABELS, {"weight": WEIGHT}))
    losses = F.cross_entropy(outputs, LABELS, weight=WEIGHT, reduction="none")
    mean_mass = (weights * WEIGHT[LABELS]).sum() / weights.sum()
    torch.testing.assert_close(
        apart.reduced(weights, "mean"), (weights * losses).sum() / (B * mean_mass)
    )


def test_weights_of_zero_make_a_loss_of_zero():
    # A rank can be left with padding only.
    outputs = torch.randn(B, C, generator=GENERATOR)
    apart = sample_losses.sample_losses(*take(F.cross_entropy, outputs, LABELS, {}))
    assert apart.reduced(torch.zeros(B), "mean") == 0


@pytest.mark.parametrize("bias", [True, False])
def test_the_score_of_the_last_layer_is_the_norm_of_its_gradient(bias):
    layer = torch.nn.Linear(5, C, bias=bias).double()
    inputs = torch.randn(B, 5, generator=GENERATOR, dtype=torch.float64)
    params = dict(layer.named_parameters())

    def loss(params, row, label):
        return F.cross_entropy(functional_call(layer, params, row[None]), label[None])

    grads = vmap(grad(loss), (None, 0, 0))(params, inputs, LABELS)
    exact = torch.stack([g.flatten(1).square().sum(1) for g in grads.values()]).sum(0).sqrt()
    score = sample_scores.cross_entropy_score(layer(inputs), LABELS)
    found = sample_scores.last_layer_score(score, inputs, bias)
    torch.testing.assert_close(found.double(), exact, atol=1e-6, rtol=1e-6)


def test_exact_norms_are_those_of_single_samples():
    net = torch.nn.Sequential(torch.nn.Linear(5, 7), torch.nn.Tanh(), torch.nn.Linear(7, C))
    inputs = torch.randn(B, 5, generator=GENERATOR)
    losses = F.cross_entropy(net(inputs), LABELS, reduction="none")
    found = sample_scores.parameter_gradient_score(losses, list(net.parameters()))
    for i in range(B):
        net.zero_grad()
        F.cross_entropy(net(inputs[i : i + 1]), LABELS[i : i + 1]).backward()
        squares = sum(p.grad.square().sum() for p in net.parameters())
        assert found[i].item() == pytest.approx(squares.sqrt().item(), rel=1e-5)


def test_scores_of_half_precision_are_single_precision():
    outputs = torch.randn(B, C, generator=GENERATOR)
    exact = sample_scores.cross_entropy_score(outputs.bfloat16().float(), LABELS)
    found = sample_scores.cross_entropy_score(outputs.bfloat16(), LABELS)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, exact)
