"""Monitor what the ranks send each other, how long they wait for it, and how far apart their models are."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from lightning.pytorch import LightningModule, Trainer

from lightning_sgd._distributed import gather_numbers, reduce_mean
from lightning_sgd._run_log import log_folder, reporting, save_file
from lightning_sgd._validation import expect
from lightning_sgd.callbacks._monitoring.gradient_collector import holds_whole_model
from lightning_sgd.callbacks._monitoring.monitor import Monitor
from lightning_sgd.callbacks.communication_monitor.traffic_source import (
    CountedTraffic,
    TrafficSource,
    find_source,
)
from lightning_sgd.functional.distributed.flat_buffers import (
    FlatBuffers,
    consensus_distance,
    distance,
)
from lightning_sgd.functional.distributed.traffic import Traffic, blocked_share

COUNTS = "bytes_per_step", "messages_per_step", "blocked_seconds_per_step"
"""What strategies of this package log themselves."""


class CommunicationMonitor(Monitor):
    r"""Log what ranks send, how long they wait for each other, and how far apart their models are.

    Means over the ranks and over the steps since the last look:

    .. list-table::
        :header-rows: 1

        * - key
          - meaning
        * - ``comm/bytes_per_step``, ``comm/messages_per_step``
          - sent by a rank
        * - ``comm/blocked_seconds_per_step``
          - seconds in which a rank waited for an exchange
        * - ``comm/blocked_share``
          - the same as a share of the training time
        * - ``comm/consensus_distance``
          - :math:`\sqrt{\frac1n \sum_i \|x_i - \bar x\|^2}` over the n models

    A step is a batch, or an accumulated group of batches, that ends with an update, whatever the number of optimizers.
    Strategies of this package count for themselves and log the first three under the same keys, every
    ``log_every_n_steps``; then the monitor leaves these to them. Of DDP only the bytes of gradients and buffers are
    known; of other strategies nothing but, perhaps, the distance. The rest is NaN, and the start message says so.

    ``trainer.callback_metrics`` also has all five under ``communication/`` instead of ``comm/``, as earlier versions
    called them. These names are deprecated; loggers no longer get them.

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
        "comm/bytes_per_step",
        "comm/messages_per_step",
        "comm/blocked_seconds_per_step",
        "comm/blocked_share",
        "comm/consensus_distance",
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
        super().__init__(every_n_steps, every_n_epochs, max_overhead, default_every_n_steps=50)
        expect(
            distance_every_n_looks >= 0,
            "distance_every_n_looks",
            "at least 0",
            distance_every_n_looks,
            "0 never takes the distance.",
        )
        self.distance_every_n_looks, self.save_table = distance_every_n_looks, save_table
        self.source: TrafficSource | None = None
        self.reset()

    def reset(self) -> None:
        """Clear all counts."""
        self.ranks: list[list[float]] = []  # by rank: bytes, messages, seconds blocked, seconds
        self.num_looks, self.num_steps = 0, 0
        self.distance, self.largest_distance = math.nan, math.nan
        self._carried = [0.0] * 4
        self._mark, self._clock = Traffic(), 0.0
        self._steps_at_look = 0  # optimizer steps at the last look
        self._new_steps, self._last_step = (
            0,
            0,
        )  # batches with a step since then; optimizer steps so far

    def identity(self) -> dict[str, Any]:
        """Return the intervals of looks and of the distance."""
        return {**super().identity(), "distance_every_n_looks": self.distance_every_n_looks}

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Find the source of the counts; then look for the first time."""
        self.source = find_source(trainer)
        self._mark, self._clock = self.source.read(), time.perf_counter()
        self._last_step = trainer.global_step
        if not self._restored:
            self._steps_at_look = trainer.global_step
        # After an interruption between two looks, as if all optimizers stepped equally often. Lightning's own count of
        # batches is one too low in checkpoints that are written at the end of a batch.
        missed = trainer.global_step - self._steps_at_look
        self._new_steps = math.ceil(missed / max(1, len(trainer.optimizers)))
        if len(self.ranks) != trainer.world_size:
            self.ranks = [[0.0] * 4 for _ in range(trainer.world_size)]
        super().on_train_start(trainer, pl_module)

    def on_after_backward(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Count, where the strategy does not."""
        if self.source is not None:
            self.source.after_backward()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, *args: Any, **kwargs: Any
    ) -> None:
        """Count a batch that ended with a step, however many optimizers made it; look, if it is time to."""
        self._new_steps += trainer.global_step > self._last_step
        self._last_step = trainer.global_step
        super().on_train_batch_end(trainer, pl_module, *args, **kwargs)

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
        old_names = {f"communication/{name}": torch.tensor(x) for name, x in values.items()}
        trainer.callback_metrics.update(old_names)
        left_to_strategy = COUNTS if self._strategy_logs(trainer) else ()
        return {f"comm/{name}": x for name, x in values.items() if name not in left_to_strategy}

    def describe_start(self, trainer: Trainer, pl_module: LightningModule) -> str:
        """Return what is counted, and by whom."""
        assert self.source is not None
        every = self.distance_every_n_looks
        looks = "every look" if every == 1 else f"every {every} looks"
        distance = f"the distance between models at {looks}" if every else "no distance"
        if every and not holds_whole_model(trainer):
            distance = "no distance, because ranks hold parts of the model"
        return f"{self.source.description}, {distance}"

    def describe_end(self, trainer: Trainer, pl_module: LightningModule) -> str:
        """Return the means per step, and save the table."""
        columns = zip(*self.ranks, strict=True)
        per_step = _per_step(
            *_as_traffic([sum(column) / len(self.ranks) for column in columns], self.num_steps)
        )
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
        """Return what every rank has sent and waited until the last look, in Markdown."""
        return traffic_table([_as_traffic(row, self.num_steps) for row in self.ranks])

    def state_dict(self) -> dict[str, Any]:
        """Return what was sent and waited so far, and the state of the schedule."""
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
        """Restore :meth:`state_dict`; what other ranks had sent since the last look is taken to be what rank 0 had."""
        super().load_state_dict(state_dict)
        self.source, self._mark = None, Traffic()
        self.ranks = [list(row) for row in state_dict["ranks"]]
        self.num_looks, self.num_steps = state_dict["num_looks"], state_dict["num_steps"]
        self.distance = state_dict["distance"]
        self.largest_distance = state_dict["largest_distance"]
        # Bytes and messages only: both times before the interruption are left out, so that their ratio stays right.
        self._carried = [*state_dict["pending"], 0.0, 0.0]
        self._steps_at_look = state_dict["steps_at_look"]

    def _strategy_logs(self, trainer: Trainer) -> bool:
        every: int = trainer.log_every_n_steps  # type: ignore[attr-defined]  # set by a connector
        return every > 0 and isinstance(self.source, CountedTraffic)

    def _traffic_of_all(self, trainer: Trainer) -> dict[str, float]:
        assert self.source is not None
        steps, self._new_steps = self._new_steps, 0
        gathered = gather_numbers(trainer, self._pending())
        self.ranks = [
            [total + part for total, part in zip(totals, parts, strict=True)]
            for totals, parts in zip(self.ranks, gathered, strict=True)
        ]
        self.num_steps += steps
        self._carried, self._steps_at_look = [0.0] * 4, trainer.global_step
        # Both at once, or a rank would seem to wait for longer than there is time.
        self._mark, self._clock = self.source.read(), time.perf_counter()
        means = [sum(column) / len(gathered) for column in zip(*gathered, strict=True)]
        return _per_step(*_as_traffic(means, steps)) if steps else {}

    def _pending(self) -> list[float]:
        """Return bytes, messages, seconds blocked and seconds of this rank since the last look."""
        if self.source is None:
            return self._carried
        new, seconds = self.source.read() - self._mark, time.perf_counter() - self._clock
        counts = (new.num_bytes, new.num_messages, new.seconds, seconds)
        return [old + count for old, count in zip(self._carried, counts, strict=True)]

    def _save_table(self, trainer: Trainer) -> str:
        if not self.save_table or getattr(trainer, "fast_dev_run", False):
            return ""
        folder = log_folder(trainer)
        if not trainer.is_global_zero:
            return ""
        said = " No table: see the warning."
        with reporting(trainer, f"communication.md cannot be written to {folder}"):
            table = f"{self.table()}\n".encode()
            said = f" Table: {save_file(folder, 'communication.md', table)}"
        return said  # noqa: RET504  # the block before may end early


