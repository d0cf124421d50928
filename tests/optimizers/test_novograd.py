"""NovoGrad against the paper's recursion, hand-computed steps, exact invariances and other people's code."""

from __future__ import annotations

import copy
import io
import warnings

import numpy as np
import pytest
import torch
from pytorch_optimizer import NovoGrad as PeerNovoGrad
from support.parameters import gradients, parameters, run

from lightning_sgd import NoEffectWarning, NovoGrad, OutsideIntendedUseWarning
from lightning_sgd.functional.optim.kernels import SMALL, small_by_shape, squared_norms
from lightning_sgd.functional.optim.novograd import (
    NovoGradSettings,
    fused_novograd_works,
    novograd_coefficients_,
    novograd_for_loop_,
    novograd_fused_without_waiting_,
)

IMPLEMENTATIONS = {
    "for-loop": {"foreach": False, "fused": False},
    "foreach": {"foreach": True},
    "fused": {"fused": True},
}


@pytest.fixture(params=IMPLEMENTATIONS, name="implementation")
def _implementation(request):
    return IMPLEMENTATIONS[request.param]


def follow(optimizer_class, grads, start=(1.0, -2.0), dtype=torch.float64, **settings):
    """Where given gradients lead one parameter, step by step."""
    w = torch.nn.Parameter(torch.tensor(start, dtype=dtype))
    optimizer = optimizer_class([w], **settings)
    points = []
    for grad in grads:
        w.grad = torch.as_tensor(grad, dtype=dtype).clone()
        optimizer.step()
        points.append(w.detach().clone().numpy())
    return np.stack(points), optimizer.state[w]


HAND = {"lr": 0.1, "betas": (0.9, 0.5), "eps": 0.0, "weight_decay": 0.01}
HAND_GRADS = [(3.0, 4.0), (0.0, 1.0)]


@pytest.mark.parametrize(
    ("settings", "m2", "w2"),
    [
        # v = ½·25 + ½·1 = 13, m = 0.9·(0.61, 0.78) + (0, 1)/√13 + 0.01·(0.939, −2.078)
        ({}, (0.55839, 0.9585700981), (0.883161, -2.1738570098)),
        # divided by √25 instead of √13
        ({"amsgrad": True}, (0.55839, 0.88122), (0.883161, -2.166122)),
        # what is added to 0.9·m is weighed with 0.1
        ({"grad_averaging": True}, (0.549939, 0.7276570098), (0.8840061, -2.1507657010)),
    ],
    ids=["plain", "amsgrad", "grad_averaging"],
)
def test_hand_computed_steps(implementation, settings, m2, w2):
    # Step 1 is the same for all: v = 25, m = (3, 4)/5 + 0.01·(1, −2) = (0.61, 0.78).
    first, state = follow(NovoGrad, HAND_GRADS[:1], **HAND, **settings, **implementation)
    np.testing.assert_allclose(first[0], (0.939, -2.078), rtol=1e-14)
    np.testing.assert_allclose(state["momentum_buffer"], (0.61, 0.78), rtol=1e-14)
    points, state = follow(NovoGrad, HAND_GRADS, **HAND, **settings, **implementation)
    assert state["second_moment"].item() == pytest.approx(13.0, abs=1e-14)
    np.testing.assert_allclose(state["momentum_buffer"], m2, atol=1e-10)
    np.testing.assert_allclose(points[1], w2, atol=1e-10)


def test_hand_computed_steps_with_decoupled_decay(implementation):
    # w = 0.999·(1, −2) − 0.1·(0.6, 0.8) = (0.939, −2.078); then m = 0.9·(0.6, 0.8) + (0, 1)/√13,
    # w = 0.999·(0.939, −2.078) − 0.1·(0.54, 0.72 + 0.2773500981).
    points, _ = follow(NovoGrad, HAND_GRADS, **HAND, decoupled_weight_decay=True, **implementation)
    expected = [(0.939, -2.078), (0.884061, -2.17565700981)]
    np.testing.assert_allclose(points, expected, atol=1e-11)


