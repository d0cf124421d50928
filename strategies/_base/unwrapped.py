"""The base of strategies that leave the module unwrapped and exchange what they like, when they like."""

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
from torch.optim import Optimizer

from lightning_sgd._run_log import announce
from lightning_sgd._validation import expect, warn_no_effect
from lightning_sgd.functional.distributed.traffic import Traffic, all_reduce_traffic
from lightning_sgd.strategies._base.agreement import verify_equal_weights
from lightning_sgd.strategies._base.rank_checkpoints import RankCheckpoints
from lightning_sgd.strategies._base.replica import Replica
from lightning_sgd.strategies._base.requirements import refuse_unsupported
from lightning_sgd.strategies._comm.collectives import Collectives
from lightning_sgd.strategies._comm.failures import ExchangeError, is_failed_exchange

if TYPE_CHECKING:
    from datetime import timedelta

StartMethod: TypeAlias = Literal["popen", "spawn", "fork", "forkserver"]
InitialWeights: TypeAlias = Literal["broadcast", "verify"]


class UnwrappedStrategy(RankCheckpoints, ABC):
    """Trains the module as it is, without DDP's wrapper, on exchanges of its own.

    This class owns what does not depend on what is exchanged: equal weights at the start, the lines at the start and
    at the end, counting and timing, and failing ranks.

    Args:
        initial_weights: Whether to ``broadcast`` those of rank 0 or to ``verify`` that all ranks have the same.
        sigterm_every_n_batches: How often all ranks agree whether to stop on SIGTERM; 0 for never.
        process_group_backend: As of ``DDPStrategy``.
        timeout: How long a rank waits for the others before it gives up.
        start_method: How processes are started on one machine.
    """

    in_background = False
    """Whether a subclass exchanges while it computes, which takes a process group more."""

    against_sync_batchnorm: ClassVar[str]
    """Why batch statistics must not be exchanged in the forward pass, and what to do instead."""

    logs: ClassVar[str] = "comm/..."
    """Under which keys it logs."""

    def __init__(
        self,
        initial_weights: InitialWeights,
        sigterm_every_n_batches: int,
        process_group_backend: str | None,
        timeout: timedelta,
        start_method: StartMethod,
    ) -> None:
        super().__init__(
            process_group_backend=process_group_backend, timeout=timeout, start_method=start_method
        )
        expect(
            sigterm_every_n_batches >= 0,
            "sigterm_every_n_batches",
            "at least 0",
            sigterm_every_n_batches,
            "1 is Lightning's behaviour, 0 means never.",
        )
        self.initial_weights = initial_weights
        self.sigterm_every_n_batches = sigterm_every_n_batches
        self.exchange = None
        self._logged = Traffic()

    # What a subclass says.

    @abstractmethod
    def describe(self) -> str:
        """What is exchanged and when, as the middle of the line at the start."""

    def before_step(self, replica: Replica) -> None:
        """Called when the gradients are there, before they are unscaled, clipped and used.

        Args:
            replica: What the optimizer trains; its counts do not include this step yet.
        """

    @abstractmethod
    def after_step(self, replica: Replica) -> None:
        """Exchange, or not, after an optimizer step of this rank; on every rank alike.

        Args:
            replica: What the optimizer trains; its counts include this step.
        """

    def begin(self) -> None:
        """Called when the optimizers are there."""
        self._random_states = None
        self._logged = Traffic()
        if self.exchange is not None:
            self.exchange.traffic = Traffic()

    def close(self) -> None:
        """Put this rank's own things back, and exchange nothing any more: a rank has failed."""

    def make_exchange(self) -> Collectives:
        """What a subclass exchanges by; makes process groups, so all ranks come here."""
        return Collectives(self._timeout, in_background=self.in_background)

    def own_metrics(self) -> dict[str, float]:
        """What else to log beside the traffic, by key."""
        return {}

    # Set-up.

    def configure_ddp(self) -> None:
        """Instead of wrapping the module, give all ranks the same weights, unless each has got its own back."""
        if self._is_resumed or self.exchange is None:
            return
        if self.initial_weights == "verify":
            verify_equal_weights(self.exchange, self._module)
        else:
            _sync_module_states(self._module)

    def setup(self, trainer: Trainer) -> None:
        """Make process groups of our own, then what the subclass begins with."""
        if trainer.state.fn != TrainerFn.FITTING:
            super().setup(trainer)
            return
        refuse_unsupported(self)
        if self.world_size > 1 and (self.exchange is None or not self.exchange.is_valid):
            self.exchange = self.make_exchange()
        super().setup(trainer)
        refuse_unsupported(self)  # now the optimizers are known
        self.begin()
        self._is_resumed = False

    def on_train_start(self) -> None:
        """Thin out Lightning's own broadcasts, and say what is going to happen."""
        listen_for_sigterm_every(self.sigterm_every_n_batches, self._trainer)
        places = ", ".join(type(logger).__name__ for logger in self._trainer.loggers) or "no logger"
        ranks = f"{self.num_ranks} ranks" if self.exchange else "1 rank, nothing to exchange"
        num_bytes = sum(replica.num_bytes for replica in self.replicas)
        what = f"{ranks}, {num_bytes / 1e6:.3g} MB of parameters {self.describe()}"
        announce(
            self._trainer, type(self).__name__, "start", f"{what}; {self.logs} goes to {places}."
        )

    # Training.

    def optimizer_step(
        self,
        optimizer: Optimizer,
        closure: Callable[[], Any],
        model: LightningModule | torch.nn.Module | None = None,
        **kwargs: Any,
    ) -> Any:
        """One step of this rank, with what the subclass does before and after it.

        Here and not in a hook of the optimizer, which a GradScaler may skip on one rank but not on another.
        """
        replica = next(r for r in self.replicas if r.optimizer is optimizer)

        def closure_then_exchange() -> Any:
            result = closure()
            replica.loss = result.detach() if isinstance(result, Tensor) else None
            self.before_step(replica)
            return result

        output = super().optimizer_step(optimizer, closure_then_exchange, model, **kwargs)
        replica.step()
        self.after_step(replica)
        self._log_traffic()
        return output

    def on_train_end(self) -> None:
        """Say what it took."""
        for replica in self.replicas:
            if replica.num_steps == 0 and replica.optimizer.state:
                warn_no_effect(
                    f"{type(self).__name__} saw no step of optimizer {replica.index}. Call `step` of what "
                    "`self.optimizers()` returns, not of the torch optimizer itself."
                )
        self.settle()
        listen_for_sigterm_every(1, self._trainer)
        announce(self._trainer, type(self).__name__, "end", self._conclusion())

    def settle(self) -> None:
        """Leave the same model on every rank, for good; training is over."""

    # Failing ranks.

    def barrier(self, *args: Any, **kwargs: Any) -> None:
        """Wait for the others, unless one of them has failed and will never come."""
        if not self._has_failed:
            super().barrier(*args, **kwargs)

    def broadcast(self, obj: Any, src: int = 0) -> Any:
        """Send from one rank to all, unless one of them has failed."""
        return obj if self._has_failed else super().broadcast(obj, src)

    def on_exception(self, exception: BaseException) -> None:
        """Put this rank's own things back, hang up, and find out or let the others know who is to blame."""
        self.close()
        if self.exchange is not None and not isinstance(exception, ExchangeError):
            self._blame(self.exchange, exception)
        super().on_exception(exception)

    @staticmethod
    def _blame(exchange: Collectives, exception: BaseException) -> None:
        roll_call = exchange.roll_call
        if is_failed_exchange(exception):
            exchange.hang_up()
            exception.args = (f"{exception} {roll_call.take('something else')}",)
        else:
            roll_call.report(f"raised {type(exception).__name__}: {exception}")
            exchange.hang_up()
            roll_call.stay()

    @property
    def traffic(self) -> Traffic | None:
        """What this rank has sent and waited since the start of the training; ``None`` on one rank."""
        return None if self.exchange is None else self.exchange.traffic

    @property
    def is_connected(self) -> bool:
        """Whether there are other ranks, and none of them is known to have failed."""
        return self.exchange is not None and not self._has_failed

    @property
    def _has_failed(self) -> bool:
        module = self.lightning_module
        trainer = None if module is None else module._trainer
        return trainer is not None and trainer.interrupted

    # Small things.

    @property
    def _module(self) -> LightningModule:
        assert self.lightning_module is not None
        return self.lightning_module

    @property
    def _trainer(self) -> Trainer:
        return self._module.trainer

    def _log_traffic(self) -> None:
        if self.exchange is None:
            return
        traffic, trainer = self.exchange.traffic, self._trainer
        traffic.num_steps += 1
        every: int = trainer.log_every_n_steps  # type: ignore[attr-defined]  # set by a connector
        if every == 0 or traffic.num_steps % every:
            return
        values = {**(traffic - self._logged).per_step(), **self.own_metrics()}
        self._logged = traffic - Traffic()
        for logger in trainer.loggers:
            logger.log_metrics(values, step=trainer.fit_loop.epoch_loop._batches_that_stepped)
        trainer.callback_metrics.update({key: torch.tensor(x) for key, x in values.items()})

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
            f"({gradients / 1e6:.3g} MB if gradients were exchanged in every step), waited {traffic.seconds:.2f} s for "
            "the other ranks."
        )


HOOK = "_broadcast_sigterm_tensor"


def listen_for_sigterm_every(num_batches: int, trainer: Trainer) -> None:
    """Let Lightning broadcast the flag before every so many batches; always on all ranks alike.

    Args:
        num_batches: 1 is Lightning's own behaviour; 0 for never.
        trainer: Only this one is changed.
    """
    loop = trainer.fit_loop.epoch_loop
    loop.__dict__.pop(HOOK, None)
    check = getattr(loop, HOOK, None)
    if check is None or num_batches == 1:
        return
    batches = count(1)

    def seldom() -> None:
        if num_batches and next(batches) % num_batches == 0:
            check()

    setattr(loop, HOOK, seldom)
