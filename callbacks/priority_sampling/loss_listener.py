"""Find out in the first step which part of a module the losses come from, and track only its outputs afterwards."""

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
    """Runs training steps with a recorder of their losses.

    In the first step every function of torch is intercepted, which takes some microseconds each, and every part of the
    module has a hook. If the inputs of the losses are outputs of a part, only a hook on that part tracks them from then
    on, which costs next to nothing. Otherwise all functions are intercepted in every step.
    """

    def __init__(self, module: LightningModule) -> None:
        self.module = module
        self._handles: list[RemovableHandle] = []
        self._outputs: list[tuple[nn.Module, Tensor]] = []
        self._recorder: LossRecorder | None = None
        self._is_settled = self._is_explicit = False
        self.logged: frozenset[int] | None = frozenset()
        """Losses of the last step that are only logged; ``None`` if that changes from step to step."""

    def run(
        self, step: Callable[[Any], Any], batch: Any, recorder: LossRecorder, is_trial: bool = False
    ) -> Any:
        """Run a step while its losses are recorded, and return its output.

        Args:
            step: What to run.
            batch: Its argument.
            recorder: Records the losses.
            is_trial: The module is restored afterwards, hooks included, so that nothing can be found out.
        """
        if not self._is_settled and not is_trial:
            output = self._first(step, batch, recorder)
        elif self._is_explicit or self._handles:
            self._recorder = None if self._is_explicit else recorder
            try:
                with recording(recorder):
                    output = step(batch)
            finally:
                self._recorder = None
            recorder.drop_unreached(output)
            is_lost = output is not None and not recorder.num_losses and not recorder.was_missed
            if is_lost and self._handles and not is_trial:
                self._listen_everywhere(recorder)
        else:
            with recording(recorder), LossInterceptor(recorder):
                output = step(batch)
            recorder.drop_unreached(output)
        if not is_trial:
            self._compare_logged(recorder)
        return _untracked(output)

    def stop(self) -> None:
        """Remove all hooks."""
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
            recorder.drop_unreached(output)
            sources = [self._source_of(tensor) for tensor in recorder.inputs]
        finally:
            self.stop()
        if recorder.num_losses:
            self._is_settled, self._is_explicit = True, not sources  # by `priority_mean` alone
            found = dict.fromkeys(source for source in sources if source is not None)
            if sources and None not in sources:
                self._handles = [part.register_forward_hook(self._mark) for part in found]
        return output

    def _compare_logged(self, recorder: LossRecorder) -> None:
        if self.logged is None or not recorder.unreached ^ self.logged:
            return
        if recorder.logged <= recorder.unreached:
            self.logged = frozenset(recorder.unreached)
            return
        self.logged = None
        rank_zero_warn(
            "PrioritySampling gave no weight to a loss of a batch, because `training_step` only logged it in the batch "
            "before, and returns it now. From now on losses that are logged get weights too."
        )

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
        """Return the innermost part that returned the tensor, or the tensor of which it is a view."""
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
    """Iterate over the module and its parts, without those that are compiled as a whole."""
    yield module
    for child in module.children():
        is_script = isinstance(child, torch.jit.ScriptModule)
        if not is_script and type(child).__name__ != "OptimizedModule":
            yield from _visible_parts(child)


def _untracked(output: Any) -> Any:
    """Convert tracked tensors in the output of a step to plain ones."""
    if isinstance(output, TrackedTensor):
        return output.as_subclass(Tensor)
    if isinstance(output, dict):
        return {key: _untracked(value) for key, value in output.items()}
    return output
