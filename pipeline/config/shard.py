"""The section `shard` of a config: a collection of images, and how it becomes shards."""

from __future__ import annotations

import re
from ipaddress import ip_network
from typing import Annotated, Literal

from pydantic import Field, field_validator, model_validator

from pipeline.config.data import Bound
from pipeline.config.section import Bytes, Count, Flag, Part, Positive, Section, Time, check_word
from pipeline.core import units


class Source(Section):
    """Where images come from. `folder`: a class a sub-folder, or one flat folder; side files .txt, .cls, .json. `urls`: tables of URLs and
    captions. `table`: tables with the images' bytes in them. `tars`: WebDataset tars, written anew, but for what deny-lists
    beside them name."""

    format: str = "folder"
    url: str = Field(description="the folder; or a table, a folder of tables or a pattern of them (*.parquet, *.csv, *.jsonl); or tars")
    endpoint: str | None = Field(
        None, description="of an S3-compatible store that the source is in; default: storage.endpoint, where both are s3:// URLs"
    )
    columns: dict[str, str] = Field(
        {},
        description="of tables: what our names (url, image, caption, label, key) are called there; those of LAION, COYO, DataComp and of "
        "Hugging Face's datasets are known",
    )


class Resize(Section):
    side: Literal["shorter", "longer", "crop"] = Field(
        "shorter", description="the side that gets `pixels`; crop: the shorter one, and of the longer one its middle alone"
    )
    pixels: Count
    enlarge: Flag = False


class ShardImages(Section):
    resize: Resize | None = None
    min_pixels: Count = Field(1, description="the shorter side of a smaller image makes it `too-small`")
    max_pixels: Count = Field(2**26, description="width x height of a larger image makes it `too-large`, before it is decoded")
    max_aspect: Annotated[float, Field(ge=1)] | None = Field(
        None, description="longer side over shorter; a larger one makes an image `bad-aspect`"
    )
    min_bytes: Bytes = Field(1, description="a shorter file is `too-short`")
    max_bytes: Bytes = Field(2**28, description="a longer file is `too-long`")
    quality: Annotated[int, Field(ge=1, le=100)] = Field(95, description="of JPEGs that have to be encoded anew")
    subsampling: Literal["444", "422", "420"] = Field("444", description="of their colours")
    check: Literal["decode", "ends"] = Field(
        "decode",
        description="ends: of an image that needs no change only its header and end marker are looked at, so damage in between stays",
    )
    hash: Flag = Field(False, description="adds the column `phash` to the index, a 64-bit perceptual hash, for near duplicates")


class ShardText(Section):
    """What is done with captions."""

    clean: Flag = Field(True, description="mend broken Unicode and HTML entities, and make white space single spaces")
    min_length: Annotated[int, Field(ge=0)] = Field(0, description="characters; a shorter caption makes a sample `text-too-short`")
    max_length: Count | None = Field(None, description="characters; a longer caption makes a sample `text-too-long`")
    required: Flag = Field(False, description="a sample without a caption is dropped as `no-text`")


class Fetch(Section):
    """How the images of `urls` are downloaded. Proxies, cookies and credentials are not used."""

    connections: Count = Field(128, description="requests under way, of one worker")
    per_host: Count = Field(8, description="requests under way to one host, of all workers together, but one of each")
    rate: Positive | None = Field(None, description="requests a second to one host, of all workers together; default: as per_host allows")
    timeout: Time = Field(units.Duration(20, "second"), description="of one request, from its beginning to the last byte")
    retries: Annotated[int, Field(ge=0)] = Field(
        2, description="further attempts, where a host is overloaded (429, 5xx), resets a connection or does not answer"
    )
    patience: Time = Field(
        units.Duration(1, "minute"), description="the longest that a host's Retry-After is waited for; what asks for more has failed"
    )
    redirects: Annotated[int, Field(ge=0)] = 5
    robots: Flag = Field(True, description="what a host's robots.txt forbids is not asked for (`robots`)")
    opt_out: list[str] = Field(
        ["noai", "noimageai"], description="directives of X-Robots-Tag that make an image `opted-out`; [] heeds none"
    )
    agent: str = Field(
        "tessera",
        description="what we call ourselves to hosts, best with a way to reach you: tessera/1.0 (+https://lab.example); robots.txt is read "
        "for the name before the first / or space",
    )
    allow: list[str] = Field(
        [],
        description="hosts, addresses or networks (10.0.0.0/8) that may be asked though they are private, loopback or link-local; other "
        "such addresses are refused (`forbidden-address`)",
    )

    @field_validator("agent")
    @classmethod
    def _agent_is_a_header(cls, agent: str) -> str:
        if not re.fullmatch(r"[A-Za-z][A-Za-z_-]*([/ (][ -~]*)?", agent):
            raise ValueError("must be plain ASCII and begin with a name of letters, '-' and '_', as in 'tessera/1.0 (+https://a.example)'")
        return agent

    @field_validator("allow")
    @classmethod
    def _networks_are_networks(cls, allow: list[str]) -> list[str]:
        for n, entry in enumerate(allow):
            if "/" in entry:
                try:
                    ip_network(entry)
                except ValueError as e:
                    raise ValueError(f"{n}: {entry!r} is neither a host nor an address nor a network ({e})") from None
            elif not entry.strip("[]") or set(entry) & set(" @?#*"):
                raise ValueError(f"{n}: {entry!r} is neither a host nor an address nor a network")
        return allow


