"""Training that tolerates ranks which send arbitrary gradients."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from datetime import timedelta
from functools import partial
from typing import Any, ClassVar, Literal, TypeAlias

from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from lightning_sgd._validation import (
    expect,
    expect_one_of,
    expect_whole,
    plain_number,
    warn_outside_intended_use,
)
from lightning_sgd.aggregation import Aggregator, Attack, get_aggregator
from lightning_sgd.strategies._base.common_model import BufferRule
from lightning_sgd.strategies._base.gradient_aggregation import GradientAggregationStrategy, Workers
from lightning_sgd.strategies._base.replica import GradientReplica
from lightning_sgd.strategies._base.unwrapped import InitialWeights, StartMethod
from lightning_sgd.strategies._comm.collectives import Purpose
from lightning_sgd.strategies.byzantine.robust_reduce import RobustReduce
from lightning_sgd.strategies.byzantine.shard_audit import ShardAudit
from lightning_sgd.strategies.byzantine.sharded_rule import (
    MixingPlan,
    NoResult,
    ShardedRule,
    StepReport,
    refuse_too_few,
    squared_distances_from,
)
from lightning_sgd.strategies.byzantine.simulated_attack import SimulatedAttack
from lightning_sgd.strategies.byzantine.worker_momentum import WorkerMomentum

Nonfinite: TypeAlias = Literal["drop", "raise"]


class ByzantineStrategy(RobustReduce, GradientAggregationStrategy):
    r"""Replaces the mean of gradients by a rule that a few wrong workers cannot move far.

    A wrong worker may send anything: gradients of poisoned or mislabelled data, of a host that computes wrongly, NaN,
    infinity, flipped bits, or vectors chosen to do harm; up to ``num_byzantine`` workers in each step, not always the
    same. **Collectives are trusted**: see the card for what a rank that lies inside them can do.

    Rank i receives the i-th shard of every rank's gradient; norms and inner products are summed over the ranks; all
    ranks derive the same weights from them; rank i combines its shard and sends it to all. All replicas stay equal, bit
    by bit.

    Cost per rank and step: as many bytes as a ring all-reduce, one pass over the gradients for norms, one for
    n × n inner products; three copies of the gradient in memory, whatever n is, and one momentum per worker.

    Logged every ``log_every_n_steps`` batches that stepped:

    =================================  ===============================================================
    Key                                Meaning, for the logging rank
    =================================  ===============================================================
    ``comm/bytes_per_step``            bytes sent, per batch that stepped
    ``comm/messages_per_step``         messages sent to other ranks, per batch that stepped
    ``comm/blocked_seconds_per_step``  seconds spent waiting for communication, per batch that stepped
    =================================  ===============================================================

    Args:
        aggregator: The rule: a name such as ``filter``, ``nnm+trmean`` or ``krum``, or an object.
        num_byzantine: Number of workers that may be wrong in a step [f], fewer than half; null for that of an
            aggregator object, or 0.
        worker_momentum: Each worker sends :math:`m \leftarrow \beta m + (1 - \beta) g` instead of its gradient g [β];
            0.9 defeats attacks that persist over steps, with SGD without momentum.
        workers: A ``rank`` is a worker; or, on one device, each ``micro_batch`` of ``accumulate_grad_batches``; or
            ``both``: each micro-batch of each rank.
        nonfinite: What happens when more than ``num_byzantine`` gradients are not finite: ``drop`` them all and warn,
            or ``raise``. With a GradScaler the step is skipped.
        attack: Simulated attack: what the workers in ``byzantine_ranks`` send instead of their gradients.
        byzantine_ranks: Ranks that carry out the simulated attack; on one device, micro-batches.
        buffers: How floating-point buffers such as the statistics of batch normalisation are combined for evaluation
            and checkpoints: ``median``, ``mean``, those of ``rank0``, or each rank its own (``local``).
        robust_metrics: Whether values logged with ``sync_dist=True`` become medians over the ranks instead of means,
            and decisions such as early stopping are made by majority, so that one rank's NaN does not stop training.
        audit_every: Period, in steps, at which a second rank computes one shard again and the weights of all ranks are
            compared; 0 for never.
        initial_weights: ``broadcast`` those of rank 0, or only ``verify`` that all ranks have the same, which trusts
            no rank if all build the model from one seed.
        sigterm_every_n_batches: How often all ranks agree whether to stop on SIGTERM. Lightning does before every
            batch; 0 for never.
        process_group_backend: As of ``DDPStrategy``; by default NCCL on GPUs and gloo elsewhere.
        timeout: How long a rank waits for the others before it gives up.
        start_method: How processes are started on one machine; ``popen`` for scripts, ``fork`` for notebooks.

    Raises:
        ValueError: If an argument is out of range, or arguments contradict each other.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> strategy = ByzantineStrategy("filter", num_byzantine=1, worker_momentum=0.9)
        >>> trainer = Trainer(strategy=strategy, accelerator="cpu", devices=4, logger=False)

    Reference:
        Deepesh Data, Suhas Diggavi. Byzantine-Resilient SGD in High Dimensions on Heterogeneous Data. ISIT 2021.
        Sai Praneeth Karimireddy, Lie He, Martin Jaggi. Learning from History for Byzantine Robust Optimization.
        ICML 2021 (worker momentum).
    """

    metric_keys: ClassVar[tuple[str, ...]] = (
        "comm/bytes_per_step",
        "comm/messages_per_step",
        "comm/blocked_seconds_per_step",
    )

    def __init__(
        self,
        aggregator: str | Aggregator = "filter",
        num_byzantine: int | None = None,
        worker_momentum: float = 0.0,
        workers: Workers = "rank",
        nonfinite: Nonfinite = "drop",
        attack: Attack | None = None,
        byzantine_ranks: Sequence[int] = (),
        buffers: BufferRule = "median",
        robust_metrics: bool = False,
        audit_every: int = 0,
        initial_weights: InitialWeights = "broadcast",
        sigterm_every_n_batches: int = 1,
        process_group_backend: str | None = None,
        timeout: timedelta = timedelta(minutes=30),
        start_method: StartMethod = "popen",
    ) -> None:
        super().__init__(
            workers=workers,
            buffers=buffers,
            initial_weights=initial_weights,
            sigterm_every_n_batches=sigterm_every_n_batches,
            process_group_backend=process_group_backend,
            timeout=timeout,
            start_method=start_method,
        )
        num_byzantine, worker_momentum = plain_number(num_byzantine), plain_number(worker_momentum)
        audit_every, byzantine_ranks = plain_number(audit_every), plain_number(byzantine_ranks)
        if num_byzantine is None:
            num_byzantine = aggregator.num_byzantine if isinstance(aggregator, Aggregator) else 0
        self.rule = get_aggregator(aggregator, num_byzantine)
        remedy = "0.9 suits most; 0 sends gradients as they are."
        expect(0 <= worker_momentum < 1, "worker_momentum", "in [0, 1)", worker_momentum, remedy)
        expect_one_of(nonfinite, Nonfinite, "nonfinite", "The default is 'drop'.")
        expect_whole(audit_every, 0, "audit_every", "0 means never.")
        both = (attack is None) == (not byzantine_ranks)
        remedy = "A simulated attack needs both `attack` and `byzantine_ranks`."
        expect(
            both, "byzantine_ranks", "given together with `attack`", list(byzantine_ranks), remedy
        )
        self.attack, self.byzantine_ranks = attack, list(byzantine_ranks)
        self.momenta, self.nonfinite = WorkerMomentum(worker_momentum), nonfinite
        self.robust_metrics, self.audit_every = robust_metrics, audit_every
        self._measures_distances = False
        self._sharded: list[ShardedRule] = []
        self._plan: MixingPlan | None = None
        self.audit: ShardAudit | None = None
        self.simulated_attack: SimulatedAttack | None = None
        self._has_warned = False

    def describe(self) -> str:
        """Describe the rule, and whose gradients it combines."""
        units = {
            "rank": "",
            "micro_batch": ", one per micro-batch",
            "both": ", one per micro-batch",
        }
        beta = self.momenta.beta
        momentum = f" with momentum {beta}" if beta else ""
        attack = f", attacked on purpose by {self.byzantine_ranks}" if self.attack else ""
        audit = f", audited every {self.audit_every} steps" if self.audit_every else ""
        return f"combined{units[self.workers]}{momentum} by {self.rule!r}{audit}{attack}"

    @property
    def reports(self) -> list[StepReport]:
        """The result of the rule for the last step of each optimizer."""
        return [sharded.report for sharded in self._sharded]

    def request_distances(self, wanted: bool) -> None:
        """Measure in the steps from now on how far each worker's gradient is from the result, or stop to."""
        self._measures_distances = wanted

    @property
    def num_workers(self) -> int:
        """Number of rows in a step."""
        per_rank = 1 if self.workers == "rank" else self._accumulation
        return self.num_ranks * per_rank

    # Set-up.

    def begin(self) -> None:
        """Create the rules, after a check that they have a guarantee for the number of workers."""
        super().begin()
        unit = "ranks" if self.workers == "rank" else "micro-batches"
        refuse_too_few(self.rule, self.num_workers, unit)
        if self.rule.num_byzantine > self.num_workers / 4 and self.is_global_zero:
            warn_outside_intended_use(
                f"{self.rule.num_byzantine} of {self.num_workers} workers may be wrong. The proofs of the spectral "
                "filter hold up to a third if all data are alike, and up to a quarter if they are not."
            )
        # With a GradScaler a row that is not finite may be an overflow, for which there must be no result: the scaler
        # has to see it and lower its factor.
        drops_more = self.nonfinite == "drop" and not self.has_scaler
        # A rule of its own for each optimizer, because rules keep a state from step to step.
        self._sharded = [ShardedRule(copy.deepcopy(self.rule), drops_more) for _ in self.replicas]
        self.momenta, self._has_warned = WorkerMomentum(self.momenta.beta), False
        self.simulated_attack = self._make_attack()
        self.audit = None if self.exchange is None else ShardAudit(self.exchange)

    def _make_attack(self) -> SimulatedAttack | None:
        if self.attack is None:
            return None
        # On one device micro-batches attack, otherwise ranks with all of theirs.
        count = self.num_workers if self.workers == "micro_batch" else self.num_ranks
        known = all(0 <= rank < count for rank in self.byzantine_ranks)
        remedy = "They count from 0."
        expect(known, "byzantine_ranks", f"below {count}", self.byzantine_ranks, remedy)
        return SimulatedAttack(self.attack, self.byzantine_ranks, self.num_ranks)

    def on_train_start(self) -> None:
        """Write the start message, after a check that the rule has a guarantee for an incomplete group too."""
        super().on_train_start()
        if self.workers == "rank":
            return
        batches, k = self._trainer.num_training_batches, self._accumulation
        # The last group of an epoch is smaller unless k divides the number of batches.
        rest = 0 if batches == float("inf") else int(batches) % k
        enough = rest == 0 or self._is_enough(rest * self.num_ranks)
        remedy = f"Set limit_train_batches to a multiple of {k}."
        expect(enough, "accumulate_grad_batches", "a divisor of the batches per epoch", k, remedy)

    def _is_enough(self, num_workers: int) -> bool:
        with suppress(ValueError):
            self.rule.check(num_workers)
            return True
        return False

    # Training.

    @property
    def min_users(self) -> int:
        """One more than may be wrong."""
        return min(self.rule.num_byzantine + 1, self.num_ranks)

    @property
    def is_identity_on_one_rank(self) -> bool:
        """Whether there is no momentum."""
        return self.momenta.beta == 0

    def prepare(self, replica: GradientReplica, rows: Tensor) -> Tensor:
        """Return the momentum of each worker instead of its gradient, or what an attacker sends."""
        # Before the attack: an attacker replaces what the worker would have sent.
        rows = self.momenta.update(replica, rows) if self.momenta.beta else rows
        if self.simulated_attack is None:
            return rows
        return self.simulated_attack.on_sender(rows, self.global_rank, replica.num_steps)

    def aggregate(
        self, replica: GradientReplica, columns: Tensor, absent: list[int]
    ) -> Tensor | None:
        """Decide with all ranks how the rows are combined, and combine this rank's shard."""
        sharded = self._sharded[replica.index]
        index = 0 if self.exchange is None else self.exchange.rank
        if self.simulated_attack is not None:
            columns = self.simulated_attack.on_columns(columns, index, replica.num_steps)
        previous = sharded.part_of_previous(replica.gradients, index)
        plan = sharded.decide(columns, absent, previous, self.exchange, replica.num_steps)
        if isinstance(plan, NoResult):
            self._raise_or_warn(plan, replica.num_steps)
            return None
        self._warn_of_dropped(sharded.report)
        # Kept for the audit, which carries it out on another shard.
        self._plan = plan
        shard = sharded.carry_out(plan, columns, previous)
        if self._measures_distances:
            self._measure_distances(sharded, columns, shard, replica.num_steps)
        if self.exchange is None:
            sharded.remember(shard)
        return shard

    def _raise_or_warn(self, why: NoResult, step: int) -> None:
        if why.faulty and not self.has_scaler:
            raise ValueError(
                f"Expected at most {self.rule.num_byzantine} gradients not to be finite, but after step {step} "
                f"{why.reason}. Lower the learning rate, or raise `num_byzantine`."
            )
        self._warn_once(f"No step was taken after step {step}: {why.reason}.")

    def _warn_of_dropped(self, report: StepReport) -> None:
        if len(report.dropped) > self.rule.num_byzantine:
            self._warn_once(
                f"The gradients of workers {list(report.dropped)} are not finite and were dropped, more than "
                f"num_byzantine={self.rule.num_byzantine}: the rule has no guarantee any more."
            )

    def _warn_once(self, message: str) -> None:
        if not self._has_warned and not self.has_scaler:
            rank_zero_warn(message)
            self._has_warned = True

    def _measure_distances(
        self, sharded: ShardedRule, columns: Tensor, shard: Tensor, step: int
    ) -> None:
        squares = squared_distances_from(columns, shard)
        if self.exchange is not None:
            # Squares add up over shards, distances do not: the root comes last.
            squares = self.exchange.all_reduce_sum(squares, Purpose.GRADIENTS, step)
        sharded.report = replace(sharded.report, distances=squares.sqrt())

    def inspect(self, replica: GradientReplica, rows: Tensor, result: Tensor) -> Tensor:
        """Audit the result if a period has ended."""
        step, sharded = replica.num_steps, self._sharded[replica.index]
        if self.audit_every and self.audit is not None and (step + 1) % self.audit_every == 0:
            # By the step and not by a counter: a resumed run audits the same pairs.
            number = (step + 1) // self.audit_every - 1
            result = self.audit(number, rows, result, partial(self._recompute, replica), step)
            self.agree()
        sharded.remember(result)
        return result

    def _recompute(self, replica: GradientReplica, index: int, columns: Tensor) -> Tensor:
        assert self._plan is not None
        sharded = self._sharded[replica.index]
        previous = sharded.part_of_previous(replica.gradients, index)
        if self.simulated_attack is not None:
            columns = self.simulated_attack.on_columns(columns, index, replica.num_steps)
        return sharded.carry_out(self._plan, columns, previous)

    # Checkpoints.

    def own_state(self) -> dict[str, Any]:
        """Return the momentum of this rank's workers."""
        return {"momenta": self.momenta.state_dict(self.replicas)}

    def load_own_state(self, state: dict[str, Any]) -> None:
        """Restore the momentum of this rank's workers."""
        self.momenta.load_state_dict(state["momenta"], self.root_device)

    def shared_state(self) -> dict[str, Any]:
        """Return the state of the aggregation rules and of the simulated attack."""
        state: dict[str, Any] = {"rules": [sharded.state_dict() for sharded in self._sharded]}
        return state if self.attack is None else {**state, "attack": self.attack.state_dict()}

    def load_shared_state(self, state: dict[str, Any]) -> None:
        """Restore the state of the aggregation rules and of the simulated attack."""
        for sharded, saved in zip(self._sharded, state.get("rules", []), strict=False):
            sharded.load_state_dict(saved)
        if self.attack is not None and "attack" in state:
            self.attack.load_state_dict(state["attack"])
