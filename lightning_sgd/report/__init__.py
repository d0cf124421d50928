"""What a run did, for people: tables and plots made from its log files."""

from lightning_sgd.report.files import ReportError
from lightning_sgd.report.run_report import report

__all__ = ["ReportError", "report"]
