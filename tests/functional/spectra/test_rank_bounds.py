"""Bounds on the rank, against the ranks that NumPy finds in networks trained by torch."""

from __future__ import annotations

import copy
import math

import numpy as np
import pytest
import torch

from lightning_sgd import MaSS
from lightning_sgd.functional.optim.mass import mass_coefficients
from lightning_sgd.functional.spectra.rank_bounds import (
    Transfer,
    Window,
    asymptotic_rank_bound,
    gradient_rank_bound,
    sgd_transfer,
    stationarity_gap,
    trajectory_rank_bound,
    trajectory_tails,
)

WIDTH = 40


def rank(matrix):
    return int(np.linalg.matrix_rank(matrix.detach().numpy()))


def norm(matrix):
    return float(np.linalg.norm(matrix.detach().numpy()))


def network(batch_norm=False):
    torch.manual_seed(0)
    layers = [torch.nn.Linear(WIDTH, WIDTH), torch.nn.BatchNorm1d(WIDTH)][: 1 + batch_norm]
    return torch.nn.Sequential(*layers, torch.nn.Tanh(), torch.nn.Linear(WIDTH, 3)).double()


def train(net, optimizer, steps, batch_size, seed=0, schedule=None, scale=1.0):
    generator = torch.Generator().manual_seed(seed)
    for t in range(steps):
        if schedule is not None:
            optimizer.param_groups[0]["lr"] = schedule(t)
        x = torch.randn(batch_size, WIDTH, generator=generator, dtype=torch.float64)
        y = torch.randint(3, (batch_size,), generator=generator)
        optimizer.zero_grad()
        (scale * torch.nn.functional.cross_entropy(net(x), y)).backward()
        optimizer.step()


def buffer(optimizer, weight):
    state = optimizer.state[weight].get("momentum_buffer")
    return torch.zeros_like(weight) if state is None else state.clone()


@pytest.mark.parametrize("batch_size", [2, 4, 8])
def test_gradient_of_a_linear_layer(batch_size):
    for batch_norm in (False, True):
        net = network(batch_norm)
        torch.nn.functional.cross_entropy(
            net(torch.randn(batch_size, WIDTH).double()), torch.arange(batch_size) % 3
        ).backward()
        bound = gradient_rank_bound((WIDTH, WIDTH), batch_size, batch_norm_follows=batch_norm)
        assert rank(net[0].weight.grad) == bound == batch_size - batch_norm


@pytest.mark.parametrize(("images", "batch_norm", "expected"), [(2, False, 8), (3, True, 11)])
def test_gradient_of_a_convolution(images, batch_norm, expected):
    # Four positions that do not overlap: 2 images give rank 8 of 27; with BatchNorm 3 images give 3·4 − 1.
    torch.manual_seed(0)
    conv = torch.nn.Conv2d(3, 64, kernel_size=3, stride=3).double()
    after = torch.nn.BatchNorm2d(64).double() if batch_norm else torch.nn.Identity()
    out = after(conv(torch.randn(images, 3, 6, 6, dtype=torch.float64)))
    (out * torch.randn_like(out)).sum().backward()
    matrix = conv.weight.grad.flatten(1)
    bound = gradient_rank_bound(tuple(matrix.shape), images, 4, batch_norm)
    assert rank(matrix) == bound == expected


OPTIMIZERS = {
    "plain": lambda p: torch.optim.SGD(p, lr=0.1, weight_decay=0.05),
    "momentum": lambda p: torch.optim.SGD(p, lr=0.1, weight_decay=0.05, momentum=0.9),
    "dampened": lambda p: torch.optim.SGD(
        p, lr=0.1, weight_decay=0.05, momentum=0.9, dampening=0.5
    ),
    "nesterov": lambda p: torch.optim.SGD(
        p, lr=0.1, weight_decay=0.05, momentum=0.9, nesterov=True
    ),
    "mass": lambda p: MaSS(p, lr=0.1, weight_decay=0.05),
    "mass-decoupled": lambda p: MaSS(p, lr=0.1, weight_decay=0.05, decoupled_weight_decay=True),
}


def transfer_of(group):
    if "alpha" in group:
        coefficients = mass_coefficients(group["alpha"], group["kappa_tilde"])
        return sgd_transfer(
            group["lr"],
            group["weight_decay"],
            coefficients.scale,
            1 - coefficients.gain,
            nesterov=True,
            decoupled=group["decoupled_weight_decay"],
        )
    names = ("lr", "weight_decay", "momentum", "dampening", "nesterov")
    return sgd_transfer(**{name: group[name] for name in names})


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize(("steps", "batch_size"), [(5, 2), (6, 2)])
def test_steps_add_no_more_rank_than_their_samples(name, steps, batch_size):
    # The first steps are left out: torch starts its momentum buffer without dampening.
    net = network()
    optimizer = OPTIMIZERS[name](net.parameters())
    train(net, optimizer, 3, batch_size)
    weight = net[0].weight
    before, buffer_before = weight.detach().clone(), buffer(optimizer, weight)
    rates = [0.1 / (1 + t) for t in range(steps)]
    train(net, optimizer, steps, batch_size, seed=1, schedule=lambda t: rates[t])
    total = Transfer()
    for lr in rates:
        total = transfer_of({**optimizer.param_groups[0], "lr": lr}).after(total)
    added = weight - total.ww * before - total.wv * buffer_before
    assert rank(added) == steps * batch_size
    assert rank(weight) == WIDTH


