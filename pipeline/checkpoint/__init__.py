"""What outlives a crash: the run directory, committed checkpoints, the model in them."""

from pipeline.checkpoint.commit import Checkpoints, Commit, Lease
from pipeline.checkpoint.history import read_history
from pipeline.checkpoint.model import ModelCard, adapt_weights, find_model
from pipeline.checkpoint.run import Run, claim_run, find_run

__all__ = ["Checkpoints", "Commit", "Lease", "ModelCard", "Run", "adapt_weights", "claim_run", "find_model", "find_run", "read_history"]
