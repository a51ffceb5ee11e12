"""One HTML file that shows a run: figures, and every trajectory down to its tokens."""

from eval.report.report import write_report

__all__ = ["write_report"]
