"""MaSS against the paper: its own recursions, hand-computed steps, and the methods it contains."""

from __future__ import annotations

import copy
import math

import numpy as np
import pytest
import torch
from pytorch_optimizer import AccSGD

from lightning_sgd import MaSS, NoEffectWarning, OutsideIntendedUseWarning, mass_hyperparameters
from lightning_sgd.functional.optim.mass import fused_mass_works, mass_coefficients

IMPLEMENTATIONS = {
    "for-loop": {"foreach": False, "fused": False},
    "foreach": {"foreach": True},
    "fused": {"fused": True},
}


@pytest.fixture(params=IMPLEMENTATIONS, name="implementation")
def _implementation(request):
    return IMPLEMENTATIONS[request.param]


class NoisyLeastSquares:
    """One random row per step: the same sequence of gradients for everybody who asks at the same points."""

    def __init__(self, dim=5, seed=0):
        random = np.random.default_rng(seed)
        self.rows = random.standard_normal((400, dim))
        self.targets = self.rows @ random.standard_normal(dim)
        self.dim = dim

    def gradient(self, u, t):
        row = self.rows[t]
        return row * (row @ u - self.targets[t])

    def iterate(self, make_optimizer, steps=200, before_step=None):
        """Trajectory of u under a torch optimizer, in float64."""
        u = torch.nn.Parameter(torch.zeros(self.dim, dtype=torch.float64))
        optimizer = make_optimizer([u])
        trajectory = []
        for t in range(steps):
            if before_step is not None:
                before_step(optimizer, t)
            u.grad = torch.from_numpy(self.gradient(u.detach().numpy(), t))
            optimizer.step()
            trajectory.append(u.detach().numpy().copy())
        return np.stack(trajectory)


def form_a(problem, lr, gamma, eta2, steps=200):
    """The paper's two sequences, as printed."""
    u = w = np.zeros(problem.dim)
    trajectory = []
    for t in range(steps):
        gradient = problem.gradient(u, t)
        new_w = u - lr * gradient
        u = (1 + gamma) * new_w - gamma * w + eta2 * gradient
        w = new_w
        trajectory.append(u)
    return np.stack(trajectory)


def form_b(problem, lr, alpha, kappa_tilde, steps=200):
    """The three sequences of the authors' code."""
    delta = lr / (alpha * kappa_tilde)
    u = v = np.zeros(problem.dim)
    trajectory = []
    for t in range(steps):
        gradient = problem.gradient(u, t)
        w = u - lr * gradient
        v = (1 - alpha) * v + alpha * u - delta * gradient
        u = (alpha * v + w) / (1 + alpha)
        trajectory.append(u)
    return np.stack(trajectory)


@pytest.mark.parametrize(
    ("alpha", "kappa_tilde"), [(0.05, 2.0), (0.05, 12.0), (0.3, 1.5), (0.5, 2)]
)
def test_equals_both_forms_of_the_paper(implementation, alpha, kappa_tilde):
    problem, lr = NoisyLeastSquares(), 0.02
    ours = problem.iterate(
        lambda params: MaSS(params, lr=lr, alpha=alpha, kappa_tilde=kappa_tilde, **implementation)
    )
    gamma = (1 - alpha) / (1 + alpha)
    eta2 = lr * (1 - 1 / kappa_tilde) / (1 + alpha)
    scale = np.abs(ours).max()
    np.testing.assert_allclose(ours, form_a(problem, lr, gamma, eta2), atol=1e-12 * scale)
    np.testing.assert_allclose(ours, form_b(problem, lr, alpha, kappa_tilde), atol=1e-12 * scale)


@pytest.mark.parametrize(("gamma", "eta2"), [(0.5, 0.004), (0.9, 0.0), (0.0, 0.0)])
def test_equals_the_paper_when_given_gamma_and_eta2(implementation, gamma, eta2):
    problem, lr = NoisyLeastSquares(), 0.02
    if gamma == 0 and implementation.get("fused"):
        implementation = {}  # torch's kernel has no buffer without momentum; tested below
    ours = problem.iterate(
        lambda params: MaSS(params, lr=lr, gamma=gamma, eta2=eta2, **implementation)
    )
    np.testing.assert_allclose(ours, form_a(problem, lr, gamma, eta2), atol=1e-12)


