"""Stage 3: how good is what was trained? Scores with intervals, by the protocols of the papers (reference/evaluation.md)."""

from pipeline.evaluate.protocols import PROTOCOLS
from pipeline.evaluate.results import Result, metric_values, read_results
from pipeline.evaluate.tasks import Task, check_evaluate

__all__ = ["PROTOCOLS", "Result", "Task", "check_evaluate", "metric_values", "read_results"]
