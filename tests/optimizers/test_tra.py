"""TRSGD and TRAdam against the authors' numbers, torch's own optimizers, and closed forms."""

from __future__ import annotations

import copy
import io

import numpy as np
import pytest
import torch
from support.parameters import gradients, parameters, run
from torch.optim.lr_scheduler import LambdaLR

from lightning_sgd import TRSGD, NoEffectWarning, TRAdam
from lightning_sgd.functional.optim.momentum_steps import fused_adam_works, fused_sgd_works
from lightning_sgd.functional.optim.tra import pull_strength

IMPLEMENTATIONS = {
    "for-loop": {"foreach": False, "fused": False},
    "foreach": {"foreach": True},
    "fused": {"fused": True},
}
S1 = pytest.mark.filterwarnings("ignore:`lambda_w` has no effect with stages of one step")


@pytest.fixture(params=IMPLEMENTATIONS, name="implementation")
def _implementation(request):
    return IMPLEMENTATIONS[request.param]


def descend(optimizer_class, steps, each_step=None, **settings):
    """f(w) = w²/2 from w = 1; the points, and the parameter's state after each step."""
    w = torch.nn.Parameter(torch.tensor(1.0, dtype=torch.float64))
    optimizer = optimizer_class([w], **settings)
    points, states = [], []
    for t in range(steps):
        if each_step is not None:
            each_step(optimizer, t)
        w.grad = w.detach().clone()
        optimizer.step()
        points.append(w.item())
        states.append(copy.deepcopy(optimizer.state[w]))
    return points, states


def test_first_steps_of_the_authors_code(implementation):
    # λ = 0.01/0.1 = 0.1.  b = 1, w = 0.9;
    # b = 0.9 + 0.9 + 0.2·(0.9 − 1) = 1.78, w = 0.9 − 0.05·1.78 = 0.811;
    # b = 0.9·1.78 + 0.811 + 0.2·(0.811 − 1) = 2.3752, w = 0.811 − 0.1/3·2.3752 = 0.7318266667.
    points, _ = descend(TRSGD, 3, lr=0.1, lambda_w=0.01, weight_decay=0.0, **implementation)
    assert points == pytest.approx([0.9, 0.811, 0.7318266667], abs=1e-10)


def test_momentum_survives_the_change_of_the_anchor(implementation):
    # Two stages of two steps with decay 0.1, from the authors' class; a cleared momentum would give 0.7055 at step 3.
    points, states = descend(
        TRSGD, 4, lr=0.1, lambda_w=0.01, inner_steps=2, weight_decay=0.1, **implementation
    )
    assert points == pytest.approx([0.89, 0.79265, 0.5302285, 0.3856004725], abs=1e-12)
    anchors = [state["anchor"].item() for state in states]
    assert anchors == pytest.approx([1, 1, 0.79265, 0.79265], abs=1e-12)


def test_momentum_can_be_cleared_with_the_anchor(implementation):
    # Step 3 is a first step from 0.79265: b = 1.1·0.79265.
    settings = {"lr": 0.1, "lambda_w": 0.01, "inner_steps": 2, "weight_decay": 0.1}
    points, _ = descend(TRSGD, 3, reset_momentum=True, **settings, **implementation)
    assert points[2] == pytest.approx(0.79265 * (1 - 0.11), abs=1e-12)


def test_first_steps_of_adam_in_the_authors_code(implementation):
    points, _ = descend(TRAdam, 3, lr=1e-3, lambda_w=1e-4, weight_decay=0.0, **implementation)
    assert points == pytest.approx([0.9990000003, 0.9985000162, 0.9981667037], abs=5e-11)


def trajectory(optimizer_class, steps=40, schedule=None, **settings):
    """Several parameters under repeatable gradients, in float64."""
    params = parameters(torch.float64)
    optimizer = optimizer_class(params, **settings)
    scheduler = None if schedule is None else schedule(optimizer)
    points = []
    for t in range(steps):
        run(optimizer, params, steps=1, first=t)
        if scheduler is not None:
            scheduler.step()
        points.append(torch.cat([param.detach().flatten() for param in params]).clone())
    return torch.stack(points)