def test_hand_computed_steps_in_the_form_of_apex(implementation):
    # Step 1: m = 0.1·(3, 4), m̂ = (3, 4), √v̂ = √(25/0.5) = √50: w = (1, −2) − 0.1·((3, 4)/√50 + 0.01·(1, −2)).
    # Step 2: m = (0.27, 0.46), m̂ = m/0.19, √v̂ = √(13/0.75).
    settings = {**HAND, "grad_averaging": True, "variant": "apex"}
    points, state = follow(NovoGrad, HAND_GRADS, **settings, **implementation)
    w1 = np.array([1 - 0.1 * (3 / 50**0.5 + 0.01), -2 - 0.1 * (4 / 50**0.5 - 0.02)])
    np.testing.assert_allclose(w1, (0.956573593, -2.054568542), atol=1e-9)
    root = (13 / 0.75) ** 0.5
    w2 = w1 - 0.1 * (np.array([0.27, 0.46]) / 0.19 / root + 0.01 * w1)
    np.testing.assert_allclose(points, [w1, w2], rtol=1e-13)
    np.testing.assert_allclose(state["momentum_buffer"], (0.27, 0.46), rtol=1e-14)
    assert state["step"].item() == 2


@pytest.mark.parametrize(
    ("averaging", "m1", "m2"),
    [
        # ε = 11 inside the root: √(25 + 11) = 6, then √(13 + 11) = √24.
        (
            False,
            (0.51, 4 / 6 - 0.02),
            (0.46849, 0.9 * (4 / 6 - 0.02) + 24**-0.5 - 0.01 * 2.0646666),
        ),
        # Averaged from the first step on.
        (True, (0.051, (4 / 6 - 0.02) / 10), None),
    ],
)
def test_hand_computed_steps_in_the_form_of_openseq2seq(implementation, averaging, m1, m2):
    settings = {**HAND, "eps": 11.0, "variant": "openseq2seq", "grad_averaging": averaging}
    _, state = follow(NovoGrad, HAND_GRADS[:1], **settings, **implementation)
    np.testing.assert_allclose(state["momentum_buffer"], m1, rtol=1e-14)
    if m2 is not None:
        _, state = follow(NovoGrad, HAND_GRADS, **settings, **implementation)
        np.testing.assert_allclose(state["momentum_buffer"], m2, atol=1e-8)


def noisy_grads(steps=150, dim=5, seed=0):
    random = np.random.default_rng(seed)
    return random.standard_normal((steps, dim)) * np.exp(random.standard_normal((steps, 1)))


def as_printed(grads, lr, betas, eps, weight_decay, start, averaging=False):
    """The recursion of the paper in NumPy."""
    w, m, v, points = np.array(start), None, None, []
    for grad in grads:
        square = grad @ grad
        v = square if v is None else betas[1] * v + (1 - betas[1]) * square
        update = grad / (np.sqrt(v) + eps) + weight_decay * w
        gain = 1 - betas[0] if averaging else 1
        m = update if m is None else betas[0] * m + gain * update
        w = w - lr * m
        points.append(w)
    return np.stack(points)


