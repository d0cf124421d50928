"""What every callback of the catalogue must do, whatever it is for; the promises are in ``support.callback_checks``."""

from __future__ import annotations

import pytest
from support import callback_checks as checks
from support import callback_interruptions as interruptions

pytestmark = [pytest.mark.slow, pytest.mark.timeout(60)]


@pytest.mark.compatible("training unchanged, bit by bit")
def test_training_is_unchanged(observer, tmp_path):
    # A monitor that disturbs what it measures is worse than none.
    checks.check_training_is_unchanged(observer, tmp_path)


def test_what_is_logged_is_what_the_catalogue_says(subject, tmp_path):
    checks.check_metric_keys(subject, tmp_path)


def test_nothing_is_put_on_the_progress_bar(subject, tmp_path):
    checks.check_progress_bar(subject, tmp_path)


def test_one_line_at_the_start_and_one_at_the_end(subject, tmp_path):
    checks.check_lines(subject, tmp_path)


@pytest.mark.compatible("failure in the middle")
def test_a_failing_measurement_is_seen_and_leaves_everything_as_it_was(subject, tmp_path):
    interruptions.check_failure_inside(subject, tmp_path)


@pytest.mark.compatible("failure in the middle")
def test_a_failing_module_is_seen(subject, tmp_path):
    interruptions.check_failure_outside(subject, tmp_path)


@pytest.mark.compatible("two instances")
def test_two_instances_keep_their_states_apart(subject, tmp_path):
    checks.check_two_instances(subject, tmp_path)


@pytest.mark.compatible("fit twice with one object")
def test_one_object_serves_two_trainings(subject, tmp_path):
    interruptions.check_fit_twice(subject, tmp_path)


def test_copies_can_be_made(subject, tmp_path):
    # Spawned processes get a pickled callback.
    interruptions.check_copies(subject, tmp_path)
