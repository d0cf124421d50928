"""Draw batches from the training data, and compute their gradients without side effects."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeAlias

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities.signature_utils import is_param_in_hook_signature
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset

from lightning_sgd.callbacks._monitoring.module_state import module_state_kept

LossFunction: TypeAlias = Callable[[LightningModule, Any], Tensor]


def obstacle_to_extra_batches(
    trainer: Trainer, pl_module: LightningModule, loss_fn: LossFunction | None
) -> str | None:
    """Return the reason why batches cannot be drawn or have no known loss; ``None`` if there is none."""
    if loss_fn is None and not pl_module.automatic_optimization:
        return "in manual optimization only `loss_fn` can say what the loss is"
    takes_iterator = is_param_in_hook_signature(
        pl_module.training_step, "dataloader_iter", explicit=True
    )
    if loss_fn is None and takes_iterator:
        return "`training_step` takes an iterator, so that only `loss_fn` can say what the loss is"
    loader = trainer.train_dataloader
    if not isinstance(loader, DataLoader) or isinstance(loader.dataset, IterableDataset):
        return "batches can be drawn from a single DataLoader with a map-style data set only"
    return None


def draw_batch(
    trainer: Trainer, loader: DataLoader[Any], size: int, generator: torch.Generator
) -> Callable[[], Any]:
    """Draw ``size`` samples with replacement, and return a function that loads them to the device.

    Every rank draws every batch, so that all generators stay equal, but loads only its own.
    """
    length = len(loader.dataset)  # type: ignore[arg-type]  # map-style, see `obstacle_to_extra_batches`
    draw = torch.randint(length, (size,), generator=generator).tolist()
    return lambda: to_device(_fetch(loader, draw), trainer)


def gradient_of(
    trainer: Trainer, module: LightningModule, batch: Any, loss_fn: LossFunction | None
) -> list[Tensor]:
    """Compute the gradient of each trained parameter; zero for parameters that the loss does not use.

    By ``torch.autograd.grad``, which leaves ``.grad`` and the hooks of DDP alone.
    """
    params = [param for param in module.parameters() if param.requires_grad]
    with torch.enable_grad(), trainer.precision_plugin.train_step_context():
        loss = loss_fn(module, batch) if loss_fn else _training_loss(module, batch)
    gradients = torch.autograd.grad(loss, params, allow_unused=True)
    return [
        torch.zeros_like(param) if gradient is None else gradient.detach()
        for param, gradient in zip(params, gradients, strict=True)
    ]


@contextmanager
def side_effect_free(module: LightningModule, train_mode: bool) -> Iterator[None]:
    """Restore afterwards what forward passes change, and discard what they log.

    Args:
        module: The module.
        train_mode: Whether dropout and batch normalisation behave as in training, or as in evaluation.
    """
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
    """Load a batch of these samples as a worker of the loader does."""
    dataset: Any = loader.dataset
    whole = getattr(dataset, "__getitems__", None)
    return loader.collate_fn(whole(indices) if whole else [dataset[index] for index in indices])


def to_device(batch: Any, trainer: Trainer) -> Any:
    """Move a batch to the device and the precision of the training."""
    batch = trainer.precision_plugin.convert_input(batch)
    return trainer.strategy.batch_to_device(batch, dataloader_idx=0)
