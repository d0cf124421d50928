"""Draw hard samples more often in a training that exists already."""

from __future__ import annotations

import math
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn

from lightning_sgd._distributed import gather_numbers
from lightning_sgd._run_log import announce, log_metrics, logger_names
from lightning_sgd._validation import expect, plain_number, warn_no_effect
from lightning_sgd.callbacks._monitoring.figures import publish_if_possible
from lightning_sgd.callbacks.priority_sampling.borrowed import (
    PatchedAttributes,
    replace_train_dataloader,
)
from lightning_sgd.callbacks.priority_sampling.report import STEM, draw_priorities
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
from lightning_sgd.sampling.priority_sampler import check_sampler_settings
from lightning_sgd.sampling.priority_table import Order, Unseen
from lightning_sgd.sampling.selection import Selection

if TYPE_CHECKING:
    from matplotlib.figure import Figure


class PrioritySampling(Callback):
    r"""Draws samples with a high score more often, and weights their losses, in a training that you have already.

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
    helps. Batches may have any structure, with one row for each sample in the order of the draw.

    All ranks draw the same batches as one process would, and exchange the scores in one all-gather per batch of
    4 bytes per sample. Scores, generator and prefetched draws are in the checkpoint, so training resumes exactly in
    mid-epoch.

    Logged every ``log_every_n_steps`` of the Trainer, and the last two at the end of every epoch; the ten hardest
    samples are named at the end of the training:

    ================================== =================================================================================
    key                                meaning
    ================================== =================================================================================
    ``priority/effective_batch_share`` effective sample size of the weighted batch, as a share of its size
    ``priority/max_weight``            largest weight in the batch
    ``priority/gain``                  τ; a uniform batch would have to be τ² times as large for the same variance
    ``priority/lag``                   batches between the draw of this batch and its use
    ``priority/mean_age``              mean age of the scores in the batch, in batches
    ``priority/effective_share``       effective sample size of the probabilities, as a share of the data set
    ``priority/never_drawn``           share of the samples that were never drawn
    ================================== =================================================================================

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

    metric_keys: ClassVar[tuple[str, ...]] = (
        "priority/effective_batch_share",
        "priority/max_weight",
        "priority/gain",
        "priority/lag",
        "priority/mean_age",
        "priority/effective_share",
        "priority/never_drawn",
    )

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
        beta = plain_number(beta)
        self.score, self.weight_norm = score, weight_norm
        self.beta, self.beta_end = beta, plain_number(beta_end)
        self.pressure_end, self.selection = plain_number(pressure_end), selection
        self.refresh_every_n_epochs = plain_number(refresh_every_n_epochs)
        self.irreducible_losses = irreducible_losses
        self.seed, self.save_figure = seed, save_figure
        # The order is part of the state key, which checkpoints know.
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
        self.settings = {name: plain_number(value) for name, value in self.settings.items()}
        checked = {name: value for name, value in self.settings.items() if name != "stratified"}
        check_sampler_settings(**checked)
        check_settings(self._everything())
        warn_of_settings(self._everything())
        name = score if isinstance(score, str) else score.__name__
        rule = None if selection is None else type(selection).__name__
        # Computed once, because Lightning asks for it in every hook.
        self._state_key = self._generate_state_key(
            score=name, beta=beta, selection=rule, seed=seed, **self.settings
        )
        self.run: PriorityRun | None = None
        self._patches = PatchedAttributes()
        self._restored: dict[str, Any] | None = None
        self._is_passive, self._warned = False, False

    @property
    def state_key(self) -> str:
        """Tells instances with different settings apart in a checkpoint."""
        return self._state_key

    # Set-up.

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Replace the training step and the data loader, before Lightning asks for either."""
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

        replace_train_dataloader(trainer, self._patches, replace)
        # Not on the module, which stays as it is for everybody who copies it, saves it, or calls its step.
        self._patches.wrap(trainer.strategy, "training_step", step)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Announce the settings, and refuse ranks with different data sets."""
        if self._is_passive:
            rank_zero_info("PrioritySampling: an earlier one in the list of callbacks does it all.")
            return
        sampler = self._running.sampler
        sizes = [int(size) for (size,) in gather_numbers(trainer, [sampler.num_in_dataset])]
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
        self._running.begin_batch(beta, self.weight_norm, progress)

    def on_train_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        """Exchange the scores of the ranks, and enter them into the table."""
        if self._is_passive:
            return
        values = self._running.end_batch(wants_values=_is_due(trainer))
        if trainer.is_last_batch:
            # Lightning leaves `on_train_epoch_end` out when it resumes from a checkpoint of the last batch.
            values |= self._values_of_epoch(trainer)
        if values:
            log_metrics(trainer, values, num_uncounted=1)
        if self._running.sampler.num_not_finite and not self._warned:
            self._warned = True
            rank_zero_warn(
                "PrioritySampling met losses that are not finite; they count as the largest known score."
            )

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Announce the effective sample size and the hardest samples, and save the figure."""
        if self._is_passive:
            rank_zero_info("PrioritySampling: see the earlier one.")
        else:
            figure = self._save_figure(trainer)
            announce(trainer, "PrioritySampling", "end", f"{self._running.conclusion()}{figure}")

    def on_save_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Leave the loader out of the checkpoint, so that it can be resumed without this callback."""
        if not self._is_passive and "loops" in checkpoint:
            # Lightning refuses to restore a loader that has another class than the one that was saved.
            checkpoint["loops"]["fit_loop"]["state_dict"].pop("combined_loader", None)

    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        """Restore the training step and the data loader."""
        self._release()

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Restore the training step and the data loader."""
        self._release()

    def plot(self) -> Figure:
        """Plot the spread of the probabilities over time, and the share of draws of the likeliest samples.

        Raises:
            ModuleNotFoundError: If matplotlib is not installed.
            RuntimeError: Before the first epoch is over.
        """
        if self.run is None or not self.run.history.steps:
            raise RuntimeError("Expected an epoch to be over, got none. Plot after training.")
        return draw_priorities(self.run.history, self.run.spread())

    # State.

    def state_dict(self) -> dict[str, Any]:
        """Return scores, prefetched draws, generators and history."""
        if self._is_passive:
            return {"is_passive": True}
        return dict(self._restored or {}) if self.run is None else self.run.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the state, or keep it until the data loader is known."""
        self._restored = dict(state_dict) if "sampler" in state_dict else None
        if self.run is not None and self._restored:
            self.run.load_state_dict(self._restored)

    def __getstate__(self) -> dict[str, Any]:
        """Leave out what belongs to one training."""
        return {**self.__dict__, "run": None, "_patches": PatchedAttributes(), "_restored": None}

    # Small things.

    def _everything(self) -> dict[str, Any]:
        """Return all settings that depend on each other."""
        names = "score", "beta", "beta_end", "weight_norm", "pressure_end", "selection"
        more = "refresh_every_n_epochs", "irreducible_losses"
        return {**self.settings, **{name: getattr(self, name) for name in (*names, *more)}}

    def _release(self) -> None:
        self._patches.restore()
        if self.run is not None:
            self.run.listener.stop()

    @property
    def _running(self) -> PriorityRun:
        assert self.run is not None
        return self.run

    def _loader(
        self, trainer: Trainer, pl_module: LightningModule, loader: object
    ) -> PriorityDataLoader:
        """Return the user's loader with a priority sampler; called again whenever Lightning reloads it."""
        ranks = trainer.distributed_sampler_kwargs or {"num_replicas": 1, "rank": 0}

        def make(dataset: Any, batch_size: int, drop_last: bool) -> PrioritySampler:
            run = self.run
            if run is not None and run.sampler.num_in_dataset == len(dataset):
                run.resize(batch_size, drop_last)
                return run.sampler
            if run is not None:
                rank_zero_warn(
                    f"PrioritySampling starts with new scores, because the data set has {len(dataset)} samples now and "
                    f"had {run.sampler.num_in_dataset} before."
                )
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
        # Lightning leaves `on_train_epoch_start` out when it resumes from a checkpoint of the last batch.
        sampler.before_epoch = partial(self._prepare_epoch, trainer, pl_module)
        if self._restored:
            run.load_state_dict(self._restored)
            self._restored = None  # a data set that is loaded later has scores of its own
        return run

    def _prepare_epoch(self, trainer: Trainer, pl_module: LightningModule, epoch: int) -> None:
        """Anneal the pressure, and measure the scores of all samples every so many epochs."""
        every = self.refresh_every_n_epochs
        if self.pressure_end is not None:
            progress = epoch / max(1, (trainer.max_epochs or 1) - 1)
            start: float = self.settings["pressure"]
            pressure = annealed(start, self.pressure_end, progress, geometric=True)
            self._running.sampler.table.pressure = pressure
        if every is not None and epoch > 0 and epoch % every == 0:
            self._running.refresh(refreshed_scores(trainer, pl_module, self._running))

    def _values_of_epoch(self, trainer: Trainer) -> dict[str, float]:
        run = self._running
        spread = run.spread()
        run.history.append(trainer.global_step, spread)
        return {
            "priority/effective_share": effective_sample_size(spread) / len(spread),
            "priority/never_drawn": 1 - float(run.sampler.table.is_drawn.float().mean()),
        }

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
        return (
            f"{sampler.num_in_dataset} samples in batches of {size} by {score}: {what}; {exchange}{advice}values go to "
            f"{logger_names(trainer)}."
        )

    def _save_figure(self, trainer: Trainer) -> str:
        """Publish the figure, and return the sentence that says where it is."""
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
    """Return the share of the training that is done, 0 where its length is unknown."""
    total = trainer.estimated_stepping_batches
    return trainer.global_step / total if math.isfinite(total) and total > 0 else 0.0


def _is_due(trainer: Trainer) -> bool:
    """Decide as Lightning does, once per batch that steps, however many optimizers there are."""
    loop = trainer.fit_loop.epoch_loop
    every: int = trainer.log_every_n_steps  # type: ignore[attr-defined]  # set by a connector
    num_stepped = loop._batches_that_stepped + 1
    return bool(every and not loop._should_accumulate() and num_stepped % every == 0)
