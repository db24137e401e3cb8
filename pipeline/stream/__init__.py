"""Shards to batches: which sample comes when (order), its bytes (reader), its pixels (decode, augment), batches (loader)."""

from pipeline.stream.batches import MicroBatch
from pipeline.stream.collection import Collection, open_collection
from pipeline.stream.loader import Stream, open_stream
from pipeline.stream.reader import Dataset, open_dataset

__all__ = ["Collection", "Dataset", "MicroBatch", "Stream", "open_collection", "open_dataset", "open_stream"]
