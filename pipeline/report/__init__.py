"""One self-contained HTML page a run: scores, curves, pictures, data, time, config."""

from pipeline.report.page import build_report, write_report

__all__ = ["build_report", "write_report"]
