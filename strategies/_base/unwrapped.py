"""The base of strategies that leave the module unwrapped and communicate outside of forward and backward pass.

Hooks of a subclass. "Ranks" says whether all ranks call a hook together, so that it may communicate.

===============================  =============================  ============================================  =====
Hook                             Called by                      When                                          Ranks
===============================  =============================  ============================================  =====
``make_exchange``                ``setup``                      process groups are created                    all
``begin``                        ``setup``                      the optimizers exist                          all
``make_common_model``            ``begin``                      the replicas exist                            all
``describe``                     ``on_train_start``             the start message is written                  each
``on_train_start``               Lightning                      the first batch is next                       all
``on_train_batch_start``         Lightning                      a batch is next                               all
``mark_diverged``                ``on_train_batch_start``       a batch is next, or a checkpoint was loaded   each
``training_step``                Lightning                      the loss of a batch is computed               each
``post_backward``                Lightning                      the gradients of a batch have been added up   each
``before_step``                  ``optimizer_step``             gradients are complete, scaled and unclipped  all
``after_step``                   ``optimizer_step``             the optimizer has stepped                     all
``own_metrics``                  ``optimizer_step``             metrics are logged                            each
``on_validation_start``          Lightning                      validation is next                            all
``on_validation_end``            Lightning                      validation is over                            all
``model_to_average``             ``common_model``               the common model is made                      all
``lightning_module_state_dict``  Lightning                      a checkpoint is collected                     all
``rank_state``                   ``save_checkpoint``            a checkpoint is written                       all
``own_state``                    ``save_checkpoint``            a checkpoint is written                       all
``shared_state``                 ``save_checkpoint``            a checkpoint is written                       each
``average_over_ranks``           ``save_checkpoint``            a callback replaced the weights to be saved   all
``load_shared_state``            ``load_optimizer_state_dict``  a checkpoint is loaded                        all
``load_own_state``               ``load_optimizer_state_dict``  it has a state for each rank                  all
``start_from_common``            ``load_optimizer_state_dict``  it has not: it is of another number of ranks  all
``finalize``                     ``on_train_end``               training is over                              all
``close``                        ``on_exception``               this rank has failed, or noticed a failure    each
``teardown``                     Lightning                      the trainer is done                           each
===============================  =============================  ============================================  =====
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from itertools import count
from typing import TYPE_CHECKING, Any, ClassVar, Literal, TypeAlias

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.overrides.distributed import _sync_module_states
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor
from torch.nn.parameter import is_lazy
from torch.optim import Optimizer

from lightning_sgd._run_log import announce, log_metrics, logger_names
from lightning_sgd._validation import (
    Words,
    expect,
    expect_one_of,
    expect_whole,
    plain_number,
    warn_no_effect,
)
from lightning_sgd.functional.distributed.traffic import Traffic, all_reduce_traffic
from lightning_sgd.strategies._base.agreement import verify_equal_layouts, verify_equal_weights
from lightning_sgd.strategies._base.common_model import CommonModel
from lightning_sgd.strategies._base.rank_checkpoints import RankCheckpoints
from lightning_sgd.strategies._base.replica import Replica
from lightning_sgd.strategies._base.requirements import ONE_GRADIENT, refuse_unsupported
from lightning_sgd.strategies._comm.collectives import Collectives
from lightning_sgd.strategies._comm.failures import ExchangeError, is_failed_exchange

if TYPE_CHECKING:
    from datetime import timedelta

StartMethod: TypeAlias = Literal["popen", "spawn", "fork", "forkserver"]
InitialWeights: TypeAlias = Literal["broadcast", "verify"]

SIGTERM_HOOK = "_broadcast_sigterm_tensor"
"""Method of Lightning's training loop that broadcasts before every batch whether to stop."""


