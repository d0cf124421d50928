"""Every callback of the catalogue under the settings of the Trainer, against the same training without it."""

from __future__ import annotations

import pytest
from support import callback_checks as checks

pytestmark = [pytest.mark.slow, pytest.mark.timeout(60)]


@pytest.mark.compatible("no logger, CSV, TensorBoard")
def test_no_logger(subject, tmp_path):
    checks.check_no_logger(subject, tmp_path)


@pytest.mark.compatible("no logger, CSV, TensorBoard")
def test_csv_logger(subject, tmp_path):
    checks.check_csv_logger(subject, tmp_path)


@pytest.mark.compatible("no logger, CSV, TensorBoard")
def test_tensorboard_logger(subject, tmp_path):
    checks.check_tensorboard_logger(subject, tmp_path)


@pytest.mark.compatible("fast_dev_run and sanity check")
def test_fast_dev_run(subject, tmp_path):
    checks.check_fast_dev_run(subject, tmp_path)


@pytest.mark.compatible("fast_dev_run and sanity check")
def test_sanity_check(subject, tmp_path):
    checks.check_sanity_check(subject, tmp_path)


@pytest.mark.compatible("limited batches")
def test_limited_batches(subject, tmp_path):
    checks.check_limited_batches(subject, tmp_path)


@pytest.mark.compatible("gradient accumulation")
def test_accumulation_also_of_an_incomplete_group(subject, tmp_path):
    checks.check_accumulation(subject, tmp_path)


@pytest.mark.compatible("gradient clipping")
def test_clipping(subject, tmp_path):
    checks.check_clipping(subject, tmp_path)


@pytest.mark.compatible("manual optimization, two optimizers")
def test_manual_optimization_with_two_optimizers(subject, tmp_path):
    checks.check_manual_optimization(subject, tmp_path)


@pytest.mark.compatible("bf16-mixed precision")
def test_bf16_mixed(subject, tmp_path):
    checks.check_bf16_mixed(subject, tmp_path)


@pytest.mark.compatible("torch.compile of a module")
def test_compiled_modules(subject, tmp_path):
    checks.check_compiled_modules(subject, tmp_path)


@pytest.mark.compatible("validate, test, predict alone")
def test_entries_without_training(subject, tmp_path):
    checks.check_entries_without_training(subject, tmp_path)
