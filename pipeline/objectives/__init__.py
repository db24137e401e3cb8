"""What training minimises: small classes, `loss(model, batch) -> (loss, metrics)`."""

from pipeline.objectives.classify import Classify
from pipeline.objectives.registry import build_objective, check_objective

__all__ = ["Classify", "build_objective", "check_objective"]
