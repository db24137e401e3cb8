"""Sources that are tables, and tars: which files there are, what their rows mean, what is wrong with them."""

from __future__ import annotations

import bz2
import gzip
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from pipeline.config.shard import Fetch
from pipeline.core.errors import ConfigError, DataError
from pipeline.core.storage import Storage
from pipeline.shards.dropped import Dropped
from pipeline.shards.layout import key_order
from pipeline.shards.manifest import Manifest
from pipeline.shards.sources import Files, Ignored, Item, Lost, Source, TableSource, TarSource, UrlSource

LAION = {
    "URL": ["http://a/1", "http://a/2", None],
    "TEXT": ["one", None, "three"],
    "similarity": [0.3, float("nan"), 0.5],
    "WIDTH": [5, 6, 7],
}


def write(path: Path, columns: dict[str, Any], schema: pa.Schema | None = None, rows: int | None = None) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(columns, schema=schema), path, row_group_size=rows)
    return path


def rows(source: Source) -> list[Item | Lost | Ignored]:
    return [row for part in source.parts() for row in source.rows(part)]


def items(source: Source) -> list[Item]:
    return [row for row in rows(source) if isinstance(row, Item)]


def test_laion(tmp_path: Path) -> None:
    write(tmp_path / "part-0.parquet", LAION)
    source = UrlSource(str(tmp_path), {})
    assert rows(source) == [
        Item("http://a/1", 0, text="one", extra={"similarity": 0.3, "WIDTH": 5}),
        Item("http://a/2", 0, extra={"WIDTH": 6}),
        Lost("part-0.parquet#2", "no-url", "row 2 of part-0.parquet has no URL"),
    ]
    survey = source.survey()
    assert (survey.rows, survey.parts, survey.exact) == (3, 1, True)


@pytest.mark.parametrize(
    ("there", "kept"),
    [
        ({"url": ["u"], "text": ["t"], "clip_similarity_vitb32": [0.25], "id": [4]}, {"clip_similarity_vitb32": 0.25, "id": 4}),  # COYO
        ({"url": ["u"], "text": ["t"], "uid": ["ab"], "sha256": ["cd"], "clip_l14_similarity_score": [0.5]}, None),  # DataComp
        ({"image_url": ["u"], "caption": ["t"]}, {}),
    ],
)
def test_column_names_of_others(tmp_path: Path, there: dict[str, list[Any]], kept: dict[str, Any] | None) -> None:
    write(tmp_path / "a.parquet", there)
    (item,) = items(UrlSource(str(tmp_path / "a.parquet"), {}))
    rest = {n: v[0] for n, v in there.items() if n not in ("url", "image_url", "text", "caption")}
    assert (item.path, item.text, item.extra) == ("u", "t", rest if kept is None else kept)


def test_columns_of_ones_own(tmp_path: Path) -> None:
    write(tmp_path / "a.parquet", {"link": ["u"], "words": ["t"], "id": [9], "class": ["dog"]})
    (item,) = items(UrlSource(str(tmp_path), {"url": "link", "caption": "words", "key": "id", "label": "class"}))
    assert (item.path, item.text, item.identity, item.class_name, item.extra) == ("u", "t", "9", "dog", {"id": 9})
    with pytest.raises(
        DataError, match=r"^shard.source.columns.caption: a.parquet has no column 'text' \(there: link, words, id, class\)$"
    ):
        UrlSource(str(tmp_path), {"url": "link", "caption": "text"}).check()
    with pytest.raises(ConfigError, match=r"^shard.source.columns: 'captoin' is not known, did you mean 'caption'\?"):
        UrlSource(str(tmp_path), {"captoin": "words"}).check()
    with pytest.raises(
        DataError, match=r"^shard.source.url: a.parquet has no column for the url \(looked for url, URL, .*; there: link, .*\)"
    ):
        UrlSource(str(tmp_path), {}).check()


CSV = 'url,caption,score,label\nhttp://a/1,"one, two\nlines",0.5,3\nhttp://a/2,"caf\u00e9",,dog\nhttp://a/3,00123,12,\n,no url,1,1\n'