class UnwrappedStrategy(RankCheckpoints, ABC):
    """Trains the module as it is, without DDP's wrapper.

    This class owns what does not depend on what is exchanged: equal weights at the start, the common model for
    evaluation, start and end messages, metrics of the traffic, and failing ranks. The module's docstring lists the
    hooks of a subclass.

    Args:
        initial_weights: ``broadcast`` those of rank 0, or ``verify`` that all ranks have the same.
        sigterm_every_n_batches: How often all ranks agree whether to stop on SIGTERM; 0 for never.
        process_group_backend: As of ``DDPStrategy``.
        timeout: How long a rank waits for the others before it gives up.
        start_method: How processes are started on one machine.
    """

    in_background = False
    """Whether a subclass communicates while it computes, which takes one more process group."""

    against_sync_batchnorm: ClassVar[str]
    """Why batch statistics must not be exchanged in the forward pass, and what to do instead."""

    metric_keys: ClassVar[tuple[str, ...]] = (
        "comm/bytes_per_step",
        "comm/messages_per_step",
        "comm/blocked_seconds_per_step",
    )
    """Every key that is logged."""

    exchanged: ClassVar[str] = "parameters"
    """What the start message gives the size of."""

    def __init__(
        self,
        *,
        initial_weights: InitialWeights,
        sigterm_every_n_batches: int,
        process_group_backend: str | None,
        timeout: timedelta,
        start_method: StartMethod,
    ) -> None:
        expect_one_of(initial_weights, InitialWeights, "initial_weights")
        expect_one_of(start_method, StartMethod, "start_method")
        super().__init__(
            process_group_backend=process_group_backend, timeout=timeout, start_method=start_method
        )
        sigterm_every_n_batches = plain_number(sigterm_every_n_batches)
        remedy = "1 is Lightning's behaviour, 0 means never."
        expect_whole(sigterm_every_n_batches, 0, "sigterm_every_n_batches", remedy)
        self.initial_weights = initial_weights
        self.sigterm_every_n_batches = sigterm_every_n_batches
        self.exchange = None
        self.common_model: CommonModel | None = None
        self._logged = Traffic()
        self._last_batch = -1

    # Hooks of a subclass.

    @abstractmethod
    def describe(self) -> str:
        """Describe what is exchanged and when, to continue "2 ranks, 5.2 kB of parameters each, …"."""

    @abstractmethod
    def make_common_model(self) -> CommonModel:
        """Create the object that makes one model out of those of all ranks."""

    def before_step(self, replica: Replica) -> None:
        """Process complete gradients before they are unscaled, clipped and used; counts do not include this step."""

    @abstractmethod
    def after_step(self, replica: Replica) -> None:
        """Communicate, or not, after an optimizer step of this rank; counts include this step."""

    def begin(self) -> None:
        """Reset everything for a new training."""
        self._random_states = None
        self._logged, self._last_batch = Traffic(), -1
        if self.exchange is not None:
            self.exchange.traffic = Traffic()
        self.common_model = self.make_common_model()

    def mark_diverged(self) -> None:
        """Expect ranks to differ from now on."""
        if self.common_model is not None:
            self.common_model.mark_diverged()

    def finalize(self) -> None:
        """Leave the common model on every rank."""
        if self.common_model is not None:
            self.common_model.finalize()

    def close(self) -> None:
        """Restore this rank's own model, and communicate no more."""
        if self.common_model is not None:
            self.common_model.close()

    def make_exchange(self) -> Collectives:
        """Create the collectives, and with them process groups."""
        return Collectives(self._timeout, in_background=self.in_background)

    def own_metrics(self) -> dict[str, float]:
        """Return further metrics of this rank by key."""
        return {}

    # What callbacks may ask for, see `lightning_sgd._protocols`.

    @property
    def traffic(self) -> Traffic | None:
        """Bytes, messages and seconds of this rank since the start of the training; ``None`` on one rank."""
        return None if self.exchange is None else self.exchange.traffic

    # Set-up.

    def configure_ddp(self) -> None:
        """Give all ranks the same weights; the module is not wrapped."""
        if self.exchange is None:
            return
        state = [*self._module.named_parameters(), *self._module.named_buffers()]
        verify_equal_layouts(self.exchange, state)
        # A resumed rank has loaded weights of its own, which must stay.
        if self._is_resumed:
            return
        if self.initial_weights == "verify":
            verify_equal_weights(self.exchange, self._module)
        else:
            _sync_module_states(self._module)

    def setup(self, trainer: Trainer) -> None:
        """Create process groups and prepare the training."""
        if trainer.state.fn != TrainerFn.FITTING:
            super().setup(trainer)
            return
        refuse_unsupported(self, self.against_sync_batchnorm)
        if self.world_size > 1 and (self.exchange is None or not self.exchange.is_valid):
            self.exchange = self.make_exchange()
        super().setup(trainer)
        refuse_unsupported(
            self, self.against_sync_batchnorm
        )  # again: only now the optimizers are known
        self.begin()
        if self.exchange is not None:
            names = {id(param): name for name, param in self._module.named_parameters()}
            tensors = [tensor for replica in self.replicas for tensor in replica.tensors]
            named = [(names.get(id(tensor), "?"), tensor) for tensor in tensors]
            verify_equal_layouts(self.exchange, named)
        self._is_resumed = False

    def on_train_start(self) -> None:
        """Write the start message."""
        listen_for_sigterm_every(self.sigterm_every_n_batches, self._trainer)
        announce(self._trainer, type(self).__name__, "start", f"{self._introduction()}.")

    def _introduction(self) -> str:
        ranks = (
            "1 rank, nothing to exchange" if self.exchange is None else f"{self.num_ranks} ranks"
        )
        if any(is_lazy(tensor) for replica in self.replicas for tensor in replica.tensors):
            size = "a number of bytes, known after the first batch,"
        else:
            size = format_bytes(sum(replica.num_bytes for replica in self.replicas))
        if self.exchange is None:
            return f"{ranks}, {size} of {self.exchanged}, {self.describe()}"
        prefixes = dict.fromkeys(f"{key.split('/')[0]}/*" for key in self.metric_keys)
        logs = f"logs {', '.join(prefixes)} ({logger_names(self._trainer)})"
        return f"{ranks}, {size} of {self.exchanged} each, {self.describe()}; {logs}"

    # Training.

    def optimizer_step(
        self,
        optimizer: Optimizer,
        closure: Callable[[], Any],
        model: LightningModule | torch.nn.Module | None = None,
        **kwargs: Any,
    ) -> Any:
        """Take one step of this rank, with the hooks before and after it."""
        # Not in hooks of the optimizer: a GradScaler may skip its step on one rank but not on another, and all ranks
        # must communicate equally often.
        replica = next(r for r in self.replicas if r.optimizer is optimizer)
        num_calls = count()

        def closure_then_exchange() -> Any:
            if next(num_calls) and self.exchange is not None:
                refuse_second_gradient(optimizer)
            result = closure()
            replica.loss = result.detach() if isinstance(result, Tensor) else None
            self.before_step(replica)
            return result

        output = super().optimizer_step(optimizer, closure_then_exchange, model, **kwargs)
        replica.step()
        self.after_step(replica)
        if self.exchange is not None:
            self._log(self.exchange.traffic)
        return output

    def _log(self, traffic: Traffic) -> None:
        trainer = self._trainer
        batch = trainer.fit_loop.epoch_loop._batches_that_stepped
        # In manual optimization several optimizers may step in one batch, which counts once.
        if batch == self._last_batch:
            return
        self._last_batch = batch
        traffic.num_steps += 1
        every: int = trainer.log_every_n_steps  # type: ignore[attr-defined]  # set by a connector
        if every == 0 or traffic.num_steps % every:
            return
        rates = (traffic - self._logged).per_step()
        values = {f"comm/{name}": rate for name, rate in rates.items()} | self.own_metrics()
        self._logged = traffic - Traffic()
        log_metrics(trainer, values, num_uncounted=1)

    def on_validation_start(self) -> None:
        """Validate the common model."""
        if self.common_model is not None:
            self.common_model.swap_in()

    def on_validation_end(self) -> None:
        """Continue with this rank's own model."""
        if self.common_model is not None:
            self.common_model.swap_out()

    def on_train_end(self) -> None:
        """Leave the common model on every rank, and write the end message."""
        for replica in self.replicas:
            if replica.num_steps == 0 and replica.optimizer.state:
                warn_no_effect(
                    f"{type(self).__name__} saw no step of optimizer {replica.index}. Call `step` of what "
                    "`self.optimizers()` returns, not of the torch optimizer itself."
                )
        self.finalize()
        listen_for_sigterm_every(1, self._trainer)
        announce(self._trainer, type(self).__name__, "end", self._conclusion())

    def teardown(self) -> None:
        """Free the buffers."""
        for replica in self.replicas:
            replica.release()
        super().teardown()

    # Failing ranks.

    def barrier(self, *args: Any, **kwargs: Any) -> None:
        """Wait for the others, unless a rank has failed and will never come."""
        if not self._has_failed:
            super().barrier(*args, **kwargs)

    def broadcast(self, obj: Any, src: int = 0) -> Any:
        """Send an object from one rank to all, unless a rank has failed."""
        return obj if self._has_failed else super().broadcast(obj, src)

    def on_exception(self, exception: BaseException) -> None:
        """Restore this rank's weights, abort the process groups, and report which rank failed."""
        self.close()
        if self.exchange is not None and not isinstance(exception, ExchangeError):
            self._report_failure(self.exchange, exception)
        super().on_exception(exception)

    @staticmethod
    def _report_failure(exchange: Collectives, exception: BaseException) -> None:
        reports = exchange.failure_reports
        if is_failed_exchange(
            exception
        ):  # of Lightning or a metric: the cause lies on another rank
            exchange.abort()
            exception.args = (f"{exception} {reports.collect('something else')}",)
        else:
            # Published before the connections close, so that the others find it when they notice.
            reports.publish(f"raised {type(exception).__name__}: {exception}")
            exchange.abort()
            reports.linger()

    @property
    def is_connected(self) -> bool:
        """Whether there are other ranks, and none of them is known to have failed."""
        return self.exchange is not None and not self._has_failed

    @property
    def _has_failed(self) -> bool:
        module = self.lightning_module
        trainer = None if module is None else module._trainer
        return trainer is not None and trainer.interrupted

    # Shorthands.

    @property
    def _module(self) -> LightningModule:
        assert self.lightning_module is not None
        return self.lightning_module

    @property
    def _trainer(self) -> Trainer:
        return self._module.trainer

    def _conclusion(self) -> str:
        steps = ", ".join(str(replica.num_steps) for replica in self.replicas)
        if self.exchange is None:
            return f"{steps} steps, nothing to exchange."
        traffic = self.exchange.traffic
        gradients = sum(
            replica.num_steps * all_reduce_traffic(replica.num_bytes, self.num_ranks)[0]
            for replica in self.replicas
        )
        return (
            f"{steps} steps, {traffic.num_bytes / 1e6:.3g} MB sent per rank in {traffic.num_messages} messages "
            f"({gradients / 1e6:.3g} MB if each optimizer exchanged its gradients in every step), waited "
            f"{traffic.seconds:.2f} s for the other ranks."
        )


