from __future__ import annotations

import gzip
import hashlib
import io
import json
import os
import random
import subprocess
import sys
import tarfile
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import webdataset as wds
from click.testing import CliRunner
from PIL import Image

from pipeline.core.errors import DataError, StorageError
from pipeline.core.storage import Storage
from pipeline.core.units import format_bytes
from pipeline.shards.__main__ import main
from pipeline.shards.adopt import AdoptedTar, Options, adopt, adopt_tar
from pipeline.shards.deny import DenyListWriter
from pipeline.shards.index import TarIndex
from pipeline.shards.manifest import INDEX_SCHEMA, Manifest, ShardTable, find_manifest, read_manifest
from pipeline.shards.tars import End, Tape, Walk
from pipeline.stream import open_dataset

Members = list[tuple[str, bytes] | tarfile.TarInfo]


def picture(width: int = 6, height: int = 5, kind: str = "PNG", shade: int = 99) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (width, height), (shade % 256, 40, 200)).save(file, kind)
    return file.getvalue()


PNG = picture()


def tar_bytes(members: Members, kind: int = tarfile.GNU_FORMAT) -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w", format=kind) as tar:
        for member in members:
            if isinstance(member, tarfile.TarInfo):
                tar.addfile(member)
            else:
                info = tarfile.TarInfo(member[0])
                info.size = len(member[1])
                tar.addfile(info, io.BytesIO(member[1]))
    return file.getvalue()


def special(name: str, kind: bytes, target: str = "") -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, target
    return info


def read(data: bytes, block: int = 1000, **options: object) -> tuple[TarIndex, End]:
    """In blocks of an odd size, so that everything lies across a border sometimes."""
    index = TarIndex(**options)  # type: ignore[arg-type]
    end = index.read(Tape(iter([data[n : n + block] for n in range(0, len(data), block)])))
    return index, end


def adopt_one(folder: Path, data: bytes, **options: object) -> AdoptedTar:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "0.tar").write_bytes(data)
    return adopt_tar("0.tar", "train", Storage(str(folder)), Options(**options))  # type: ignore[arg-type]


def webdataset_samples(*tars: Path) -> Iterator[dict[str, object]]:
    return iter(wds.WebDataset([str(t) for t in tars], shardshuffle=False))


ODD: Members = [
    special("./", tarfile.DIRTYPE),
    ("plain.jpg", picture(7, 5, "JPEG")),
    ("plain.txt", "ein Häuschen".encode()),
    ("plain.cls", b" 3\n"),
    ("plain.json", b'{"similarity": 0.25}'),
    special("photos.v2/", tarfile.DIRTYPE),
    ("photos.v2/one.JPEG", picture(9, 8, "JPEG")),
    special("photos.v2/deep/", tarfile.DIRTYPE),
    ("photos.v2/one.Txt", b"upper case"),
    ("photos.v2/one.seg.png", picture(3, 3)),
    ("photos.v2/one.npy", os.urandom(5000)),
    ("./dot.flac", os.urandom(700)),
    ("./dot.PNG", picture(30, 4)),
    ("./dot.WebP", picture(2, 2, "WEBP")),
    ("README", b"no suffix, no sample"),
    (".hidden.jpg", PNG),
    ("mac/._one.jpg", PNG),
    ("__meta__/info.json", b"{}"),
    ("x" * 90 + "/" + "y" * 120 + ".webp", picture(5, 6, "WEBP")),
    ("x" * 90 + "/" + "y" * 120 + ".txt", b"a long name"),
    ("größe/bild-ü.png", picture(11, 12)),
    ("größe/bild-ü.cls", b"0"),
]


