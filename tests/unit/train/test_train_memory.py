from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from pipeline.core.storage import Storage
from tests.unit.train.workshop import Workshop


def test_out_of_memory_names_the_biggest_item_and_what_would_fit(tmp_path: Path, make_dataset: Callable[..., Any]) -> None:
    """A model of 13 TB, which torch's allocator refuses at once."""
    make_dataset(Storage(str(tmp_path / "data")), {"train": 24, "test": 8})
    workshop = Workshop(tmp_path)
    (error,) = workshop.train(1, [workshop.job("wide", f"pretrain.model.width={2**20}")])
    assert error is not None and error[0] == "OutOfMemory", error
    assert "pretrain: out of memory on a device with" in error[1] and "the biggest item is" in error[1]
    assert "the smallest change that fits: none up to 4,096 workers" in error[1]
