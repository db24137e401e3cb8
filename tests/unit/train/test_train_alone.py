"""A rank alone at stage 0, where DeepSpeed's averaging over the ranks is left out: what it did beside that is still done."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.unit.train.workshop import Workshop


def test_parameters_that_the_loss_never_sees_decay_alone_as_on_two_ranks(tmp_path: Path) -> None:
    shop = Workshop(tmp_path)
    found = {}
    for size in (1, 2):
        shop.start(size, [str(Path(__file__).with_name("unused.py")), str(tmp_path / f"{size}.json")])
        found[size] = json.loads((tmp_path / f"{size}.json").read_text())
    assert found[1]["norms"] == pytest.approx(found[2]["norms"], rel=1e-5) and min(found[1]["norms"]) > 0
    for name, value in found[1]["after"].items():
        assert value == pytest.approx(found[2]["after"][name], rel=1e-5, abs=1e-5), name
    unseen = "mask_head.weight"
    assert found[1]["after"][unseen] == pytest.approx(found[1]["before"][unseen] * (1 - 0.01 * 0.1) ** 3, rel=1e-5)
    assert found[1]["after"]["head.weight"] != found[1]["before"]["head.weight"]