@pytest.mark.parametrize("kind", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
@pytest.mark.usefixtures("cluster")
def test_an_odd_tar_reads_as_webdataset_reads_it(tmp_path: Path, kind: int) -> None:
    for n in range(2):
        (tmp_path / f"part.{n}.tar").write_bytes(tar_bytes(ODD if n == 0 else [("lone.jpg", picture(40, 50, "JPEG"))], kind))
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "9.tar").write_bytes(b"not looked at")
    manifest, remarks = adopt(Storage(str(tmp_path)), Options(columns=("similarity", "typo")))
    assert remarks == ["no sample has a number 'typo' in its json"]
    assert (manifest.read, manifest.written, manifest.dropped, manifest.ignored) == (6, 6, {}, 4)
    assert manifest.smallest == (5, 4) and manifest.splits == {"train": 6}
    assert manifest.classes == ["0", "1", "2", "3"] and manifest.source == str(tmp_path)
    dataset = open_dataset(str(tmp_path))
    peers = {str(s["__key__"]): s for s in webdataset_samples(tmp_path / "part.0.tar", tmp_path / "part.1.tar")}
    del peers["mac/"]  # webdataset's key of mac/._one.jpg, a file that macOS puts into tars
    assert [dataset[n].key for n in range(len(dataset))] == list(peers)
    for n in range(len(dataset)):
        sample, peer = dataset[n], peers[dataset[n].key]
        image = next(peer[suffix] for suffix in ("jpg", "jpeg", "png", "webp") if suffix in peer)
        assert sample.image == image and sample.text.encode() == peer.get("txt", b"")
        assert sample.label == int(peer.get("cls", b"-1")) and sample.json == peer.get("json", b"")  # type: ignore[call-overload]
    assert dataset.labels().tolist() == [3, -1, -1, -1, 0, -1]
    index = pq.read_table(tmp_path / "part.0.index.parquet")
    assert index["similarity"].to_pylist() == [0.25, None, None, None, None] and index["typo"].null_count == 5
    assert index["width"].to_pylist() == [7, 9, 30, 5, 11]


@pytest.mark.parametrize(
    ("reason", "members"),
    [
        ("no-image", [("a.txt", b"x"), ("a.json", b"{}")]),
        ("no-image", [("a.seg.png", PNG)]),
        ("empty", [("a.png", b"")]),
        ("not-an-image", [("a.png", b"<html>404</html>"), ("a.txt", b"x")]),
        ("corrupt", [("a.png", PNG[:20])]),
        ("corrupt", [("a.jpg", picture(kind="JPEG")[:60])]),
        ("corrupt", [("a.webp", picture(kind="WEBP")[:20])]),
        ("not-an-image", [("a.jpg", b"text"), ("a.png", PNG)]),
        ("bad-cls", [("a.png", PNG), ("a.cls", b"seven")]),
        ("bad-cls", [("a.png", PNG), ("a.cls", b"-1")]),
        ("bad-cls", [("a.png", PNG), ("a.cls", b"1.0")]),
        ("bad-cls", [("a.png", PNG), ("a.cls", b"1_0")]),
        ("bad-cls", [("a.png", PNG), ("a.cls", b"")]),
        ("bad-cls", [("a.png", PNG), ("a.cls", b"1000000")]),
        ("bad-cls", [("a.png", PNG), ("a.cls", b"9" * 5000)]),
        ("bad-txt", [("a.png", PNG), ("a.txt", b"\xff\xfe")]),
        ("bad-json", [("a.png", PNG), ("a.json", b"[1]")]),
        ("bad-json", [("a.png", PNG), ("a.json", b"[" * 100_000)]),
        ("not-a-file", [special("a.png", tarfile.LNKTYPE, "good.png"), ("a.txt", b"x")]),
        ("not-a-file", [("a.png", PNG), special("a.txt", tarfile.SYMTYPE, "good.txt")]),
        ("not-a-file", [special("a.png", tarfile.FIFOTYPE)]),
        ("scattered", [("a.png", PNG), ("b.png", PNG), ("a.txt", b"x")]),
        ("scattered", [("a.txt", b"x"), ("b.png", PNG), ("a.png", PNG)]),
    ],
)
def test_a_sample_that_cannot_be_used_is_dropped_by_reason(tmp_path: Path, reason: str, members: Members) -> None:
    good: Members = [("good.png", PNG), ("good.txt", b"x")]
    tar = adopt_one(tmp_path, tar_bytes([*good, *members, ("z.png", PNG)]))
    assert tar.dropped == {reason: 1}
    (named,) = tar.named
    assert (named["file"], named["reason"]) == ("0.tar/a", reason) and named["detail"]
    keys = pq.read_table(tmp_path / "0.index.parquet")["key"].to_pylist()
    assert keys == ["good", *(["b"] if reason == "scattered" else []), "z"]
    assert tar.record is not None and tar.record.samples == len(keys)


