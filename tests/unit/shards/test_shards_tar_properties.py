"""Of any samples whatever: what the writer writes, its index, tarfile and plain webdataset agree on."""

from __future__ import annotations

import hashlib
import io
import json
import tarfile
import tempfile
import zlib
from functools import cache, partial
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import webdataset as wds
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from pipeline.core.storage import Storage
from pipeline.shards.images import Checked
from pipeline.shards.index import TarIndex
from pipeline.shards.samples import Sample
from pipeline.shards.tars import End, Tape
from pipeline.shards.writer import WrittenShard, write_shard

_SUFFIXES = {"JPEG": "jpg", "PNG": "png", "WEBP": "webp"}


@cache
def _image(kind: str, width: int, height: int) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(np.full((height, width, 3), 7 * width % 256, np.uint8)).save(buffer, kind)
    return buffer.getvalue()


@st.composite
def images(draw: st.DrawFn) -> Checked:
    """A sound header and any bytes behind it, so that lengths fall on, before and behind a tar's blocks."""
    kind = draw(st.sampled_from(sorted(_SUFFIXES)))
    width, height = draw(st.integers(1, 9)), draw(st.integers(1, 9))
    data = _image(kind, width, height)
    if draw(st.booleans()):
        data += bytes(-len(data) % 512 + draw(st.sampled_from([0, 1, 511])))
    return Checked(data + draw(st.binary(max_size=50)), _SUFFIXES[kind], width, height)


# Any name a file can have but for dots, which end a key, and control characters, which webdataset's own pattern does not take.
_LETTERS = st.characters(codec="utf-8", exclude_characters="./", exclude_categories=("Cc", "Zl", "Zp"))
_WORDS = st.text(_LETTERS, min_size=1, max_size=120)
KEYS = st.lists(_WORDS, min_size=1, max_size=4).map("/".join).filter(lambda key: not key.startswith("__"))
TEXTS = st.none() | st.text(st.characters(codec="utf-8"), max_size=2000).map(str.encode)
METAS = st.dictionaries(st.text(max_size=9), st.none() | st.integers() | st.text(), max_size=4)


@st.composite
def samples(draw: st.DrawFn) -> list[Sample]:
    return [
        Sample(key, draw(images()), draw(st.integers(-1, 10**6 - 1)), draw(TEXTS), json.dumps(draw(METAS), sort_keys=True).encode())
        for key in draw(st.lists(KEYS, min_size=1, max_size=6, unique=True))
    ]


def written(made: list[Sample]) -> tuple[WrittenShard, bytes, list[dict[str, Any]]]:
    """What the writer says, the tar, and the rows of its index."""
    with tempfile.TemporaryDirectory() as folder:
        directory = Storage(folder)
        shard = write_shard(directory, "t-00000.tar", "t", iter(made))
        assert shard is not None
        return shard, directory.read("t-00000.tar"), pq.read_table(io.BytesIO(directory.read("t-00000.index.parquet"))).to_pylist()


_settings = partial(settings, deadline=None, suppress_health_check=[HealthCheck.too_slow])


@_settings(max_examples=60)
@given(samples())
def test_the_index_points_at_the_bytes(made: list[Sample]) -> None:
    shard, tar, rows = written(made)
    assert (shard.record.samples, shard.record.bytes, shard.record.sha256) == (len(made), len(tar), hashlib.sha256(tar).hexdigest())
    assert shard.largest_label == max(s.label for s in made)
    assert shard.smallest == (min(s.image.width for s in made), min(s.image.height for s in made))
    end = 0
    for row, sample in zip(rows, made, strict=True):
        assert (row["key"], row["cls"], row["offset"]) == (sample.key, sample.label, end)
        end += row["length"]
        assert zlib.crc32(tar[row["offset"] : end]) == row["crc32"]
        assert hashlib.sha256(sample.image.data).hexdigest() == row["sha256"]
        assert (row["width"], row["height"]) == (sample.image.width, sample.image.height)
        for name, data in (("image", sample.image.data), ("txt", sample.text), ("json", sample.meta)):
            at, length = row[f"{name}_offset"], row[f"{name}_length"]
            assert (tar[at : at + length] if at >= 0 else None) == data
            assert (at < 0) == (length < 0) == (data is None)
    assert not tar[end:].strip(b"\0") and len(tar) - end >= 1024
    assert _index(tar)[1].rows == rows  # what is found by whoever reads the tar


@_settings(max_examples=40)
@given(samples())
def test_tarfile_and_webdataset_read_the_same(made: list[Sample]) -> None:
    _, tar, _ = written(made)
    with io.BytesIO() as file:
        with wds.TarWriter(file, mtime=0, user="", group="", encoder=False) as writer:
            for sample in made:
                writer.write({"__key__": sample.key, **sample.members()})
        assert file.getvalue() == tar
    expected = [{f"{s.key}.{suffix}": data for suffix, data in s.members().items()} for s in made]
    with tarfile.open(fileobj=io.BytesIO(tar), mode="r:") as archive:
        members = archive.getmembers()
        found = {m.name: archive.extractfile(m).read() for m in members}  # type: ignore[union-attr]
    assert found == {name: data for sample in expected for name, data in sample.items()}
    assert all((m.mtime, m.uid, m.gid, m.uname, m.gname, m.isreg()) == (0, 0, 0, "", "", True) for m in members)
    with tempfile.NamedTemporaryFile(suffix=".tar") as file:
        file.write(tar)
        file.flush()
        read = list(wds.WebDataset(file.name, shardshuffle=False, empty_check=False))
    plain = [{"__key__": s.key, **s.members()} for s in made]
    assert [{k: v for k, v in r.items() if k not in ("__url__", "__local_path__")} for r in read] == plain


@_settings(max_examples=20)
@given(samples())
def test_the_same_samples_give_the_same_bytes(made: list[Sample]) -> None:
    assert written(made) == written(made)


def _index(tar: bytes) -> tuple[End, TarIndex]:
    index, tape = TarIndex(), Tape(iter([tar]))
    return index.read(tape), index


@_settings(max_examples=50)
@given(samples(), st.floats(0, 1))
def test_a_tar_cut_anywhere_has_the_rows_before_the_cut(made: list[Sample], share: float) -> None:
    _, tar, rows = written(made)
    cut = int(len(tar) * share)
    end, index = _index(tar[:cut])
    found = index.rows[:-1] if end.kind == "unmarked" else index.rows  # cut between two members: the last may lack some, as is told
    assert found == rows[: len(found)]
    whole = sum(row["offset"] + row["length"] <= cut for row in rows)
    assert whole - 1 <= len(found) <= whole  # of the last one before the cut it is not known whether it went on
    assert end.kind != "whole" or found == rows


@_settings(max_examples=60)
@given(samples(), st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.integers(1, 255)), min_size=1, max_size=4))
def test_damage_anywhere_is_noticed(made: list[Sample], damage: list[tuple[float, int]]) -> None:
    shard, tar, rows = written(made)
    damaged = bytearray(tar)
    for place, bits in damage:
        damaged[int(place * len(tar))] ^= bits
    _, index = _index(bytes(damaged))  # whatever is there, it is read without a crash
    if damaged == tar:
        assert index.rows == rows
        return
    for row in index.rows:  # a row either differs, or its bytes are those that were written
        if row in rows:
            assert damaged[row["offset"] : row["offset"] + row["length"]] == tar[row["offset"] : row["offset"] + row["length"]]
    assert hashlib.sha256(damaged).hexdigest() != shard.record.sha256
