"""Measure the scores of all samples by a pass over the data without side effects."""

from __future__ import annotations

from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities.signature_utils import is_param_in_hook_signature
from torch import Tensor
from torch.utils.data import DataLoader

from lightning_sgd._distributed import gather
from lightning_sgd.callbacks._monitoring.extra_batches import to_device
from lightning_sgd.callbacks._monitoring.module_state import random_states_kept
from lightning_sgd.callbacks.priority_sampling.borrowed import side_effect_free_eval
from lightning_sgd.callbacks.priority_sampling.run import PriorityRun
from lightning_sgd.sampling.batch_rows import BatchRows, FollowedBatch, FollowedCollate
from lightning_sgd.sampling.priority_loader import check_rows
from lightning_sgd.sampling.priority_table import UNKNOWN


def refreshed_scores(trainer: Trainer, module: LightningModule, run: PriorityRun) -> Tensor:
    """Measure the score of every sample with the current weights; each rank measures a part."""
    num, size = run.sampler.num_in_dataset, run.sampler.batch_size
    num_each = -(-num // run.sampler.num_replicas)
    first = run.sampler.rank * num_each
    own = torch.arange(first, first + num_each).clamp(max=num - 1)
    with (
        random_states_kept(),
        side_effect_free_eval(module),
        trainer.precision_plugin.train_step_context(),
    ):
        parts = [
            _measured(trainer, module, run, number, len(indices), followed)
            for number, (indices, followed) in enumerate(_batches(trainer, own, size))
        ]
    scores = gather(torch.cat(parts), run.sampler.num_replicas)
    return scores.flatten()[:num].cpu()


def _measured(
    trainer: Trainer,
    module: LightningModule,
    run: PriorityRun,
    number: int,
    num: int,
    followed: FollowedBatch,
) -> Tensor:
    """Measure the scores of ``num`` samples; those that the ``collate_fn`` dropped stay unknown."""
    rows = followed.rows if followed.rows.num_items == num else BatchRows(num)
    check_rows(rows)
    if followed.batch is None:
        return torch.full((num,), UNKNOWN, device=module.device)
    scores = run.measured(_step(module, number), to_device(followed.batch, trainer), len(rows))
    return rows.of_samples(scores, UNKNOWN)


def _batches(trainer: Trainer, indices: Tensor, size: int) -> Any:
    loader: Any = trainer.train_dataloader
    batches = [indices[i : i + size].tolist() for i in range(0, len(indices), size)]
    settings = {
        "collate_fn": FollowedCollate(loader.collate_fn),
        "num_workers": loader.num_workers,
    }
    inner = DataLoader(
        loader.dataset, batch_sampler=batches, generator=torch.Generator(), **settings
    )
    return zip(batches, inner, strict=True)


def _step(module: LightningModule, number: int) -> Any:
    if is_param_in_hook_signature(module.training_step, "batch_idx", min_args=2):
        return lambda batch: module.training_step(batch, number)
    return module.training_step
