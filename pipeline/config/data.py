"""The section `data` of a config: datasets of shards."""

from __future__ import annotations

from pydantic import Field, model_validator

from pipeline.config.section import Flag, Positive, Quantity, Section


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
    own_deny: Flag = Field(True, description="leave out what the lists in the dataset's own folder deny/ name; false reads it all")
    where: dict[str, Bound] = Field({}, description="bounds by column of the index; a sample without the value is left out")
    weight: Positive | None = Field(None, description="share in a mixture, relative to the others; default: the number of samples")

    @model_validator(mode="after")
    def _is_named_or_counted(self) -> Data:
        if self.url is None and self.samples is None:
            raise ValueError("url: is missing, and samples too; name the dataset, or say how many samples to plan for")
        return self