class Duplicates(Section):
    """Of equal files, or nearly equal pictures, one stays: splits whose names begin with "train" come last, then the order of the shards
    decides. Published as a deny-list."""

    near: Annotated[int, Field(ge=0, le=16)] | None = Field(
        None, description="bits of 64 in which perceptual hashes of near duplicates differ at most; null: equal files alone"
    )


class Contamination(Section):
    """A dataset of an evaluation; images of ours that are also there are put on a deny-list."""

    _plain_key: str = "url"
    url: str
    split: str | None = Field(None, description="default: all")
    near: Annotated[int, Field(ge=0, le=16)] | None = Field(4, description="as in duplicates")


class Score(Section):
    """A column that is added to the index: a number for each sample."""

    column: str
    model: str | None = Field(None, description="a CLIP checkpoint (URL or URL@step, or a published one): the cosine of image and caption")
    tokenizer: str | None = Field(
        None,
        description="of a published CLIP, which comes without its tokens: a tokenizer.json made here, or OpenAI's "
        "bpe_simple_vocab_16e6.txt.gz",
    )
    function: str | None = Field(None, description="instead: package.module.name of a function, called with a list of samples")
    gpus: Annotated[float, Field(ge=0, le=1)] = Field(0, description="share of a GPU that one of its tasks has")
    batch: Count = 64
    keep: Bound | None = Field(None, description="samples outside these bounds are put on a deny-list")

    @field_validator("column")
    @classmethod
    def _column_is_a_word(cls, column: str) -> str:
        if re.search(r"-v\d+$", column):
            raise ValueError(f"{column!r} ends as the names of lists do that are of a version; choose {column.replace('-v', '_v')!r}")
        return check_word(column)

    @model_validator(mode="after")
    def _has_one_of_both(self) -> Score:
        if (self.model is None) == (self.function is None):
            raise ValueError("model: give either a model or a function")
        if self.tokenizer and self.model is None:
            raise ValueError("tokenizer: is a model's, and a function has none")
        return self


class Shard(Section):
    source: Source
    splits: dict[str, Part] = {"train": 1.0}
    workers: Count | None = Field(None, description="parallel tasks; never changes the result; default: one a core")
    images: ShardImages = ShardImages()
    text: ShardText = ShardText()
    filter: str | None = Field(
        None,
        description="package.module.name of a function, called with each sample's json as a dict; where it is false: `filtered`. Another "
        "source code of its module makes another dataset; what that imports is not looked at",
    )
    fetch: Fetch = Fetch()
    size: Bytes = Field(256 * 2**20, description="of a shard, about")
    samples: Count | None = Field(None, description="rows of the source that make a shard, instead of size")
    shuffle: Flag = Field(True, description="false leaves samples in the order of the source")
    duplicates: Duplicates | None = None
    contamination: list[Contamination] = []
    scores: list[Score] = []
    takedown: list[str] = Field([], description="lists of keys, URLs or sha256, a line each, whose samples are put on a deny-list")

    @field_validator("splits")
    @classmethod
    def _splits_add_up(cls, splits: dict[str, float]) -> dict[str, float]:
        if abs(sum(splits.values()) - 1) > 1e-6:
            raise ValueError(f"the fractions must add up to 1, these add up to {sum(splits.values()):g}")
        for name in splits:
            check_word(name)
        return splits

    @model_validator(mode="after")
    def _near_needs_hashes(self) -> Shard:
        near = [("duplicates.near", self.duplicates.near)] if self.duplicates else []
        for path, bits in [*near, *((f"contamination.{n}.near", c.near) for n, c in enumerate(self.contamination))]:
            if bits is not None and not self.images.hash:
                raise ValueError(f"{path}: compares perceptual hashes, which images.hash: true adds to the index; or set it to null")
        return self
