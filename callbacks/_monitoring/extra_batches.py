"""Take batches as training gets them, and compute their gradients without side effects."""

from __future__ import annotations

import copy
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import islice
from typing import Any, TypeAlias

import torch
from lightning.fabric.utilities.seed import pl_worker_init_function
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities.signature_utils import is_param_in_hook_signature
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    DistributedSampler,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
)

from lightning_sgd.callbacks._monitoring.module_state import iterator_in, module_state_kept
from lightning_sgd.data.resumable import ResumableDataLoader
from lightning_sgd.sampling.priority_loader import PriorityDataLoader
from lightning_sgd.sampling.priority_sampler import PrioritySampler

LossFunction: TypeAlias = Callable[[LightningModule, Any], Tensor]


def obstacle_to_extra_batches(
    trainer: Trainer,
    pl_module: LightningModule,
    loss_fn: LossFunction | None,
    batch_size: int | None = None,
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
    is_other = batch_size is not None and batch_size != size_of_batches(loader)
    if is_other and not (draws_from_all_rows(trainer, loader) or _has_plain_batches(loader)):
        return (
            f"the data loader makes batches of its own, so that `batch_size` cannot be {batch_size}"
        )
    kind = iterator_in(pl_module) if loss_fn is None else None
    if kind is not None:
        return f"the module holds a {kind}, which an extra pass would advance for good"
    return None


def draws_from_all_rows(trainer: Trainer, loader: DataLoader[Any]) -> bool:
    """Return whether training takes batches from all rows of the data set alike, and any process can read these."""
    if trainer.overfit_batches or _has_worker_init(loader):  # type: ignore[attr-defined]  # set by a connector
        return False
    sampler, dataset = _sampler(loader), _sized(loader.dataset)
    if isinstance(loader, PriorityDataLoader) or type(sampler) is PrioritySampler:
        return True
    if not _has_plain_batches(loader):
        return False
    if type(sampler) is DistributedSampler:
        return len(_sized(sampler.dataset)) == len(dataset)
    known = type(sampler) in (RandomSampler, SequentialSampler)
    return known and len(sampler.data_source) == len(dataset)


def extra_batches(
    trainer: Trainer, loader: DataLoader[Any], size: int, num_each: int, generator: torch.Generator
) -> Generator[Any, None, None]:
    """Yield this rank's share of the batches, on its device.

    Where training takes all rows alike, rows are drawn with replacement, by a generator that is equal on all ranks:
    every rank draws every batch, but loads only its own. Otherwise the batches are those of another iteration of the
    user's loader, with its samplers, workers, and whatever a subclass does.

    Args:
        trainer: Knows ranks and device.
        loader: The training data loader.
        size: Samples of a batch; of no effect where the loader makes batches of its own.
        num_each: Batches of each rank.
        generator: Of the draws.
    """
    if not draws_from_all_rows(trainer, loader):
        for batch in islice(_iteration(trainer, loader, size), num_each):
            yield to_device(batch, trainer)
        return
    length, num_ranks = len(loader.dataset), trainer.world_size  # type: ignore[arg-type]  # map-style
    for number in range(num_each * num_ranks):
        draw = torch.randint(length, (size,), generator=generator).tolist()
        if number % num_ranks == trainer.global_rank:
            yield to_device(_fetch(loader, draw), trainer)


def _iteration(trainer: Trainer, loader: DataLoader[Any], size: int) -> Iterator[Any]:
    """Yield the batches of a copy of the loader, epoch after epoch; of complete batches if there are any."""
    clone = copy.copy(loader)
    if isinstance(clone, ResumableDataLoader):
        clone._indices = copy.copy(clone._indices)
    # Not by assignment, which DataLoader forbids after construction.
    own = vars(clone)
    own["_iterator"], own["persistent_workers"] = None, False
    if _has_plain_batches(loader):
        sampler = _sampler(loader)
        is_enough = not hasattr(sampler, "__len__") or size <= len(sampler)
        own["batch_sampler"] = BatchSampler(sampler, size, drop_last=is_enough)
        if isinstance(clone, ResumableDataLoader):  # keeps a reference to the old one
            clone._indices.indices = own["batch_sampler"]
    # With `overfit_batches` training sees no others.
    last = int(trainer.num_training_batches) if trainer.overfit_batches else None  # type: ignore[attr-defined]  # set by a connector
    is_empty = False
    while not is_empty:
        is_empty = True
        for batch in islice(clone, last):
            is_empty = False
            yield batch


def size_of_batches(loader: DataLoader[Any]) -> int | None:
    """Return the number of samples of a complete batch; ``None`` if the loader does not tell."""
    size: int | None = loader.batch_size or getattr(loader.batch_sampler, "batch_size", None)
    return size


def _sampler(loader: DataLoader[Any]) -> Any:
    # Where the user gives a batch sampler, `loader.sampler` is not in use.
    return getattr(loader.batch_sampler, "sampler", loader.sampler)


def _sized(dataset: Any) -> Any:
    """Return a data set, as something that has a length, which torch's type does not promise."""
    return dataset


def _has_plain_batches(loader: DataLoader[Any]) -> bool:
    """Return whether batches are groups of what the sampler yields, collated, and nothing else."""
    kind = type(loader)
    same = kind.__iter__ is DataLoader.__iter__ and kind._get_iterator is DataLoader._get_iterator
    return (same or kind is ResumableDataLoader) and type(loader.batch_sampler) is BatchSampler


def _has_worker_init(loader: DataLoader[Any]) -> bool:
    """Return whether workers prepare something that the data set needs; Lightning's function only seeds them."""
    function: Any = loader.worker_init_fn
    if isinstance(function, partial):
        function = function.func
    return loader.num_workers > 0 and function not in (None, pl_worker_init_function)


def num_samples(batch: Any) -> int | None:
    """Return the length of the first tensor of a batch; ``None`` if there is none."""
    leaves = tree_leaves(batch)
    return next((len(x) for x in leaves if isinstance(x, Tensor) and x.ndim), None)


def gradient_of(
    trainer: Trainer, module: LightningModule, batch: Any, loss_fn: LossFunction | None
) -> list[Tensor] | None:
    """Compute the gradient of each trained parameter; zero for parameters that the loss does not use.

    By ``torch.autograd.grad``, which leaves ``.grad`` and the hooks of DDP alone. ``None`` where the step skips the
    batch, as Lightning allows.
    """
    params = [param for param in module.parameters() if param.requires_grad]
    loss = _loss(trainer, module, batch, loss_fn)
    if loss is None:
        return None
    found: Sequence[Tensor | None]
    if not _has_reentrant_checkpoint(loss):
        found = torch.autograd.grad(loss, params, allow_unused=True)
    else:
        # Such a checkpoint knows only `backward`. Its gradients go to other leaves that share the memory of the
        # parameters, so that neither `.grad` nor hooks of the parameters see anything.
        leaves = [nn.Parameter(param.detach()) for param in params]
        with _replaced(module, dict(zip(params, leaves, strict=True))):
            loss = _loss(trainer, module, batch, loss_fn)
            if loss is None:
                return None
            loss.backward()
        found = [leaf.grad for leaf in leaves]
    return [
        torch.zeros_like(param) if gradient is None else gradient.detach()
        for param, gradient in zip(params, found, strict=True)
    ]


def _loss(
    trainer: Trainer, module: LightningModule, batch: Any, loss_fn: LossFunction | None
) -> Tensor | None:
    with torch.enable_grad(), trainer.precision_plugin.train_step_context():
        return loss_fn(module, batch) if loss_fn else _training_loss(module, batch)


def _has_reentrant_checkpoint(loss: Tensor) -> bool:
    """Return whether the graph has a part that is computed again in ``backward``, and hides its parameters."""
    waiting, seen = [loss.grad_fn], set()
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if node.name() == "CheckpointFunctionBackward":
            return True
        waiting += [following for following, _ in node.next_functions]
    return False


@contextmanager
def _replaced(module: nn.Module, replacements: dict[nn.Parameter, nn.Parameter]) -> Iterator[None]:
    places = [
        (part, name, param)
        for part in module.modules()
        for name, param in part._parameters.items()
        if param in replacements
    ]
    try:
        for part, name, param in places:
            setattr(part, name, replacements[param])  # which recurrent layers notice
        yield
    finally:
        for part, name, param in places:
            setattr(part, name, param)


@contextmanager
def side_effect_free(
    module: LightningModule, train_mode: bool, loader: DataLoader[Any] | None = None
) -> Iterator[None]:
    """Restore afterwards what forward passes and loading change, and discard what they log.

    Args:
        module: The module.
        train_mode: Whether dropout and batch normalisation behave as in training, or as in evaluation.
        loader: The data loader from which batches are taken.
    """
    with module_state_kept(module, loader):
        vars(module)["log"] = _log_nothing
        vars(module)["log_dict"] = _log_nothing
        for part in module.modules():
            part.training = part.training and train_mode
        yield


def _log_nothing(*_: Any, **__: Any) -> None:
    pass


def _training_loss(module: LightningModule, batch: Any) -> Tensor | None:
    step: Callable[..., Any] = module.training_step
    takes_index = is_param_in_hook_signature(step, "batch_idx", min_args=2)
    output = step(batch, 0) if takes_index else step(batch)
    loss = output.get("loss") if isinstance(output, dict) else output
    if loss is not None and not isinstance(loss, Tensor):
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
