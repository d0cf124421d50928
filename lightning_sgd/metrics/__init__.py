"""torchmetrics ``Metric`` classes, one per file."""
