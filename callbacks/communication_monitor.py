"""Watches what the ranks send each other, how long they wait for it, and how far apart their models are."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import torch
import torch.distributed as dist
from lightning.pytorch import LightningModule, Trainer

from lightning_sgd._validation import expect
from lightning_sgd.callbacks._monitoring.monitor import Monitor
from lightning_sgd.callbacks._traffic_source import TrafficSource, find_source, holds_whole_model
from lightning_sgd.functional.distributed.flat_buffers import (
    FlatBuffers,
    consensus_distance,
    distance,
)
from lightning_sgd.functional.distributed.traffic import Traffic, blocked_share, traffic_table


class CommunicationMonitor(Monitor):
    r"""Logs what ranks send, how long they wait for each other, and how far apart their models are.

    Means over the ranks, and over the steps since the last look:

    - ``communication/bytes_per_step`` and ``communication/messages_per_step``, sent by a rank,
    - ``communication/blocked_seconds_per_step``, in which a rank waited for an exchange,
    - ``communication/blocked_share``, the same as a part of the training time,
    - ``communication/consensus_distance``, :math:`\sqrt{\frac1n \sum_i \|x_i - \bar x\|^2}` over the n models.

    Strategies of this package count for themselves. Of DDP only the bytes of gradients and buffers are known; of other
    strategies nothing but, perhaps, the distance. The rest is logged as NaN, and the line at the start says so.

    Cost: a gather of four numbers per look, and for the distance an all-reduce of the parameters in float64 and as
    much memory for as long as that takes. What the monitor itself sends is not counted. Training is not changed, to
    the last bit.

    Args:
        every_n_steps: Look after so many optimizer steps; by default after every 50.
        every_n_epochs: Look after so many epochs; instead of ``every_n_steps``.
        distance_every_n_looks: Take the distance at one in so many looks, the first one included; 0 for never. It is
            zero right after an average: an interval that shares no factor with the period sees all of a round.
        max_overhead: Largest share of the training time for looking, which the interval is stretched to keep; null
            never stretches it.
        save_table: Save a table, one row per rank, as ``communication.md`` in the log folder at the end.

    Raises:
        ValueError: If an argument is out of range, or both intervals are given.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> trainer = Trainer(callbacks=[CommunicationMonitor(every_n_steps=25)], logger=False)
    """

    metric_keys: ClassVar[tuple[str, ...]] = (
        "communication/bytes_per_step",
        "communication/messages_per_step",
        "communication/blocked_seconds_per_step",
        "communication/blocked_share",
        "communication/consensus_distance",
    )

    def __init__(
        self,
        every_n_steps: int | None = None,
        every_n_epochs: int | None = None,
        distance_every_n_looks: int = 1,
        max_overhead: float | None = 0.01,
        save_table: bool = True,
    ) -> None:
        steps = 50 if every_n_steps is None and every_n_epochs is None else every_n_steps
        super().__init__(steps, every_n_epochs, max_overhead)
        expect(
            distance_every_n_looks >= 0,
            "distance_every_n_looks",
            "at least 0",
            distance_every_n_looks,
            "0 never takes the distance.",
        )
        self.distance_every_n_looks, self.save_table = distance_every_n_looks, save_table
        self._interval = (steps, every_n_epochs)
        self.source: TrafficSource | None = None
        self._forget()

    def _forget(self) -> None:
        self.ranks: list[list[float]] = []  # by rank: bytes, messages, seconds blocked, seconds
        self.num_looks, self.num_steps = 0, 0
        self.distance, self.largest_distance = math.nan, math.nan
        self._carried = [0.0] * 4
        self._mark, self._clock, self._steps_at_look = Traffic(), 0.0, 0

    @property
    def state_key(self) -> str:
        """Tells instances with different settings apart in a checkpoint."""
        return self._generate_state_key(
            interval=list(self._interval), distance_every_n_looks=self.distance_every_n_looks
        )

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Forget an earlier training, unless this one goes on from its checkpoint."""
        restored = self._restored
        super().on_fit_start(trainer, pl_module)
        if not restored:
            self._forget()
            self._steps_at_look = trainer.global_step

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Find out who counts; then look for the first time."""
        self.source = find_source(trainer)
        self._mark, self._clock = self.source.read(), time.perf_counter()
        if len(self.ranks) != trainer.world_size:
            self.ranks = [[0.0] * 4 for _ in range(trainer.world_size)]
        super().on_train_start(trainer, pl_module)

    def on_after_backward(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Count, where the strategy does not."""
        if self.source is not None:
            self.source.after_backward()

    def look(self, trainer: Trainer, pl_module: LightningModule) -> Mapping[str, float]:
        """Gather what the ranks have sent and waited, and compare their models, if it is time to."""
        values = self._traffic_of_all(trainer)
        every = self.distance_every_n_looks
        if every and self.num_looks % every == 0 and holds_whole_model(trainer):
            self.distance = _distance(trainer, pl_module)
            known = [x for x in (self.distance, self.largest_distance) if not math.isnan(x)]
            self.largest_distance = max(known, default=math.nan)
            values["consensus_distance"] = self.distance
        self.num_looks += 1
        return {f"communication/{name}": value for name, value in values.items()}

    def _traffic_of_all(self, trainer: Trainer) -> dict[str, float]:
        assert self.source is not None
        steps = trainer.global_step - self._steps_at_look
        gathered = _gather(trainer, self._pending())
        self.ranks = [
            [total + part for total, part in zip(totals, parts, strict=True)]
            for totals, parts in zip(self.ranks, gathered, strict=True)
        ]
        self.num_steps += steps
        self._carried, self._steps_at_look = [0.0] * 4, trainer.global_step
        # Together, or a rank would seem to wait for longer than there is time.
        self._mark, self._clock = self.source.read(), time.perf_counter()
        means = [sum(column) / len(gathered) for column in zip(*gathered, strict=True)]
        return _per_step(*_as_traffic(means, steps)) if steps else {}

    def _pending(self) -> list[float]:
        """What this rank has sent and waited since the last look, and in how many seconds."""
        if self.source is None:
            return self._carried
        new, seconds = self.source.read() - self._mark, time.perf_counter() - self._clock
        counts = (new.num_bytes, new.num_messages, new.seconds, seconds)
        return [old + count for old, count in zip(self._carried, counts, strict=True)]

    def announce(self, trainer: Trainer, pl_module: LightningModule) -> str:
        """What is counted, and by whom."""
        assert self.source is not None
        every = self.distance_every_n_looks
        looks = "every look" if every == 1 else f"every {every} looks"
        distance = f"the distance between models at {looks}" if every else "no distance"
        if every and not holds_whole_model(trainer):
            distance = "no distance, because ranks hold parts of the model"
        return f"{self.source.description}, {distance}"

    def conclude(self, trainer: Trainer, pl_module: LightningModule) -> str:
        """Means per step; saves the table."""
        traffic, seconds = self._mean()
        per_step = _per_step(traffic, seconds)
        parts = [
            f"{_known(per_step['bytes_per_step'], 1e-3)} kB",
            f"{_known(per_step['messages_per_step'])} messages sent",
            f"{_known(per_step['blocked_seconds_per_step'], 1e3)} ms blocked",
        ]
        found = (
            f"{self.num_steps} steps, per rank and step {', '.join(parts)} "
            f"({_known(per_step['blocked_share'], 100)} % of the time)"
        )
        if not math.isnan(self.distance):
            found += f", consensus distance at most {self.largest_distance:.4g}, at last {self.distance:.4g}"
        return f"{found}.{self._save_table(trainer)}"

    def table(self) -> str:
        """What every rank has sent and waited until the last look, in Markdown."""
        return traffic_table([self._of(row) for row in self.ranks])

    def _of(self, row: list[float]) -> tuple[Traffic, float]:
        return _as_traffic(row, self.num_steps)

    def _mean(self) -> tuple[Traffic, float]:
        columns = zip(*self.ranks, strict=True)
        return self._of([sum(column) / len(self.ranks) for column in columns])

    def _save_table(self, trainer: Trainer) -> str:
        if not self.save_table or getattr(trainer, "fast_dev_run", False):
            return ""
        # On all ranks, because a logger may ask the first one for its folder.
        folder = Path(trainer.log_dir or trainer.default_root_dir)
        if not trainer.is_global_zero:
            return ""
        folder.mkdir(parents=True, exist_ok=True)
        file = folder / "communication.md"
        file.write_text(self.table() + "\n")
        return f" Table: {file}"

    def state_dict(self) -> dict[str, Any]:
        """What was sent and waited so far, and when to look next."""
        return {
            **super().state_dict(),
            "ranks": [list(row) for row in self.ranks],
            "num_looks": self.num_looks,
            "num_steps": self.num_steps,
            "distance": self.distance,
            "largest_distance": self.largest_distance,
            "pending": self._pending()[:2],
            "steps_at_look": self._steps_at_look,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on counting; what other ranks had sent since the last look is taken to be what rank 0 had."""
        super().load_state_dict(state_dict)
        self.source, self._mark = None, Traffic()
        self.ranks = [list(row) for row in state_dict["ranks"]]
        self.num_looks, self.num_steps = state_dict["num_looks"], state_dict["num_steps"]
        self.distance = state_dict["distance"]
        self.largest_distance = state_dict["largest_distance"]
        # Of bytes and messages; the time before the interruption is left out, that of waiting and the whole alike.
        self._carried = [*state_dict["pending"], 0.0, 0.0]
        self._steps_at_look = state_dict["steps_at_look"]


def _as_traffic(row: list[float], num_steps: int) -> tuple[Traffic, float]:
    num_bytes, num_messages, blocked, seconds = row
    return Traffic(num_bytes, num_messages, blocked, num_steps), seconds


def _per_step(traffic: Traffic, seconds: float) -> dict[str, float]:
    means = {key.removeprefix("comm/"): value for key, value in traffic.per_step().items()}
    return {**means, "blocked_share": blocked_share(traffic, seconds)}


def _known(value: float, scale: float = 1.0) -> str:
    return "an unknown number of" if math.isnan(value) else f"{scale * value:.4g}"


def _gather(trainer: Trainer, numbers: list[float]) -> list[list[float]]:
    """The numbers of every rank; a collective if there are several."""
    if trainer.world_size == 1:
        return [numbers]
    mine = torch.tensor(numbers, dtype=torch.float64, device=trainer.strategy.root_device)
    all_of_them = [torch.empty_like(mine) for _ in range(trainer.world_size)]
    dist.all_gather(all_of_them, mine)
    return [each.tolist() for each in all_of_them]


def _distance(trainer: Trainer, pl_module: LightningModule) -> float:
    """Of the trainable parameters, without touching them."""
    trained = [param.detach() for param in pl_module.parameters() if param.requires_grad]
    if trainer.world_size == 1 or not trained:
        return 0.0
    # In float64 the mean of equal models is that model, and the distance exactly zero.
    flat = FlatBuffers(trained, exact=True)
    flat.pack()
    for buffer in flat.buffers:
        dist.all_reduce(buffer)
        buffer.div_(trainer.world_size)
    gathered = _gather(trainer, [float(distance(flat.tensors, flat.views)) ** 2])
    return consensus_distance([squared for (squared,) in gathered])
