"""Parameters and gradients that every optimizer test can repeat exactly."""

from __future__ import annotations

import torch

SHAPES = [(3, 4), (5,), (2, 2, 2)]


def parameters(dtype=torch.float32):
    """A few parameters with the same values every time."""
    generator = torch.Generator().manual_seed(0)
    return [
        torch.nn.Parameter(torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype))
        for shape in SHAPES
    ]


def gradients(params, t):
    """The gradients of step ``t``, each its own function of the parameter's place in the list."""
    for index, param in enumerate(params):
        generator = torch.Generator().manual_seed(1000 * t + index)
        noise = torch.randn(param.shape, generator=generator, dtype=torch.float64)
        yield noise.to(param.dtype) + param.detach()


def run(optimizer, params, steps, first=0, skip=None):
    """Make ``steps`` steps, the parameter number ``skip`` without a gradient."""
    for t in range(first, first + steps):
        for index, (param, grad) in enumerate(zip(params, gradients(params, t), strict=True)):
            param.grad = None if index == skip else grad
        optimizer.step()


def snapshot(params):
    """Copies of the values."""
    return [param.detach().clone() for param in params]
