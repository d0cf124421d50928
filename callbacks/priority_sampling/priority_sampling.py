"""Draws hard samples more often, in the training that a user has already."""

from __future__ import annotations

import math
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn

from lightning_sgd._run_log import announce
from lightning_sgd._validation import expect, warn_no_effect
from lightning_sgd.callbacks._monitoring.figures import publish_if_possible
from lightning_sgd.callbacks.priority_sampling.borrowed import (
    Loan,
    all_gathered,
    replace_train_dataloader,
)
from lightning_sgd.callbacks.priority_sampling.report import STEM, conclusion, draw_priorities
from lightning_sgd.callbacks.priority_sampling.rescore import refreshed_scores
from lightning_sgd.callbacks.priority_sampling.run import PriorityRun
from lightning_sgd.callbacks.priority_sampling.settings import (
    check_settings,
    load_losses,
    refuse_unsupported,
    warn_of_settings,
)
from lightning_sgd.functional.sampling.priority_sampling import (
    WeightNorm,
    annealed,
    effective_sample_size,
)
from lightning_sgd.sampling import PrioritySampler
from lightning_sgd.sampling.loss_recorder import ScoreFunction, ScoreName
from lightning_sgd.sampling.priority_loader import PriorityDataLoader, with_priorities
from lightning_sgd.sampling.priority_table import Order, Unseen
from lightning_sgd.sampling.selection import Selection

if TYPE_CHECKING:
    from matplotlib.figure import Figure