def test_hand_computed_steps(implementation):
    # f(u) = u², u0 = w0 = 1, η1 = 0.1, γ = 0.5, η2 = 0.02:
    #   g = 2       w = 1 − 0.2 = 0.8            u = 1.5·0.8 − 0.5·1 + 0.04         = 0.74
    #   g = 1.48    w = 0.74 − 0.148 = 0.592     u = 1.5·0.592 − 0.5·0.8 + 0.0296    = 0.5176
    #   g = 1.0352  w = 0.5176 − 0.10352         u = 1.5·0.41408 − 0.5·0.592 + 0.020704 = 0.345824
    u = torch.nn.Parameter(torch.tensor(1.0, dtype=torch.float64))
    optimizer = MaSS([u], lr=0.1, gamma=0.5, eta2=0.02, **implementation)
    for w_expected, u_expected in [(0.8, 0.74), (0.592, 0.5176), (0.41408, 0.345824)]:
        optimizer.zero_grad()
        (u**2).backward()
        optimizer.step()
        assert u.item() == pytest.approx(u_expected, abs=1e-14)
        before = u.item()
        with optimizer.swap_to_w():
            assert u.item() == pytest.approx(w_expected, abs=1e-14)
        assert u.item() == before


def test_compensation_without_momentum_is_a_smaller_step():
    # γ = 0 leaves u − (η1 − η2)·g: legal, but only a detour to SGD, hence the warning.
    problem = NoisyLeastSquares()
    with pytest.warns(OutsideIntendedUseWarning, match="slower than plain SGD"):
        ours = problem.iterate(lambda params: MaSS(params, lr=0.02, gamma=0.0, eta2=0.005))
    theirs = problem.iterate(lambda params: torch.optim.SGD(params, lr=0.015))
    np.testing.assert_allclose(ours, theirs, atol=1e-13)


def test_coefficients_of_the_documented_settings():
    two, twelve = mass_coefficients(0.05, 2.0), mass_coefficients(0.05, 12.0)
    assert (two.gamma, two.ratio) == pytest.approx((0.9047619, 0.4761905), abs=5e-8)
    assert two.gain * two.scale == pytest.approx(0.4285714, abs=5e-8)
    assert twelve.ratio == pytest.approx(0.8730159, abs=5e-8)
    assert twelve.gain * twelve.scale == pytest.approx(0.0317460, abs=5e-8)


def _step_decay(optimizer, t):
    optimizer.param_groups[0]["lr"] = 0.02 if t < 50 else 0.005


@pytest.mark.parametrize("alpha", [0.05, 0.5])
def test_without_compensation_it_is_nesterov_sgd_also_under_a_schedule(implementation, alpha):
    problem, gamma = NoisyLeastSquares(), (1 - alpha) / (1 + alpha)
    ours = problem.iterate(
        lambda params: MaSS(params, lr=0.02, alpha=alpha, kappa_tilde=1.0, **implementation),
        before_step=_step_decay,
    )
    theirs = problem.iterate(
        lambda params: torch.optim.SGD(params, lr=0.02, momentum=gamma, nesterov=True),
        before_step=_step_decay,
    )
    np.testing.assert_allclose(ours, theirs, atol=1e-13)


@pytest.mark.parametrize("alpha", [0.05, 0.3, 0.7])
def test_with_kappa_tilde_one_over_alpha_it_is_sgd(implementation, alpha):
    problem = NoisyLeastSquares()
    ours = problem.iterate(
        lambda params: MaSS(params, lr=0.02, alpha=alpha, kappa_tilde=1 / alpha, **implementation)
    )
    theirs = problem.iterate(lambda params: torch.optim.SGD(params, lr=0.02))
    np.testing.assert_allclose(ours, theirs, atol=1e-13)


