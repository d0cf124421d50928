"""What users give to optimizers besides parameters: types of arguments, states of elsewhere, converted modules."""

from __future__ import annotations

import copy
import warnings

import numpy as np
import pytest
import torch
from support.parameters import gradients, parameters, run, snapshot

import lightning_sgd
from lightning_sgd import NoEffectWarning
from lightning_sgd.catalogue import plugins

PEERS = {
    "MaSS": lambda params: torch.optim.SGD(params, lr=0.1, momentum=0.9, nesterov=True),
    "NovoGrad": lambda params: torch.optim.Adam(params, lr=0.1),
    "TRSGD": lambda params: torch.optim.SGD(params, lr=0.1, momentum=0.9),
    "TRAdam": lambda params: torch.optim.Adam(params, lr=0.1),
}


def assert_same(params, others):
    assert all(torch.equal(a, b) for a, b in zip(params, others, strict=True))


@pytest.mark.parametrize("shape", [(), (1,), (1, 1)], ids=str)
def test_a_step_size_in_a_tensor_of_one_element_may_have_any_shape(make, implementation, shape):
    params, flat = parameters(), parameters()
    run(make(params, lr=torch.full(shape, 0.02)), params, steps=3)
    run(make(flat, lr=torch.tensor(0.02)), flat, steps=3)
    assert_same(params, flat)


@pytest.mark.parametrize("kind", [str, np.float32, np.float64, lambda x: np.array(x)[()]])
def test_numbers_as_text_and_of_numpy_are_numbers(make, kind):
    # YAML reads 1e-3 as text, sweeps draw NumPy scalars; checkpoints with weights_only=True take no NumPy scalar.
    params, plain = parameters(), parameters()
    optimizer = make(params, lr=kind(0.0625), weight_decay=kind(0.125))
    run(optimizer, params, steps=2)
    run(make(plain, lr=0.0625, weight_decay=0.125), plain, steps=2)
    assert_same(params, plain)
    assert [type(optimizer.param_groups[0][k]) for k in ("lr", "weight_decay")] == [float, float]
    assert type(optimizer.defaults["lr"]) is float


def test_a_group_of_the_user_is_not_changed(make):
    group = {"params": parameters(), "lr": "0.01"}
    before = dict(group)
    optimizer = make([group])
    assert group == before
    assert optimizer.param_groups[0]["lr"] == 0.01


def test_text_that_is_no_number_is_refused(make):
    with pytest.raises(ValueError, match="Expected `lr` to be a number ≥ 0, got 'fast'"):
        make(parameters(), lr="fast")


def test_a_refused_group_leaves_no_trace(make):
    optimizer = make(parameters())
    with pytest.raises(ValueError, match="to be real"):
        optimizer.add_param_group({"params": [torch.nn.Parameter(torch.ones(2).cfloat())]})
    assert len(optimizer.param_groups) == 1


def test_a_loaded_state_is_neither_kept_nor_changed(make, implementation):
    # One state for several runs, as in a sweep: the first run must not change what the second one loads.
    params = parameters()
    optimizer = make(params)
    run(optimizer, params, steps=3)
    saved = optimizer.state_dict()
    kept = copy.deepcopy(saved)
    others = [torch.nn.Parameter(p) for p in snapshot(params)]
    second = make(others)
    second.load_state_dict(saved)
    run(second, others, steps=3)
    assert saved["param_groups"] == kept["param_groups"]
    for key, state in kept["state"].items():
        for name, value in state.items():
            assert torch.equal(torch.as_tensor(saved["state"][key][name]), torch.as_tensor(value))


def test_the_state_of_a_relative_is_taken_over(make, plugin, implementation):
    # From the optimizer that a project began with, or of an older version: settings that are missing are named.
    params = parameters()
    peer = PEERS[plugin.name](params)
    run(peer, params, steps=2)
    optimizer = make(params)
    with pytest.warns(UserWarning, match="the values of the constructor stay"):
        optimizer.load_state_dict(peer.state_dict())
    assert optimizer.param_groups[0]["lr"] == 0.1
    run(optimizer, params, steps=2)
    shared = set(peer.state[params[0]]) & set(optimizer.state_names)
    assert shared or plugin.name == "NovoGrad"
    assert all(p.isfinite().all() for p in params)
    # What is written now loads without a word.
    third = make(parameters())
    third.load_state_dict(optimizer.state_dict())


def test_the_momentum_of_nesterov_sgd_goes_on_in_mass():
    # MaSS with κ̃ = 1 is torch's Nesterov SGD, buffer included, so the trajectory has no seam.
    params, others = parameters(torch.float64), parameters(torch.float64)
    torchs = [torch.optim.SGD(p, lr=0.02, momentum=0.5, nesterov=True) for p in (params, others)]
    run(torchs[0], params, steps=6)
    run(torchs[1], others, steps=3)
    ours = lightning_sgd.MaSS(others, lr=0.02, gamma=0.5, eta2=0.0)
    with pytest.warns(UserWarning, match="alpha"):
        ours.load_state_dict(torchs[1].state_dict())
    run(ours, others, steps=3, first=3)
    for a, b in zip(params, others, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-14)


def test_plain_sgd_without_momentum_has_no_buffer_to_take_over(make):
    params = parameters()
    sgd = torch.optim.SGD(params, lr=0.1)
    run(sgd, params, steps=1)
    optimizer = make(params)
    with pytest.warns(UserWarning, match="the values of the constructor stay"):
        optimizer.load_state_dict(sgd.state_dict())
    run(optimizer, params, steps=1)


