"""A small training on several real processes, what every rank saw of it, and the same in plain loops."""

from __future__ import annotations

import multiprocessing
from datetime import timedelta

import torch
import torch.distributed as dist
from lightning.pytorch import Callback, seed_everything
from lightning.pytorch.strategies import DDPStrategy
from torch.utils.data import DataLoader, Sampler, TensorDataset

from support.training import Regression, loss_of, network, trainer

NUM_SAMPLES, GLOBAL_BATCH = 56, 8
NUM_BATCHES = NUM_SAMPLES // GLOBAL_BATCH
FORK = {"start_method": "fork", "timeout": timedelta(seconds=20)}


def samples():
    """The same data every time."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(NUM_SAMPLES, 4, generator=generator)
    return TensorDataset(x, x.sum(dim=1, keepdim=True).sin())


class InTurns(Sampler):
    """Deals the samples out to the ranks in turns, in the same order every epoch.

    Lightning's own sampler shuffles in training.
    """

    def __init__(self, num_ranks):
        self.num_ranks = num_ranks

    def __iter__(self):
        rank = dist.get_rank() if dist.is_initialized() else 0
        return iter(range(rank, NUM_SAMPLES, self.num_ranks))

    def __len__(self):
        return NUM_SAMPLES // self.num_ranks


def loader(num_ranks):
    """So many samples a batch that all ranks together have the same global batches, whatever their number."""
    batch_size = GLOBAL_BATCH // num_ranks
    return DataLoader(samples(), batch_size, sampler=InTurns(num_ranks))


def sgd(params):
    """What most tests train with."""
    return torch.optim.SGD(params, lr=0.1, momentum=0.9, weight_decay=0.01)


def flat(module):
    """All parameters in a row."""
    return torch.cat([param.detach().reshape(-1) for param in module.parameters()])


def simulate(make, num_ranks, averages_after, *, epochs=2, exact=torch.float64):
    """Every rank's weights after every step, in plain PyTorch: ``averages_after(step)`` says whether to average."""
    nets = [network().to(exact) for _ in range(num_ranks)]
    optimizers = [make(net.parameters()) for net in nets]
    x, y = (tensor.to(exact) for tensor in samples().tensors)
    trace = []
    for step in range(1, epochs * NUM_BATCHES + 1):
        begin = (step - 1) % NUM_BATCHES * GLOBAL_BATCH
        for rank, (net, optimizer) in enumerate(zip(nets, optimizers, strict=True)):
            mine = slice(begin + rank, begin + GLOBAL_BATCH, num_ranks)
            optimizer.zero_grad()
            loss_of(net, (x[mine], y[mine])).backward()
            optimizer.step()
        if averages_after(step):
            with torch.no_grad():
                for params in zip(*(net.parameters() for net in nets), strict=True):
                    mean = sum(params) / num_ranks
                    for param in params:
                        param.copy_(mean)
        trace.append([flat(net) for net in nets])
    return trace


class Recorder(Callback):
    """Writes down the weights of its rank.

    Args:
        folder: Where the record of each rank goes.
    """

    def __init__(self, folder):
        self.folder = folder
        self.record = {"trace": [], "validated": [], "buffers": [], "metrics": []}

    def on_train_batch_end(self, trainer, pl_module, *args):
        self.record["trace"].append(flat(pl_module))
        self.record["metrics"].append({k: float(v) for k, v in trainer.callback_metrics.items()})

    def on_validation_epoch_start(self, trainer, pl_module):
        if not trainer.sanity_checking:
            self.record["validated"].append(flat(pl_module))

    def on_fit_end(self, trainer, pl_module):
        self.record["final"] = flat(pl_module)
        self.record["buffers"] = [buffer.clone() for buffer in pl_module.buffers()]
        self.record["optimizers"] = [optimizer.state_dict() for optimizer in trainer.optimizers]
        self.record["num_steps"] = trainer.global_step
        replicas = getattr(trainer.strategy, "replicas", [])
        self.record["replica_steps"] = [replica.num_steps for replica in replicas]
        self.write(trainer)

    def write(self, trainer):
        """To the file of this rank."""
        torch.save(self.record, f"{self.folder}/{trainer.global_rank}.pt")


class Run:
    """One training and what came of it.

    Attributes:
        ranks: The record of every rank.
        lines: What rank 0 said, in the main process or before processes were started.
    """

    def __init__(
        self,
        folder,
        strategy,
        module=None,
        *,
        ranks=2,
        data=None,
        val=None,
        resume=None,
        **settings,
    ):
        folder.mkdir(exist_ok=True, parents=True)
        seed_everything(0, verbose=False)
        self.module = Regression(sgd) if module is None else module
        callbacks = [Recorder(folder), *settings.pop("callbacks", [])]
        own_data = data is not None
        defaults = {"num_sanity_val_steps": 0, "use_distributed_sampler": own_data}
        settings = {**defaults, **settings}
        self.trainer = trainer(
            folder, devices=ranks, strategy=strategy, callbacks=callbacks, **settings
        )
        data = loader(ranks) if data is None else data
        loaders = {} if hasattr(data, "setup") else {"val_dataloaders": val}
        key = "datamodule" if hasattr(data, "setup") else "train_dataloaders"
        try:
            self.trainer.fit(self.module, **{key: data}, **loaders, ckpt_path=resume)
        finally:
            for child in multiprocessing.active_children():
                child.kill()
        self.ranks = [
            torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(ranks)
        ]

    @property
    def trace(self):
        """By step, the weights of every rank."""
        return list(zip(*(record["trace"] for record in self.ranks), strict=True))


def ddp():
    """The peer, which gives up instead of hanging, and adds up in the same order after every start."""
    return DDPStrategy(**FORK, find_unused_parameters=True)


def spread(weights):
    """Largest difference between ranks."""
    return max(float((each - weights[0]).abs().max()) for each in weights)
