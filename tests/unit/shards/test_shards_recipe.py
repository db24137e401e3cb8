"""What a table says beside an image, captions, and the user's filter."""

from __future__ import annotations

import json
from collections.abc import Callable
from datetime import UTC, date, datetime
from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from pipeline.config.shard import Shard, ShardImages, ShardText
from pipeline.core.errors import ConfigError
from pipeline.shards.fill import Filling
from pipeline.shards.images import Dropped
from pipeline.shards.samples import Files, Recipe, Sample, make_sample
from pipeline.shards.sources import FolderSource, Item

NAN = float("nan")


@pytest.fixture
def make(photo: Callable[..., Image.Image], encoded: Callable[..., bytes]) -> Callable[..., Sample | Dropped]:
    image = encoded(photo(), "PNG")

    def make(recipe: Recipe | None = None, ids: dict[str, int] | None = None, side: dict[str, bytes] | None = None, **item: Any) -> Any:
        side = side or {}
        row = Item("part-0.parquet#7", 0, side={name: f"x.{name}" for name in side}, **item)
        return make_sample("k7", row, Files(image, side), recipe or Recipe(), ids or {})

    return make


def test_a_row_of_a_table(make: Callable[..., Sample]) -> None:
    sample = make(text=" a  caption\n", label=3, extra={"similarity": 0.3, "LICENSE": "?"})
    assert sample.members().keys() == {"png", "cls", "json", "txt"}
    assert (sample.text, sample.label) == (b"a caption", 3)
    assert sample.meta == b'{"LICENSE": "?", "similarity": 0.3, "source": "part-0.parquet#7"}'


def test_files_beside_an_image_win_over_its_table(make: Callable[..., Sample]) -> None:
    side = {"txt": b"of the file", "cls": b"1", "json": b'{"a": 1}'}
    sample = make(side=side, text="of the table", label=2, extra={"a": 2, "b": 3})
    assert (sample.text, sample.label) == (b"of the file", 1)
    assert json.loads(sample.meta) == {"a": 1, "b": 3, "source": "part-0.parquet#7"}


def test_labels_of_a_table(make: Callable[..., Any]) -> None:
    assert make(label=-1).label == -1  # as Hugging Face's datasets say that there is none
    assert make(label=1, ids={"a": 0, "b": 1}).label == 1
    for label in (-2, 2):
        assert make(label=label, ids={"a": 0, "b": 1}).reason == "bad-cls"


def test_columns_of_any_kind_become_json(make: Callable[..., Sample]) -> None:
    extra = {
        "nan": NAN,
        "deep": [{"inf": -float("inf"), "n": np.float32(0.5)}, (1, None)],
        "when": datetime(2024, 1, 2, 3, tzinfo=UTC),
        "day": date(2024, 1, 2),
        "price": Decimal("1.10"),
        "bytes": b"\xff\0",
        "array": np.array([1.0, np.nan]),
        "text": "half \ud800 a pair",
    }
    values = json.loads(make(extra=extra).meta)
    assert values == {
        "nan": None,
        "deep": [{"inf": None, "n": 0.5}, [1, None]],
        "when": "2024-01-02T03:00:00+00:00",
        "day": "2024-01-02",
        "price": "1.10",
        "bytes": "/wA=",
        "array": [1.0, None],
        "text": "half \ud800 a pair",
        "source": "part-0.parquet#7",
    }
    assert make(extra=extra).meta == make(extra=dict(reversed(extra.items()))).meta


def test_what_has_no_form_in_json_is_a_reason(make: Callable[..., Any]) -> None:
    dropped = make(extra={"x": object})
    assert (dropped.reason, dropped.detail) == ("bad-json", "its columns make no JSON (a type has no form in JSON)")


def test_reasons_of_captions(make: Callable[..., Any]) -> None:
    def reason(text: str | None, **config: Any) -> str:
        return make(Recipe(text=ShardText(**config)), text=text).reason

    assert reason(None, required=True) == "no-text"
    assert reason("no", min_length=3) == "text-too-short"
    assert reason("long", max_length=3) == "text-too-long"
    assert make(Recipe(text=ShardText(required=True)), side={"txt": b"\xff"}).reason == "bad-txt"


def test_a_bad_caption_saves_decoding_the_image(make: Callable[..., Any]) -> None:
    recipe = Recipe(ShardImages(min_pixels=1000), ShardText(required=True))
    assert make(recipe).reason == "no-text"


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str, str], Recipe]:
    """A recipe with a filter of this body, in a module of this name."""
    monkeypatch.syspath_prepend(str(tmp_path))

    def write(module: str, body: str) -> Recipe:
        (tmp_path / f"{module}.py").write_text(f"def keep(sample):\n    {body}\n")
        return Recipe(filter=f"{module}.keep")

    return write


def test_a_filter_sees_the_json_caption_label_and_size(make: Callable[..., Any], own: Callable[[str, str], Recipe]) -> None:
    recipe = own("filter_sees", "global seen; seen = dict(sample); sample.clear(); return seen['score'] > 0.5")
    kept = make(recipe, text=" a  dog ", label=4, extra={"score": 0.6})
    assert isinstance(kept, Sample)
    import filter_sees  # type: ignore[import-not-found]

    assert filter_sees.seen == {
        **{"score": 0.6, "source": "part-0.parquet#7"},
        **{"key": "k7", "caption": "a dog", "label": 4, "width": 48, "height": 32},
    }
    assert make(recipe, extra={"score": 0.4}) == Dropped("filtered", "filter_sees.keep is false for it")
    assert (filter_sees.seen["caption"], filter_sees.seen["label"]) == (None, None)


def test_a_filter_that_raises_ends_the_job(make: Callable[..., Any], own: Callable[[str, str], Recipe]) -> None:
    recipe = own("filter_raises", "return sample['score'] > 0.5")
    with pytest.raises(
        ConfigError, match=r"shard.filter: filter_raises.keep raised KeyError \('score'\) for the sample k7 of part-0.parquet#7"
    ):
        make(recipe)


def test_a_filter_is_asked_last(make: Callable[..., Any], own: Callable[[str, str], Recipe]) -> None:
    recipe = own("filter_last", "raise RuntimeError")
    assert make(Recipe(ShardImages(min_pixels=1000), filter=recipe.filter)).reason == "too-small"


def test_a_filter_that_changes_while_the_job_runs_ends_it(own: Callable[[str, str], Recipe], tmp_path: Path) -> None:
    """Processes that begin later would import another one; and machines may have another from the beginning."""
    name = own("filter_changes", "return True").filter
    filling = Filling.of(FolderSource(str(tmp_path)), Shard.model_validate({"source": {"url": "x"}, "filter": name}), [], 1)
    filling.check()
    own("filter_changes", "return False")
    with pytest.raises(ConfigError, match=r"shard.filter: the source code of filter_changes.keep is not what it was when the job began"):
        filling.check()
