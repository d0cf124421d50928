"""Track, step by step, the bound that batch size, step size and decay imply for the rank of weight matrices."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

from lightning.pytorch import Trainer
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd
from torch.optim import SGD, Optimizer
from torch.utils.hooks import RemovableHandle

from lightning_sgd.functional.optim.mass import mass_coefficients
from lightning_sgd.functional.spectra.rank_bounds import (
    Transfer,
    Window,
    sgd_transfer,
    trajectory_rank_bound,
    trajectory_tails,
)
from lightning_sgd.functional.spectra.weight_matrices import WeightMatrix
from lightning_sgd.optimizers import MaSS

MAX_WINDOWS = 256


def transfer_of(optimizer: Optimizer, group: dict[str, Any]) -> Transfer | None:
    """Return the linear map of a step on weights and momentum buffer, apart from the gradient.

    ``None`` where no bound applies: element-wise scaling as in Adam gives updates of full rank, whatever the rank of
    the gradient.
    """
    if isinstance(optimizer, MaSS):
        coefficients = mass_coefficients(group["alpha"], group["kappa_tilde"])
        return sgd_transfer(
            lr=float(group["lr"]),
            weight_decay=group["weight_decay"],
            momentum=coefficients.scale,
            dampening=1 - coefficients.gain,
            nesterov=True,
            decoupled=group["decoupled_weight_decay"],
        )
    if type(optimizer) is SGD and not group["dampening"]:
        return sgd_transfer(
            lr=float(group["lr"]),
            weight_decay=group["weight_decay"],
            momentum=group["momentum"],
            nesterov=group["nesterov"],
        )
    return None


def uses_in_batch(module: nn.Module, inputs: tuple[Any, ...], output: Any) -> int | None:
    """Return how often a forward pass uses the weight of a module; ``None`` for modules of an unknown type."""
    if not inputs or not isinstance(inputs[0], Tensor):
        return None
    if isinstance(module, nn.Linear):
        return inputs[0].numel() // inputs[0].shape[-1]
    if isinstance(module, _ConvTransposeNd):
        return inputs[0].numel() // module.in_channels
    if isinstance(module, _ConvNd):
        return int(output.numel()) // module.out_channels
    return None


class BoundTracker:
    """Collect the windows between looks, for every matrix to which the bound applies.

    Args:
        matrices: The weight matrices.
        trainer: The trainer, with optimizers.
    """

    def __init__(self, matrices: Sequence[WeightMatrix], trainer: Trainer) -> None:
        self.trainer = trainer
        # A GradScaler skips steps without notice.
        scaled = getattr(trainer.precision_plugin, "scaler", None) is not None
        optimizers = [] if scaled else trainer.optimizers
        self.owners = [_find_owner(matrix, optimizers) for matrix in matrices]
        self.shapes = [matrix.shape for matrix in matrices]
        self.uses: list[int | None] = [None] * len(matrices)
        self.windows: list[list[Window]] = [[] for _ in matrices]
        self.begin: list[tuple[float, float] | None] = [None] * len(matrices)
        self.transfers: dict[tuple[int, int], Transfer] = {}
        self.num_steps: dict[int, int] = {}
        self.tails: list[list[tuple[int, float]]] = [[] for _ in matrices]
        self._hooks: list[RemovableHandle] = []
        self._seen: list[int] = [0] * len(matrices)
        for index, matrix in enumerate(matrices):
            if self.owners[index] is not None:
                hook = partial(self._count_uses, index)
                self._hooks.append(matrix.module.register_forward_hook(hook))

    def _count_uses(
        self, index: int, module: nn.Module, inputs: tuple[Any, ...], output: Any
    ) -> None:
        uses = uses_in_batch(module, inputs, output)
        if module.training and uses is not None:
            self._seen[index] += uses

    def after_batch(self) -> None:
        """Take the first batch as typical, and stop counting uses."""
        if self._hooks:
            self.remove_hooks()
            per_step = self.trainer.accumulate_grad_batches * self.trainer.world_size
            self.uses = [seen * per_step or None for seen in self._seen]

    def remove_hooks(self) -> None:
        """Remove the hooks from the modules."""
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()

    def before_step(self, optimizer: Optimizer) -> None:
        """Record step size, decay and momentum of the step that follows."""
        number = self.trainer.optimizers.index(optimizer)
        self.num_steps[number] = self.num_steps.get(number, 0) + 1
        for place, group in enumerate(optimizer.param_groups):
            step = transfer_of(optimizer, group)
            if step is not None:
                earlier = self.transfers.get((number, place), Transfer())
                self.transfers[number, place] = step.after(earlier)

    def look(self, weight_norms: Sequence[float]) -> None:
        """Close the open window of every matrix, given the current Frobenius norms, and update the tails."""
        for index, norm in enumerate(weight_norms):
            self._close(index)
            self.tails[index] = trajectory_tails(self.windows[index], norm)
            self.begin[index] = (norm, self._buffer_norm(index))
        self.transfers.clear()
        self.num_steps.clear()

    def bounds(self, eps: float) -> list[float]:
        """Return the bounds below full rank, relative to the short sides of their matrices."""
        shares = []
        for shape, pairs in zip(self.shapes, self.tails, strict=True):
            bound = trajectory_rank_bound(pairs, eps)
            if bound is not None and bound < min(shape):
                shares.append(bound / min(shape))
        return shares

    def _close(self, index: int) -> None:
        owner, begin, uses = self.owners[index], self.begin[index], self.uses[index]
        if owner is None or begin is None or uses is None:
            return
        transfer = self.transfers.get(owner[:2])
        if transfer is not None:
            num_samples = self.num_steps[owner[0]] * uses
            self.windows[index].append(Window(num_samples, transfer, *begin))
            del self.windows[index][:-MAX_WINDOWS]

    def _buffer_norm(self, index: int) -> float:
        owner = self.owners[index]
        if owner is None:
            return 0.0
        state = self.trainer.optimizers[owner[0]].state.get(owner[2], {})
        buffer = state.get("momentum_buffer")
        return 0.0 if buffer is None else float(buffer.norm())

    def state_dict(self) -> dict[str, Any]:
        """Return the windows as lists of numbers."""
        return {
            "uses": list(self.uses),
            "begin": [begin and list(begin) for begin in self.begin],
            "windows": [
                [[w.num_samples, list(w.transfer), w.weight_norm, w.buffer_norm] for w in windows]
                for windows in self.windows
            ],
            "transfers": [[*place, *transfer] for place, transfer in self.transfers.items()],
            "num_steps": dict(self.num_steps),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore :meth:`state_dict`."""
        self.remove_hooks()
        self.uses = list(state_dict["uses"])
        self.begin = [begin and tuple(begin) for begin in state_dict["begin"]]
        self.windows = [
            [Window(n, Transfer(*transfer), *norms) for n, transfer, *norms in windows]
            for windows in state_dict["windows"]
        ]
        self.transfers = {
            (number, place): Transfer(*transfer)
            for number, place, *transfer in state_dict["transfers"]
        }
        self.num_steps = dict(state_dict["num_steps"])


def _find_owner(
    matrix: WeightMatrix, optimizers: Sequence[Optimizer]
) -> tuple[int, int, nn.Parameter] | None:
    """Return the numbers of optimizer and group that train a matrix; ``None`` if no bound applies to it."""
    parameter = matrix.module._parameters.get(matrix.weight)
    for number, optimizer in enumerate(optimizers):
        for place, group in enumerate(optimizer.param_groups):
            if any(parameter is other for other in group["params"]):
                applies = transfer_of(optimizer, group) is not None
                return (number, place, parameter) if applies and parameter is not None else None
    return None
