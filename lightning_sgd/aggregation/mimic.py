"""The mimic attack: copies of one honest row."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from lightning_sgd._validation import expect
from lightning_sgd.aggregation._attack import Attack


class Mimic(Attack):
    r"""A copy of one honest worker's row, so that it counts several times.

    Args:
        worker: Number of the honest worker whose row is copied; with a warm-up, during the warm-up only.
        num_warmup_steps: Number of calls that learn the direction z in which honest rows differ most; after them the
            row with the largest :math:`\langle x_i, z \rangle` is copied. 0 for none.

    Example:
        >>> Mimic()(torch.tensor([[1.0], [2.0]]), torch.zeros(2, 1), torch.Generator()).flatten()
        tensor([1., 1.])

    Reference:
        Sai Praneeth Karimireddy, Lie He, Martin Jaggi. Byzantine-Robust Learning on Heterogeneous Datasets via
        Bucketing. ICLR 2022.
    """

    def __init__(self, worker: int = 0, num_warmup_steps: int = 0) -> None:
        expect(
            worker >= 0, "worker", "the number of an honest worker", worker, "They count from 0."
        )
        remedy = "0 copies one worker throughout."
        expect(num_warmup_steps >= 0, "num_warmup_steps", "not negative", num_warmup_steps, remedy)
        self.worker, self.num_warmup_steps = worker, num_warmup_steps
        # The direction of largest spread needs whole rows; copying one can be done by columns.
        self.scope = "rows" if num_warmup_steps else "columns"
        self.num_calls = 0
        self.mean: Tensor | None = None
        self.direction: Tensor | None = None

    def __call__(self, honest: Tensor, own: Tensor, generator: torch.Generator) -> Tensor:
        """Return the same row for all faulty workers."""
        remedy = "Honest workers count from 0."
        expect(self.worker < len(honest), "worker", f"less than {len(honest)}", self.worker, remedy)
        if self.num_calls < self.num_warmup_steps:
            self._learn(honest, generator)
        elif self.direction is not None:
            return honest[int((honest @ self.direction).argmax())].expand_as(own)
        return honest[self.worker].expand_as(own)

    def _learn(self, honest: Tensor, generator: torch.Generator) -> None:
        """Take one step of the power iteration, with running means of the rows and of the direction."""
        self.num_calls += 1
        share = 1 / self.num_calls
        if self.mean is None or self.direction is None:
            drawn = torch.randn(honest.shape[1], generator=generator, device=generator.device)
            self.mean, self.direction = torch.zeros_like(honest[0]), drawn.to(honest)
        # Running means with weight 1/t, which start from the first rows alone.
        self.mean = torch.lerp(self.mean, honest.mean(dim=0), share)
        centred = honest - self.mean
        image = centred.mT @ (centred @ self.direction)
        # Equal rows give a zero image, which must not become NaN.
        image = image / image.norm().clamp_min(torch.finfo(image.dtype).tiny)
        self.direction = torch.lerp(self.direction, image, share)
        self.direction /= self.direction.norm().clamp_min(torch.finfo(image.dtype).tiny)

    def state_dict(self) -> dict[str, object]:
        """Return the number of calls, and the mean and direction learned in them."""
        learned = {} if self.mean is None else {"mean": self.mean, "direction": self.direction}
        return {"num_calls": self.num_calls, **learned}

    def load_state_dict(self, state: Mapping[str, object]) -> None:
        """Restore what :meth:`state_dict` returned.

        Args:
            state: Result of :meth:`state_dict`.
        """
        num_calls, mean, direction = (state.get(k) for k in ("num_calls", "mean", "direction"))
        assert isinstance(num_calls, int)
        self.num_calls = num_calls
        self.mean = mean.clone() if isinstance(mean, Tensor) else None
        self.direction = direction.clone() if isinstance(direction, Tensor) else None