def test_batch_norm_takes_one_from_every_step():
    net = network(batch_norm=True)
    optimizer = OPTIMIZERS["plain"](net.parameters())
    before = net[0].weight.detach().clone()
    train(net, optimizer, 7, 5)
    total = math.prod([transfer_of(optimizer.param_groups[0]).ww] * 7)
    assert rank(net[0].weight - total * before) == 7 * (5 - 1)


@pytest.mark.parametrize("steps", [0, 50, 299])
@pytest.mark.parametrize("norm_of", ["fro", "spectral"])
def test_stationarity_gap_bounds_the_tail_of_the_spectrum(steps, norm_of):
    decay, batch_size = 0.05, 4
    net = network()
    train(net, OPTIMIZERS["plain"](net.parameters()), steps, batch_size)
    x = torch.randn(batch_size, WIDTH, dtype=torch.float64)
    net.zero_grad()
    torch.nn.functional.cross_entropy(net(x), torch.arange(batch_size) % 3).backward()
    weight = net[0].weight.detach()
    gap = float(stationarity_gap(weight, net[0].weight.grad, decay, norm_of))
    sigma = np.linalg.svd(weight.numpy(), compute_uv=False) / np.linalg.norm(weight.numpy())
    tail = sigma[batch_size:]
    assert (tail[0] if norm_of == "spectral" else np.linalg.norm(tail)) <= gap
    by_hand = np.linalg.norm(
        net[0].weight.grad.numpy() + decay * weight.numpy(),
        ord=2 if norm_of == "spectral" else None,
    )
    assert gap == pytest.approx(by_hand / (decay * np.linalg.norm(weight.numpy())), rel=1e-10)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_trajectory_bound_is_never_violated(name):
    net = network()
    optimizer = OPTIMIZERS[name](net.parameters())
    optimizer.param_groups[0]["weight_decay"] = 2.0
    weight, batch_size, windows = net[0].weight, 1, []
    train(net, optimizer, 2, batch_size)
    for look in range(15):
        norms = (norm(weight), norm(buffer(optimizer, weight)))
        total = Transfer()
        for _ in range(2):
            total = transfer_of(optimizer.param_groups[0]).after(total)
        train(net, optimizer, 2, batch_size, seed=look, scale=30.0)
        windows.append(Window(2 * batch_size, total, *norms))
        tails = trajectory_tails(windows, norm(weight))
        sigma = np.linalg.svd(weight.detach().numpy(), compute_uv=False)
        sigma = np.append(sigma / np.linalg.norm(sigma), 0.0)
        assert [k for k, _ in tails] == [2 * (i + 1) for i in range(look + 1)]
        for k, tail in tails:
            assert sigma[min(k, WIDTH)] <= tail * (1 + 1e-12)
    # With this much decay, and a loss that keeps the norm up against it, the bound says something.
    if name == "plain":
        bound = trajectory_rank_bound(tails, eps=0.3)
        assert bound < WIDTH
        assert (sigma > 0.3).sum() <= bound


def test_the_papers_form_can_be_violated_while_the_norm_falls():
    # Weights that only shrink keep their rank for ever, whatever the formula for large times says.
    weight = torch.eye(300).double()
    bound = asymptotic_rank_bound(1, lr=0.5, weight_decay=0.1, eps=0.01)
    windows = [Window(1, sgd_transfer(0.5, 0.1), norm(weight) * 0.95**t) for t in range(300)]
    shrunk = weight * 0.95**300
    assert int((torch.linalg.svdvals(shrunk) > 0.01 * norm(shrunk)).sum()) == 300 > bound
    tails = trajectory_tails(windows, norm(shrunk))
    assert all(tail == pytest.approx(1.0) for _, tail in tails)
    assert trajectory_rank_bound(tails, eps=0.5) is None


def test_transfers_compose_like_matrices():
    a, b = Transfer(0.9, -0.1, 0.2, 0.8), Transfer(0.5, 0.3, -0.7, 0.1)
    product = np.array(a).reshape(2, 2) @ np.array(b).reshape(2, 2)
    np.testing.assert_allclose(np.array(a.after(b)).reshape(2, 2), product)


def test_numbers_without_a_bound_are_refused():
    with pytest.raises(ValueError, match=r"Expected `weight_decay` to be positive, got 0\.0"):
        stationarity_gap(torch.eye(2), torch.eye(2), 0.0)
    with pytest.raises(ValueError, match=r"Expected `lr \* weight_decay` to be positive"):
        asymptotic_rank_bound(1, lr=0.1, weight_decay=0.0, eps=0.1)


def test_a_zero_matrix_has_no_tail():
    assert trajectory_tails([Window(1, Transfer(), 1.0)], weight_norm=0.0) == [(1, 0.0)]


def test_windows_are_left_as_they_are():
    windows = [Window(1, Transfer(), 1.0)]
    before = copy.deepcopy(windows)
    trajectory_tails(windows, 1.0)
    assert windows == before
