"""Monitor the error that compressing the gradients would make."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any, ClassVar

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor
from torch.nn.parameter import is_lazy

from lightning_sgd._distributed import reduce_mean
from lightning_sgd._validation import expect
from lightning_sgd.callbacks._monitoring.monitor import Monitor
from lightning_sgd.functional.step_size.biased_sgd import BiasedSGDProblem
from lightning_sgd.functional.step_size.biased_sgd_plan import biased_sgd_floor
from lightning_sgd.functional.step_size.compression import (
    CompressorName,
    compression_sums,
    cosine,
    fit_error_model,
    relative_error,
)
from lightning_sgd.functional.step_size.compression import (
    compressor as find_compressor,
)


class GradientErrorMonitor(Monitor):
    r"""Log the error that a compressor makes on the gradients of this training, and an error model that covers it.

    After an optimizer step, the gradient :math:`u` that it used, reduced over ranks, accumulated, unscaled and clipped,
    is compressed to :math:`C(u)`. The error is :math:`e = C(u) - u`.

    .. list-table::
        :header-rows: 1

        * - key
          - meaning
        * - ``gradient_error/relative``
          - ‖e‖/‖u‖
        * - ``gradient_error/cosine``
          - cosine of the angle between u and C(u)
        * - ``gradient_error/delta``, ``gradient_error/c``
          - δ and c of a model ‖e‖² ≤ δ²‖u‖² + c² of the last measurements
        * - ``gradient_error/floor``
          - with ``problem``: the squared distance to the optimum below which no step size is certain to lead

    Every parameter's gradient is compressed on its own. Training uses the exact gradients: the monitor shows whether
    one could compress, and which errors :class:`~lightning_sgd.BiasedSGDLR` should allow for. At the first look there
    is no gradient yet and nothing is logged, nor in manual optimization that zeroes gradients right after a step.

    Cost: one copy of the largest gradient and a few passes over all of them; one all-reduce of three numbers. Training
    is not changed, to the last bit.

    Args:
        compressor: ``bf16``, ``int8``, ``int4``, ``sign`` (times mean magnitude), ``topk``, or a function that returns
            the compressed gradient of one parameter.
        topk_fraction: Share of the numbers that ``topk`` keeps.
        problem: What is known about the objective; for the floor, and for the best trade of δ against c.
        quantile: Share of the last measurements that the model must cover.
        window: Number of last measurements that the model must cover.
        every_n_steps: Look after so many optimizer steps; by default after every 50.
        every_n_epochs: Look after so many epochs; instead of ``every_n_steps``.
        max_overhead: Largest share of the training time for looking, which the interval is stretched to keep; null
            never stretches it.

    Raises:
        ValueError: If an argument is out of range.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> trainer = Trainer(callbacks=[GradientErrorMonitor("int8")], logger=False)

    Reference:
        Bin Hu, Peter Seiler, Laurent Lessard. Analysis of Biased Stochastic Gradient Descent Using Sequential
        Semidefinite Programs. Mathematical Programming 187, 2021.
    """

    metric_keys: ClassVar[tuple[str, ...]] = (
        "gradient_error/relative",
        "gradient_error/cosine",
        "gradient_error/delta",
        "gradient_error/c",
        "gradient_error/floor",
    )

    def __init__(
        self,
        compressor: CompressorName | Callable[[Tensor], Tensor] = "bf16",
        topk_fraction: float = 0.01,
        problem: BiasedSGDProblem | None = None,
        quantile: float = 1.0,
        window: int = 100,
        every_n_steps: int | None = None,
        every_n_epochs: int | None = None,
        max_overhead: float | None = 0.01,
    ) -> None:
        super().__init__(every_n_steps, every_n_epochs, max_overhead, default_every_n_steps=50)
        expect(0 < quantile <= 1, "quantile", "in (0, 1]", quantile, "Use 1 to cover all.")
        expect(window >= 1, "window", "at least 1", window, "Try 100.")
        if not callable(compressor):
            find_compressor(compressor, topk_fraction)
        self.compressor, self.topk_fraction = compressor, topk_fraction
        self.problem, self.quantile, self.window = problem, quantile, window
        self.reset()

    def reset(self) -> None:
        """Clear the measurements."""
        self.grad_sq: list[float] = []
        self.err_sq: list[float] = []
        self.last_cosine, self.num_overflows = 1.0, 0

    def identity(self) -> dict[str, Any]:
        """Return the compressor and the interval."""
        compressor = {"compressor": self._name, "topk_fraction": self.topk_fraction}
        return {**compressor, **super().identity()}

    def look(self, trainer: Trainer, pl_module: LightningModule) -> Mapping[str, float]:
        """Compress copies of the gradients, and fit the model."""
        compress = self.compressor
        if not callable(compress):
            compress = find_compressor(compress, self.topk_fraction)
        found = compression_sums(_gradients(pl_module), compress)
        if trainer.world_size > 1:  # else it stays on the CPU: MPS has no float64
            found = found.to(trainer.strategy.root_device)
        # Ratios of the means are right for replicas and for shards alike; absolute values are those of a replica.
        sums = reduce_mean(found, trainer.world_size).tolist()
        if sums[0] == 0:
            return {}
        if not all(map(math.isfinite, sums)):
            self.num_overflows += 1
            return {}
        self.grad_sq = [*self.grad_sq, sums[0]][-self.window :]
        self.err_sq = [*self.err_sq, sums[1]][-self.window :]
        self.last_cosine = cosine(sums)
        values = {"relative": relative_error(sums), "cosine": self.last_cosine, **self._model()}
        return {f"gradient_error/{name}": value for name, value in values.items()}

    def error_model(self) -> tuple[float, float] | None:
        """Return the pair (δ, c) that covers the last measurements; ``None`` before the first."""
        if not self.grad_sq:
            return None
        return fit_error_model(self.grad_sq, self.err_sq, self.problem, self.quantile)

    def describe_start(self, trainer: Trainer, pl_module: LightningModule) -> str:
        """Return the compressor and the number of parameters."""
        params = [param for param in pl_module.parameters() if param.requires_grad]
        what = f"error of {self._name} on the gradients of"
        if any(map(is_lazy, params)):
            return f"{what} {len(params)} tensors, some without a shape before the first batch"
        return f"{what} {sum(param.numel() for param in params)} parameters"

    def describe_end(self, trainer: Trainer, pl_module: LightningModule) -> str:
        """Return the error model, and what follows from it."""
        model = self.error_model()
        overflows = f" {self.num_overflows} gradients had overflowed." if self.num_overflows else ""
        if model is None:
            return f"no gradient was measured.{overflows}"
        found = (
            f"{self._name} leaves a relative error of {model[0]:.4g} and an absolute error of {model[1]:.4g} on the "
            f"last {len(self.grad_sq)} gradients measured, cosine {self.last_cosine:.6f} on the last one.{overflows}"
        )
        if self.problem is None:
            return found
        floor = biased_sgd_floor(self.problem, *model)
        return f"{found} Plain SGD is certain to come within a squared distance of {floor:.4g}."

    def state_dict(self) -> dict[str, Any]:
        """Return the last measurements, and the state of the schedule."""
        return {
            **super().state_dict(),
            "grad_sq": list(self.grad_sq),
            "err_sq": list(self.err_sq),
            "last_cosine": self.last_cosine,
            "num_overflows": self.num_overflows,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore :meth:`state_dict`."""
        super().load_state_dict(state_dict)
        self.grad_sq, self.err_sq = list(state_dict["grad_sq"]), list(state_dict["err_sq"])
        self.last_cosine = state_dict["last_cosine"]
        self.num_overflows = state_dict["num_overflows"]

    @property
    def _name(self) -> str:
        if not callable(self.compressor):
            return str(self.compressor)
        return getattr(self.compressor, "__qualname__", type(self.compressor).__qualname__)

    def _model(self) -> dict[str, float]:
        model = self.error_model()
        assert model is not None
        values = {"delta": model[0], "c": model[1]}
        if self.problem is not None:
            values["floor"] = biased_sgd_floor(self.problem, *model)
        return values


def _gradients(module: LightningModule) -> Iterator[Tensor]:
    for param in module.parameters():
        if param.grad is not None and param.grad.numel():
            # The real and the imaginary part are two numbers, as optimizers take them.
            yield torch.view_as_real(param.grad) if param.is_complex() else param.grad
