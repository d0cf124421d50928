"""Every callback of the catalogue on several real processes, and after an interruption."""

from __future__ import annotations

import pytest
from support import callback_checks as checks
from support import callback_interruptions as interruptions

pytestmark = pytest.mark.timeout(60)


@pytest.mark.compatible("2 ranks (DDP)")
def test_two_ranks(subject, tmp_path):
    checks.check_two_ranks(subject, tmp_path)


@pytest.mark.compatible("2 ranks (DDP)")
def test_a_measurement_that_fails_on_one_rank_does_not_hang_the_other(subject, tmp_path):
    interruptions.check_failure_inside_on_one_of_two_ranks(subject, tmp_path)


@pytest.mark.compatible("2 ranks (DDP)")
def test_a_module_that_fails_on_one_rank_does_not_hang_the_other(subject, tmp_path):
    interruptions.check_failure_outside_on_one_of_two_ranks(subject, tmp_path)


# The resumed run keeps its files apart on purpose.
@pytest.mark.filterwarnings("ignore:The dirpath has changed:UserWarning")
@pytest.mark.parametrize("world_size", [1, 2, 4])
@pytest.mark.compatible("exact resume in mid-epoch (1, 2 and 4 ranks)")
def test_resume_in_the_middle_of_an_epoch_is_bit_exact(subject, tmp_path, world_size):
    interruptions.check_resume(subject, tmp_path, world_size)