@pytest.mark.parametrize(("name", "encode"), [("a.csv", bytes), ("a.csv.gz", gzip.compress), ("a.csv.bz2", bz2.compress)])
def test_csv(tmp_path: Path, name: str, encode: Callable[[bytes], bytes]) -> None:
    (tmp_path / name).write_bytes(encode(CSV.encode()))
    assert rows(UrlSource(str(tmp_path), {})) == [
        Item("http://a/1", 0, text="one, two\nlines", label=3, extra={"score": 0.5}),
        Item("http://a/2", 0, "dog", text="café"),
        Item("http://a/3", 0, text="00123", extra={"score": 12}),
        Lost(f"{name}#3", "no-url", f"row 3 of {name} has no URL"),
    ]
    survey = UrlSource(str(tmp_path), {}).survey()
    assert (survey.rows, survey.exact) == (4, True)


def test_columns_without_a_name_mean_nothing(tmp_path: Path) -> None:
    """pandas writes row numbers so, which are no captions, no labels and no keys."""
    (tmp_path / "a.csv").write_text(",url\n0,http://a/1\n1,http://a/2\n")
    (tmp_path / "b.csv").write_text(",url,text\n0,http://b/1,one\n1,http://b/2,two\n")
    (tmp_path / "c.csv").write_text(",url,text,label\n0,http://c/1,one,7\n")
    found = [(i.path, i.text, i.label, i.key, i.extra) for i in items(UrlSource(str(tmp_path), {}))]
    assert found == [
        ("http://a/1", None, None, None, {"": 0}),
        ("http://a/2", None, None, None, {"": 1}),
        ("http://b/1", "one", None, None, {"": 0}),
        ("http://b/2", "two", None, None, {"": 1}),
        ("http://c/1", "one", 7, None, {"": 0}),
    ]


def test_a_row_without_its_key_is_a_reason(tmp_path: Path) -> None:
    write(tmp_path / "a.parquet", {"url": ["u1", "u2", "u3"], "uid": ["x", None, "z"]})
    found = rows(UrlSource(str(tmp_path), {"key": "uid"}))
    assert [(i.key, i.identity) for i in found if isinstance(i, Item)] == [("x", "x"), ("z", "z")]
    assert [i for i in found if isinstance(i, Lost)] == [
        Lost("a.parquet#1", "no-key", "row 1 of a.parquet has nothing in its column 'uid'")
    ]


def test_whole_numbers_with_gaps_are_labels(tmp_path: Path) -> None:
    """A column of whole numbers, some of which are missing, is one of floats in many tables."""
    write(tmp_path / "a.parquet", {"url": ["u1", "u2", "u3", "u4"], "label": [3.0, None, 0.5, float("nan")]})
    (tmp_path / "b.csv").write_text("url,label\nu5,12.0\nu6,\n")
    assert [i.label for i in items(UrlSource(str(tmp_path), {}))] == [3, None, None, None, 12, None]


