"""The base class of metrics with one value."""

from __future__ import annotations

from abc import ABC
from collections.abc import Sequence
from typing import TYPE_CHECKING

from torch import Tensor
from torchmetrics import Metric

if TYPE_CHECKING:
    from torchmetrics.utilities.plot import _AX_TYPE, _PLOT_OUT_TYPE


class ScalarMetric(Metric, ABC):
    """A metric whose result is one number."""

    def plot(
        self, val: Tensor | Sequence[Tensor] | None = None, ax: _AX_TYPE | None = None
    ) -> _PLOT_OUT_TYPE:
        """Plot one value, or several over time.

        Args:
            val: A result of ``forward`` or ``compute``, or a list of them; by default the current one.
            ax: A matplotlib axis to draw on; by default a new figure.

        Returns:
            Figure and axis.

        Raises:
            ModuleNotFoundError: If matplotlib is not installed.
        """
        return self._plot(val, ax)
