"""The suite itself: a monitor that behaves passes, and for every way to misbehave there is a check that fails."""

from __future__ import annotations

import inspect
import logging
import random
import time

import numpy as np
import pytest
import torch
import torch.distributed as dist
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from lightning.pytorch.utilities.seed import isolate_rng
from support import callback_checks as checks
from support import callback_interruptions as interruptions
from support.callback_checks import Subject
from support.steady_monitor import SteadyMonitor
from torch.multiprocessing import ProcessRaisedException

PROMISES = {**vars(checks), **vars(interruptions)}
CHECKS = {name: check for name, check in PROMISES.items() if name.startswith("check_")}
MISBEHAVIOUR = []
pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(60),
    # A resumed run keeps its files apart on purpose.
    pytest.mark.filterwarnings("ignore:The dirpath has changed:UserWarning"),
]


def subject(monitor):
    return Subject(monitor, ("steady/norm/*",), other_settings={"every_n_steps": 2})


def caught_by(name, match):
    """Note which check must fail because of a class, and with which words."""

    def note(monitor):
        MISBEHAVIOUR.append(pytest.param(name, monitor, match, id=f"{name}-{monitor.__name__}"))
        return monitor

    return note


@pytest.fixture(autouse=True)
def _settings_of_torch():
    """Some leave gradients off."""
    with torch.enable_grad():
        yield


@pytest.mark.parametrize("name", CHECKS)
def test_a_monitor_that_behaves_passes(name, tmp_path):
    CHECKS[name](subject(SteadyMonitor), tmp_path)


@pytest.mark.parametrize("world_size", [2, 4])
def test_a_monitor_that_behaves_resumes_on_several_ranks(world_size, tmp_path):
    interruptions.check_resume(subject(SteadyMonitor), tmp_path, world_size)


@caught_by("check_training_is_unchanged", "on_train_batch_end.* random state/torch")
class DrawsFromTorch(SteadyMonitor):
    def on_train_batch_end(self, trainer, *args):
        torch.rand(1)


@caught_by("check_training_is_unchanged", "on_train_batch_end.* random state/numpy")
class DrawsFromNumpy(SteadyMonitor):
    def on_train_batch_end(self, trainer, *args):
        np.random.rand()  # noqa: NPY002  # what must not be done


@caught_by("check_training_is_unchanged", "on_train_epoch_end.* random state/python")
class DrawsFromPython(SteadyMonitor):
    def on_train_epoch_end(self, trainer, pl_module):
        random.random()


@caught_by("check_training_is_unchanged", "on_train_start.* gradients/net.1.bias")
class LeavesAGradient(SteadyMonitor):
    def measure(self, trainer, pl_module):
        pl_module(torch.rand(8, 64)).sum().backward()
        return {"steady/norm/all": 1.0}


@caught_by("check_training_is_unchanged", "on_train_batch_end.* training mode/net.2")
class LeavesEvalMode(SteadyMonitor):
    def on_train_batch_end(self, trainer, pl_module, *args):
        pl_module.net[2].eval()


@caught_by("check_training_is_unchanged", "on_train_start.* buffers/net.2.num_batches")
class ChangesABuffer(SteadyMonitor):
    def look(self, trainer, pl_module):
        with isolate_rng(), torch.no_grad():
            pl_module(torch.rand(8, 64))
        return {"steady/norm/all": 1.0}


@caught_by("check_training_is_unchanged", "on_train_start.* weights/net.5.bias")
class ChangesAWeight(SteadyMonitor):
    def measure(self, trainer, pl_module):
        with torch.no_grad():
            pl_module.net[-1].bias[0].nextafter_(torch.tensor(1.0))
        return {"steady/norm/all": 1.0}


@caught_by("check_training_is_unchanged", "on_before_optimizer_step.* optimizer state/")
class ChangesMomentum(SteadyMonitor):
    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        for state in optimizer.state.values():
            state["momentum_buffer"].mul_(0.5)


@caught_by("check_training_is_unchanged", "on_train_batch_start.* loss and batch")
class ChangesTheBatch(SteadyMonitor):
    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        batch[0].clamp_(max=0.5)


@caught_by("check_training_is_unchanged", "on_train_end.* requires_grad/net.1.bias")
class Freezes(SteadyMonitor):
    def on_train_end(self, trainer, pl_module):
        pl_module.net[1].requires_grad_(False)


@caught_by("check_training_is_unchanged", "settings of torch/gradients enabled")
class SwitchesGradientsOff(SteadyMonitor):
    def on_train_batch_end(self, *args):
        torch.set_grad_enabled(False)


@caught_by("check_training_is_unchanged", "number of hooks")
class LeavesAHook(SteadyMonitor):
    def on_train_start(self, trainer, pl_module):
        pl_module.net[1].register_forward_hook(lambda *_: None)