@pytest.mark.parametrize("averaging", [False, True])
@pytest.mark.parametrize("eps", [1e-8, 0.3])
def test_equals_the_paper(implementation, averaging, eps):
    settings = {"lr": 0.02, "betas": (0.95, 0.98), "eps": eps, "weight_decay": 0.1}
    start = [1.0, -2.0, 0.5, 3.0, 0.0]
    ours, _ = follow(
        NovoGrad, noisy_grads(), start, grad_averaging=averaging, **settings, **implementation
    )
    paper = as_printed(noisy_grads(), start=start, averaging=averaging, **settings)
    np.testing.assert_allclose(ours, paper, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("averaging", [False, True])
def test_equals_another_implementation(implementation, averaging):
    # Of many packages this one, in the version that is tested here, makes the paper's first step.
    settings = {"lr": 0.02, "betas": (0.95, 0.98), "weight_decay": 0.1, "grad_averaging": averaging}
    start = [1.0, -2.0, 0.5, 3.0, 0.0]
    ours, _ = follow(NovoGrad, noisy_grads(), start, **settings, **implementation)
    theirs, _ = follow(PeerNovoGrad, noisy_grads(), start, **settings)
    np.testing.assert_allclose(ours, theirs, rtol=1e-11, atol=1e-12)


def test_is_sgd_with_momentum_on_normalised_gradients(implementation):
    # The same as torch's own optimizer that is fed g/√v and coupled decay.
    grads, v, normalised = noisy_grads(), None, []
    for grad in grads:
        v = grad @ grad if v is None else 0.98 * v + 0.02 * (grad @ grad)
        normalised.append(grad / np.sqrt(v))
    start, settings = [1.0, -2.0, 0.5, 3.0, 0.0], {"lr": 0.02, "weight_decay": 0.1}
    ours, _ = follow(NovoGrad, grads, start, eps=0.0, **settings, **implementation)
    theirs, _ = follow(torch.optim.SGD, normalised, start, momentum=0.95, **settings)
    np.testing.assert_allclose(ours, theirs, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("scale", [2.0**20, 2.0**-20, 1e4, 1e-4])
def test_the_scale_of_the_loss_has_no_influence(implementation, scale):
    settings = {"lr": 0.02, "eps": 0.0, "weight_decay": 0.1, **implementation}
    start = [1.0, -2.0, 0.5, 3.0, 0.0]
    plain, _ = follow(NovoGrad, noisy_grads(), start, **settings)
    scaled, _ = follow(NovoGrad, scale * noisy_grads(), start, **settings)
    if np.log2(scale).is_integer() and not implementation.get("fused"):
        np.testing.assert_array_equal(plain, scaled)
    np.testing.assert_allclose(plain, scaled, rtol=1e-9)


def test_without_memory_every_tensor_moves_by_exactly_the_step_size(implementation):
    if implementation.get("fused"):
        implementation = {}  # the kernel has no buffer without momentum; tested below
    params = parameters(torch.float64)
    optimizer = NovoGrad(params, lr=0.1, betas=(0.0, 0.0), eps=0.0, **implementation)
    for t in range(3):
        before = [param.detach().clone() for param in params]
        run(optimizer, params, steps=1, first=t)
        for old, param in zip(before, params, strict=True):
            step = old - param.detach()
            assert step.norm().item() == pytest.approx(0.1, abs=1e-14)
            direction = param.grad / param.grad.norm()
            torch.testing.assert_close(step / 0.1, direction, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("beta2", [0.0, 0.5, 0.98])
def test_no_step_is_longer_than_the_bound(implementation, beta2):
    # Gradients that grow tenfold at every step are the worst case for the normalisation.
    grads = np.outer(10.0 ** np.arange(12), np.ones(4))
    points, _ = follow(
        NovoGrad, grads, [0.0] * 4, lr=0.1, betas=(0.9, beta2), eps=0.0, **implementation
    )
    steps = np.linalg.norm(np.diff(points, axis=0), axis=1)
    bound = 0.1 / (1 - 0.9) / np.sqrt(1 - beta2)
    assert steps.max() <= bound * (1 + 1e-12)
    assert steps.max() > 0.5 * bound


def test_along_a_constant_gradient_the_step_is_twenty_step_sizes(implementation):
    points, _ = follow(NovoGrad, [(3.0, 4.0)] * 400, lr=0.01, **implementation)
    step = np.linalg.norm(points[-1] - points[-2])
    assert step == pytest.approx(0.2, rel=1e-7)


def test_rescaling_a_normalised_layer_keeps_the_direction(implementation):
    # Before batch normalisation w → s·w changes nothing but the gradient, g → g/s: the momentum must not notice.
    def momentum(scale):
        torch.manual_seed(0)
        x, y = torch.randn(16, 3, dtype=torch.float64), torch.randn(16, 4, dtype=torch.float64)
        w = torch.nn.Parameter(scale * torch.randn(4, 3, dtype=torch.float64))
        optimizer = NovoGrad([w], lr=0.0, eps=0.0, **implementation)
        for _ in range(5):
            optimizer.zero_grad()
            hidden = x @ w.T
            ((hidden - hidden.mean(dim=0)) / hidden.std(dim=0) - y).square().mean().backward()
            optimizer.step()
        return optimizer.state[w]["momentum_buffer"]

    torch.testing.assert_close(momentum(7.0), momentum(1.0), rtol=1e-11, atol=1e-13)


def state_numel(optimizer):
    return sum(value.numel() for state in optimizer.state.values() for value in state.values())


def test_the_state_is_one_number_per_weight_and_one_per_tensor():
    ours, theirs = parameters(), parameters()
    run(NovoGrad(ours), ours, steps=1)
    novograd, adam = NovoGrad(ours), torch.optim.Adam(theirs)
    run(novograd, ours, steps=2)
    run(adam, theirs, steps=2)
    num_weights, num_tensors = sum(param.numel() for param in ours), len(ours)
    assert state_numel(novograd) == num_weights + num_tensors
    assert state_numel(adam) == 2 * num_weights + num_tensors


@pytest.mark.parametrize("variant", ["paper", "openseq2seq"])
@pytest.mark.parametrize("averaging", [False, True])
def test_a_zero_gradient_comes_before_the_first_step(implementation, variant, averaging):
    # The memory of the size of gradients begins with the first one that is not zero.
    settings = {"lr": 0.1, "betas": (0.9, 0.5), "variant": variant, "grad_averaging": averaging}
    points, state = follow(NovoGrad, [(0.0, 0.0)] * 3, **settings, **implementation)
    np.testing.assert_array_equal(points, [(1.0, -2.0)] * 3)
    assert state["second_moment"].item() == 0.0
    later, state = follow(NovoGrad, [(0.0, 0.0)] * 3 + HAND_GRADS, **settings, **implementation)
    fresh, _ = follow(NovoGrad, HAND_GRADS, **settings, **implementation)
    np.testing.assert_array_equal(later[3:], fresh)
    assert state["second_moment"].item() == pytest.approx(13.0, abs=1e-14)


@pytest.mark.parametrize("eps", [1e-8, 0.0])
def test_a_zero_gradient_still_decays(implementation, eps):
    # m = 0/(0 + ε) + d·w, not NaN: w = (1, −2)·(1 − 0.1·0.01).
    points, _ = follow(NovoGrad, [(0.0, 0.0)], **{**HAND, "eps": eps}, **implementation)
    np.testing.assert_allclose(points[0], (0.999, -1.998), rtol=1e-13)


def test_half_precision_gradients_do_not_overflow(implementation):
    # The square of 300 is beyond float16.
    if implementation.get("fused"):
        implementation = {}  # whether the kernel can be trusted is for the probe to say
    points, state = follow(
        NovoGrad, [(300.0, 400.0)], lr=0.5, dtype=torch.float16, **implementation
    )
    assert state["second_moment"].dtype == torch.float32
    assert state["second_moment"].item() == 250000.0
    np.testing.assert_allclose(points[0], (1 - 0.3, -2 - 0.4), atol=2e-3)


def test_a_norm_that_overflows_is_not_hidden(implementation):
    # ‖g‖² = ∞ for finite g: dividing by it would freeze the layer for ever.
    points, _ = follow(NovoGrad, [(1e30, 0.0), (1.0, 0.0)], dtype=torch.float32, **implementation)
    assert np.isnan(points[-1]).all()


@pytest.mark.parametrize("amsgrad", [False, True])
def test_second_moments_of_bfloat16_parameters_survive_a_checkpoint(amsgrad):
    # torch rounds every state to the type of its parameter when it loads.
    params = parameters(torch.bfloat16)
    optimizer = NovoGrad(params, amsgrad=amsgrad)
    run(optimizer, params, steps=3)
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    other = parameters(torch.bfloat16)
    resumed = NovoGrad(other, amsgrad=amsgrad)
    resumed.load_state_dict(saved)
    names = ["second_moment", *(["max_second_moment"] if amsgrad else [])]
    for param, twin in zip(params, other, strict=True):
        for name in names:
            value, restored = optimizer.state[param][name], resumed.state[twin][name]
            assert value.dtype == restored.dtype == torch.float32
            assert torch.equal(value, restored)
            assert value != value.bfloat16().float(), "else the test shows nothing"
    # What was loaded stays as it is when training goes on.
    before = copy.deepcopy(saved)
    run(resumed, other, steps=1)
    for index, state in saved["state"].items():
        assert torch.equal(state["second_moment"], before["state"][index]["second_moment"])


def test_the_form_of_apex_resumes_with_its_count():
    settings = {"variant": "apex", "grad_averaging": True, "weight_decay": 0.1}
    params = parameters(torch.bfloat16)
    optimizer = NovoGrad(params, **settings)
    run(optimizer, params, steps=3)
    other = [torch.nn.Parameter(param.detach().clone()) for param in params]
    resumed = NovoGrad(other, **settings)
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    run(optimizer, params, steps=3, first=3)
    run(resumed, other, steps=3, first=3)
    assert all(torch.equal(a, b) for a, b in zip(params, other, strict=True))


@pytest.mark.parametrize(
    "settings",
    [
        {"variant": "apex", "grad_averaging": True},
        {"variant": "openseq2seq", "grad_averaging": True},
        {"amsgrad": True},
        {"grad_averaging": True},
        {"decoupled_weight_decay": True},
        {"maximize": True},
    ],
    ids=str,
)
@pytest.mark.parametrize(
    "lr", [0.02, torch.tensor(0.02, dtype=torch.float64)], ids=["float", "tensor"]
)
def test_all_implementations_agree_in_every_form(settings, lr):
    results = []
    for switches in IMPLEMENTATIONS.values():
        params = parameters(torch.float64)
        run(NovoGrad(params, lr=lr, weight_decay=0.1, **settings, **switches), params, steps=6)
        results.append(params)
    for a, b, c in zip(*results, strict=True):
        torch.testing.assert_close(b, a, rtol=1e-12, atol=1e-13)
        torch.testing.assert_close(c, a, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("maximize", [False, True])
@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_the_kernel_without_waiting_makes_the_same_steps(maximize, decay):
    # For devices that must not be waited for; the arithmetic is the same on a CPU.
    settings = NovoGradSettings(0.95, 0.98, weight_decay=decay)
    results = []
    for step in (novograd_for_loop_, novograd_fused_without_waiting_):
        params = [param.detach() for param in parameters(torch.float64)]
        momenta = [torch.zeros_like(param) for param in params]
        moments = torch.zeros(len(params), dtype=torch.float64)
        for t in range(5):
            grads = list(gradients(params, t))
            numbers = novograd_coefficients_(grads, moments, None, None, settings)
            step(params, grads, momenta, numbers, lr=0.02, settings=settings, maximize=maximize)
        results.append(params)
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-13)


def test_a_tiny_weight_of_the_gradient_keeps_its_digits():
    # dampening = 1 − 1e-12 would leave four digits of it.
    large = [(3e12, 4e12), (0.0, 1e12)]
    points, _ = follow(NovoGrad, large, **HAND, fused=True)
    expected, _ = follow(NovoGrad, HAND_GRADS, **HAND)
    np.testing.assert_allclose(points, expected, rtol=1e-14)


@pytest.mark.parametrize("shape", [(3_000_001,), (2, 1_500_000), (1000, 3, 1001)])
def test_norms_of_large_tensors_are_accurate(shape):
    # A simple sum of 3 million squares in single precision is off by 3e-4.
    generator = torch.Generator().manual_seed(0)
    tensor = torch.randn(shape, generator=generator)
    expected = np.square(tensor.double().numpy()).sum()
    (ours,) = squared_norms([tensor], torch.float32)
    assert ours.item() == pytest.approx(expected, rel=2e-6)
    (turned,) = squared_norms([tensor.transpose(0, -1)], torch.float32)
    assert turned.item() == pytest.approx(expected, rel=2e-6)


SHAPES = [
    (SMALL + 1,),
    (),
    (SMALL,),
    (3, 2),
    (0,),
    (SMALL + 1,),
    (3, 2),
    (SMALL,),
    (0,),
    (),
    (2, 3),
]


def around_the_boundary(dtype=torch.float64, turned=False):
    """Tensors that go through the kernel together beside tensors that go alone."""
    generator = torch.Generator().manual_seed(0)
    tensors = [torch.randn(shape, generator=generator, dtype=dtype) for shape in SHAPES]
    if turned:
        tensors += [torch.randn(5, 4, generator=generator, dtype=dtype).T for _ in range(2)]
    return [torch.nn.Parameter(tensor) for tensor in tensors]


def test_which_small_tensors_go_together():
    # Shapes that occur once, large, empty and transposed ones go alone.
    portions, others = small_by_shape([p.detach() for p in around_the_boundary(turned=True)])
    assert sorted(portions) == [[1, 9], [2, 7], [3, 6]]
    assert others == [0, 4, 5, 8, 10, 11, 12]


def test_portions_of_small_tensors_are_bounded():
    portions, others = small_by_shape([torch.empty(SMALL)] * 129)
    assert [len(portion) for portion in portions] == [64, 64, 1]
    assert not others


def test_norms_of_small_and_large_tensors_come_in_their_order():
    tensors = [p.detach() for p in around_the_boundary(turned=True)]
    expected = [np.square(tensor.numpy()).sum() for tensor in tensors]
    np.testing.assert_allclose(squared_norms(tensors, torch.float64), expected, rtol=1e-12)
    halves = [tensor.half() for tensor in tensors]
    expected = [np.square(tensor.double().numpy()).sum() for tensor in halves]
    np.testing.assert_allclose(squared_norms(halves, torch.float32), expected, rtol=2e-6)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"weight_decay": 0.1, "maximize": True},
        {"weight_decay": 0.1, "grad_averaging": True},
        {"variant": "apex", "grad_averaging": True, "weight_decay": 0.1},
        {"variant": "openseq2seq", "lr": torch.tensor(0.02, dtype=torch.float64)},
    ],
    ids=str,
)
def test_small_and_large_tensors_make_the_same_steps(settings):
    results = []
    for switches in (IMPLEMENTATIONS["for-loop"], IMPLEMENTATIONS["fused"]):
        params = around_the_boundary()
        run(NovoGrad(params, **{"lr": 0.02, **settings}, **switches), params, steps=5)
        results.append(params)
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(b, a, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_small_and_large_tensors_resume_exactly(dtype):
    params = around_the_boundary(dtype)
    optimizer = NovoGrad(params, weight_decay=0.1)
    run(optimizer, params, steps=3)
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    other = [torch.nn.Parameter(param.detach().clone()) for param in params]
    resumed = NovoGrad(other, weight_decay=0.1)
    resumed.load_state_dict(torch.load(file, weights_only=True))
    run(optimizer, params, steps=3, first=3)
    run(resumed, other, steps=3, first=3)
    assert all(torch.equal(a, b) for a, b in zip(params, other, strict=True))
    for a, b in zip(params, other, strict=True):
        for name, value in optimizer.state[a].items():
            assert torch.equal(value, resumed.state[b][name])


def test_second_moments_stay_with_their_parameters(implementation):
    # They share one piece of memory; parameters may pause, join late or change their order.
    def moments(orders):
        params = [torch.nn.Parameter(torch.ones(2)) for _ in range(3)]
        optimizer = NovoGrad(params, betas=(0.9, 0.5), **implementation)
        for order in orders:
            optimizer.param_groups[0]["params"] = [params[i] for i in order]
            for i in order:
                params[i].grad = torch.tensor([3.0, 4.0]) * (i + 1)
            optimizer.step()
            optimizer.zero_grad()
        return [optimizer.state[param]["second_moment"].item() for param in params]

    # ‖g‖² = 25(i + 1)², the same at every step
    for orders in ([[0, 1, 2]] * 3, [[0, 1], [2, 1, 0], [1, 0, 2], [2], [0, 2, 1]]):
        assert moments(orders) == [25.0, 100.0, 225.0]


def test_what_users_see_of_the_settings():
    # Loggers of learning rates and decay index these, and the precision plugins look for the attribute.
    optimizer = NovoGrad([torch.nn.Parameter(torch.ones(1))])
    group = optimizer.param_groups[0]
    assert (group["lr"], group["betas"], group["eps"]) == (0.01, (0.95, 0.98), 1e-8)
    assert (group["weight_decay"], group["grad_averaging"], group["amsgrad"]) == (0.0, False, False)
    assert not hasattr(optimizer, "_step_supports_amp_scaling")


def test_groups_may_decay_differently(implementation):
    # Biases and norms are usually left out.
    one, two = torch.nn.Parameter(torch.ones(2)), torch.nn.Parameter(torch.ones(2))
    groups = [{"params": [one]}, {"params": [two], "weight_decay": 0.0}]
    optimizer = NovoGrad(groups, lr=0.1, weight_decay=0.5, **implementation)
    one.grad, two.grad = torch.tensor([3.0, 4.0]), torch.tensor([3.0, 4.0])
    optimizer.step()
    # 1 − 0.1·(0.6 + 0.5), 1 − 0.1·(0.8 + 0.5); 1 − 0.06, 1 − 0.08
    torch.testing.assert_close(one.detach(), torch.tensor([0.89, 0.87]))
    torch.testing.assert_close(two.detach(), torch.tensor([0.94, 0.92]))


def test_fused_kernel_is_used_where_it_works(monkeypatch):
    calls = []
    kernel = torch._fused_sgd_
    monkeypatch.setattr(torch, "_fused_sgd_", lambda *a, **k: (calls.append(1), kernel(*a, **k)))
    run(NovoGrad(params := parameters()), params, steps=1)
    assert len(calls) >= 3


@pytest.mark.parametrize("failure", ["absent", "changed"])
def test_falls_back_when_torch_takes_the_kernel_away(monkeypatch, failure):
    if failure == "absent":
        monkeypatch.delattr(torch, "_fused_sgd_")
    else:  # same name, other meaning
        monkeypatch.setattr(torch, "_fused_sgd_", lambda params, *a, **k: params[0].zero_())
    fused_novograd_works.cache_clear()
    try:
        automatic, foreach = parameters(), parameters()
        run(NovoGrad(automatic), automatic, steps=4)
        run(NovoGrad(foreach, foreach=True), foreach, steps=4)
        assert all(torch.equal(a, b) for a, b in zip(automatic, foreach, strict=True))
        with pytest.warns(NoEffectWarning, match="kernel is not available"):
            run(NovoGrad(params := parameters(), fused=True), params, steps=1)
    finally:
        fused_novograd_works.cache_clear()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("num", [5, 16, 100])
def test_half_precision_is_as_right_in_the_default_as_tensor_by_tensor(dtype, num):
    # A kernel of torch leaves garbage in momenta of half precision, from 16 elements on.
    results = []
    for switches in ({}, IMPLEMENTATIONS["for-loop"]):
        generator = torch.Generator().manual_seed(0)
        w = torch.nn.Parameter(torch.randn(num, generator=generator).to(dtype))
        optimizer = NovoGrad([w], lr=0.1, weight_decay=0.1, **switches)
        run(optimizer, [w], steps=4)
        results.append((w.detach(), optimizer.state[w]["momentum_buffer"]))
    for ours, expected in zip(*results, strict=True):
        torch.testing.assert_close(ours, expected, rtol=2e-2, atol=1e-2)


def test_fused_without_momentum_says_that_it_is_not_used():
    with pytest.warns(NoEffectWarning, match="not made for β₁ = 0"):
        run(NovoGrad(params := parameters(), betas=(0.0, 0.98), fused=True), params, steps=1)


def test_sharded_parameters_are_refused(tmp_path):
    # The norm of a shard is not the norm of the layer.
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    dist.init_process_group("gloo", f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            shard = distribute_tensor(torch.ones(4), init_device_mesh("cpu", (1,)), [Shard(0)])
        with pytest.raises(ValueError, match=r"Expected `params` of NovoGrad to be whole tensors"):
            NovoGrad([torch.nn.Parameter(shard)])
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"lr": -0.1}, r"Expected `lr` to be a number ≥ 0, got -0\.1\."),
        ({"lr": torch.ones(2)}, r"Expected `lr` to be a tensor of one element"),
        (
            {"betas": (1.0, 0.9)},
            r"Expected `betas` to be two numbers in \[0, 1\), got \(1\.0, 0\.9\)",
        ),
        ({"betas": (0.9, float("nan"))}, r"Expected `betas` to be two numbers"),
        ({"betas": (0.9,)}, r"Expected `betas` to be two numbers"),
        ({"eps": -1e-8}, r"Expected `eps` to be a number ≥ 0, got -1e-08\."),
        ({"weight_decay": -1.0}, r"Expected `weight_decay` to be a number ≥ 0, got -1\.0\."),
        (
            {"variant": "timm"},
            r"Expected `variant` to be one of paper, apex, openseq2seq, got 'timm'",
        ),
        (
            {"variant": "apex", "amsgrad": True, "grad_averaging": True},
            r"Expected `amsgrad` to be False beside `variant='apex'`",
        ),
        ({"foreach": True, "fused": True}, r"Expected `foreach` to be None or False"),
    ],
)
def test_bad_settings_are_refused_in_one_sentence(settings, message):
    with pytest.raises(ValueError, match=message):
        NovoGrad([torch.nn.Parameter(torch.ones(1))], **settings)


@pytest.mark.parametrize(
    ("settings", "category"),
    [
        ({"decoupled_weight_decay": True}, NoEffectWarning),
        (
            {
                "variant": "apex",
                "grad_averaging": True,
                "decoupled_weight_decay": True,
                "weight_decay": 0.1,
            },
            NoEffectWarning,
        ),
        ({"variant": "apex"}, OutsideIntendedUseWarning),
    ],
)
def test_settings_that_do_nothing_or_harm_are_named(settings, category):
    with pytest.warns(category):
        NovoGrad([torch.nn.Parameter(torch.ones(1))], **settings)
