"""One self-contained HTML page a run, or of several: scores, curves, pictures, data, time, config."""

from pipeline.report.page import build_joint_report, build_report, write_joint_report, write_report
from pipeline.report.view import Shown

__all__ = ["Shown", "build_joint_report", "build_report", "write_joint_report", "write_report"]
