"""Architectures as the papers give them, by name."""

from pipeline.models.registry import build_model, check_model, model_names

__all__ = ["build_model", "check_model", "model_names"]
