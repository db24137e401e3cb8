"""Architectures as the papers give them, by name."""

from pipeline.models.model import Model, flops, training_flops
from pipeline.models.registry import build, check_model, create, model_names

__all__ = ["Model", "build", "check_model", "create", "flops", "model_names", "training_flops"]
