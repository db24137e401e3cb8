"""Shards to batches: which sample comes when (order), its bytes (reader), its pixels (decode, augment), batches (loader)."""

from pipeline.stream.loader import MicroBatch, Stream, open_stream
from pipeline.stream.reader import Dataset, open_dataset

__all__ = ["Dataset", "MicroBatch", "Stream", "open_dataset", "open_stream"]