@pytest.mark.parametrize(
    ("kappa", "xi", "small_const"), [(1000.0, 10.0, 0.7), (50.0, 3.0, 0.7), (40.0, 4.0, 1.0)]
)
def test_equals_accsgd_under_its_dictionary(kappa, xi, small_const):
    problem, lr = NoisyLeastSquares(), 0.01
    beta = small_const**2 * xi / kappa
    zeta = small_const / (small_const + beta)
    gamma = (1 - beta) * zeta
    eta2 = lr * ((1 - beta * zeta) - (1 - zeta) * small_const * xi)
    ours = problem.iterate(lambda params: MaSS(params, lr=lr, gamma=gamma, eta2=eta2))
    theirs = problem.iterate(
        lambda params: AccSGD(params, lr=lr, kappa=kappa, xi=xi, constant=small_const)
    )
    np.testing.assert_allclose(ours, theirs, atol=1e-12)


def test_equals_agnes_under_its_dictionary():
    # AGNES: x' = x + a·v; x ← x' − η·g(x'); v ← ρ(v − g).  MaSS: γ = ρ, η2 = ρ(η − a).
    problem, eta, a, rho = NoisyLeastSquares(), 0.02, 0.012, 0.8
    x, v = np.zeros(problem.dim), np.zeros(problem.dim)
    points = []
    for t in range(200):
        ahead = x + a * v
        gradient = problem.gradient(ahead, t)
        x, v = ahead - eta * gradient, rho * (v - gradient)
        points.append(x + a * v)
    ours = problem.iterate(lambda params: MaSS(params, lr=eta, gamma=rho, eta2=rho * (eta - a)))
    np.testing.assert_allclose(ours, np.stack(points), atol=1e-12)


def second_moment_radius(nodes, weights, **settings):
    """Spectral radius of E[M ⊗ M], where M is what one step of the optimizer does to (u, buffer)."""
    second_moment = np.zeros((4, 4))
    for curvature, weight in zip(nodes, weights, strict=True):
        u = torch.nn.Parameter(torch.tensor([1.0, 0.0], dtype=torch.float64))
        optimizer = MaSS([u], **settings)
        buffer = torch.tensor([0.0, 1.0], dtype=torch.float64)
        optimizer.state[u]["momentum_buffer"] = buffer
        u.grad = curvature * u.detach()
        optimizer.step()
        M = np.stack([u.detach().numpy(), buffer.numpy()])
        second_moment += weight * np.kron(M, M)
    return max(abs(np.linalg.eigvals(second_moment)))


def component_decoupled_radius(sigma_squares, **settings):
    """Worst coordinate of: x = σ_i·z·e_i with probability ½, z ~ N(0, 2)."""
    # Gauss–Hermite integrates polynomials of z against N(0, 2) exactly after z = 2t.
    t, weights = np.polynomial.hermite.hermgauss(8)
    weights = np.append(weights / math.sqrt(math.pi) / 2, 0.5)
    return max(
        second_moment_radius(np.append(s * (2 * t) ** 2, 0.0), weights, **settings)
        for s in sigma_squares
    )


SIGMA_SQUARES = (1.0, 2.0**-9)


@pytest.mark.parametrize(
    ("gamma", "radius"),
    [(0.0, 0.99934959), (0.5, 0.99870), (0.6, 1.03070), (0.9, 1.37699), (0.99, 1.50725)],
)
def test_nesterov_diverges_where_sgd_converges(gamma, radius):
    # At SGD's own step size 1/6: the paper's non-acceleration result, as exact rates.
    ours = component_decoupled_radius(SIGMA_SQUARES, lr=1 / 6, gamma=gamma, eta2=0.0)
    assert ours == pytest.approx(radius, abs=6e-6)


def test_closed_form_rate_of_the_component_decoupled_problem():
    best = mass_hyperparameters(L=1.0, L1=6.0, mu=2.0**-9, kappa_tilde=6.0, batch_size=1)
    assert (best.eta1, best.eta2, best.gamma) == pytest.approx(
        (1 / 6, 0.13787336, 0.98537632), abs=5e-9
    )
    radius = component_decoupled_radius(
        SIGMA_SQUARES, lr=best.eta1, gamma=best.gamma, eta2=best.eta2
    )
    assert radius == pytest.approx(0.98812730, abs=1e-6)
    assert best.rate == pytest.approx(0.99263430, abs=1e-6)
    assert radius < best.rate < 0.99934959