def test_bad_rows_are_a_reason(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_bytes(b"url,text\nu1,one\nu2\nu3,three,3\nu4,\xff\xfe\n")
    (tmp_path / "b.jsonl").write_bytes(
        b'{"url": "u5", "text": "five", "n": 1}\n\n{"url": \n[1]\n{"text": "no url"}\n{"url": "u6", "caption": "c", "label": 2}'
    )
    found = rows(UrlSource(str(tmp_path), {}))
    assert [i.path for i in found if isinstance(i, Item)] == ["u1", "u4", "u5", "u6"]
    assert [(i.reason, i.path.partition("#")[0]) for i in found if isinstance(i, Lost)] == [
        ("bad-row", "a.csv"), ("bad-row", "a.csv"), ("bad-row", "b.jsonl"), ("bad-row", "b.jsonl"), ("no-url", "b.jsonl"),
    ]  # fmt: skip
    assert [i.label for i in found if isinstance(i, Item)][-1] == 2


def test_parts_need_not_have_the_same_columns(tmp_path: Path) -> None:
    """Each is read by its own columns; none, or no rows at all, is no reason to stop. What is no label stays with the sample."""
    write(tmp_path / "a.parquet", {"url": ["u1"], "text": ["one"], "n": [1]})
    write(tmp_path / "b.parquet", {"n": ["x"], "URL": pa.array(["u2"]).dictionary_encode(), "TEXT": pa.array([None], pa.null())})
    write(tmp_path / "c.parquet", {"url": pa.array([], pa.string()), "text": pa.array([], pa.string())})
    write(tmp_path / "d.parquet", {"url": pa.array(["u3"], pa.large_string()), "labels": [[1, 2]]})
    for name in ("e.csv", "f.jsonl", "g.tsv"):
        (tmp_path / name).write_bytes(b"")
    (tmp_path / "h.csv").write_bytes(b"url,text\n")
    (tmp_path / "i.jsonl.gz").write_bytes(gzip.compress(b"\n"))
    (tmp_path / "j.jsonl").write_bytes(b'{"url": "u4", "text": "four", "label": ["a"]}\n{"url": "u5", "text": 5}')
    source = UrlSource(str(tmp_path), {})
    assert [(i.path, i.text, i.extra) for i in items(source)] == [
        ("u1", "one", {"n": 1}), ("u2", None, {"n": "x"}), ("u3", None, {"labels": [1, 2]}), ("u4", "four", {"label": ["a"]}),
    ]  # fmt: skip
    assert [i for i in rows(source) if isinstance(i, Lost)] == [
        Lost("j.jsonl#1", "bad-txt", "row 1 of j.jsonl: its text is of type int, not text")
    ]
    assert 5 <= source.survey().rows < 50


@pytest.mark.parametrize("kind", [UrlSource, TableSource])
def test_captions_that_are_no_text_are_named(tmp_path: Path, kind: type[Source]) -> None:
    images = {"image": [b"x"]} if kind is TableSource else {"url": ["u"]}
    write(tmp_path / "a.parquet", {**images, "caption": ["one"]})
    write(tmp_path / "b.parquet", {**images, "caption": [1]})
    write(tmp_path / "c.parquet", {**images, "text": [["one", "two"]]})
    with pytest.raises(
        DataError, match=r"^shard.source.url: 2 of 3 tables cannot be used: b.parquet: its column 'caption' holds int64, not"
    ) as e:
        kind(str(tmp_path), {}).check()
    assert "c.parquet: its column 'text' holds list<" in str(e.value) and "shard.source.columns: {caption: ..} names another" in str(
        e.value
    )


def test_a_csv_of_many_blocks_is_estimated(tmp_path: Path) -> None:
    lines = [f"http://host/{n:08d},caption number {n}" for n in range(150_000)]
    (tmp_path / "a.csv").write_text("\n".join(["url,text", *lines]))
    source = UrlSource(str(tmp_path / "*.csv"), {})
    survey = source.survey()
    assert not survey.exact and survey.rows == pytest.approx(150_000, rel=0.1)
    assert [i.path for i in items(source)] == [line.split(",")[0] for line in lines]
    (tmp_path / "a.csv.gz").write_bytes(gzip.compress((tmp_path / "a.csv").read_bytes()))
    assert UrlSource(str(tmp_path / "*.csv.gz"), {}).survey().rows > 60_000  # lines this alike are packed to a seventh


def test_which_files_a_url_names(tmp_path: Path) -> None:
    for name in ("b/1.parquet", "b/2.parquet", "a.parquet", "_tmp/x.parquet", ".hidden.parquet"):
        write(tmp_path / name, {"url": [name]})
    (tmp_path / "README.md").write_text("about")

    def named(url: str) -> list[str]:
        return [p.name for p in UrlSource(url, {}).parts()]

    assert named(str(tmp_path)) == ["a.parquet", "b/1.parquet", "b/2.parquet"]
    assert named(f"{tmp_path}/b/*.parquet") == ["1.parquet", "2.parquet"]
    assert named(f"{tmp_path}/*/[12].parquet") == ["b/1.parquet", "b/2.parquet"]
    assert named(f"{tmp_path}/**/2.parquet") == ["b/2.parquet"]
    assert named(f"{tmp_path}/a.parquet") == ["a.parquet"]
    for url in (f"{tmp_path}/c/*.parquet", f"{tmp_path}/none.parquet", f"{tmp_path}/none"):
        with pytest.raises(
            DataError, match=r"^shard.source.url: there are no tables at .*none|^shard.source.url: there are no tables at .*c/\*"
        ):
            named(url)


def test_tables_on_an_object_store(store: Storage, tmp_path: Path) -> None:
    for n in range(3):
        store.put(write(tmp_path / f"{n}.parquet", {"url": [f"u{n}", f"v{n}"]}), f"in/{n}.parquet")
    store.write("in/3.jsonl.gz", gzip.compress(b'{"url": "w"}\n'))
    source = UrlSource(f"{store.url}/in", {}, store.endpoint)
    assert [i.path for i in items(source)] == ["u0", "v0", "u1", "v1", "u2", "v2", "w"]
    assert [p.rows for p in source.parts()] == [2, 2, 2, None]


def test_all_broken_tables_are_named_before_anything_starts(tmp_path: Path) -> None:
    whole = write(tmp_path / "0.parquet", {"url": ["u"] * 1000}).read_bytes()
    (tmp_path / "1.parquet").write_bytes(whole[:-20])
    (tmp_path / "2.parquet").write_bytes(b"")
    write(tmp_path / "3.parquet", {"link": ["u"]})
    with pytest.raises(
        DataError,
        match=r"^shard.source.url: 3 of 4 tables cannot be used: 1.parquet is damaged.*; 2.parquet is damaged.*; 3.parquet has no column",
    ):
        UrlSource(str(tmp_path), {}).check()


def test_damage_inside_is_found_as_it_is_read(tmp_path: Path) -> None:
    path = write(tmp_path / "0.parquet", {"url": [f"http://a/{n}" for n in range(5000)]})
    data = bytearray(path.read_bytes())
    data[100:2000] = b"\xff" * 1900
    path.write_bytes(data)
    with pytest.raises(DataError, match=r"^shard.source.url: 0.parquet is damaged, or no parquet"):
        items(UrlSource(str(tmp_path), {}))
    (tmp_path / "0.parquet").unlink()
    (tmp_path / "a.jsonl").write_bytes(b'{"url": "u"}\n[' + b"1," * 2**26)
    with pytest.raises(DataError, match=r"a.jsonl has a line of more than 64 MiB"):
        items(UrlSource(str(tmp_path), {}))
    (tmp_path / "a.jsonl").unlink()
    (tmp_path / "a.csv.gz").write_bytes(gzip.compress(b"url\n" + b"http://a/b\n" * 10_000)[:-30])
    with pytest.raises(DataError, match=r"a.csv.gz is damaged, or no csv"):
        items(UrlSource(str(tmp_path), {}))


def test_a_table_that_changes_is_an_error(tmp_path: Path) -> None:
    path = write(tmp_path / "0.parquet", {"url": ["a", "b"]})
    source = UrlSource(str(tmp_path), {})
    (part,) = source.parts()
    write(path, {"url": ["a", "b", "c"]})
    with pytest.raises(DataError, match=r"0.parquet changed while it was read: 2 rows when it was listed, 3 now"):
        list(source.rows(part))
    path.unlink()
    with pytest.raises(DataError, match=r"0.parquet vanished after it was listed"):
        list(source.rows(part))


def hugging_face(path: Path, images: list[bytes | None], labels: list[int], rows: int = 3) -> Path:
    """As `datasets` writes it."""
    image = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    about = {"info": {"features": {"image": {"_type": "Image"}, "label": {"names": ["cat", "dog"], "_type": "ClassLabel"}}}}
    schema = pa.schema([("image", image), ("label", pa.int64()), ("text", pa.string())], metadata={"huggingface": json.dumps(about)})
    values = [{"bytes": data, "path": f"{n}.png"} for n, data in enumerate(images)]
    return write(path, {"image": values, "label": labels, "text": [f"text {n}" for n in range(len(images))]}, schema, rows)


def test_embedded_images(tmp_path: Path) -> None:
    images = [b"image %d" % n * (n + 1) for n in range(8)]
    hugging_face(tmp_path / "train-0.parquet", images[:6], [0, 1, -1, 0, 1, 1])
    hugging_face(tmp_path / "train-1.parquet", [images[6], None, images[7]], [0, 1, 0])
    source, size = TableSource(str(tmp_path), {}), (tmp_path / "train-0.parquet").stat().st_size
    found = items(source)
    assert source.classes() == ["cat", "dog"]
    assert [(i.path, i.label, i.text, i.place) for i in found[:4]] == [
        ("train-0.parquet#0", 0, "text 0", ("train-0.parquet", 0, 0, size)),
        ("train-0.parquet#1", 1, "text 1", ("train-0.parquet", 0, 1, size)),
        ("train-0.parquet#2", None, "text 2", ("train-0.parquet", 0, 2, size)),
        ("train-0.parquet#3", 0, "text 3", ("train-0.parquet", 1, 0, size)),
    ]
    chosen = [found[n] for n in (8, 4, 0, 5, 7)]
    fetched = dict(source.fetch(chosen, Fetch(), 2**20, 1))
    assert [fetched[n] for n in range(4)] == [Files(images[n], {}) for n in (7, 4, 0, 5)]
    assert fetched[4] == Dropped("no-image", "the row has no image; it names a file, 1.png, which is not read")


def test_rows_of_a_group_stay_together(tmp_path: Path) -> None:
    hugging_face(tmp_path / "a.parquet", [b"x"] * 30, [0] * 30, rows=5)
    source = TableSource(str(tmp_path), {})
    orders = {i.path: source.order(i, key_order(i.path)) for i in items(source)}
    groups = [int(path.partition("#")[2]) // 5 for path in sorted(orders, key=orders.__getitem__)]
    assert sorted(groups[::5]) == list(range(6)) and all(len(set(groups[n : n + 5])) == 1 for n in range(0, 30, 5))
    assert groups != sorted(groups)


def test_a_table_without_images_is_refused(tmp_path: Path) -> None:
    write(tmp_path / "a.parquet", {"image": ["a path"]})
    with pytest.raises(DataError, match=r"^shard.source.url: a.parquet: its column 'image' holds string, not the bytes of images$"):
        TableSource(str(tmp_path), {}).check()
    write(tmp_path / "a.parquet", {"text": ["a"]})
    with pytest.raises(DataError, match=r"has no column for the image .*shard.source.columns: \{image: ..\} names it$"):
        TableSource(str(tmp_path), {}).check()


def test_a_table_that_changed_since_it_was_listed_loses_its_rows_with_a_reason(tmp_path: Path) -> None:
    """The captions are those of other images."""
    path = hugging_face(tmp_path / "a.parquet", [b"x" * n for n in range(6)], [0] * 6)
    hugging_face(tmp_path / "b.parquet", [b"z"] * 2, [0] * 2)
    source = TableSource(str(tmp_path), {})
    found = items(source)
    hugging_face(path, [b"y" * n for n in range(9)], [0] * 9)
    fetched = dict(source.fetch(found, Fetch(), 2**20, 1))
    assert [f.reason if isinstance(f, Dropped) else "" for _, f in sorted(fetched.items())] == ["unreadable"] * 6 + ["", ""]
    assert isinstance(fetched[0], Dropped) and fetched[0].detail.startswith("a.parquet changed after it was listed: ")


def test_tars(tmp_path: Path, make_dataset: Callable[..., Manifest]) -> None:
    make_dataset(Storage(str(tmp_path / "in")), {"train": 30}, per_shard=12, unlabelled=5)
    with_index = TarSource(str(tmp_path / "in"))
    expected = items(with_index)
    for index in (tmp_path / "in").glob("*.index.parquet"):
        index.unlink()
    source = TarSource(f"{tmp_path}/in/*.tar")
    assert [p.name for p in source.parts()] == ["train-00000.tar", "train-00001.tar", "train-00002.tar"]
    assert items(source) == expected and len(expected) == 30
    assert 25 <= with_index.survey().rows <= 35 and 25 <= source.survey().rows <= 35
    for index, files in source.fetch(expected[::-1], Fetch(), 2**20, 1):
        number = 29 - index
        assert isinstance(files, Files)
        with Image.open(io.BytesIO(files.image)) as image:
            assert image.size == (8, 8)
        side = {"txt": f"train {number}".encode(), "json": b'{"n": %d}' % number, "cls": str(number % 3).encode()}
        assert files.side == {k: v for k, v in side.items() if k != "cls" or number % 5}


def test_cut_and_foreign_tars(tmp_path: Path, make_dataset: Callable[..., Manifest]) -> None:
    make_dataset(Storage(str(tmp_path / "in")), {"train": 10}, per_shard=10)
    tar = tmp_path / "in" / "train-00000.tar"
    (tmp_path / "in" / "train-00000.index.parquet").unlink()
    source = TarSource(str(tmp_path / "in"))
    last = items(source)[-1]
    data = tar.read_bytes()
    tar.write_bytes(data[: int(last.place[4]) + 10])
    found = rows(source)
    assert [type(r) for r in found] == [Item] * 9 + [Lost, Ignored]
    assert isinstance(found[9], Lost) and found[9].reason == "truncated"
    ((_, dropped),) = source.fetch([last], Fetch(), 2**20, 1)
    assert dropped == Dropped("unreadable", "train-00000.tar was cut short after it was listed")
    tar.write_bytes(data[: last.place[1]] + bytes(len(data) - int(last.place[1])))  # of the same length
    ((_, dropped),) = source.fetch([last], Fetch(), 2**20, 1)
    assert isinstance(dropped, Dropped) and dropped.detail.startswith("train-00000.tar has other bytes there than when it was listed")
    tar.write_bytes(gzip.compress(data))
    with pytest.raises(DataError, match=r"^shard.source.url: train-00000.tar: it is compressed"):
        rows(source)
    tar.rename(tmp_path / "in" / "train.tar.gz")
    with pytest.raises(DataError, match=r"^shard.source.url: train.tar.gz \(1 in all\) is compressed"):
        source.check()