def test_a_state_of_other_shapes_is_refused_before_anything_is_changed(make):
    params, others = parameters(), list(reversed(parameters()))
    optimizer, other = make(params), make(others)
    for one, its in ((optimizer, params), (other, others)):
        run(one, its, steps=1)
    before = copy.deepcopy(optimizer.state_dict())
    with pytest.raises(ValueError, match="to be of the parameter's shape"):
        optimizer.load_state_dict(other.state_dict())
    after = optimizer.state_dict()
    assert after["param_groups"] == before["param_groups"]
    for key, state in before["state"].items():
        for name, value in state.items():
            assert torch.equal(torch.as_tensor(after["state"][key][name]), torch.as_tensor(value))


@pytest.mark.filterwarnings("ignore:.fused=True. has no effect for some")
def test_a_module_converted_after_some_steps_goes_on_in_its_new_type(make, implementation):
    # module.double() converts the parameters in place; the states follow in the next step.
    module = torch.nn.Linear(3, 2)
    module.load_state_dict({"weight": torch.arange(6.0).view(2, 3) / 8, "bias": torch.ones(2)})
    optimizer = make(module.parameters())
    params = list(module.parameters())
    run(optimizer, params, steps=2)
    module.double()
    reference = [torch.nn.Parameter(p.detach().clone()) for p in params]
    twin = make(reference)
    twin.load_state_dict(optimizer.state_dict())
    for one, its in ((optimizer, params), (twin, reference)):
        run(one, its, steps=2, first=2)
    assert all(p.dtype == torch.float64 for p in params)
    for name in optimizer.state_names:
        assert optimizer.state[params[0]][name].dtype == torch.float64
    for a, b in zip(params, reference, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-14)


def test_the_default_dtype_changes_nothing(make, implementation):
    params, doubles = parameters(), parameters()
    run(make(params), params, steps=3)
    torch.set_default_dtype(torch.float64)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", NoEffectWarning)
            run(make(doubles), doubles, steps=3)
    finally:
        torch.set_default_dtype(torch.float32)
    assert_same(params, doubles)


def test_a_sparse_gradient_is_refused_before_anything_is_changed(make, plugin):
    # In the last of two groups: a user who catches the error has the parameters and states of before.
    params = parameters()
    matrix = torch.nn.Parameter(torch.ones(3, 2))
    optimizer = make([{"params": params}, {"params": [matrix]}])
    for param, grad in zip(params, gradients(params, 0), strict=True):
        param.grad = grad
    matrix.grad = torch.eye(3)[:, :2].to_sparse()
    before = snapshot(params)
    with pytest.raises(ValueError, match=f"to be dense for {plugin.name}, got a sparse one"):
        optimizer.step()
    assert_same(params, before)
    assert not optimizer.state


def test_parameters_without_content_can_be_stepped(make, implementation):
    # On the meta device, to see shapes and memory of a large model.
    params = [torch.nn.Parameter(torch.ones(3, 2, device="meta")) for _ in range(2)]
    for param in params:
        param.grad = torch.ones(3, 2, device="meta")
    optimizer = make(params)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", NoEffectWarning)
        optimizer.step()
        optimizer.step()
    assert optimizer.state[params[0]][optimizer.state_names[0]].device.type == "meta"


def test_expanded_gradients_are_taken_as_they_are(make, implementation):
    # What autograd gives for a sum: one number with strides of zero.
    expanded, plain = parameters(), parameters()
    for param, other in zip(expanded, plain, strict=True):
        param.grad = torch.tensor(0.5).expand(param.shape)
        other.grad = torch.full_like(other, 0.5)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", NoEffectWarning)
        make(expanded).step()
    make(plain).step()
    for a, b in zip(expanded, plain, strict=True):
        torch.testing.assert_close(a, b)


def test_every_optimizer_is_told_that_its_kernel_is_not_used(make, plugin):
    # Not the first of the process alone: a second model is told, too, and each once.
    for _ in range(2):
        param = torch.nn.Parameter(torch.ones(3, 2))
        optimizer = make([param], fused=True)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            for _ in range(3):
                param.grad = torch.ones(2, 3).T
                optimizer.step()
        assert ["other strides" in str(w.message) for w in caught] == [True]
        assert caught[0].filename == __file__


@pytest.mark.parametrize("scheduler", ["OneCycleLR", "CyclicLR"])
def test_cyclic_schedules_cycle_the_momentum_or_say_how_not_to(make, plugin, scheduler):
    params = parameters()
    optimizer = make(params)
    settings = {
        "max_lr": 0.1,
        **({"total_steps": 4} if scheduler == "OneCycleLR" else {"base_lr": 0.01}),
    }
    build = getattr(torch.optim.lr_scheduler, scheduler)
    if (
        plugin.name == "MaSS"
    ):  # its acceleration is given by alpha, which no schedule of torch knows
        with pytest.raises(ValueError, match="cycle_momentum"):
            build(optimizer, **settings)
        schedule = build(optimizer, cycle_momentum=False, **settings)
    else:
        schedule = build(optimizer, **settings)
    group = optimizer.param_groups[0]
    seen = []
    for t in range(3):
        run(optimizer, params, steps=1, first=t)
        schedule.step()
        seen.append(group.get("momentum", group.get("betas")))
    assert len(set(seen)) == (1 if plugin.name == "MaSS" else 3)


def test_the_catalogue_has_no_other_optimizers():
    assert {plugin.name for plugin in plugins("optimizer")} == set(PEERS)
