"""What sharding a source will take, from what its listings and footers say: for plans, which read no rows."""

from __future__ import annotations

from dataclasses import dataclass

from pipeline.config.schema import StorageSection
from pipeline.config.shard import Shard
from pipeline.shards.division import Division
from pipeline.shards.layout import MEMBER_BYTES
from pipeline.shards.plan import GROUP_ROWS, PIECE_PARTS, PIECE_ROWS, SPILL_BYTES
from pipeline.shards.sources import Survey, open_source

_RESIZED, _AS_IT_IS = 25_000, 100_000  # bytes of an image of which nothing is known: at 256 pixels, and as the web has them
_ROW, _PLANNED = 450, 150  # bytes of a row in the files of a plan, and compressed: a URL, a caption, a few numbers


@dataclass(frozen=True)
class Forecast:
    """`exact`: whether `rows` is no estimate. `ranges` that the rows are shuffled in, in so many `passes` over them before images are read;
    `plan_bytes` lie beside the shards meanwhile, in files that take so many `requests` to read. Bytes of the shards, before anything is
    dropped. All for rows of a common length: of longer ones there are more ranges."""

    rows: int
    parts: int
    exact: bool
    rows_a_shard: int
    shards: int
    ranges: int
    passes: int
    plan_bytes: int
    requests: int
    bytes: int


def forecast(shard: Shard, storage: StorageSection | None = None) -> Forecast:
    """Raises as the source's `survey`."""
    source = open_source(shard.source, storage)
    return forecast_of(shard, source.survey(), source.has_sizes, source.in_blocks)


def forecast_of(shard: Shard, survey: Survey, has_sizes: bool, in_blocks: bool) -> Forecast:
    is_known = has_sizes and shard.images.resize is None
    mean = survey.mean if is_known else _RESIZED if shard.images.resize else _AS_IT_IS
    sample = round(mean) + 3 * MEMBER_BYTES
    rows_a_shard = shard.samples or max(1, shard.size // sample)
    ranges = max(1, -(-survey.rows // GROUP_ROWS))
    division, is_arranged, shards = Division.into(ranges), in_blocks or not shard.shuffle, 0
    tasks = min(max(1, survey.parts), max(-(-survey.parts // PIECE_PARTS), -(-survey.rows // PIECE_ROWS)))
    files = tasks * -(-survey.rows * _ROW // (tasks * SPILL_BYTES)) if survey.rows else 0
    for share in shard.splits.values():
        of_range = survey.rows * share / ranges
        shards += ranges * max(1, -(-int(of_range) // rows_a_shard)) if of_range >= 1 else max(1, round(survey.rows * share))
    return Forecast(
        rows=survey.rows,
        parts=survey.parts,
        exact=survey.exact,
        rows_a_shard=rows_a_shard,
        shards=shards,
        ranges=ranges,
        passes=(2 + is_arranged) + (division.width > 1) * (1 + is_arranged),
        plan_bytes=survey.rows * _PLANNED,
        requests=sum(requests_of(n, survey.rows * _ROW, division) for n in ([files, ranges] if is_arranged else [files])),
        bytes=survey.rows * sample,
    )


def requests_of(files: int, size: int, division: Division) -> int:
    """Reads that bring `size` bytes of rows out of so many files to the tasks of each range: two, of where a piece is and of the piece."""
    if division.width == 1:
        return 2 * files * division.count
    moved = max(1, round(size / (division.pieces * SPILL_BYTES)))  # files that a piece is divided into
    return 2 * (files * division.pieces + moved * division.count)