def trajectories(steps, num=64, sigma_squares=(1.0, 1.0 / 512), **settings):
    """‖w‖² of independent runs on the component-decoupled problem, all in one parameter."""
    generator = torch.Generator().manual_seed(0)
    u = torch.nn.Parameter(torch.ones(num, 2, dtype=torch.float64))
    optimizer = MaSS([u], **settings)
    sigmas = torch.tensor(sigma_squares, dtype=torch.float64)
    for _ in range(steps):
        z = math.sqrt(2) * torch.randn(num, 1, generator=generator, dtype=torch.float64)
        first = torch.rand(num, 1, generator=generator, dtype=torch.float64) < 0.5
        active = torch.cat([first, ~first], dim=1)
        u.grad = active * sigmas * z**2 * u.detach()
        optimizer.step()
    return u.detach().square().sum(dim=1).median().item()


@pytest.mark.slow
def test_typical_paths_at_condition_number_512():
    # Medians over 64 runs: Nesterov explodes (1.2e2 at 100, 1.5e16 at 500 steps), SGD crawls (0.52 at 1000),
    # MaSS converges (9e-6 at 1000). The random numbers differ from the source's, hence orders of magnitude.
    nesterov = {"lr": 1 / 6, "gamma": 0.99, "eta2": 0.0}
    assert 1e1 < trajectories(100, **nesterov) < 1e4
    assert 1e13 < trajectories(500, **nesterov) < 1e19
    sgd = {"lr": 1 / 6, "gamma": 0.0, "eta2": 0.0}
    assert trajectories(1000, **sgd) == pytest.approx(0.52, abs=0.05)
    assert trajectories(2000, **sgd) == pytest.approx(0.27, abs=0.05)
    best = mass_hyperparameters(L=1.0, L1=6.0, mu=1.0 / 512, kappa_tilde=6.0, batch_size=1)
    mass = {"lr": best.eta1, "gamma": best.gamma, "eta2": best.eta2}
    assert 1e-7 < trajectories(1000, **mass) < 1e-3
    assert trajectories(2000, **mass) < 1e-9


def test_asymptotic_step_for_a_constant_gradient(implementation):
    # The effective step tends to lr·(1 + 1/(ακ̃))/2: 5.5·lr for α = 0.05, κ̃ = 2.
    u = torch.nn.Parameter(torch.zeros((), dtype=torch.float64))
    optimizer = MaSS([u], lr=0.1, alpha=0.05, kappa_tilde=2.0, **implementation)
    for _ in range(600):
        before = u.item()
        u.grad = torch.ones_like(u)
        optimizer.step()
    assert before - u.item() == pytest.approx(0.55, abs=1e-12)


def test_coupled_decay_enters_the_gradient_and_decoupled_does_not(implementation):
    # One step from u = 2, g = 1, λ = 0.5, η1 = 0.1, γ = 0.5, r = 0.2 (c = 0.3).
    # Coupled: g = 1 + 0.5·2 = 2, u = 2 − 0.1·(2 + 0.6) = 1.74.
    # Decoupled: u = 2·(1 − 0.05) − 0.1·(1 + 0.3) = 1.77.
    for decoupled, expected in [(False, 1.74), (True, 1.77)]:
        u = torch.nn.Parameter(torch.tensor(2.0, dtype=torch.float64))
        optimizer = MaSS(
            [u],
            lr=0.1,
            gamma=0.5,
            eta2=0.02,
            weight_decay=0.5,
            decoupled_weight_decay=decoupled,
            **implementation,
        )
        u.grad = torch.ones_like(u)
        optimizer.step()
        assert u.item() == pytest.approx(expected, abs=1e-14)


