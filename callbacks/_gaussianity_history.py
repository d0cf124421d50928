"""What tests of Gaussian noise found at several moments, and that in words."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field
from typing import Any

from lightning_sgd.functional.noise.gradient_gaussianity import (
    GaussianityResult,
    GaussianitySettings,
)

_BEGIN = {
    "Gaussian": "nothing speaks against Gaussian noise in",
    "not Gaussian": "noise is not Gaussian in",
    "Gaussian on random directions only": (
        "noise is not Gaussian by coordinate, though nothing speaks against it in sums over coordinates, in"
    ),
    "undecided": "there is no noise that could be tested in",
}


@dataclass
class GaussianityHistory:
    """Results by time; all of it goes into a checkpoint.

    Attributes:
        times: Optimizer steps, ascending.
        verdicts: What was found at each of them.
        values: By quantity, one number for each time.
        quantiles: By family of directions, mean order statistics at the last time.
        tested: Batch size and number of directions of each family, at the last time.
    """

    times: list[int] = field(default_factory=list)
    verdicts: list[str] = field(default_factory=list)
    values: dict[str, list[float]] = field(default_factory=dict)
    quantiles: dict[str, list[float]] = field(default_factory=dict)
    tested: dict[str, int] = field(default_factory=dict)

    def note(self, step: int, found: GaussianityResult, batch_size: int) -> None:
        """Enter a result, unless there is one of this time already.

        Args:
            step: Optimizer steps so far.
            found: The result.
            batch_size: Samples behind one gradient.
        """
        if self.times[-1:] == [step]:
            return
        self.times.append(step)
        self.verdicts.append(found.verdict)
        for name, value in found.values.items():
            self.values.setdefault(name, []).append(value)
        self.quantiles = {
            "random": list(found.random_quantiles),
            "coordinate": list(found.coordinate_quantiles),
        }
        self.tested = {
            "batch_size": batch_size,
            "random": found.random.num_directions,
            "coordinate": found.coordinate.num_directions,
        }

    def state_dict(self) -> dict[str, Any]:
        """A copy as lists, dictionaries, numbers and strings."""
        return asdict(self)

    def in_words(self, settings: GaussianitySettings) -> str:
        """The last verdict with its reason, and when noise was not Gaussian.

        Args:
            settings: How was tested.
        """
        begin = f"at step {self.times[-1]} {_BEGIN[self.verdicts[-1]]} batches of {self.tested['batch_size']}"
        if math.isnan(self.values["rejected"][-1]):
            return f"{begin}.{self._past()}"
        random = self._share("random", "random directions", "")
        single = self._share("coordinate", "coordinates", "coordinate_")
        return (
            f"{begin}: rejected at the {settings.level:.2g} level are {random} and {single}, calibrated at a rate of "
            f"false alarms of {settings.false_alarm_rate:.2g}.{self._past()}"
        )

    def _share(self, family: str, what: str, prefix: str) -> str:
        names = (f"{prefix}{name}" for name in ("rejected", "limit", "p_value"))
        rejected, limit, p_value = (self.values[name][-1] for name in names)
        if math.isnan(rejected):
            return f"no {what}, for there is no noise in them,"
        return (
            f"{rejected:.0%} of {self.tested[family]} {what} (Gaussian noise: at most {limit:.0%}, "
            f"p = {p_value:.2g})"
        )

    def _past(self) -> str:
        """How often sums over coordinates were not Gaussian, if there is more than one look to tell about."""
        if len(self.times) < 2:
            return ""
        pairs = zip(self.times, self.verdicts, strict=True)
        steps = [time for time, verdict in pairs if verdict == "not Gaussian"]
        first = f", first at step {steps[0]}" if steps else ""
        return (
            f" Not Gaussian on random directions at {len(steps)} of {len(self.times)} looks{first}."
        )
