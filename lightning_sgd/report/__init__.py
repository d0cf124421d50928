"""Tables, a plot and a page for people, made from the log files of a run."""

from lightning_sgd.report.files import ReportError
from lightning_sgd.report.run_report import report

__all__ = ["ReportError", "report"]
