"""Gathers gradients of several batches at the same weights, once for all monitors that ask for the same."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeAlias

import torch
import torch.distributed as dist
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities.signature_utils import is_param_in_hook_signature
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset

from lightning_sgd._validation import expect
from lightning_sgd.callbacks._module_state import module_state_kept
from lightning_sgd.callbacks._traffic_source import holds_whole_model
from lightning_sgd.functional.gradient_sample import Coordinates, GradientSample

LossFunction: TypeAlias = Callable[[LightningModule, Any], Tensor]


class GradientCollector:
    """Draws batches of its own from the training data, and takes their gradients at the weights as they are.

    Batches are drawn with replacement, by a generator that depends on ``seed`` and step alone, so that nothing of it
    is in a checkpoint. Ranks share the work. Gradients come from ``torch.autograd.grad``: ``.grad``, the hooks of DDP
    and a GradScaler see nothing of it. Buffers, attributes and metrics of the module are put back, also after an
    exception; random states are kept by the monitor. Memory: the sample, the coordinates' share of ``num_gradients``
    gradients, and one gradient.

    Args:
        num_gradients: How many, over all ranks [m]; rounded up to the same number on each.
        num_coordinates: About how many coordinates of each to keep [s]; ``None`` for all.
        batch_size: Samples per gradient; by default that of the training data loader.
        train_mode: Whether dropout and batch statistics are as in training, or as in evaluation.
        loss_fn: Takes module and batch and returns the loss; by default what ``training_step`` returns.
        seed: Decides on coordinates and batches.
    """

    def __init__(
        self,
        num_gradients: int,
        num_coordinates: int | None,
        batch_size: int | None = None,
        train_mode: bool = True,
        loss_fn: LossFunction | None = None,
        seed: int = 0,
    ) -> None:
        remedy = "Noise is in differences between gradients."
        expect(num_gradients >= 2, "num_gradients", "at least 2", num_gradients, remedy)
        for name, value in (("num_coordinates", num_coordinates), ("batch_size", batch_size)):
            remedy = "None takes all coordinates, or the batch size of training."
            expect(value is None or value >= 1, name, "at least 1", value, remedy)
        self.num_gradients, self.num_coordinates = num_gradients, num_coordinates
        self.batch_size, self.train_mode, self.loss_fn = batch_size, train_mode, loss_fn
        self.seed = seed
        self._last: GradientSample | None = None

    @property
    def settings(self) -> dict[str, Any]:
        """What two collectors must have in common to give the same sample."""
        return {key: value for key, value in vars(self).items() if not key.startswith("_")}

    def shared(self, trainer: Trainer) -> GradientCollector:
        """The first collector among the callbacks of a Trainer that has the same settings.

        Args:
            trainer: Knows the callbacks.
        """
        others = (getattr(callback, "collector", None) for callback in trainer.callbacks)  # type: ignore[attr-defined]  # set by a connector
        mine = self.settings
        same = (c for c in others if isinstance(c, GradientCollector) and c.settings == mine)
        return next(same, self)

    def obstacle(self, trainer: Trainer, pl_module: LightningModule) -> str | None:
        """Why nothing can be collected in this training; ``None`` if something can.

        Args:
            trainer: About to train.
            pl_module: The module.
        """
        if not holds_whole_model(trainer):
            return f"{type(trainer.strategy).__name__} keeps no rank a whole gradient"
        if self.loss_fn is None and not pl_module.automatic_optimization:
            return "in manual optimization only `loss_fn` can say what the loss is"
        if self.loss_fn is None and is_param_in_hook_signature(
            pl_module.training_step, "dataloader_iter", explicit=True
        ):
            return (
                "`training_step` takes an iterator, so that only `loss_fn` can say what the loss is"
            )
        loader = trainer.train_dataloader
        if not isinstance(loader, DataLoader) or isinstance(loader.dataset, IterableDataset):
            return "batches can be drawn from a single DataLoader with a map-style data set only"
        if self._size_of_batch(loader) is None:
            return "the data loader does not tell its batch size; set `batch_size`"
        return None

    def forget(self) -> None:
        """Free the last sample."""
        self._last = None

    def sample(self, trainer: Trainer, pl_module: LightningModule) -> GradientSample | None:
        """Gradients at the weights as they are, the same on all ranks; ``None`` where there is an obstacle.

        A second monitor that asks at the same step gets what the first one got.

        Args:
            trainer: Knows ranks, data and precision.
            pl_module: The module.
        """
        if self.obstacle(trainer, pl_module) is not None:
            return None
        if self._last is None or self._last.step != trainer.global_step:
            self._last = self._collect(trainer, pl_module)
        return self._last

    def coordinates(self, pl_module: LightningModule) -> Coordinates:
        """Which coordinates are kept, of the parameters that are trained.

        Args:
            pl_module: The module.
        """
        sizes = {
            name.replace("_orig_mod.", ""): param.numel()
            for name, param in pl_module.named_parameters()
            if param.requires_grad
        }
        return Coordinates(sizes, self.num_coordinates, self.seed)

    def _collect(self, trainer: Trainer, pl_module: LightningModule) -> GradientSample:
        coordinates = self.coordinates(pl_module)
        loader: DataLoader[Any] = trainer.train_dataloader  # type: ignore[assignment]  # see `obstacle`
        size = self._size_of_batch(loader)
        assert size is not None
        step, rank, num_ranks = trainer.global_step, trainer.global_rank, trainer.world_size
        generator = torch.Generator().manual_seed(_mixed(self.seed, step, 0))
        torch.manual_seed(_mixed(self.seed, step, rank + 1))  # dropout and augmentation
        num_each = -(-self.num_gradients // num_ranks)
        rows = []
        with _measuring(pl_module, self.train_mode):
            for number in range(num_each * num_ranks):
                draw = torch.randint(_length(loader), (size,), generator=generator).tolist()
                if number % num_ranks == rank:
                    batch = _to_device(_fetch(loader, draw), trainer)
                    gradient = self._gradient(trainer, pl_module, batch)
                    rows.append(coordinates.of(gradient))
        table = _gather(torch.stack(rows), num_ranks)
        return GradientSample(table, size, coordinates.layers, step).finite()

    def _gradient(self, trainer: Trainer, module: LightningModule, batch: Any) -> list[Tensor]:
        params = [param for param in module.parameters() if param.requires_grad]
        with torch.enable_grad(), trainer.precision_plugin.train_step_context():
            loss = self.loss_fn(module, batch) if self.loss_fn else _training_loss(module, batch)
        gradients = torch.autograd.grad(loss, params, allow_unused=True)
        return [
            torch.zeros_like(param) if gradient is None else gradient.detach()
            for param, gradient in zip(params, gradients, strict=True)
        ]

    def _size_of_batch(self, loader: DataLoader[Any]) -> int | None:
        sampler = getattr(loader.batch_sampler, "batch_size", None)
        return self.batch_size or loader.batch_size or sampler


@contextmanager
def _measuring(module: LightningModule, train_mode: bool) -> Iterator[None]:
    """Forward passes leave no trace: what changes is put back, and what is logged goes nowhere."""
    with module_state_kept(module):
        vars(module)["log"] = _log_nothing
        vars(module)["log_dict"] = _log_nothing
        for part in module.modules():
            part.training = part.training and train_mode
        yield


def _log_nothing(*_: Any, **__: Any) -> None:
    pass


def _training_loss(module: LightningModule, batch: Any) -> Tensor:
    step: Callable[..., Any] = module.training_step
    takes_index = is_param_in_hook_signature(step, "batch_idx", min_args=2)
    output = step(batch, 0) if takes_index else step(batch)
    loss = output.get("loss") if isinstance(output, dict) else output
    if not isinstance(loss, Tensor):
        raise TypeError(
            f"Expected `training_step` to return a loss, got {type(loss).__name__}. Give `loss_fn`, a function of "
            "module and batch."
        )
    return loss


def _fetch(loader: DataLoader[Any], indices: list[int]) -> Any:
    """A batch of these samples, as a worker of the loader would make it."""
    dataset: Any = loader.dataset
    whole = getattr(dataset, "__getitems__", None)
    return loader.collate_fn(whole(indices) if whole else [dataset[index] for index in indices])


def _length(loader: DataLoader[Any]) -> int:
    return len(loader.dataset)  # type: ignore[arg-type]  # map-style, see `obstacle`


def _to_device(batch: Any, trainer: Trainer) -> Any:
    batch = trainer.precision_plugin.convert_input(batch)
    return trainer.strategy.batch_to_device(batch, dataloader_idx=0)


def _gather(rows: Tensor, num_ranks: int) -> Tensor:
    """The rows of all ranks, in the order of their batches."""
    if num_ranks == 1:
        return rows
    parts = [torch.empty_like(rows) for _ in range(num_ranks)]
    dist.all_gather(parts, rows)
    return torch.stack(parts, dim=1).flatten(0, 1)


def _mixed(*numbers: int) -> int:
    """One seed of several numbers, different for different ones."""
    seed = 0
    for number in numbers:
        seed = (seed * 1_000_003 + number + 0x9E3779B9) % 2**63
    return seed