def test_maximize_is_minimising_the_negative(implementation):
    problem = NoisyLeastSquares()
    settings = {"lr": 0.02, "weight_decay": 0.1, **implementation}
    descent = problem.iterate(lambda params: MaSS(params, **settings))
    problem.rows, gradient = problem.rows, problem.gradient
    problem.gradient = lambda u, t: -gradient(u, t)
    ascent = problem.iterate(lambda params: MaSS(params, maximize=True, **settings))
    np.testing.assert_array_equal(descent, ascent)


def test_restart_forgets_the_momentum_exactly_at_a_drop():
    problem = NoisyLeastSquares()
    with_restart = problem.iterate(
        lambda params: MaSS(params, lr=0.02, restart_on_lr_drop=True), before_step=_step_decay
    )
    without = problem.iterate(lambda params: MaSS(params, lr=0.02), before_step=_step_decay)
    np.testing.assert_array_equal(with_restart[:50], without[:50])

    # From the drop on, a fresh optimizer that starts at the same point does the same.
    u = torch.nn.Parameter(torch.from_numpy(with_restart[49].copy()))
    fresh = MaSS([u], lr=0.005)
    for t in range(50, 200):
        u.grad = torch.from_numpy(problem.gradient(u.detach().numpy(), t))
        fresh.step()
        np.testing.assert_array_equal(u.detach().numpy(), with_restart[t])


def test_a_rising_step_size_does_not_restart():
    u = torch.nn.Parameter(torch.ones(3))
    optimizer = MaSS([u], lr=0.1, restart_on_lr_drop=True)
    u.grad = torch.ones(3)
    optimizer.step()
    optimizer.param_groups[0]["lr"] = 0.2
    buffer = optimizer.state[u]["momentum_buffer"].clone()
    optimizer.step()
    gamma = mass_coefficients(0.05, 2.0).gamma
    gain = mass_coefficients(0.05, 2.0).gain
    torch.testing.assert_close(optimizer.state[u]["momentum_buffer"], gamma * buffer + gain)


def test_from_spectrum_passes_the_optimum_on():
    u = torch.nn.Parameter(torch.zeros(2))
    optimizer = MaSS.from_spectrum(
        [u], L=1.0, L1=6.0, mu=0.01, kappa_tilde=6.0, batch_size=3, weight_decay=0.1
    )
    # By hand: L_m = 2 + 2/3 = 8/3, κ̃_m = 2 + 2/3, κ_m = 800/3, α = 1/√(800/3·8/3) = 3/80.
    group = optimizer.param_groups[0]
    assert group["lr"] == pytest.approx(3 / 8)
    assert group["alpha"] == pytest.approx(3 / 80)
    assert group["kappa_tilde"] == pytest.approx(8 / 3)
    assert group["weight_decay"] == 0.1


def test_swap_to_w_gives_the_parameters_back_after_an_exception():
    u = torch.nn.Parameter(torch.ones(3))
    optimizer = MaSS([u], lr=0.1)
    u.grad = torch.ones(3)
    optimizer.step()
    before = u.detach().clone()
    with pytest.raises(RuntimeError, match="evaluation failed"), optimizer.swap_to_w():
        assert not torch.equal(u, before)
        raise RuntimeError("evaluation failed")
    assert torch.equal(u, before)


