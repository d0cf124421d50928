"""What every optimizer of the catalogue must do, whatever its update rule; without Lightning."""

from __future__ import annotations

import copy
import io
import pickle
import warnings

import pytest
import torch
from support.parameters import gradients, parameters, run, snapshot

from lightning_sgd import NoEffectWarning

DTYPES = [torch.float64, torch.float32, torch.bfloat16]


def test_a_step_without_gradients_changes_nothing(make, implementation):
    # Frozen or unused layers must neither move nor break the step.
    params = parameters()
    before = snapshot(params)
    optimizer = make(params)
    optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(before, params, strict=True))
    assert not optimizer.state


def test_a_parameter_without_gradient_is_left_alone(make, implementation):
    # Some layers take no part in some steps (a branch not taken); their weights and states stay as they are.
    params = parameters()
    optimizer = make(params)
    run(optimizer, params, steps=2)
    before = params[1].detach().clone()
    state = copy.deepcopy(optimizer.state[params[1]])
    for param, grad in zip(params, gradients(params, 7), strict=True):
        param.grad = grad
    params[1].grad = None
    optimizer.step()
    assert torch.equal(params[1], before)
    for name, value in optimizer.state[params[1]].items():
        assert torch.equal(torch.as_tensor(value), torch.as_tensor(state[name])), name


@pytest.mark.parametrize("way", ["pickle", "deepcopy"])
def test_a_copied_optimizer_continues_equally(make, implementation, way):
    # Spawned workers pickle it, callbacks copy it.
    params = parameters()
    optimizer = make(params)
    run(optimizer, params, steps=3)
    twin = (
        pickle.loads(pickle.dumps((params, optimizer)))
        if way == "pickle"
        else copy.deepcopy((params, optimizer))
    )
    run(optimizer, params, steps=3, first=3)
    run(twin[1], twin[0], steps=3, first=3)
    assert all(torch.equal(a, b) for a, b in zip(params, twin[0], strict=True))


def test_groups_do_not_influence_each_other(make, implementation):
    # A second group with other settings must not change the first one's trajectory.
    together, alone = parameters(), parameters()
    both = make([{"params": together[:2]}, {"params": together[2:], "lr": 0.003}])
    one = make(alone[:2])
    run(both, together, steps=4)
    run(one, alone, steps=4)
    assert all(torch.equal(a, b) for a, b in zip(together[:2], alone[:2], strict=True))


@pytest.mark.parametrize("lr", [0.0, torch.tensor(0.0)], ids=["float", "tensor"])
def test_step_size_zero_leaves_the_parameters_alone(make, implementation, lr):
    # Warm-up schedules start at zero.
    params = parameters()
    before = snapshot(params)
    run(make(params, lr=lr), params, steps=3)
    assert all(torch.equal(a, b) for a, b in zip(before, params, strict=True))


@pytest.mark.compatible("learning rate as a tensor")
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_a_tensor_step_size_changed_in_place_equals_a_float(make, implementation, dtype):
    # Compiled and graph-captured training keeps lr in a tensor.
    floats, tensors = parameters(dtype), parameters(dtype)
    lr = torch.tensor(0.02, dtype=dtype)
    with_float, with_tensor = make(floats, lr=0.02), make(tensors, lr=lr)
    for t in range(4):
        if t == 2:
            with_float.param_groups[0]["lr"] = 0.005
            lr.fill_(0.005)
        run(with_float, floats, steps=1, first=t)
        run(with_tensor, tensors, steps=1, first=t)
    for a, b in zip(floats, tensors, strict=True):
        torch.testing.assert_close(a, b, rtol=2e-6 if dtype == torch.float32 else 1e-13, atol=0)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.filterwarnings("ignore:.fused=True. has no effect for some")
def test_resume_from_a_file_is_bit_exact_and_keeps_types(make, implementation, dtype):
    params = parameters(dtype)
    optimizer = make(params)
    run(optimizer, params, steps=3)
    file = io.BytesIO()
    torch.save({"params": snapshot(params), "optimizer": optimizer.state_dict()}, file)
    types = {k: v.dtype for k, v in optimizer.state[params[0]].items() if torch.is_tensor(v)}
    run(optimizer, params, steps=3, first=3)

    file.seek(0)
    saved = torch.load(file, weights_only=True)
    resumed = [torch.nn.Parameter(p) for p in saved["params"]]
    # Different constructor arguments: everything must come from the file.
    second = make(resumed, lr=0.5)
    second.load_state_dict(saved["optimizer"])
    run(second, resumed, steps=3, first=3)
    assert all(torch.equal(a, b) for a, b in zip(params, resumed, strict=True))
    state = second.state[resumed[0]]
    assert {k: v.dtype for k, v in state.items() if torch.is_tensor(v)} == types


@pytest.mark.filterwarnings("ignore:.fused=True. has no effect for some")
def test_long_tensors_of_16_bits_follow_float32(make, implementation):
    # torch 2.13's fused SGD on a CPU leaves garbage in momenta of 16 bits, from 16 elements on.
    start, dtype = torch.linspace(-1, 1, 67), torch.bfloat16
    low, full = torch.nn.Parameter(start.to(dtype)), torch.nn.Parameter(start.to(dtype).float())
    optimizers = make([low]), make([full])
    for step in range(3):
        low.grad = torch.sin(start * (step + 1)).to(dtype)
        full.grad = low.grad.float()
        for optimizer in optimizers:
            optimizer.step()
    torch.testing.assert_close(low.float(), full, rtol=0.05, atol=0.02)


