"""The sections of a config about data: collections to be sharded, and datasets of shards."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, field_validator, model_validator

from pipeline.config.section import Bytes, Count, Flag, Part, Positive, Quantity, Section, check_word


class Source(Section):
    """Where images come from. `folder`: a class a sub-folder, or one flat folder; side files .txt, .cls, .json."""

    format: str = "folder"
    url: str
    columns: dict[str, str] = {}


class Resize(Section):
    side: Literal["shorter", "longer"] = "shorter"
    pixels: Count
    enlarge: Flag = False


class ShardImages(Section):
    resize: Resize | None = None
    min_pixels: Count = Field(1, description="the shorter side of a smaller image makes it `too-small`")
    max_pixels: Count = Field(2**26, description="width x height of a larger image makes it `too-large`, before it is decoded")


class Shard(Section):
    source: Source
    splits: dict[str, Part] = {"train": 1.0}
    workers: Count | None = Field(None, description="parallel tasks; never changes the result; default: one a core")
    images: ShardImages = ShardImages()
    size: Bytes = 256 * 2**20

    @field_validator("splits")
    @classmethod
    def _splits_add_up(cls, splits: dict[str, float]) -> dict[str, float]:
        if abs(sum(splits.values()) - 1) > 1e-6:
            raise ValueError(f"the fractions must add up to 1, these add up to {sum(splits.values()):g}")
        for name in splits:
            check_word(name)
        return splits


class Bound(Section):
    """A number from `min` to `max`, both included."""

    min: float | None = None
    max: float | None = None

    @model_validator(mode="after")
    def _bounds_something(self) -> Bound:
        if self.min is None and self.max is None:
            raise ValueError("min: is missing, and max too; a bound needs one of them")
        return self


class Data(Section):
    """A dataset, or what is left of it: shards are never rewritten, samples are left out as they are read."""

    _plain_key: str = "url"
    url: str | None = Field(None, description="URL, or URL@version; without it a config can only be planned, by `samples` and `classes`")
    samples: Quantity | None = Field(None, description="how many there are, to plan with before the data is at hand")
    classes: Quantity | None = Field(None, description="likewise")
    deny: list[str] = Field([], description="lists of keys to leave out: a text file, a line a key, or Parquet with a column `key`")
    where: dict[str, Bound] = Field({}, description="bounds by column of the index; a sample without the value is left out")
    weight: Positive | None = Field(None, description="share in a mixture, relative to the others; default: the number of samples")

    @model_validator(mode="after")
    def _is_named_or_counted(self) -> Data:
        if self.url is None and self.samples is None:
            raise ValueError("url: is missing, and samples too; name the dataset, or say how many samples to plan for")
        return self