def test_of_duplicates_the_first_is_kept() -> None:
    one, two = picture(shade=1), picture(shade=2)
    for between in ([], [("b.png", PNG)]):
        index, _ = read(tar_bytes([("a.png", one), ("a.txt", b"1"), *between, ("a.png", two), ("a.txt", b"2"), ("c.png", PNG)]))
        rows = index.rows
        assert [r["key"] for r in rows] == ["a", *(name[0] for name, _ in between), "c"]
        assert [r["offset"] for r in rows] == sorted(r["offset"] for r in rows)
        assert [(key, drop.reason) for key, drop in index.dropped] == [("a", "duplicate-key")]
        assert rows[0]["image_length"] == len(one) and rows[0]["txt_offset"] < rows[0]["offset"] + rows[0]["length"]


def test_other_members_elsewhere_do_not_scatter_a_sample() -> None:
    index, _ = read(tar_bytes([("b.npy", b"1" * 600), ("a.npy", b"2"), ("a.png", PNG), ("b.png", PNG), ("a.flac", b"3"), ("b.flac", b"4")]))
    assert [r["key"] for r in index.rows] == ["a", "b"] and index.dropped == [] and index.ignored == 2
    assert index.rows[0]["offset"] < index.rows[1]["offset"]


def test_labels_beyond_the_named_classes_are_bad() -> None:
    data = tar_bytes([(f"{n}.{suffix}", value) for n in range(3) for suffix, value in (("png", PNG), ("cls", b"%d" % n))])
    index, _ = read(data, labels=2)
    assert [r["cls"] for r in index.rows] == [0, 1] and [d.reason for _, d in index.dropped] == ["bad-cls"]


def test_numbers_of_the_json_become_columns() -> None:
    texts = [
        b'{"s": 1}',
        b'{"s": 0.5, "t": 2}',
        b'{"s": NaN}',
        b'{"s": "0.5"}',
        b'{"s": true}',
        b'{"s": 1%s}' % (b"0" * 400),
        b'\xef\xbb\xbf{"s": -3}',
    ]
    index, _ = read(tar_bytes([m for n, text in enumerate(texts) for m in ((f"{n}.png", PNG), (f"{n}.json", text))]), columns=("s", "t"))
    assert [r["s"] for r in index.rows] == [1.0, 0.5, None, None, None, None, -3.0]
    assert [r["t"] for r in index.rows] == [None, 2.0, *[None] * 5]


def whole_tar() -> tuple[bytes, list[dict[str, object]]]:
    data = tar_bytes(
        [m for n in range(4) for m in ((f"{n}.png", picture(5 + n, 7)), (f"{n}.txt", b"t" * 700 * n), (f"{n}.json", b"{}"))],
        tarfile.PAX_FORMAT,
    )
    index, end = read(data)
    assert end.kind == "whole" and len(index.rows) == 4
    return data, index.rows