@S1
@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_stages_of_one_step_are_sgd(implementation, momentum):
    settings = {"lr": 0.05, "momentum": momentum, "weight_decay": 0.1}
    ours = trajectory(TRSGD, inner_steps=1, lambda_w=0.3, **settings, **implementation)
    torch.testing.assert_close(ours, trajectory(torch.optim.SGD, **settings), rtol=1e-12, atol=0)


@S1
@pytest.mark.parametrize("amsgrad", [False, True])
def test_stages_of_one_step_are_adam(implementation, amsgrad):
    # Up to the place of ε, which is nothing for a tiny ε.
    settings = {"lr": 0.05, "weight_decay": 0.1, "amsgrad": amsgrad, "eps": 1e-16}
    ours = trajectory(TRAdam, inner_steps=1, lambda_w=0.3, **settings, **implementation)
    theirs = trajectory(torch.optim.Adam, **settings)
    torch.testing.assert_close(ours, theirs, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize(
    ("ours", "theirs", "settings"),
    [
        (TRSGD, torch.optim.SGD, {"lr": 0.05, "momentum": 0.9, "weight_decay": 0.1}),
        (TRAdam, torch.optim.Adam, {"lr": 0.05, "weight_decay": 0.1, "eps": 1e-16}),
    ],
)
def test_without_pull_and_falling_steps_nothing_is_left(implementation, ours, theirs, settings):
    off = {"lambda_w": 0.0, "inner_lr_decay": "none", "inner_steps": 7}
    a, b = trajectory(ours, **settings, **off, **implementation), trajectory(theirs, **settings)
    torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-12)


def test_falling_steps_alone_are_a_schedule(implementation):
    settings = {"lr": 0.05, "momentum": 0.9, "weight_decay": 0.1}
    ours = trajectory(TRSGD, lambda_w=0.0, inner_steps=4, **settings, **implementation)
    theirs = trajectory(
        torch.optim.SGD,
        schedule=lambda optimizer: LambdaLR(optimizer, lambda t: 1 / (t % 4 + 1)),
        **settings,
    )
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("decay", ["harmonic", "none"])
@pytest.mark.parametrize("lr", [0.1, 0.8])
def test_the_pull_contracts_alike_for_every_step_size(implementation, decay, lr):
    # With g = 0 and no momentum one step leaves 1 − 2λ_w/(k + 1) of the deviation, whatever the step size.
    w = torch.nn.Parameter(torch.tensor([1.0, 2.0], dtype=torch.float64))
    optimizer = TRSGD(
        [w],
        lr=lr,
        lambda_w=0.05,
        momentum=0.0,
        weight_decay=0.0,
        inner_lr_decay=decay,
        **implementation,
    )
    w.grad = torch.zeros_like(w)
    optimizer.step()
    with torch.no_grad():
        w.add_(3.0)
    deviation = 3.0
    for k in range(1, 6):
        if k == 3:
            optimizer.param_groups[0]["lr"] = 2 * lr
        optimizer.step()
        deviation *= 1 - 0.1 / (k + 1 if decay == "harmonic" else 1)
        expected = torch.tensor([1.0 + deviation, 2.0 + deviation], dtype=torch.float64)
        torch.testing.assert_close(w.detach(), expected, rtol=1e-13, atol=0)


@pytest.mark.parametrize("lr", [0.0, torch.tensor(0.0)], ids=["float", "tensor"])
def test_a_step_size_of_zero_leaves_no_trace(implementation, lr):
    # λ = λ_w/η: a warm-up that starts at zero must not fill the momentum with infinities.
    assert pull_strength(0.01, lr) == 0.0
    w = torch.nn.Parameter(torch.ones(3))
    optimizer = TRSGD([w], lr=0.1, **implementation)
    for step in range(4):
        optimizer.param_groups[0]["lr"] = 0.1 if step == 0 else lr
        w.grad = torch.ones(3)
        optimizer.step()
    assert optimizer.state[w]["momentum_buffer"].isfinite().all()
    torch.testing.assert_close(w.detach(), torch.full((3,), 0.89999), rtol=1e-6, atol=0)


