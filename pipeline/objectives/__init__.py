"""What training minimises: small classes, `loss(model, batch) -> (loss, metrics)`."""

from pipeline.objectives.objective import Facts, Inputs, Objective, Teacher
from pipeline.objectives.registry import OBJECTIVES, build_objective, check_mixing, check_objective, model_options

__all__ = ["OBJECTIVES", "Facts", "Inputs", "Objective", "Teacher", "build_objective", "check_mixing", "check_objective", "model_options"]