class PrioritySampling(Callback):
    r"""Draws samples by what they still have to teach, and weights their losses; in the training that you have already.

    Sample i of N has a score :math:`s_i`, measured when it was last trained on. It is drawn with probability
    :math:`p_i = (1 - \lambda)\,v_i / \sum v + \lambda / N`, where :math:`v_i = (s_i + \epsilon)^\alpha`, and its loss
    is multiplied by :math:`w_i = (N p_i)^{-\beta}`. With ``beta=1`` the gradient is unbiased, however old the scores;
    with less the hard samples take larger steps, which is what makes training shorter where the step size is the limit.
    The first ``warmup_epochs`` are uniform and give every sample a score.

    The callback replaces the sampler of the training data loader, and finds the losses of the samples in
    ``training_step`` by itself if they come from ``cross_entropy``, ``nll_loss``, ``binary_cross_entropy`` with or
    without logits, ``mse_loss``, ``l1_loss``, ``smooth_l1_loss``, ``huber_loss``, ``kl_div``, ``gaussian_nll_loss`` or
    ``poisson_nll_loss`` of ``torch.nn.functional``, or the classes over them, with one row for each sample. Otherwise
    training stops with an error, and ``return lightning_sgd.priority_mean(losses)`` in place of ``losses.mean()``
    helps. Batches are the user's own, of any structure.

    All ranks draw the same batches as one process would, and exchange the scores in one all-gather per batch of
    4 bytes per sample. Scores, generator and prefetched draws are in the checkpoint, so training resumes exactly in
    mid-epoch.

    Logged every ``log_every_n_steps`` of the Trainer: ``priority/effective_batch_share``, worth of the weighted batch;
    ``priority/max_weight``; ``priority/gain`` [τ], whose square is the factor by which a uniform batch would have to
    grow; ``priority/lag``, batches between draw and use; ``priority/mean_age`` of the scores in batches. Every epoch:
    ``priority/effective_share`` of the data set and ``priority/never_drawn``. At the end the ten hardest samples are
    named.

    Args:
        score: ``grad_norm_bound``: norm of the gradient with respect to the outputs, in closed form. ``last_layer``:
            with respect to the last linear layer. ``loss``. ``grad_norm``: exactly, by a backward pass per sample, to
            check the others. ``rho``: loss less ``irreducible_losses``. Or a function of batch and outputs.
        beta: 1 for an unbiased gradient, 0 for no weights [β].
        beta_end: Let β change evenly from ``beta`` to this over the training.
        uniform_mix: Share of draws that are uniform; weights are at most its −β-th power [λ]. With ``beta: 1`` and a
            large step size take 0.5 or more.
        alpha: Exponent of the scores [α]; 0.5 to 0.7 for losses.
        offset: What is added to every score, in units of their mean [ε].
        order: ``proportional`` to the score, by ``rank``, or the ``top`` scores alone; the latter two change once per
            epoch.
        pressure: By rank: how many times likelier the first is than the last [s_e].
        pressure_end: Let the pressure change by equal factors to this over the epochs.
        top: By ``top``: share of the samples that are drawn.
        weight_norm: Divide weights by the ``mean`` of the batch or the ``max`` possible one; both make them biased.
        stratified: Draw one sample from each of equal parts of the probability.
        warmup_epochs: Uniform epochs at the start.
        half_life: Epochs in which a score that is not measured comes half of the way to the mean; ``null`` for never.
        unseen: Score of samples without one after the warm-up: the ``mean`` or the ``max`` of the others.
        refresh_every_n_epochs: Measure all scores anew every so many epochs, by a pass over the data.
        selection: Look at more samples than are trained on, and choose: a
            :class:`~lightning_sgd.Presampling` or an :class:`~lightning_sgd.InBatchSelection`. Batches are drawn
            uniformly then, and β, λ and the like have no effect.
        irreducible_losses: For ``rho``: file, written by ``torch.save``, of a tensor with one loss for each sample, of
            a model trained on other data.
        seed: Of the draws.
        save_figure: Save a figure in the log folder at the end, and hand it to loggers that take figures; needs the
            extra ``report``.

    Raises:
        ValueError: If an argument is out of range, or the data loader cannot be used.
        RuntimeError: If the losses of the samples cannot be found.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> trainer = Trainer(callbacks=[PrioritySampling(beta=0.5)], logger=False)

    Reference:
        Tian Zhou, Lixin Gao. Distributed Framework for Accelerating Training of Deep Learning Models through
        Prioritization. IC2E 2021.
    """

    def __init__(
        self,
        score: ScoreName | ScoreFunction = "grad_norm_bound",
        beta: float = 0.5,
        beta_end: float | None = None,
        uniform_mix: float = 0.3,
        alpha: float = 1.0,
        offset: float = 1e-3,
        order: Order = "proportional",
        pressure: float = 100.0,
        pressure_end: float | None = None,
        top: float = 0.5,
        weight_norm: WeightNorm = "none",
        stratified: bool = True,
        warmup_epochs: int = 1,
        half_life: float | None = 2.0,
        unseen: Unseen = "mean",
        refresh_every_n_epochs: int | None = None,
        selection: Selection | None = None,
        irreducible_losses: str | None = None,
        seed: int = 0,
        save_figure: bool = True,
    ) -> None:
        self.score, self.beta, self.beta_end, self.weight_norm = score, beta, beta_end, weight_norm
        self.pressure_end, self.selection = pressure_end, selection
        self.refresh_every_n_epochs = refresh_every_n_epochs
        self.irreducible_losses = irreducible_losses
        self.seed, self.save_figure = seed, save_figure
        self.settings: dict[str, Any] = {
            "order": order,
            "uniform_mix": uniform_mix,
            "alpha": alpha,
            "offset": offset,
            "stratified": stratified,
            "warmup_epochs": warmup_epochs,
            "half_life": half_life,
            "unseen": unseen,
            "pressure": pressure,
            "top": top,
        }
        PrioritySampler(1, 1, 1, 0, **self.settings)  # refuses what it cannot draw by
        check_settings(self._everything())
        warn_of_settings(self._everything())
        name = score if isinstance(score, str) else score.__name__
        rule = None if selection is None else type(selection).__name__
        # Lightning asks for it in every hook.
        self._state_key = self._generate_state_key(
            score=name, beta=beta, selection=rule, seed=seed, **self.settings
        )
        self.run: PriorityRun | None = None
        self._loan = Loan()
        self._restored: dict[str, Any] | None = None
        self._is_passive, self._last_step, self._warned = False, 0, False

    @property
    def state_key(self) -> str:
        """Tells instances with different settings apart in a checkpoint."""
        return self._state_key

    # Set-up.

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Borrow the training step and the data loader, before Lightning asks for either."""
        if stage != "fit":
            return
        self.run, self._restored, self._warned = None, None, False
        callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]  # set by a connector
        self._is_passive = self is not next(c for c in callbacks if isinstance(c, PrioritySampling))
        if self._is_passive:
            return
        refuse_unsupported(trainer, pl_module)

        def replace(loader: object) -> PriorityDataLoader:
            return self._loader(trainer, pl_module, loader)

        def step(original: Any, *args: Any, **kwargs: Any) -> Any:
            return self._running.training_step(original, *args, **kwargs)

        replace_train_dataloader(trainer, self._loan, replace)
        self._loan.wrap(pl_module, "training_step", step)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Say what is going to happen."""
        self._last_step = trainer.global_step
        if self._is_passive:
            rank_zero_info("PrioritySampling: an earlier one in the list of callbacks does it all.")
            return
        sampler = self._running.sampler
        sizes = all_gathered(torch.tensor([sampler.num_in_dataset]), trainer.world_size).tolist()
        expect(
            len(set(sizes)) == 1,
            "dataset",
            "the same on all ranks",
            sizes,
            "Priority sampling deals one data set out to all ranks.",
        )
        self._warn_if_warm_up_is_all(trainer)
        announce(trainer, "PrioritySampling", "start", self._announcement(trainer, pl_module))

    # Training.

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Look up what was drawn for this batch."""
        if self._is_passive:
            return
        changes = self.beta_end is not None or self.selection is not None
        progress = _progress(trainer) if changes else 0.0
        end = self.beta if self.beta_end is None else self.beta_end
        beta = annealed(self.beta, end, progress)
        self._running.begin_batch(batch, beta, self.weight_norm, progress)

    def on_train_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        """Exchange the scores, and enter them."""
        if self._is_passive:
            return
        is_due = self._is_due(trainer)
        values = self._running.end_batch(is_due)
        if trainer.is_last_batch:
            # Lightning leaves the hook for epochs out when it goes on from a checkpoint of the last batch.
            values |= self._look_at_all(trainer)
        if values:
            _log(trainer, values)
        if self._running.sampler.num_not_finite and not self._warned:
            self._warned = True
            rank_zero_warn(
                "PrioritySampling met losses that are not finite; they count as the largest known score."
            )

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Say what came of it."""
        if self._is_passive:
            rank_zero_info("PrioritySampling: see the earlier one.")
        else:
            figure = self._save_figure(trainer)
            announce(trainer, "PrioritySampling", "end", f"{conclusion(self._running)}{figure}")

    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        """Give back what was borrowed."""
        self._release()

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Give back what was borrowed."""
        self._release()

    def plot(self) -> Figure:
        """Spread of the probabilities over time, and how much the likeliest samples get.

        Raises:
            ModuleNotFoundError: If matplotlib is not installed.
            RuntimeError: Before the first epoch is over.
        """
        if self.run is None or not self.run.history.steps:
            raise RuntimeError("Expected an epoch to be over, got none. Plot after training.")
        return draw_priorities(self.run.history, self.run.spread())

    # State.

    def state_dict(self) -> dict[str, Any]:
        """Scores, draws on their way, generators, history."""
        if self._is_passive:
            return {"is_passive": True}
        return dict(self._restored or {}) if self.run is None else self.run.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on as :meth:`state_dict` says, as soon as there are data."""
        self._restored = dict(state_dict) if "sampler" in state_dict else None
        if self.run is not None and self._restored:
            self.run.load_state_dict(self._restored)

    def __getstate__(self) -> dict[str, Any]:
        """Copies begin anew: data and module belong to one training."""
        return {**self.__dict__, "run": None, "_loan": Loan(), "_restored": None}

    # Small things.

    def _everything(self) -> dict[str, Any]:
        """All settings that depend on each other."""
        names = "score", "beta", "beta_end", "weight_norm", "pressure_end", "selection"
        more = "refresh_every_n_epochs", "irreducible_losses"
        return {**self.settings, **{name: getattr(self, name) for name in (*names, *more)}}

    def _release(self) -> None:
        self._loan.give_back()
        if self.run is not None:
            self.run.listener.stop()

    @property
    def _running(self) -> PriorityRun:
        assert self.run is not None
        return self.run

    def _loader(
        self, trainer: Trainer, pl_module: LightningModule, loader: object
    ) -> PriorityDataLoader:
        """The user's loader with priorities; asked for again if Lightning reloads it."""
        ranks = trainer.distributed_sampler_kwargs or {"num_replicas": 1, "rank": 0}

        def make(dataset: Any, batch_size: int, drop_last: bool) -> PrioritySampler:
            run = self.run
            if run is not None and run.sampler.num_in_dataset == len(dataset):
                return run.sampler
            settings = {**self.settings, **ranks, "seed": self.seed, "drop_last": drop_last}
            if self.selection is not None:
                warmup = 0 if self.selection.draws_uniformly else math.inf
                settings |= {"uniform_mix": 1.0, "warmup_epochs": warmup}
            return PrioritySampler(dataset, batch_size, **settings)

        found = with_priorities(loader, make, ranks["num_replicas"])
        if self.run is None or found.priorities is not self.run.sampler:
            self.run = self._begin(trainer, pl_module, found.priorities)
        return found

    def _begin(
        self, trainer: Trainer, pl_module: LightningModule, sampler: PrioritySampler
    ) -> PriorityRun:
        irreducible = None
        if self.irreducible_losses is not None:
            irreducible = load_losses(self.irreducible_losses, sampler.num_in_dataset)
        run = PriorityRun(sampler, pl_module, self.score, self.selection, irreducible, self.seed)
        # Not by Lightning's hook for epochs, which it leaves out when it goes on from a checkpoint of the last batch.
        sampler.before_epoch = partial(self._prepare_epoch, trainer, pl_module)
        if self._restored:
            run.load_state_dict(self._restored)
        return run

    def _prepare_epoch(self, trainer: Trainer, pl_module: LightningModule, epoch: int) -> None:
        """Anneal the pressure, and measure all scores anew, if it is time to."""
        every = self.refresh_every_n_epochs
        if self.pressure_end is not None:
            progress = epoch / max(1, (trainer.max_epochs or 1) - 1)
            start: float = self.settings["pressure"]
            pressure = annealed(start, self.pressure_end, progress, geometric=True)
            self._running.sampler.table.pressure = pressure
        if every is not None and epoch > 0 and epoch % every == 0:
            self._running.refresh(refreshed_scores(trainer, pl_module, self._running))

    def _look_at_all(self, trainer: Trainer) -> dict[str, float]:
        """What an epoch made of the priorities."""
        run = self._running
        spread = run.spread()
        run.history.note(trainer.global_step, spread)
        return {
            "priority/effective_share": effective_sample_size(spread) / len(spread),
            "priority/never_drawn": 1 - float(run.sampler.table.is_drawn.float().mean()),
        }

    def _is_due(self, trainer: Trainer) -> bool:
        """Whether an optimizer step is over after which something is logged."""
        step, every = trainer.global_step, trainer.log_every_n_steps  # type: ignore[attr-defined]  # set by a connector
        is_new, self._last_step = step != self._last_step, step
        return bool(is_new and every and step % every == 0)

    def _announcement(self, trainer: Trainer, pl_module: LightningModule) -> str:
        sampler = self._running.sampler
        score = self.score if isinstance(self.score, str) else self.score.__name__
        size = sampler.batch_size * sampler.num_replicas
        if self.selection is not None:
            what = self.selection.describe()
        else:
            beta = (
                f"{self.beta:g}" if self.beta_end is None else f"{self.beta:g} → {self.beta_end:g}"
            )
            what = (
                f"{sampler.warmup_epochs} uniform epochs, then {self.settings['order']}, "
                f"λ = {self.settings['uniform_mix']:g}, β = {beta}"
            )
        ranks = sampler.num_replicas
        exchange = f"{4 * size} bytes gathered per batch, " if ranks > 1 else ""
        norms = any(
            isinstance(m, torch.nn.modules.batchnorm._BatchNorm) for m in pl_module.modules()
        )
        advice = "statistics of batch normalisation follow the hard samples; " if norms else ""
        places = ", ".join(type(logger).__name__ for logger in trainer.loggers) or "no logger"
        return (
            f"{sampler.num_in_dataset} samples in batches of {size} by {score}: {what}; {exchange}{advice}values go to "
            f"{places}."
        )

    def _save_figure(self, trainer: Trainer) -> str:
        """Draw and publish the figure; what to say about it."""
        if not self.save_figure or not self._running.history.steps:
            return ""
        return publish_if_possible(trainer, self.plot, STEM, "priority/spread")

    def _warn_if_warm_up_is_all(self, trainer: Trainer) -> None:
        epochs, warmup = trainer.max_epochs, self.settings["warmup_epochs"]
        trial = getattr(trainer, "fast_dev_run", False) or self.selection is not None
        if not trial and epochs is not None and 0 < epochs <= warmup:
            warn_no_effect(
                f"PrioritySampling has no effect: all {epochs} epochs are warm-up. Set `warmup_epochs` to less."
            )


def _progress(trainer: Trainer) -> float:
    total = trainer.estimated_stepping_batches
    return trainer.global_step / total if math.isfinite(total) and total > 0 else 0.0


def _log(trainer: Trainer, values: dict[str, float]) -> None:
    """To ``callback_metrics``, and to the loggers; all ranks know the same values."""
    for logger in trainer.loggers:
        logger.log_metrics(values, step=trainer.fit_loop.epoch_loop._batches_that_stepped)
    trainer.callback_metrics.update({key: torch.tensor(value) for key, value in values.items()})