def test_differentiable_steps_have_the_right_derivative():
    # Meta-learning needs d(final parameter)/d(gradient): compared with finite differences.
    def final(gradient):
        u = torch.nn.Parameter(torch.ones(3, dtype=torch.float64))
        u = u.clone()
        optimizer = MaSS([u], lr=0.1, weight_decay=0.3, differentiable=True)
        for _ in range(3):
            u.grad = gradient
            optimizer.step()
        return u

    start = torch.tensor([0.3, -1.0, 2.0], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(final, (start,))


def test_fused_kernel_is_used_where_it_works(monkeypatch):
    # A silent fall-back would cost users a factor of two.
    calls = []
    kernel = torch._fused_sgd_
    monkeypatch.setattr(torch, "_fused_sgd_", lambda *a, **k: (calls.append(1), kernel(*a, **k)))
    u = torch.nn.Parameter(torch.ones(3))
    u.grad = torch.ones(3)
    MaSS([u]).step()
    assert calls


@pytest.mark.parametrize("failure", ["absent", "changed"])
def test_falls_back_when_torch_takes_the_kernel_away(monkeypatch, failure):
    if failure == "absent":
        monkeypatch.delattr(torch, "_fused_sgd_")
    else:  # same name, other meaning
        monkeypatch.setattr(torch, "_fused_sgd_", lambda params, *a, **k: params[0].zero_())
    fused_mass_works.cache_clear()
    try:
        problem = NoisyLeastSquares()
        automatic = problem.iterate(lambda params: MaSS(params, lr=0.02), steps=20)
        loop = problem.iterate(lambda params: MaSS(params, lr=0.02, foreach=False), steps=20)
        np.testing.assert_array_equal(automatic, loop)
        with pytest.warns(NoEffectWarning, match="kernel is not available"):
            problem.iterate(lambda params: MaSS(params, lr=0.02, fused=True), steps=1)
    finally:
        fused_mass_works.cache_clear()


def test_param_groups_may_name_their_own_steps():
    one, two = torch.nn.Parameter(torch.ones(1)), torch.nn.Parameter(torch.ones(1))
    optimizer = MaSS(
        [{"params": [one]}, {"params": [two], "gamma": 0.5, "eta2": 0.02, "lr": 0.1}], lr=0.3
    )
    one.grad, two.grad = torch.full((1,), 2.0), torch.full((1,), 2.0)
    optimizer.step()
    assert two.item() == pytest.approx(0.74)
    assert copy.deepcopy(optimizer).param_groups[1]["alpha"] == pytest.approx(1 / 3)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"lr": -0.1}, r"Expected `lr` to be a number ≥ 0, got -0\.1\."),
        ({"lr": float("nan")}, r"Expected `lr` to be a number ≥ 0, got nan\."),
        ({"lr": torch.ones(2)}, r"Expected `lr` to be a tensor of one element"),
        (
            {"lr": torch.tensor(0.1), "restart_on_lr_drop": True},
            r"Expected `lr` to be a float when",
        ),
        ({"alpha": 0.0}, r"Expected `alpha` to be in \(0, 1\], got 0\.0\."),
        ({"alpha": 1.5}, r"Expected `alpha` to be in \(0, 1\], got 1\.5\."),
        ({"kappa_tilde": 0.5}, r"Expected `kappa_tilde` to be at least 1, got 0\.5\."),
        ({"weight_decay": -1.0}, r"Expected `weight_decay` to be a number ≥ 0, got -1\.0\."),
        ({"gamma": 0.9}, r"Expected `eta2` to be given together with `gamma`, got None\."),
        ({"eta2": 0.1}, r"Expected `gamma` to be given together with `eta2`, got None\."),
        ({"gamma": 1.0, "eta2": 0.0}, r"Expected `gamma` to be in \[0, 1\), got 1\.0\."),
        ({"gamma": 0.5, "eta2": 0.2}, r"Expected `eta2` to be in .* got 0\.2\."),
        ({"foreach": True, "fused": True}, r"Expected `foreach` to be None or False"),
    ],
)
def test_bad_settings_are_refused_in_one_sentence(settings, message):
    with pytest.raises(ValueError, match=message):
        MaSS([torch.nn.Parameter(torch.ones(1))], **settings)


@pytest.mark.parametrize(
    ("settings", "category"),
    [
        ({"decoupled_weight_decay": True}, NoEffectWarning),
        ({"gamma": 0.5, "eta2": 0.01, "alpha": 0.1}, NoEffectWarning),
        ({"differentiable": True, "foreach": True}, NoEffectWarning),
        ({"kappa_tilde": 21.0}, OutsideIntendedUseWarning),
    ],
)
def test_settings_that_do_nothing_or_harm_are_named(settings, category):
    with pytest.warns(category):
        MaSS([torch.nn.Parameter(torch.ones(1))], **settings)


def test_fused_without_momentum_says_that_it_is_not_used():
    u = torch.nn.Parameter(torch.ones(1))
    u.grad = torch.ones(1)
    with pytest.warns(NoEffectWarning, match="not made for γ = 0"):
        MaSS([u], gamma=0.0, eta2=0.0, fused=True).step()
