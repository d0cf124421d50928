"""The weight matrices of a module: find, name and read them without side effects."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd
from torch.nn.parameter import is_lazy
from torch.nn.utils import parametrize
from torch.nn.utils.prune import BasePruningMethod
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

from lightning_sgd._validation import Words, expect, warn_no_effect, warn_outside_intended_use

GATES = {
    nn.LSTM: ("input", "forget", "cell", "output"),
    nn.LSTMCell: ("input", "forget", "cell", "output"),
    nn.GRU: ("reset", "update", "new"),
    nn.GRUCell: ("reset", "update", "new"),
}
"""The gates whose weights torch stacks into one tensor, in the order of its rows."""

LAZY = "Run one forward pass first."


@dataclass(frozen=True, slots=True)
class WeightMatrix:
    """One weight matrix of a module.

    Attributes:
        name: Name of the weight in the module, with the name of the block if the weight holds several matrices.
        shape: Numbers of rows and columns.
        module: The module that owns the weight.
        weight: Name of the weight in that module.
        block: Index of the block of rows that is the matrix.
        num_blocks: Number of these blocks.
    """

    name: str
    shape: tuple[int, int]
    module: nn.Module = field(repr=False)
    weight: str = field(repr=False)
    block: int = field(default=0, repr=False)
    num_blocks: int = field(default=1, repr=False)

    def read(self) -> Tensor:
        """Read the current values, as a detached tensor that shares memory with the parameter if possible.

        A weight that is computed from others is computed as in evaluation mode, so that reading it advances no power
        iteration. Gradients, buffers, random states and modes stay unchanged. A sharded weight is gathered: a
        collective operation that all its ranks must call.
        """
        with torch.no_grad():
            weight = _effective_weight(self.module, self.weight).detach()
            # Asked by an attribute, because DTensor is not part of every build of torch.
            if hasattr(weight, "full_tensor"):
                weight = weight.full_tensor()
            # The unfolding of the authors' code for convolutions. The operator on the input grid has far more singular
            # values.
            rows: Tensor = weight.flatten(1)
            return rows.tensor_split(self.num_blocks)[self.block]


def find_weight_matrices(
    module: nn.Module,
    *,
    include: Sequence[str] | None = None,
    exclude: Sequence[str] | None = None,
    min_side: int = 8,
) -> list[WeightMatrix]:
    """Find every weight of a module that acts as a matrix.

    ===================================== ==================================================================
    weight of                             matrices
    ===================================== ==================================================================
    ``Linear``                            the weight as it is
    convolution                           C_out × (C_in·kernel), with groups one matrix per group
    transposed convolution                C_in × (C_out·kernel), with groups one matrix per group
    ``MultiheadAttention``                ``in_proj_weight.q``, ``.k`` and ``.v``
    ``LSTM``, ``GRU`` and their cells     one per gate, such as ``weight_hh_l0.forget``
    embedding                             left out, unless a pattern of ``include`` names it
    any other with two or more dimensions the first dimension by all others
    ===================================== ==================================================================

    Parametrized, weight-normalized, spectrally normalized and pruned weights count as the weight that the forward pass
    uses. A weight with several names counts once, under the first that is asked for. Names lose the ``_orig_mod.`` that
    ``torch.compile`` adds. Complex and integer weights are left out, the former with a warning.

    Args:
        module: The module to search.
        include: Patterns such as ``encoder.*``; only matrices whose name matches one are taken. By default all.
        exclude: Patterns of names to leave out.
        min_side: Smallest number of rows and of columns; depthwise convolutions have a single row per group.

    Returns:
        The matrices in the order of ``module.named_modules()``.

    Raises:
        ValueError: If an argument is out of range, or a weight has no shape yet.

    Example:
        >>> net = nn.Sequential(nn.Conv2d(8, 16, 3), nn.Flatten(), nn.Linear(64, 10), nn.Linear(10, 2))
        >>> find_weight_matrices(net)
        [WeightMatrix(name='0.weight', shape=(16, 72)), WeightMatrix(name='2.weight', shape=(10, 64))]
    """
    _validate(include, exclude, min_side)
    patterns = {*(include or ()), *(exclude or ())}
    found: dict[tuple[int, ...], WeightMatrix] = {}
    for candidate in _candidates(module):
        matrix = candidate.matrix
        if min(matrix.shape) < min_side or (candidate.is_embedding and include is None):
            continue
        # Before the choice: a pattern that matches what another one excludes is no typing error.
        patterns -= {pattern for pattern in patterns if fnmatchcase(matrix.name, pattern)}
        if not _is_chosen(matrix.name, include, exclude):
            continue
        if candidate.is_complex:
            warn_outside_intended_use(f"The complex weight `{matrix.name}` is left out.")
        else:
            found.setdefault(candidate.sources, matrix)
    for pattern in sorted(patterns):
        warn_no_effect(
            f"The pattern {pattern!r} matches no weight matrix with at least {min_side} rows and columns."
        )
    return list(found.values())


def _validate(include: Sequence[str] | None, exclude: Sequence[str] | None, min_side: int) -> None:
    for argument, patterns in (("include", include), ("exclude", exclude)):
        expect(
            not isinstance(patterns, str),
            argument,
            "a list of patterns",
            patterns,
            "Put brackets around it.",
        )
    expect(min_side >= 1, "min_side", "at least 1", min_side, "The default is 8.")


def _is_chosen(name: str, include: Sequence[str] | None, exclude: Sequence[str] | None) -> bool:
    included = include is None or any(fnmatchcase(name, pattern) for pattern in include)
    return included and not any(fnmatchcase(name, pattern) for pattern in exclude or ())


class _Candidate(NamedTuple):
    """A matrix before the choice.

    Attributes:
        matrix: The matrix.
        sources: Identities of the parameters that it is made from, and its block.
        is_embedding: Whether a row is a vector of its own.
        is_complex: Whether it has complex elements.
    """

    matrix: WeightMatrix
    sources: tuple[int, ...]
    is_embedding: bool
    is_complex: bool


def _candidates(root: nn.Module) -> Iterator[_Candidate]:
    for path, module, name, parameters in _weights(root):
        for parameter in parameters:
            expect(not is_lazy(parameter), "module", "initialized", Words(f"the lazy {path}"), LAZY)
        with torch.no_grad():
            weight = _effective_weight(module, name)
        if weight.ndim < 2 or not (weight.is_floating_point() or weight.is_complex()):
            continue
        blocks = _blocks(module, name) or ("",)
        shape = (weight.shape[0] // len(blocks), weight.shape[1:].numel())
        for index, block in enumerate(blocks):
            yield _Candidate(
                WeightMatrix(path + block, shape, module, name, index, len(blocks)),
                (*map(id, parameters), index),
                isinstance(module, (nn.Embedding, nn.EmbeddingBag)),
                weight.is_complex(),
            )


def _weights(root: nn.Module) -> Iterator[tuple[str, nn.Module, str, tuple[nn.Parameter, ...]]]:
    """Yield every weight that a forward pass uses: path, module, name in the module, parameters it is made from."""
    hidden: set[nn.Module] = set()
    # With duplicates: a shared module may be asked for under its second name; `sources` tells that it is the same
    # weight.
    for path, module in root.named_modules(remove_duplicate=False):
        # Modules inside parametrizations hold the sources of a weight, not weights of their own.
        if module in hidden:
            continue
        # Compiled or not, a layer has one name in patterns and logs.
        prefix = f"{path}.".replace("_orig_mod.", "").removeprefix(".")
        behind = {name: (parameter,) for name, parameter in module.named_parameters(recurse=False)}
        for name in _computing_hooks(module):
            # Parameters of torch's hooks: weight norm has g and v, spectral norm and pruning have orig.
            sources = [f"{name}{suffix}" for suffix in ("_g", "_v", "_orig")]
            behind[name] = tuple(behind.pop(source)[0] for source in sources if source in behind)
        if parametrize.is_parametrized(module):
            parametrizations = module.get_submodule("parametrizations")
            hidden.update(parametrizations.modules())
            for name, parts in parametrizations.named_children():
                behind[name] = tuple(parts.parameters())
        for name, parameters in behind.items():
            if parameters:  # a parametrized buffer has none
                yield prefix + name, module, name, parameters


def _effective_weight(module: nn.Module, name: str) -> Tensor:
    """Compute the weight as a forward pass in evaluation mode does."""
    weight: Tensor
    if parametrize.is_parametrized(module, name):
        # Not by attribute: inside `parametrize.cached()` that would leave a weight without gradient in the cache.
        parametrization = module.get_submodule(f"parametrizations.{name}")
        # In training mode spectral norm would advance its power iteration.
        with _evaluating(parametrization):
            weight = parametrization()
    else:
        hooks = _computing_hooks(module)
        weight = hooks[name]() if name in hooks else getattr(module, name)
    return weight


@contextmanager
def _evaluating(module: nn.Module) -> Iterator[None]:
    """Set evaluation mode by the flags only: an overridden `Module.train` may have side effects."""
    training = [child for child in module.modules() if child.training]
    try:
        for child in training:
            child.training = False
        yield
    finally:
        for child in training:
            child.training = True


def _computing_hooks(module: nn.Module) -> dict[str, Callable[[], Tensor]]:
    """Find the weights that forward pre-hooks write, each with a function that computes it without writing."""
    found: dict[str, Callable[[], Tensor]] = {}
    for hook in module._forward_pre_hooks.values():
        if isinstance(hook, WeightNorm):
            found[hook.name] = partial(hook.compute_weight, module)
        elif isinstance(hook, SpectralNorm):
            # A power iteration would change the buffers that the next forward pass starts from.
            found[hook.name] = partial(hook.compute_weight, module, do_power_iteration=False)
        elif isinstance(hook, BasePruningMethod):
            found[hook._tensor_name] = partial(hook.apply_mask, module)
    return found


def _blocks(module: nn.Module, name: str) -> tuple[str, ...]:
    """Return the suffixes of the matrices that are stacked in one weight; none for a single matrix."""
    if isinstance(module, nn.MultiheadAttention) and name == "in_proj_weight":
        return (".q", ".k", ".v")
    if isinstance(module, _ConvNd) and name == "weight" and module.groups > 1:
        return tuple(f".group{index}" for index in range(module.groups))
    if name.startswith(("weight_ih", "weight_hh")):
        for kind, gates in GATES.items():
            if isinstance(module, kind):
                return tuple(f".{gate}" for gate in gates)
    return ()