def test_a_tar_cut_anywhere_keeps_what_is_whole() -> None:
    data, rows = whole_tar()
    starts = {row["offset"] for row in rows}
    last = max(row["offset"] + row["length"] for row in rows)
    kinds = set()
    for cut in range(0, len(data), 37):
        index, end = read(data[:cut])
        kinds.add(end.kind)
        before = [row for row in rows if row["offset"] + row["length"] <= cut]
        if cut > last:
            assert end.kind == ("unmarked" if cut < last + 512 else "whole") and index.rows == rows and not index.dropped
        elif end.kind == "truncated":
            # The sample at the cut, or the one before it, which may have gone on, is the one that is lost.
            assert len(index.dropped) == 1 and index.dropped[0][1].reason == "truncated"
            assert index.rows in (before, before[:-1])
            assert index.rows == before or (cut - 1) // 512 * 512 in starts | {last}
        else:
            assert end.kind == "unmarked" and not index.dropped
            assert [row["offset"] for row in index.rows] == [row["offset"] for row in rows if row["offset"] < cut]
            assert all(row["offset"] + row["length"] <= cut for row in index.rows)
        for row in index.rows:
            assert row in rows or end.kind == "unmarked"
    assert kinds == {"whole", "unmarked", "truncated"}


def test_how_a_tar_ends_is_told(tmp_path: Path) -> None:
    data, rows = whole_tar()
    end = max(row["offset"] + row["length"] for row in rows)  # type: ignore[operator]
    header = rows[2]["offset"]
    assert isinstance(header, int)
    damaged = data[: header + 3] + b"?" + data[header + 4 :]
    cases = {
        "it has no end-of-archive marker": (data[:end], 4, {}),
        "it is cut off at byte": (data[: end - 600], 3, {"truncated": 1}),
        "it has no bytes": (b"", 0, {"truncated": 1}),
        "it is damaged at byte": (damaged, 1, {"damaged": 1}),
        "it does not begin as a tar does": (b"<html>" * 200, 0, {"not-a-tar": 1}),
        "what follows its end-of-archive marker is not read": (data + data, 4, {}),
    }
    for words, (content, samples, dropped) in cases.items():
        tar = adopt_one(tmp_path, content)
        assert tar.remark.startswith(f"0.tar: {words}") and tar.dropped == dropped
        assert (tar.record.samples if tar.record else 0) == samples and tar.failure is None
        assert (tmp_path / "0.index.parquet").exists() == bool(samples)
        assert [(d["file"], d["reason"]) for d in tar.named] == [("0.tar", reason) for reason in dropped]
    assert adopt_one(tmp_path, data).remark == ""
    assert "left out: sample 3" in adopt_one(tmp_path, data[: end - 600]).named[0]["detail"]
    cut = adopt_one(tmp_path, tar_bytes([("lone.txt", b"x"), ("a.png", PNG), ("b.png", PNG)])[:2600])
    assert [(d["file"], d["reason"]) for d in cut.named] == [("0.tar", "truncated"), ("0.tar/lone", "no-image")]
    for squeezed in (gzip.compress(data), b"BZh91AY"):
        assert "compressed" in str(adopt_one(tmp_path, squeezed).failure)


def test_damage_of_any_kind_never_ends_in_a_traceback() -> None:
    data, _ = whole_tar()
    chance = random.Random(0)
    for _ in range(400):
        broken = bytearray(data)
        for _ in range(chance.choice([1, 1, 3, 40])):
            broken[chance.randrange(len(broken))] = chance.randrange(256)
        index, end = read(bytes(broken))
        assert end.kind != "whole" or len(index.rows) + len(index.dropped) >= 3
        for row in index.rows:
            assert row["offset"] + row["length"] <= len(data)
    # Sizes that make no sense: below nothing, and a pax header of terabytes.
    for field in (b"\xff" * 12, b"\x80" + b"\0" * 5 + b"\xff" * 6):
        for kind in (b"0", b"x", b"L"):
            header = bytearray(tarfile.TarInfo("a.png").tobuf())
            header[124:136], header[156:157] = field, kind
            header[148:156] = b"%06o\0 " % tarfile.calc_chksums(bytes(header))[0]
            index, end = read(bytes(header) + PNG.ljust(1024, b"\0"))
            assert end.kind == ("truncated" if (kind, field[0]) == (b"0", 0x80) else "not-a-tar") and not index.rows


