"""What a config will need, before anything starts. Imports no engine."""

from pipeline.plan.plan import Plan, make_plan

__all__ = ["Plan", "make_plan"]
