"""What a dataset directory holds, as its writers publish it and its readers trust it (contract "A dataset").

<split>-00000.tar ..            samples in WebDataset form: key.png, key.txt, key.cls, key.json
<split>-00000.index.parquet ..  one row a sample of that shard, in order (`INDEX_SCHEMA`)
shards.parquet                  one row a shard (`table.py`)
manifest.json                   totals and fingerprints; published last: without it there is no dataset
columns.json                    columns that were added to all indices later (`columns.py`)
deny/<name>.parquet             keys that are left out as it is read (`deny.py`)

Table and manifest are of the newest version. Once there are several, each has a manifest and a table of its own, which never change:
manifest-v1.json, shards-v1.parquet, ..; a later version has all shards of the earlier ones, and further ones.
"""

from __future__ import annotations

import hashlib
import heapq
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


def named_each(pieces: int) -> int:
    """Dropped samples that each piece of a job names, of which the first `NAMED` of all get into the manifest. Of many pieces each names
    fewer, for all of them pass through one process; so above 100 pieces the manifest may leave out a name that would be among the first."""
    return max(10, min(NAMED, 100 * NAMED // max(1, pieces)))


def first_named(named: list[dict[str, str]], more: list[dict[str, str]]) -> list[dict[str, str]]:
    """The first `NAMED` by file, of those that were the first before and of `more`."""
    if len(named) == NAMED:
        more = [d for d in more if _in_turn(d) < _in_turn(named[-1])]
    return heapq.nsmallest(NAMED, named + more, key=_in_turn) if more else named


def _in_turn(told: dict[str, str]) -> tuple[str, str, str]:
    """One file may be dropped twice, as several rows: who comes first must not depend on whose task ended first."""
    return told["file"], told["reason"], told["detail"]


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
    dropped_samples: list[dict[str, str]]  # some of them, by file, each {file, reason, detail}
    smallest: tuple[int, int] = (0, 0)  # least width and least height of any sample
    decoded: bool = False  # each image was decoded as a whole before it was written; of adopted tars only headers were read
    version: int = 1
    format: int = FORMAT
    unnamed: int = 0  # how many more were dropped than `dropped_samples` names


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
    """Write the table of shards, then the manifest, which makes the dataset, or its new version, visible."""
    encoded = table.encode_table(shards)
    told = (json.dumps(asdict(manifest), indent=2, ensure_ascii=False) + "\n").encode()
    if manifest.version > 1:
        _keep_version(directory, manifest.version - 1)
        directory.write(table.file_of(manifest.version), encoded)
        directory.write(manifest_name(manifest.version), told)
    directory.write(table.FILE, encoded)
    directory.write(manifest_name(), told)


def _keep_version(directory: Storage, version: int) -> None:
    """Give a version files of its own, before those of the newest are written over."""
    if not directory.exists(manifest_name(version)):
        directory.write(table.file_of(version), directory.read(table.FILE))
        directory.write(manifest_name(version), directory.read(manifest_name()))


def manifest_name(version: int | None = None) -> str:
    """Of a version that is not the newest, or has others before it; None: of the newest."""
    return "manifest.json" if version is None else f"manifest-v{version}.json"


def find_manifest(directory: Storage, version: int | None = None) -> Manifest | None:
    """The manifest of the dataset at `directory`, or None where there is no (finished) dataset, or no such version of it.

    Raises:
        DataError: it is no manifest, or of a format this version does not read.
    """
    newest = _find_manifest(directory, manifest_name())
    if newest is None or version in (None, newest.version):
        return newest
    return _find_manifest(directory, manifest_name(version))


def _find_manifest(directory: Storage, name: str) -> Manifest | None:
    where = f"data {directory.url}/{name}"
    try:
        values = json.loads(directory.read(name))
    except FileNotFoundError:
        return None
    except ValueError as e:
        raise DataError(f"{where}: this is not JSON ({e})") from e
    if not isinstance(values, dict) or values.get("format") != FORMAT:
        given = values.get("format") if isinstance(values, dict) else values
        raise DataError(f"{where}: its format is {given!r}, this version reads format {FORMAT}")
    try:
        return Manifest(**{**values, "smallest": tuple(values["smallest"])})
    except (KeyError, TypeError) as e:
        raise DataError(f"{where}: this is no manifest of format {FORMAT} ({e})") from e


def read_manifest(directory: Storage, version: int | None = None) -> Manifest:
    manifest = find_manifest(directory, version)
    if manifest is not None:
        return manifest
    newest = find_manifest(directory) if version is not None else None
    if newest is None:
        raise DataError(f"data {directory.url}: there is no dataset here (no manifest.json)")
    allowed = ", ".join(str(n) for n in range(1, newest.version + 1))
    raise DataError(f"data {directory.url}@{version}: there is no version {version} (allowed: {allowed})")


def read_part(directory: Storage, name: str) -> bytes:
    """A file that the manifest promises. Raises DataError where it is gone."""
    try:
        return directory.read(name)
    except FileNotFoundError:
        raise DataError(f"data {directory.url}/{name}: is missing") from None


def find_json(directory: Storage, file: str) -> dict[str, Any]:
    """A file beside the manifest that not every dataset has; nothing where there is no such file. Raises DataError where it is no JSON."""
    try:
        return json.loads(directory.read(file))
    except FileNotFoundError:
        return {}
    except ValueError as e:
        raise DataError(f"data {directory.url}/{file}: this is not JSON ({e})") from e


def read_shards(directory: Storage, split: str) -> list[ShardRecord]:
    """The shards of one split, by name, all in memory. Raises as `ShardTable` does."""
    return list(ShardTable(directory, split))