def test_the_strength_comes_from_the_first_step_size_of_each_group():
    one, two, three = (torch.nn.Parameter(torch.ones(1)) for _ in range(3))
    optimizer = TRSGD(
        [{"params": [one]}, {"params": [two], "lr": 0.5}, {"params": [three], "lambda_w": 0.7}],
        lr=0.1,
    )
    for group in optimizer.param_groups:
        group["lr"] *= 0.1
    strengths = [group["lambda_w"] for group in optimizer.param_groups]
    assert strengths == pytest.approx([0.01, 0.05, 0.7])


@pytest.mark.parametrize(
    ("ours", "theirs", "settings"),
    [
        (TRSGD, torch.optim.SGD, {"momentum": 0.9, "weight_decay": 0.1}),
        (TRAdam, torch.optim.Adam, {"weight_decay": 0.1, "eps": 1e-16}),
    ],
)
def test_large_tensors_are_stepped_in_pieces_alike(implementation, ours, theirs, settings):
    # A step works on a quarter of a million numbers at a time. The oracle gets the pull written out by hand.
    def tensors():
        torch.manual_seed(0)
        shapes = [(3,), (300_000,), (700, 600), (5, 2), (600_001,)]
        made = [torch.randn(shape, dtype=torch.float64) for shape in shapes]
        made[2] = made[2].T  # cannot be cut
        return [torch.nn.Parameter(tensor) for tensor in made]

    params, reference = tensors(), tensors()
    staged = ours(params, lr=0.01, lambda_w=0.002, inner_steps=3, **settings, **implementation)
    plain = theirs(reference, lr=0.01, **settings)
    for t in range(4):
        if t % 3 == 0:
            anchors = [param.detach().clone() for param in reference]
        plain.param_groups[0]["lr"] = 0.01 / (t % 3 + 1)
        for a, b, anchor in zip(params, reference, anchors, strict=True):
            a.grad = torch.sin(a.detach())
            b.grad = torch.sin(b.detach()) + 0.4 * (b.detach() - anchor)
        staged.step()
        plain.step()
    for a, b in zip(params, reference, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("optimizer_class", [TRSGD, TRAdam])
@pytest.mark.parametrize("interrupted_at", range(1, 6))
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_resume_is_exact_at_every_position_of_a_stage(optimizer_class, interrupted_at, dtype):
    # The authors' code fails this: it neither saves the position nor the strength.
    settings = {"lr": 0.05, "lambda_w": 0.02, "inner_steps": 4}
    params = parameters(dtype)
    optimizer = optimizer_class(params, **settings)
    run(optimizer, params, steps=interrupted_at)
    file = io.BytesIO()
    weights = [param.detach().clone() for param in params]
    torch.save((weights, optimizer.state_dict()), file)
    run(optimizer, params, steps=9, first=interrupted_at)

    file.seek(0)
    weights, state = torch.load(file, weights_only=True)
    resumed = [torch.nn.Parameter(weight) for weight in weights]
    second = optimizer_class(resumed, lr=0.4)
    second.load_state_dict(state)
    run(second, resumed, steps=9, first=interrupted_at)
    assert all(torch.equal(a, b) for a, b in zip(params, resumed, strict=True))


def test_a_parameter_that_joins_within_a_stage_is_not_pulled_to_zero(implementation):
    # The authors' class leaves its anchor at zero. Here it is where the parameter is at its first step.
    early, late = (torch.nn.Parameter(torch.tensor([5.0], dtype=torch.float64)) for _ in range(2))
    optimizer = TRSGD([early, late], lr=0.1, lambda_w=0.3, weight_decay=0.0, **implementation)
    early.grad = torch.zeros_like(early)
    optimizer.step()
    late.grad = torch.zeros_like(late)
    for _ in range(3):
        optimizer.step()
    assert late.item() == 5.0
    assert optimizer.state[late]["anchor"].item() == 5.0


def test_a_parameter_that_misses_the_start_of_a_stage_gets_a_new_anchor(implementation):
    params = [torch.nn.Parameter(torch.tensor([5.0], dtype=torch.float64)) for _ in range(2)]
    optimizer = TRSGD(params, lr=0.1, lambda_w=0.3, inner_steps=2, **implementation)
    for t in range(4):
        params[0].grad = torch.ones_like(params[0])
        params[1].grad = None if t == 2 else torch.ones_like(params[1])
        if t == 3:
            before = params[1].item()
        optimizer.step()
    assert optimizer.state[params[1]]["anchor"].item() == before


def test_reset_stage_forgets_the_anchor(implementation):
    # After weights were exchanged from outside the pull must not bring the old ones back.
    w = torch.nn.Parameter(torch.tensor([1.0], dtype=torch.float64))
    optimizer = TRSGD([w], lr=0.1, lambda_w=0.3, weight_decay=0.0, momentum=0.0, **implementation)
    for _ in range(3):
        w.grad = torch.zeros_like(w)
        optimizer.step()
    with torch.no_grad():
        w.fill_(9.0)
    optimizer.reset_stage()
    optimizer.step()
    optimizer.step()
    assert w.item() == 9.0
    assert optimizer.state[w]["anchor"].item() == 9.0
    assert optimizer.param_groups[0]["position"] == 2


def test_every_start_of_an_epoch_as_in_the_authors_code(implementation):
    # Five steps an epoch and stages of three: 1, ½, ⅓, 1, ½ and again from 1.
    factors = [1, 1 / 2, 1 / 3, 1, 1 / 2] * 2

    def start(optimizer, t):
        if t % 5 == 0:
            optimizer.reset_stage()

    settings = {"lr": 0.1, "weight_decay": 0.0}
    off = {"lambda_w": 0.0, "inner_steps": 3}
    ours, _ = descend(TRSGD, 10, each_step=start, **settings, **off, **implementation)

    def schedule(optimizer, t):
        optimizer.param_groups[0]["lr"] = 0.1 * factors[t]

    theirs, _ = descend(torch.optim.SGD, 10, each_step=schedule, momentum=0.9, **settings)
    assert ours == pytest.approx(theirs, abs=1e-14)


def test_maximize_ascends_on_the_loss_but_still_pulls():
    # −g in place of g, the pull and the decay as they are.
    results = []
    for sign, maximize in ((1, False), (-1, True)):
        params = parameters(torch.float64)
        optimizer = TRSGD(params, lr=0.05, lambda_w=0.02, weight_decay=0.1, maximize=maximize)
        for t in range(5):
            for param, grad in zip(params, gradients(params, t), strict=True):
                param.grad = sign * grad
            optimizer.step()
        results.append(params)
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize(
    "lr", [0.05, torch.tensor(0.05, dtype=torch.float64)], ids=["float", "tensor"]
)
def test_all_implementations_of_amsgrad_agree(lr):
    results = [
        trajectory(TRAdam, lr=lr, inner_steps=4, amsgrad=True, **switches)
        for switches in IMPLEMENTATIONS.values()
    ]
    for other in results[1:]:
        torch.testing.assert_close(other, results[0], rtol=1e-11, atol=1e-12)


def test_the_step_size_of_groups_is_never_touched():
    # Schedulers and monitors read it; within a stage it is divided on the way only.
    optimizer = TRSGD(params := parameters(), lr=0.05, inner_steps=4)
    run(optimizer, params, steps=3)
    assert optimizer.param_groups[0]["lr"] == 0.05
    assert optimizer.param_groups[0]["position"] == 3


def test_the_average_step_of_a_stage():
    # H₁₀/10 = 0.29290, the step size at which plain SGD is the control.
    gradient_of_one = [torch.nn.Parameter(torch.zeros((), dtype=torch.float64))]
    optimizer = TRSGD(gradient_of_one, lr=1.0, lambda_w=0.0, momentum=0.0, weight_decay=0.0)
    for _ in range(10):
        gradient_of_one[0].grad = torch.ones((), dtype=torch.float64)
        optimizer.step()
    assert -gradient_of_one[0].item() / 10 == pytest.approx(0.29290, abs=5e-6)


@pytest.mark.parametrize(
    ("optimizer_class", "kernel", "works"),
    [
        (TRSGD, "_fused_sgd_", fused_sgd_works),
        (TRAdam, "_fused_adam_", fused_adam_works),
    ],
)
@pytest.mark.parametrize("failure", ["none", "absent", "changed"])
def test_the_kernel_is_used_where_it_works(monkeypatch, optimizer_class, kernel, works, failure):
    calls, original = [], getattr(torch, kernel)
    if failure == "none":
        monkeypatch.setattr(torch, kernel, lambda *a, **k: (calls.append(1), original(*a, **k)))
    elif failure == "absent":
        monkeypatch.delattr(torch, kernel)
    else:  # same name, other meaning
        monkeypatch.setattr(torch, kernel, lambda params, *a, **k: params[0].zero_())
    works.cache_clear()
    try:
        automatic, foreach = parameters(), parameters()
        run(optimizer_class(automatic, inner_steps=3), automatic, steps=5)
        run(optimizer_class(foreach, inner_steps=3, foreach=True), foreach, steps=5)
        assert bool(calls) == (failure == "none")
        if failure != "none":
            assert all(torch.equal(a, b) for a, b in zip(automatic, foreach, strict=True))
            with pytest.warns(NoEffectWarning, match="kernel is not available"):
                run(optimizer_class(params := parameters(), fused=True), params, steps=1)
    finally:
        works.cache_clear()


@pytest.mark.parametrize(
    ("optimizer_class", "settings", "message"),
    [
        (TRSGD, {"lr": -0.1}, r"Expected `lr` to be a number ≥ 0, got -0\.1\."),
        (TRSGD, {"lr": torch.ones(2)}, r"Expected `lr` to be a tensor of one element"),
        (TRSGD, {"lambda_w": -1.0}, r"Expected `lambda_w` to be a number ≥ 0, got -1\.0\."),
        (TRSGD, {"inner_steps": 0}, r"Expected `inner_steps` to be an integer ≥ 1, got 0\."),
        (TRSGD, {"inner_steps": 2.5}, r"Expected `inner_steps` to be an integer ≥ 1, got 2\.5\."),
        (TRSGD, {"inner_lr_decay": "linear"}, r"`inner_lr_decay` to be one of harmonic, none"),
        (TRSGD, {"momentum": 1.0}, r"Expected `momentum` to be in \[0, 1\), got 1\.0\."),
        (TRSGD, {"weight_decay": -1.0}, r"Expected `weight_decay` to be a number ≥ 0"),
        (TRAdam, {"betas": (0.9, 1.0)}, r"Expected `betas` to be two numbers in \[0, 1\)"),
        (TRAdam, {"eps": -1.0}, r"Expected `eps` to be a number ≥ 0, got -1\.0\."),
        (TRAdam, {"foreach": True, "fused": True}, r"Expected `foreach` to be None or False"),
    ],
)
def test_bad_settings_are_refused_in_one_sentence(optimizer_class, settings, message):
    with pytest.raises(ValueError, match=message):
        optimizer_class([torch.nn.Parameter(torch.ones(1))], **settings)


def test_a_pull_without_effect_is_named():
    with pytest.warns(NoEffectWarning, match="stages of one step"):
        TRSGD([torch.nn.Parameter(torch.ones(1))], inner_steps=1, lambda_w=0.1)


def test_defaults_are_the_authors():
    w = torch.nn.Parameter(torch.ones(1))
    sgd, adam = TRSGD([w]).param_groups[0], TRAdam([w]).param_groups[0]
    assert (sgd["lr"], sgd["inner_steps"], sgd["momentum"], sgd["weight_decay"]) == (
        0.1,
        10,
        0.9,
        1e-4,
    )
    assert np.allclose((sgd["lambda_w"], adam["lambda_w"]), (0.01, 1e-4), rtol=1e-12)
    assert (adam["lr"], adam["betas"], adam["eps"]) == (1e-3, (0.9, 0.999), 1e-8)
    assert not hasattr(TRSGD([w]), "_step_supports_amp_scaling")