def _as_traffic(row: Sequence[float], num_steps: int) -> tuple[Traffic, float]:
    num_bytes, num_messages, blocked, seconds = row
    return Traffic(num_bytes, num_messages, blocked, num_steps), seconds


def _per_step(traffic: Traffic, seconds: float) -> dict[str, float]:
    return {**traffic.per_step(), "blocked_share": blocked_share(traffic, seconds)}


def _known(value: float, scale: float = 1.0) -> str:
    return "an unknown number of" if math.isnan(value) else f"{scale * value:.4g}"


def _distance(trainer: Trainer, pl_module: LightningModule) -> float:
    """Return the RMS distance of the ranks' trained parameters from their mean."""
    trained = [param.detach() for param in pl_module.parameters() if param.requires_grad]
    if trainer.world_size == 1 or not trained:
        return 0.0
    # In float64 the mean of equal models is that model, and the distance exactly zero.
    flat = FlatBuffers(trained, exact=True)
    flat.pack()
    for buffer in flat.buffers:
        reduce_mean(buffer, trainer.world_size)
    gathered = gather_numbers(trainer, [float(distance(flat.tensors, flat.views)) ** 2])
    return consensus_distance([squared for (squared,) in gathered])


def traffic_table(ranks: Sequence[tuple[Traffic, float]]) -> str:
    """Write a table in Markdown of what every rank has sent and waited, in total and per step.

    Args:
        ranks: By rank, its traffic, and the seconds of training in which that happened.

    Example:
        >>> print(traffic_table([(Traffic(4e6, 8, 0.5, 10), 2.0)]))
        | rank | steps | MB sent | kB per step | messages per step | blocked, s | blocked, ms per step | time blocked |
        |---:|---:|---:|---:|---:|---:|---:|---:|
        | 0 | 10 | 4 | 400 | 0.8 | 0.5 | 50 | 25.0 % |
    """
    titles = (
        *("rank", "steps", "MB sent", "kB per step", "messages per step"),
        *("blocked, s", "blocked, ms per step", "time blocked"),
    )
    lines = ["| " + " | ".join(titles) + " |", "|" + "---:|" * len(titles)]
    for rank, (traffic, seconds) in enumerate(ranks):
        lines.append("| " + " | ".join(_cells(rank, traffic, seconds)) + " |")
    return "\n".join(lines)


def _cells(rank: int, traffic: Traffic, seconds: float) -> list[str]:
    steps = max(traffic.num_steps, 1)
    numbers = (
        *(traffic.num_bytes / 1e6, traffic.num_bytes / 1e3 / steps, traffic.num_messages / steps),
        *(traffic.seconds, 1e3 * traffic.seconds / steps),
    )
    known = ["not known" if math.isnan(x) else f"{x:.4g}" for x in numbers]
    share = blocked_share(traffic, seconds)
    return [
        *(str(rank), str(traffic.num_steps), *known),
        "not known" if math.isnan(share) else f"{share:.1%}".replace("%", " %"),
    ]
