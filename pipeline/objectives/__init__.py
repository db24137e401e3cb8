"""What training minimises: small classes, `loss(model, batch) -> (loss, metrics)`."""

from pipeline.objectives.objective import VALIDATION, Facts, Inputs, Objective, Teacher
from pipeline.objectives.registry import OBJECTIVES, build_objective, check_best, check_mixing, check_objective, model_options

__all__ = [
    "OBJECTIVES", "VALIDATION", "Facts", "Inputs", "Objective", "Teacher", "build_objective", "check_best", "check_mixing",
    "check_objective", "model_options",
]  # fmt: skip
