"""Keep what a monitor measured, by optimizer step."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass
class TimeSeries:
    """Several quantities, measured at the same optimizer steps.

    Attributes:
        times: Optimizer steps, ascending.
        values: By quantity, one number for each of them.
    """

    times: list[int] = field(default_factory=list)
    values: dict[str, list[float]] = field(default_factory=dict)

    def add(self, step: int, values: Mapping[str, float]) -> bool:
        """Append a measurement and return true, unless there is one of this step already.

        Example:
            >>> history = TimeSeries()
            >>> history.add(10, {"alpha": 1.5}), history.add(10, {"alpha": 1.6})
            (True, False)
            >>> history
            TimeSeries(times=[10], values={'alpha': [1.5]})
        """
        if self.times[-1:] == [step]:
            return False
        self.times.append(step)
        for name, value in values.items():
            self.values.setdefault(name, []).append(value)
        return True

    def latest(self) -> dict[str, float]:
        """Return the last value of each quantity."""
        return {name: series[-1] for name, series in self.values.items()}

    @staticmethod
    def from_state(state_dict: Mapping[str, Any]) -> TimeSeries:
        """Make a copy of what :meth:`state_dict` returned."""
        values = {name: list(series) for name, series in state_dict["values"].items()}
        return TimeSeries(list(state_dict["times"]), values)

    def state_dict(self) -> dict[str, Any]:
        """Return a copy as lists, dictionaries, numbers and strings."""
        return asdict(self)