@caught_by("check_failure_outside", "number of hooks")
class RemovesItsHooksAtTheEndOnly(SteadyMonitor):
    def on_train_start(self, trainer, pl_module):
        self.handle = pl_module.net[1].register_forward_hook(_nothing)

    def on_train_end(self, trainer, pl_module):
        self.handle.remove()


def _nothing(*_):
    pass


@caught_by("check_failure_inside", "after the failure, the training .* training mode/")
class FailsInEvalMode(SteadyMonitor):
    def look(self, trainer, pl_module):
        pl_module.eval()
        values = self.measure(trainer, pl_module)
        pl_module.train()
        return values


@caught_by("check_failure_inside", "after the failure, the training .* random state")
class FailsInIsolateRng(SteadyMonitor):
    """Lightning's ``isolate_rng`` restores the states only where nothing fails."""

    def look(self, trainer, pl_module):
        with isolate_rng():
            return {"steady/norm/all": torch.rand(1).item() + torch.rand(1).item()}


@caught_by("check_failure_inside", "after the failure, the training .* requires_grad/")
class FailsWithoutGradients(SteadyMonitor):
    def look(self, trainer, pl_module):
        params = [param for param in pl_module.parameters() if param.ndim == 2]
        for param in params:
            param.requires_grad_(False)
        values = {"steady/norm/all": params[0].norm().item()}
        for param in params:
            param.requires_grad_(True)
        return values


@caught_by("check_failure_inside", "DID NOT RAISE")
@caught_by("check_failure_inside_on_one_of_two_ranks", "DID NOT RAISE")
class HidesFailures(SteadyMonitor):
    def look_if_due(self, *args):
        try:
            super().look_if_due(*args)
        except RuntimeError:
            self.last_step = -1


@caught_by("check_failure_outside_on_one_of_two_ranks", "another sentence")
class FailsOnException(SteadyMonitor):
    def on_exception(self, *args):
        raise ValueError("another sentence")


@caught_by("check_metric_keys", "not in the catalogue: .'steady/surprise'")
class LogsAnUnknownKey(SteadyMonitor):
    def measure(self, *args):
        return {**super().measure(*args), "steady/surprise": 1.0}


@caught_by("check_metric_keys", r"never logged: steady/norm/\*")
class LogsNothing(SteadyMonitor):
    def log_values(self, *args):
        pass


@caught_by("check_progress_bar", "on the progress bar: .'steady/norm/")
class UsesTheProgressBar(SteadyMonitor):
    def log_values(self, trainer, pl_module, values):
        if pl_module._current_fx_name == "on_train_batch_end":
            pl_module.log_dict(dict(values), prog_bar=True)


@caught_by("check_lines", "one line at the start and one at the end")
class IsSilent(SteadyMonitor):
    def on_train_end(self, *args):
        pass


@caught_by("check_lines", "one line at the start and one at the end")
class TalksTooMuch(SteadyMonitor):
    def on_train_epoch_end(self, *args):
        rank_zero_info("Another epoch.")


@caught_by("check_two_ranks", "said on the second rank")
class TalksOnEveryRank(SteadyMonitor):
    def on_train_end(self, trainer, pl_module):
        logging.getLogger("lightning.pytorch.utilities.rank_zero").info("The end.")


@caught_by("check_no_logger", "'NoneType' object has no attribute 'log_metrics'")
class NeedsALogger(SteadyMonitor):
    def log_values(self, trainer, pl_module, values):
        trainer.logger.log_metrics(values, step=trainer.global_step)


@caught_by("check_csv_logger", "missing in the log: steady")
@caught_by("check_tensorboard_logger", "missing in the log: steady")
class KnowsOneLoggerOnly(SteadyMonitor):
    def log_values(self, trainer, pl_module, values):
        if trainer.logger.name == "journal":
            super().log_values(trainer, pl_module, values)


@caught_by("check_fast_dev_run", "no folder")
class NeedsAFolder(SteadyMonitor):
    def on_train_end(self, trainer, pl_module):
        assert trainer.logger.log_dir, "no folder"


@caught_by("check_sanity_check", "logged in the sanity check: .'steady/norm/all'")
class LooksInTheSanityCheck(SteadyMonitor):
    def on_validation_end(self, trainer, pl_module):
        self.log_values(trainer, pl_module, {"steady/norm/all": 1.0})


@caught_by("check_limited_batches", "not the last batch")
class NeedsTheWholeEpoch(SteadyMonitor):
    def on_train_epoch_end(self, trainer, pl_module):
        assert trainer.fit_loop.epoch_loop.batch_idx == 6, "not the last batch"


@caught_by("check_accumulation", "logged more than once for a step")
class LooksAtEveryBatch(SteadyMonitor):
    def look_if_due(self, trainer, pl_module):
        self.log_values(trainer, pl_module, self.look(trainer, pl_module))


@caught_by("check_clipping", "on_train_batch_end.* gradients/")
class UndoesClipping(SteadyMonitor):
    def on_before_zero_grad(self, trainer, pl_module, optimizer):
        trainer.gradient_clip_val = None