@pytest.mark.parametrize("kind", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_headers_are_read_as_tarfile_reads_them(kind: int) -> None:
    members: Members = [
        (name, os.urandom(size))
        for name, size in (("a.png", 0), ("b.txt", 511), ("c.c.json", 512), ("d/e", 513), ("f" * 99, 7), ("é.cls", 1))
    ]
    members += [("d" * 90 + "/" + "g" * 60, b"a prefix"), special("d/", tarfile.DIRTYPE), special("h.png", tarfile.SYMTYPE, "a.png")]
    data = tar_bytes(members, kind)
    tape = Tape(iter([data]))
    mine = [(m.info.name, m.info.size, m.info.type, m.info.linkname, m.info.offset_data) for m in Walk(tape)]
    with tarfile.open(fileobj=io.BytesIO(data), encoding="utf-8") as tar:
        assert mine == [(m.name, m.size, m.type, m.linkname, m.offset_data) for m in tar]
    assert tape.drain() and tape.whole.hexdigest() == hashlib.sha256(data).hexdigest()


def test_a_large_tar_is_not_held(tmp_path: Path) -> None:
    image = PNG + os.urandom(40 << 20)
    with (tmp_path / "0.tar").open("wb") as file:
        for name, size in (("a.npy", 200 << 20), ("a.png", len(image))):
            info = tarfile.TarInfo(name)
            info.size = size
            file.write(info.tobuf())
            if name == "a.png":
                file.write(image)
                size = -len(image) % 512 + 1024
            file.seek(size, io.SEEK_CUR)
        file.truncate(file.tell())
    tracemalloc.start()
    tar = adopt_tar("0.tar", "train", Storage(str(tmp_path)), Options())
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert tar.record is not None and tar.record.samples == 1 and tar.record.bytes > 240 << 20 and not tar.remark
    assert pq.read_table(tmp_path / "0.index.parquet")["sha256"].to_pylist() == [hashlib.sha256(image).hexdigest()]
    assert peak < 64 << 20


@pytest.mark.usefixtures("cluster")
def test_shards_of_our_own_get_the_index_they_had(tmp_path: Path, make_dataset: Callable[..., Manifest]) -> None:
    directory = Storage(str(tmp_path))
    made = make_dataset(directory, {"train": 50, "test": 12}, unlabelled=5)
    before = {name: directory.read(name) for name in directory.names()}
    records = list(ShardTable(directory))
    for name in before:
        if not name.endswith(".tar"):
            directory.remove(name)
    adopted, remarks = adopt(directory, Options(split="auto"))
    after = {name: directory.read(name) for name in directory.names()}
    assert list(ShardTable(directory)) == records and after["shards.parquet"] == before["shards.parquet"] and remarks == []
    assert {n: d for n, d in after.items() if n != "manifest.json"} == {n: d for n, d in before.items() if n != "manifest.json"}
    same = ("hash", "classes", "splits", "bytes", "read", "written", "smallest")
    assert {k: getattr(adopted, k) for k in same} == {k: getattr(made, k) for k in same}
    assert len(open_dataset(str(tmp_path), "test")) == 12

    with pytest.raises(DataError, match=r"a dataset of 62 samples is here already; --force indexes its tars anew$"):
        adopt(directory, Options())
    gone = open_dataset(str(tmp_path), "test")[0].key
    stale = ["manifest-v1.json", "shards-v1.parquet", "columns.json", "statistics-v2.json", "duplicates.json", "contamination-v2.json"]
    stale += ["deny/duplicates-v2.parquet", "deny/contamination.parquet", "deny/score-clip.parquet", ".plan/v1/state.json"]
    for name in stale:  # of versions of the dataset that is replaced
        directory.write(name, b"{}")
    with DenyListWriter(directory, "takedown", {}) as out:
        out.add(pa.table({"key": [gone]}))
        out.publish({})
    (tmp_path / "notes.txt").write_text("not ours")
    forced, _ = adopt(directory, Options(classes=("zero", "one", "two")), force=True)
    assert forced.splits == {"train": 62} and forced.classes == ["zero", "one", "two"] and forced.config != adopted.config
    assert read_manifest(directory) == forced and len(open_dataset(str(tmp_path))) == 61  # who was taken down stays away
    beside = {name for name in directory.names() if not name.endswith((".tar", ".index.parquet"))}
    assert beside == {"manifest.json", "shards.parquet", "deny", "notes.txt"} and directory.names("deny") == ["takedown.parquet"]


@pytest.mark.usefixtures("cluster")
def test_a_tar_that_cannot_be_read_fails_the_whole_and_is_named(tmp_path: Path) -> None:
    directory = Storage(str(tmp_path))
    for n in range(3):
        (tmp_path / f"{n}.tar").write_bytes(tar_bytes([(f"{n}.png", PNG)]))
    (tmp_path / "8.tar").mkdir()
    (tmp_path / "9.tar").symlink_to(tmp_path / "gone")
    with pytest.raises(StorageError, match=r": 2 of its 5 tars cannot be adopted, so none is: .*8\.tar.*; .*9\.tar: it vanished"):
        adopt(directory, Options())
    assert find_manifest(directory) is None
    (tmp_path / "8.tar").rmdir()
    (tmp_path / "9.tar").unlink()
    (tmp_path / "1.index.parquet").write_bytes(b"half written when it was killed")
    (tmp_path / "9.tar").write_bytes(gzip.compress(b"x"))
    with pytest.raises(DataError, match=r": 1 of its 4 tars cannot be adopted, so none is: .*9\.tar: it is compressed"):
        adopt(directory, Options())
    (tmp_path / "9.tar").write_bytes(tar_bytes([("9.png", PNG)])[:512])
    manifest, remarks = adopt(directory, Options())
    assert manifest.written == 3 and remarks == ["9.tar: it is cut off at byte 512, inside a member; 0 samples before that are taken"]
    assert manifest.dropped_samples == [
        {"file": "9.tar", "reason": "truncated", "detail": "it is cut off at byte 512, inside a member; left out: sample 9"}
    ]
    assert [open_dataset(str(tmp_path))[n].key for n in range(3)] == ["0", "1", "2"]


@pytest.mark.usefixtures("cluster")
def test_nothing_usable_is_an_error_with_its_reasons(tmp_path: Path) -> None:
    (tmp_path / "train-0.tar").write_bytes(tar_bytes([("a.txt", b"x"), ("b.png", b"")]))
    with pytest.raises(DataError, match=r"no sample of split 'train' can be used \(of all tars: 1 empty, 1 no-image\)$"):
        adopt(Storage(str(tmp_path)), Options())
    assert find_manifest(Storage(str(tmp_path))) is None


def test_what_cannot_be_adopted_is_one_sentence(tmp_path: Path) -> None:
    directory = Storage(str(tmp_path / "in"))
    with pytest.raises(DataError, match=r"there are no tars here \(\*\.tar; those in sub-folders are not taken\)$"):
        adopt(directory, Options())
    directory.write("00000.tar", tar_bytes([("a.png", PNG)]))
    with pytest.raises(DataError, match=r"^--split auto: 00000.tar does not begin with a split and a dash, as train-00000.tar does"):
        adopt(directory, Options(split="auto"))
    with pytest.raises(DataError, match=r"^--column width: every index has this column already"):
        adopt(directory, Options(columns=("width",)))
    with pytest.raises(DataError, match=r"this names a tar; what is adopted is the folder that holds the tars$"):
        adopt(directory / "00000.tar", Options())
    directory.write("00001.tar.gz", b"")
    with pytest.raises(DataError, match=r"00001.tar.gz \(1 in all\) is compressed.* unpack such tars"):
        adopt(directory, Options())


def test_class_names_come_one_a_line(tmp_path: Path) -> None:
    (tmp_path / "0.tar").write_bytes(tar_bytes([("a.png", PNG)]))
    for content, words in {b"": "line 1 is empty", b"cat\n\ndog\n": "line 2 is empty", b"caf\xe9": "cannot be read"}.items():
        (tmp_path / "names").write_bytes(content)
        done = CliRunner().invoke(main, ["adopt", str(tmp_path), "--classes", str(tmp_path / "names")])
        assert done.exit_code == 3 and f"error: --classes {tmp_path}/names: {words}" in done.stderr
    assert "cannot be read" in CliRunner().invoke(main, ["adopt", str(tmp_path), "--classes", str(tmp_path / "gone")]).stderr


def test_the_commands_on_an_object_store(s3: tuple[str, Callable[[], str]], tmp_path: Path) -> None:
    endpoint, make_bucket = s3
    url = make_bucket() + "/laion"
    store = Storage(url, endpoint)
    for n in range(3):
        samples = range(10 * n, 10 * n + 10)
        members = [
            (f"{s:09d}.{kind}", data)
            for s in samples
            for kind, data in (("jpg", picture(20, 16, "JPEG", s)), ("json", b'{"score": %d}' % s))
        ]
        store.write(f"{n:05d}.tar", tar_bytes([*members, (f"{n}.cls", b"1")]))

    names = tmp_path / "names.txt"
    names.write_text("cat\ndog\n\n")
    # In a process of its own, which brings its own Ray.
    environment = {k: v for k, v in os.environ.items() if k != "RAY_ADDRESS"} | {"AWS_ENDPOINT_URL": endpoint}
    command = [sys.executable, "-m", "pipeline.shards", "adopt", url, "--classes", names, "--column", "score", "--workers", "1"]
    adopted = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert adopted.returncode == 0, adopted.stderr
    assert adopted.stdout.splitlines() == [
        f"30 samples adopted (train 30), {store_size(store)}, the smallest 20x16 pixels",
        "3 left out: no-image",
        f"named in {url}/manifest.json: 3 of them, under dropped_samples",
    ]
    dataset = open_dataset(url, endpoint=endpoint)
    assert [json.loads(dataset[n].json)["score"] for n in (0, 13, 29)] == [0, 13, 29]
    assert dataset[25].image == picture(20, 16, "JPEG", 25) and dataset.classes == ["cat", "dog"]
    index = pq.read_table(io.BytesIO(store.read("00001.index.parquet")))
    assert index["score"].to_pylist() == list(range(10, 20)) and index.column_names == [*INDEX_SCHEMA.names, "score"]

    done = CliRunner().invoke(main, ["adopt", url, "--endpoint", endpoint])
    assert done.exit_code == 3 and f"error: data {url}: a dataset of 30 samples is here already" in done.output
    done = CliRunner().invoke(main, ["verify", url, "--endpoint", endpoint])
    assert done.exit_code == 0 and done.stdout == f"sound: 30 samples in 3 shards, {store_size(store)}\n"
    store.write("00001.tar", store.read("00001.tar").replace(b'"score": 13', b'"score": 31'))
    done = CliRunner().invoke(main, ["verify", url, "--endpoint", endpoint])
    assert done.exit_code == 3 and done.stderr.splitlines()[-1] == f"error: data {url}: 2 problems in 3 shards"
    assert done.stdout.splitlines() == [
        "00001.tar: its sha256 differs from the table of shards",
        "00001.tar: sample 000000013: its bytes are damaged (crc32, score differ from the index)",
    ]


def store_size(store: Storage) -> str:
    return format_bytes(sum(size for name, size in store.walk() if name.endswith(".tar")))