@pytest.mark.compatible("bfloat16 parameters")
@pytest.mark.filterwarnings("ignore:.fused=True. has no effect for some")
def test_bfloat16_parameters_stay_finite_and_follow_float32(make, implementation):
    low, full = parameters(torch.bfloat16), parameters(torch.float32)
    run(make(low), low, steps=5)
    run(make(full), full, steps=5)
    for a, b in zip(low, full, strict=True):
        assert a.dtype == torch.bfloat16
        torch.testing.assert_close(a.float(), b, rtol=0.05, atol=0.02)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.filterwarnings("ignore:.fused=True. has no effect for some")
def test_every_implementation_makes_the_same_steps(make, implementation, plugin, dtype):
    # Mixed types, a parameter that joins late, a schedule and weight decay: the paths must not part.
    if implementation == "default":
        pytest.skip("offers one implementation only")
    reference, params = parameters(dtype), parameters(dtype)
    for group in (reference, params):
        group.append(torch.nn.Parameter(torch.linspace(-1, 1, 6, dtype=torch.bfloat16)))
    slow = make(reference, foreach=False, fused=False, weight_decay=0.1)
    fast = make(params, weight_decay=0.1)
    for t in range(6):
        for optimizer in (slow, fast):
            optimizer.param_groups[0]["lr"] = 0.05 / (1 + t)
        skip = 0 if t < 2 else None
        run(slow, reference, steps=1, first=t, skip=skip)
        run(fast, params, steps=1, first=t, skip=skip)
    for a, b in zip(reference, params, strict=True):
        exact = {torch.float64: 1e-13, torch.float32: 3e-6, torch.bfloat16: 2e-2}[a.dtype]
        torch.testing.assert_close(a, b, rtol=exact, atol=exact)


@pytest.mark.parametrize("maximize", [False, True])
def test_gradients_are_left_as_they_are(make, implementation, maximize):
    # Monitors and clipping read p.grad after the step.
    params = parameters()
    optimizer = make(params, maximize=maximize, weight_decay=0.1)
    for param, grad in zip(params, gradients(params, 0), strict=True):
        param.grad = grad
    before = [param.grad.clone() for param in params]
    optimizer.step()
    assert all(torch.equal(a, p.grad) for a, p in zip(before, params, strict=True))


def test_the_closure_runs_once_with_gradients_enabled(make, implementation):
    # Lightning passes a closure to every step, sometimes under no_grad.
    params = parameters()
    optimizer = make(params)
    calls = []

    def closure():
        calls.append(torch.is_grad_enabled())
        optimizer.zero_grad()
        loss = sum((p**2).sum() for p in params)
        loss.backward()
        return loss

    expected = float(sum((p.detach() ** 2).sum() for p in params))
    with torch.no_grad():
        loss = optimizer.step(closure)
    assert calls == [True]
    assert loss.item() == expected


def test_odd_shapes_and_strides(make, implementation):
    # Scalars, empty tensors, transposed storage and channels_last are all legal parameters.
    image = torch.randn(2, 3, 4, 4).to(memory_format=torch.channels_last)
    odd = [torch.tensor(1.0), torch.empty(0, 3), torch.arange(6.0).view(2, 3).T, image]
    params = [torch.nn.Parameter(p.clone(memory_format=torch.preserve_format)) for p in odd]
    plain = [torch.nn.Parameter(p.detach().clone().contiguous()) for p in params]
    # Gradients may arrive with other strides than the parameter, for instance as views of a bucket.
    # A fused kernel that is asked for may say that it cannot take these.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", NoEffectWarning)
        run(make(params), params, steps=3)
    run(make(plain), plain, steps=3)
    for a, b in zip(params, plain, strict=True):
        torch.testing.assert_close(a, b)
    assert params[3].is_contiguous(memory_format=torch.channels_last)


def test_non_finite_gradients_are_not_hidden(make, implementation):
    # A NaN must reach the weights, where NaN checks of the Trainer look for it.
    params = parameters()
    for param in params:
        param.grad = torch.full_like(param, float("nan"))
    make(params).step()
    assert all(param.isnan().all() for param in params)


@pytest.mark.compatible("complex parameters", "refused")
def test_complex_parameters_are_refused(make, plugin):
    with pytest.raises(ValueError, match=f"Expected `params` of {plugin.name} to be real, got"):
        make([torch.nn.Parameter(torch.ones(2, dtype=torch.complex64))])


@pytest.mark.compatible("sparse gradients", "refused")
def test_sparse_gradients_are_refused(make, plugin):
    embedding = torch.nn.Embedding(4, 2, sparse=True)
    optimizer = make(embedding.parameters())
    embedding(torch.tensor([1])).sum().backward()
    with pytest.raises(ValueError, match=f"Expected gradients to be dense for {plugin.name}, got"):
        optimizer.step()


@pytest.mark.compatible("torch.compile of a module")
def test_a_compiled_module_trains_alike(make):
    # The eager backend runs the tracing, which is what an optimizer could disturb, without a C++ compiler.
    torch.manual_seed(0)
    eager = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Tanh(), torch.nn.Linear(8, 1))
    source = copy.deepcopy(eager)
    compiled = torch.compile(source, backend="eager")
    x = torch.randn(16, 4)
    for module in (eager, compiled):
        optimizer = make(module.parameters())
        for _ in range(4):
            optimizer.zero_grad()
            module(x).square().mean().backward()
            optimizer.step()
    for a, b in zip(eager.parameters(), source.parameters(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("argument", ["lr", "weight_decay"])
@pytest.mark.parametrize("value", [-1.0, float("nan"), float("inf")])
def test_impossible_numbers_are_refused(make, argument, value):
    with pytest.raises(ValueError, match=f"Expected `{argument}` to be"):
        make(parameters(), **{argument: value})
