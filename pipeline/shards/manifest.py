"""What a dataset directory holds, as its writers publish it and its readers trust it (contract "A dataset").

<split>-00000.tar ..            samples in WebDataset form: key.png, key.txt, key.cls, key.json
<split>-00000.index.parquet ..  one row a sample of that shard, in order (`INDEX_SCHEMA`)
shards.parquet                  one row a shard (`table.py`)
manifest.json                   totals and fingerprints; published last: without it there is no dataset
"""

from __future__ import annotations

import hashlib
import io
import json
from dataclasses import asdict, dataclass
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.config.fingerprint import canonical
from pipeline.core.errors import DataError
from pipeline.core.storage import Storage
from pipeline.shards import table
from pipeline.shards.table import SHARDS_SCHEMA as SHARDS_SCHEMA
from pipeline.shards.table import ShardRecord, ShardTable

FORMAT = 1
NAMED = 1000  # dropped samples that a manifest names; all of them are counted

# Offsets and lengths are of a member's data, in bytes from the start of the tar; a missing member has length -1.
# A whole sample, headers included, is `length` bytes at `offset`; crc32 is of those bytes, sha256 (hex) of the image's.
# An index may have further columns behind these, such as scores.
INDEX_SCHEMA = pa.schema(
    [
        ("key", pa.string()),
        ("offset", pa.int64()),
        ("length", pa.int64()),
        ("image_offset", pa.int64()),
        ("image_length", pa.int64()),
        ("txt_offset", pa.int64()),
        ("txt_length", pa.int64()),
        ("json_offset", pa.int64()),
        ("json_length", pa.int64()),
        ("cls", pa.int64()),  # -1: no label
        ("width", pa.int32()),
        ("height", pa.int32()),
        ("crc32", pa.int64()),
        ("sha256", pa.string()),
    ]
)


@dataclass(frozen=True)
class Manifest:
    """`read` = `written` + the sum of `dropped`; `ignored` files were no images and are outside `read`."""

    hash: str  # of the table of shards: names the content, whatever it is called and wherever it lies
    config: str  # fingerprint of the config that made it, its URL and number of workers left out
    source: str
    classes: list[str]
    splits: dict[str, int]  # samples a split
    bytes: int
    read: int
    written: int
    ignored: int
    dropped: dict[str, int]  # by reason
    dropped_samples: list[dict[str, str]]  # the first of them, each {file, reason, detail}
    smallest: tuple[int, int] = (0, 0)  # least width and least height of any sample
    decoded: bool = False  # each image was decoded as a whole before it was written; of adopted tars only headers were read
    version: int = 1
    format: int = FORMAT


def table_bytes(rows: list[dict[str, Any]], schema: pa.Schema) -> bytes:
    """Parquet with nothing in it that changes from run to run."""
    return encode_index(pa.Table.from_pylist(rows, schema=schema))


def encode_index(index: pa.Table) -> bytes:
    """The same for rows that are columns already."""
    sink = io.BytesIO()
    pq.write_table(index.combine_chunks().replace_schema_metadata(None), sink, compression="zstd")
    return sink.getvalue()


def dataset_hash(shards: list[ShardRecord] | ShardTable) -> str:
    """The fingerprint of all rows by name, worked out row by row: a million of them need not be in memory as JSON."""
    rows = shards if isinstance(shards, ShardTable) else sorted(shards, key=lambda s: s.name)
    digest = hashlib.sha256(b"[")
    for number, shard in enumerate(rows):
        digest.update((b"," if number else b"") + canonical(shard.row()))
    digest.update(b"]")
    return digest.hexdigest()


def publish(directory: Storage, shards: list[ShardRecord], manifest: Manifest) -> None:
    """Write the table of shards, then the manifest, which makes the dataset visible."""
    directory.write(table.FILE, table.encode_table(shards))
    directory.write("manifest.json", (json.dumps(asdict(manifest), indent=2, ensure_ascii=False) + "\n").encode())


def find_manifest(directory: Storage) -> Manifest | None:
    """The manifest of the dataset at `directory`, or None where there is no (finished) dataset.

    Raises:
        DataError: it is no manifest, or of a format this version does not read.
    """
    try:
        values = json.loads(directory.read("manifest.json"))
    except FileNotFoundError:
        return None
    except ValueError as e:
        raise DataError(f"data {directory.url}/manifest.json: this is not JSON ({e})") from e
    if not isinstance(values, dict) or values.get("format") != FORMAT:
        given = values.get("format") if isinstance(values, dict) else values
        raise DataError(f"data {directory.url}/manifest.json: its format is {given!r}, this version reads format {FORMAT}")
    try:
        return Manifest(**{**values, "smallest": tuple(values["smallest"])})
    except (KeyError, TypeError) as e:
        raise DataError(f"data {directory.url}/manifest.json: this is no manifest of format {FORMAT} ({e})") from e


def read_manifest(directory: Storage) -> Manifest:
    manifest = find_manifest(directory)
    if manifest is None:
        raise DataError(f"data {directory.url}: there is no dataset here (no manifest.json)")
    return manifest


def read_part(directory: Storage, name: str) -> bytes:
    """A file that the manifest promises. Raises DataError where it is gone."""
    try:
        return directory.read(name)
    except FileNotFoundError:
        raise DataError(f"data {directory.url}/{name}: is missing") from None


def read_shards(directory: Storage, split: str) -> list[ShardRecord]:
    """The shards of one split, by name, all in memory. Raises as `ShardTable` does."""
    return list(ShardTable(directory, split))
