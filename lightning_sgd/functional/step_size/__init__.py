"""Step sizes and batch sizes that theory allows: schedules, bounds, constants of least squares."""