@caught_by("check_manual_optimization", "assert 2 == 1")
class WantsOneOptimizer(SteadyMonitor):
    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        assert len(trainer.optimizers) == 1


@caught_by("check_bf16_mixed", "torch.bfloat16 == torch.float32")
class WantsSinglePrecision(SteadyMonitor):
    def on_train_start(self, trainer, pl_module):
        with trainer.precision_plugin.forward_context(), isolate_rng():
            dtype = torch.nn.functional.linear(torch.ones(1), torch.ones(1, 1)).dtype
            assert dtype == torch.float32


@caught_by("check_compiled_modules", "_orig_mod")
class NamesWhatTorchWraps(SteadyMonitor):
    def measure(self, trainer, pl_module):
        values = (f"steady/norm/{name}" for name, _ in pl_module.named_parameters())
        return dict.fromkeys(values, 1.0)


class WaitsForEverybodyOnOneRank(SteadyMonitor):
    def on_train_start(self, trainer, pl_module):
        if trainer.world_size > 1 and trainer.is_global_zero:
            dist.barrier()


@caught_by("check_two_instances", "more than one stateful callback of type")
class SharesItsKey(SteadyMonitor):
    state_key = "SteadyMonitor"


@caught_by("check_two_instances", "the key changes from run to run")
class NeverHasTheSameKey(SteadyMonitor):
    @property
    def state_key(self):
        return f"SteadyMonitor {id(self)}"


class PlansByItsOwnClock(SteadyMonitor):
    last = 0.0

    def on_train_batch_end(self, trainer, pl_module, *args):
        if trainer.world_size > 1 and time.perf_counter() - self.last > 1.0:
            self.last = time.perf_counter()
            dist.all_reduce(torch.ones(1))


@caught_by("check_fit_twice", "what the second training logs differs")
class NeverStartsAgain(SteadyMonitor):
    def setup(self, trainer, pl_module, stage):
        pass


@caught_by("check_fit_twice", "nothing is logged when a training goes on")
class NeverGoesOn(SteadyMonitor):
    done = False

    def setup(self, trainer, pl_module, stage):
        super().setup(trainer, pl_module, stage)
        self.done = trainer.global_step > 0

    def log_values(self, trainer, pl_module, values):
        if not self.done:
            super().log_values(trainer, pl_module, values)


@caught_by("check_entries_without_training", "no optimizers")
class IsMadeForTrainingOnly(SteadyMonitor):
    def setup(self, trainer, pl_module, stage):
        assert trainer.optimizers or stage == "fit", "no optimizers"


@caught_by("check_copies", "pickle")
class CannotBePickled(SteadyMonitor):
    def __init__(self, every_n_steps=1):
        super().__init__(every_n_steps)
        self.f = lambda: None


@caught_by("check_resume", "Weights only load failed")
class SavesANumpyScalar(SteadyMonitor):
    def state_dict(self):
        return {**super().state_dict(), "largest": np.float64(self.largest)}


@caught_by("check_resume", "state/pair is a tuple")
class SavesATuple(SteadyMonitor):
    def state_dict(self):
        return {**super().state_dict(), "pair": (1, 2)}


@caught_by("check_resume", "the restored state differs: largest")
class ForgetsItsState(SteadyMonitor):
    def load_state_dict(self, state_dict):
        self.last_step = state_dict["last_step"]


@caught_by("check_resume", "the state at the end differs: largest")
class HidesAPartOfItsState(SteadyMonitor):
    num_looks = 0

    def look(self, *args):
        self.num_looks += 1
        return {"steady/norm/all": float(self.num_looks)}


@caught_by("check_resume", "the restored state differs: largest, last_step")
class ResetsItsState(SteadyMonitor):
    def on_train_start(self, trainer, pl_module):
        self.reset()


@pytest.mark.parametrize(("name", "monitor", "match"), MISBEHAVIOUR)
def test_misbehaviour_is_caught(name, monitor, match, tmp_path):
    with pytest.raises(BaseException, match=match):
        CHECKS[name](subject(monitor), tmp_path)


@pytest.mark.parametrize("monitor", [WaitsForEverybodyOnOneRank, PlansByItsOwnClock])
def test_a_deadlock_is_caught(monitor, tmp_path):
    # A collective on one rank alone would keep the others waiting for ever.
    with pytest.raises(ProcessRaisedException, match=r"(?i)timed? ?out|closed by peer"):
        checks.check_two_ranks(subject(monitor), tmp_path, timeout=3)


def test_every_check_catches_something():
    assert {case.values[0] for case in MISBEHAVIOUR} == set(CHECKS)


def test_every_check_is_applied_to_the_catalogue(root):
    sources = "".join(file.read_text() for file in root.glob("tests/callbacks/test_conf*.py"))
    assert all(f".{name}(" in sources for name in CHECKS)
    assert all(inspect.getdoc(check) for check in CHECKS.values())
