"""Finds out in the first step where losses come from, and listens there only from then on."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from lightning_sgd.sampling.loss_recorder import (
    LossInterceptor,
    LossRecorder,
    TrackedTensor,
    recording,
)


class LossListener:
    """Runs training steps with a recorder.

    In the first step every function of torch is looked at, some microseconds each, and every part of the module. If the
    losses got what a part had returned, a hook on that part marks its outputs from then on, which costs next to
    nothing. Otherwise it stays with looking at everything.

    Args:
        module: Whose steps are run.
    """

    def __init__(self, module: LightningModule) -> None:
        self.module = module
        self._handles: list[RemovableHandle] = []
        self._outputs: list[tuple[nn.Module, Tensor]] = []
        self._recorder: LossRecorder | None = None
        self._is_settled = self._is_explicit = False

    def run(
        self, step: Callable[[Any], Any], batch: Any, recorder: LossRecorder, is_trial: bool = False
    ) -> Any:
        """The output of a step.

        Args:
            step: What to run.
            batch: What it gets.
            recorder: What learns of its losses.
            is_trial: Whether the module is put back afterwards, hooks included, so that nothing is to be found out.
        """
        if not self._is_settled and not is_trial:
            return self._first(step, batch, recorder)
        if self._is_explicit:
            with recording(recorder):
                return step(batch)
        if not self._handles:
            with recording(recorder), LossInterceptor(recorder):
                return step(batch)
        self._recorder = recorder
        try:
            with recording(recorder):
                output = step(batch)
        finally:
            self._recorder = None
        if output is not None and not recorder.num_losses and not is_trial:
            self._listen_everywhere(recorder)
        return _as_they_were(output)

    def stop(self) -> None:
        """Leave no hook behind."""
        for handle in self._handles:
            handle.remove()
        self._handles, self._outputs = [], []
        self._is_settled = self._is_explicit = False

    def _first(self, step: Callable[[Any], Any], batch: Any, recorder: LossRecorder) -> Any:
        parts = list(_visible_parts(self.module))
        self._handles = [part.register_forward_hook(self._note) for part in parts]
        try:
            with recording(recorder), LossInterceptor(recorder):
                output = step(batch)
            sources = [self._source_of(tensor) for tensor in recorder.inputs]
        finally:
            self.stop()
        if recorder.num_losses:
            self._is_settled, self._is_explicit = True, not sources  # by `priority_mean` alone
            found = dict.fromkeys(source for source in sources if source is not None)
            if sources and None not in sources:
                self._handles = [part.register_forward_hook(self._mark) for part in found]
        return output

    def _note(self, part: nn.Module, inputs: Any, output: Any) -> None:
        if isinstance(output, Tensor):
            self._outputs.append((part, output))

    def _mark(self, part: nn.Module, inputs: Any, output: Any) -> Any:
        recorder = self._recorder
        if recorder is None or not isinstance(output, Tensor):
            return None
        marked = output.as_subclass(TrackedTensor)
        if isinstance(part, nn.Linear):
            recorder.note_linear(inputs[0], marked, part.bias is not None)
        return marked

    def _source_of(self, tensor: Tensor) -> nn.Module | None:
        """The innermost part that returned it, or what it is a view of."""
        for part, output in self._outputs:
            if output is tensor or (tensor._base is not None and tensor._base is output):
                return part
        return None

    def _listen_everywhere(self, recorder: LossRecorder) -> None:
        self.stop()
        self._is_settled = True
        recorder.was_missed = True
        rank_zero_warn(
            "PrioritySampling did not find the loss of a batch, because `training_step` took another way than in the "
            "first batch; that batch had no weights. From now on it looks everywhere, which takes longer."
        )


def _visible_parts(module: nn.Module) -> Iterator[nn.Module]:
    """The module and its parts, without those that are compiled as a whole."""
    yield module
    for child in module.children():
        is_script = isinstance(child, torch.jit.ScriptModule)
        if not is_script and type(child).__name__ != "OptimizedModule":
            yield from _visible_parts(child)


def _as_they_were(output: Any) -> Any:
    """Plain tensors in what a step returns."""
    if isinstance(output, TrackedTensor):
        return output.as_subclass(Tensor)
    if isinstance(output, dict):
        return {key: _as_they_were(value) for key, value in output.items()}
    return output
