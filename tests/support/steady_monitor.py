"""A monitor that does everything a monitor might do, and does it well; the suite for callbacks is tried out on it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from lightning.pytorch import Callback
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from torch.nn.functional import cross_entropy


class SteadyMonitor(Callback):
    """Logs the gradient norm of each layer on a fixed batch of noise.

    Args:
        every_n_steps: Interval.
    """

    def __init__(self, every_n_steps: int = 1) -> None:
        self.every_n_steps = every_n_steps
        self.reset()

    def reset(self):
        self.last_step, self.largest = -1, 0.0

    @property
    def state_key(self):
        return self._generate_state_key(every_n_steps=self.every_n_steps)

    def state_dict(self) -> dict[str, Any]:
        return {"last_step": self.last_step, "largest": self.largest}

    def load_state_dict(self, state_dict):
        self.last_step, self.largest = state_dict["last_step"], state_dict["largest"]

    def setup(self, trainer, pl_module, stage):
        if stage == "fit" and trainer.global_step == 0:
            self.reset()

    def on_train_start(self, trainer, pl_module):
        rank_zero_info(f"{type(self).__name__}: looks every {self.every_n_steps} steps.")
        self.look_if_due(trainer, pl_module)

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.look_if_due(trainer, pl_module)

    def on_train_end(self, trainer, pl_module):
        rank_zero_info(f"{type(self).__name__}: the largest norm was {self.largest:.3f}.")

    def look_if_due(self, trainer, pl_module):
        step = trainer.global_step
        if step > self.last_step and step % self.every_n_steps == 0:
            self.last_step = step
            values = self.look(trainer, pl_module)
            self.largest = max(self.largest, *values.values())
            self.log_values(trainer, pl_module, values)

    def log_values(self, trainer, pl_module, values):
        for logger in trainer.loggers:
            logger.log_metrics(values, step=trainer.global_step)

    def look(self, trainer, pl_module) -> Mapping[str, float]:
        modes = {module: module.training for module in pl_module.modules()}
        pl_module.eval()
        try:
            # isolate_rng of Lightning would not restore the states when something fails.
            with torch.random.fork_rng(), torch.autocast("cpu", enabled=False):
                return self.measure(trainer, pl_module)
        finally:
            for module, mode in modes.items():
                module.training = mode

    def measure(self, trainer, pl_module):
        torch.manual_seed(0)
        images, labels = torch.rand(8, 64), torch.arange(8)
        weights = {
            name.replace("_orig_mod.", "").removesuffix(".weight"): param
            for name, param in pl_module.named_parameters()
            if param.ndim == 2
        }
        loss = cross_entropy(pl_module(images), labels)
        gradients = torch.autograd.grad(loss, list(weights.values()))
        norms = [gradient.norm() for gradient in gradients]
        return {f"steady/norm/{name}": n.item() for name, n in zip(weights, norms, strict=True)}
