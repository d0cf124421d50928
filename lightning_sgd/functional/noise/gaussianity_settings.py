"""How noise is tested for being Gaussian: the settings that functions, metric and monitor have in common."""

from __future__ import annotations

import math
from dataclasses import dataclass

from lightning_sgd._validation import expect
from lightning_sgd.functional.noise.gaussian_null import TESTS, TestName

NUM_FAMILIES = 2  # random directions, coordinates


@dataclass(frozen=True)
class GaussianitySettings:
    """How noise is tested.

    Attributes:
        num_directions: Random directions, and as many coordinates [R].
        test: Name of the test on one direction.
        level: Level of the test on one direction.
        false_alarm_rate: How often Gaussian noise may be called something else.
        num_bootstraps: Samples of Gaussian noise for the calibration [B].
    """

    num_directions: int = 256
    test: TestName = "shapiro_wilk"
    level: float = 0.05
    false_alarm_rate: float = 0.01
    num_bootstraps: int = 199

    def __post_init__(self) -> None:
        remedy = "Several hundred make the share precise."
        expect(
            self.num_directions >= 1, "num_directions", "at least 1", self.num_directions, remedy
        )
        names = ", ".join(TESTS)
        expect(self.test in TESTS, "test", f"one of {names}", self.test, "Choose one of them.")
        for name in ("level", "false_alarm_rate"):
            value = getattr(self, name)
            expect(0 < value < 1, name, "between 0 and 1", value, "Usual are 0.05 and 0.01.")
        least = math.ceil(NUM_FAMILIES / self.false_alarm_rate - 1e-9) - 1
        remedy = (
            "So small a rate of false alarms cannot be told with fewer; raise one or the other."
        )
        num = self.num_bootstraps
        expect(num >= least, "num_bootstraps", f"at least {least}", num, remedy)

    @property
    def family_rate(self) -> float:
        """Rate of false alarms for random directions and coordinates each, together the stated one."""
        return self.false_alarm_rate / NUM_FAMILIES