def refuse_second_gradient(optimizer: Optimizer) -> None:
    """Raise in an optimizer step that evaluates its closure once more."""
    got = Words(f"a second call of the closure by {type(optimizer).__name__}")
    expect(
        False, "configure_optimizers", "of optimizers with one gradient per step", got, ONE_GRADIENT
    )


def listen_for_sigterm_every(num_batches: int, trainer: Trainer) -> None:
    """Make this trainer broadcast its SIGTERM flag every so many batches; 1 is Lightning's behaviour, 0 is never.

    All ranks must set the same number, because the broadcast is collective.
    """
    loop = trainer.fit_loop.epoch_loop
    loop.__dict__.pop(SIGTERM_HOOK, None)
    check = getattr(loop, SIGTERM_HOOK, None)
    if check is None or num_batches == 1:
        return
    batches = count(1)

    def check_seldom() -> None:
        if num_batches and next(batches) % num_batches == 0:
            check()

    setattr(loop, SIGTERM_HOOK, check_seldom)


def format_bytes(num_bytes: float) -> str:
    """Write a number of bytes with a unit.

    Example:
        >>> [format_bytes(x) for x in (780, 5224, 94_300_000, 12.4e9)]
        ['0.78 kB', '5.22 kB', '94.3 MB', '12.4 GB']
    """
    size, units = num_bytes / 1e3, ["kB", "MB", "GB"]
    while size >= 999.5 and len(units) > 1:
        size /= 1e3
        del units[0]
    return f"{size:.3g} {units[0]}"
