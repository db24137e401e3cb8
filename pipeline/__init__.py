"""Tessera: shard, pre-train and evaluate vision models on web-scale data. The map is pipeline/README.md."""

__version__ = "0.1.0"
