"""Every optimizer of the catalogue on a GPU, against the for-loop on the CPU."""

from __future__ import annotations

import pytest
import torch
from support.parameters import gradients, parameters, run

COUNT_ON_THE_HOST = {"TRSGD", "TRAdam"}
"""What they do next depends on a count, so a replayed graph would repeat one step for ever; they refuse."""

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


def on_gpu(params):
    return [torch.nn.Parameter(param.detach().cuda()) for param in params]


def run_on_gpu(optimizer, params, steps, first=0):
    """The gradients of :func:`run`, computed on the CPU and moved, so that both see the same."""
    for t in range(first, first + steps):
        on_cpu = [torch.nn.Parameter(param.detach().cpu()) for param in params]
        for param, grad in zip(params, gradients(on_cpu, t), strict=True):
            param.grad = grad.cuda()
        optimizer.step()


@pytest.mark.parametrize("lr", [0.02, torch.tensor(0.02)], ids=["float", "tensor"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_equals_the_cpu(make, implementation, dtype, lr):
    reference, params = parameters(dtype), on_gpu(parameters(dtype))
    slow = make(reference, lr=0.02, foreach=False, fused=False, weight_decay=0.1)
    fast = make(params, lr=lr.cuda() if torch.is_tensor(lr) else lr, weight_decay=0.1)
    run(slow, reference, steps=5)
    run_on_gpu(fast, params, steps=5)
    tolerance = {torch.float64: 1e-7 if torch.is_tensor(lr) else 1e-13, torch.float32: 3e-6}[dtype]
    for a, b in zip(reference, params, strict=True):
        torch.testing.assert_close(a.detach(), b.detach().cpu(), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_low_precision_follows_float32(make, implementation, dtype):
    low, full = on_gpu(parameters(dtype)), on_gpu(parameters(torch.float32))
    run_on_gpu(make(low), low, steps=5)
    run_on_gpu(make(full), full, steps=5)
    for a, b in zip(low, full, strict=True):
        assert a.dtype == dtype
        torch.testing.assert_close(a.float(), b, rtol=0.05, atol=0.02)


def test_devices_may_be_mixed(make, implementation):
    params = parameters()
    params[1] = torch.nn.Parameter(params[1].detach().cuda())
    reference = parameters()
    mixed, plain = make(params, lr=torch.tensor(0.02)), make(reference, lr=0.02)
    for t in range(3):
        run(plain, reference, steps=1, first=t)
        on_cpu = [torch.nn.Parameter(param.detach().cpu()) for param in params]
        for param, grad in zip(params, gradients(on_cpu, t), strict=True):
            param.grad = grad.to(param.device)
        mixed.step()
    for a, b in zip(reference, params, strict=True):
        torch.testing.assert_close(a.detach(), b.detach().cpu(), rtol=3e-6, atol=3e-6)


@pytest.mark.filterwarnings("ignore:The CUDA Graph is empty")
def test_a_captured_step_follows_gradients_and_step_size(make, implementation, plugin):
    # A replayed graph reads the gradients and the lr tensor at their addresses.
    eager, captured = on_gpu(parameters()), on_gpu(parameters())
    lr = torch.tensor(0.02, device="cuda")
    plain, graphed = make(eager, lr=0.02), make(captured, lr=lr)
    for params in (eager, captured):
        for index, param in enumerate(params):
            param.grad = torch.full_like(param, 0.1 * (index + 1))
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        graphed.step()
    torch.cuda.current_stream().wait_stream(stream)
    plain.step()
    graph = torch.cuda.CUDAGraph()
    if plugin.name in COUNT_ON_THE_HOST:
        with pytest.raises(RuntimeError, match="not to be captured"), torch.cuda.graph(graph):
            graphed.step()
        return
    with torch.cuda.graph(graph):
        graphed.step()
    for t in range(1, 4):
        step_size = 0.02 / t
        lr.fill_(step_size)
        plain.param_groups[0]["lr"] = step_size
        for params in (eager, captured):
            for param in params:
                param.grad.mul_(-0.7)
        plain.step()
        graph.replay()
    for a, b in zip(eager, captured, strict=True):
        torch.testing.assert_close(a, b, rtol=3e-6, atol=3e-6)


def test_a_step_does_not_wait_for_the_device(make, implementation):
    params = on_gpu(parameters())
    optimizer = make(params)
    run_on_gpu(optimizer, params, steps=2)
    torch.cuda.set_sync_debug_mode("error")
    try:
        optimizer.step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
