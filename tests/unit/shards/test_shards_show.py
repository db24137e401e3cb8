from __future__ import annotations

import io
import json
import re
from collections.abc import Callable
from dataclasses import replace

import pyarrow as pa
import pyarrow.parquet as pq
from click.testing import CliRunner

from pipeline.core.storage import Storage
from pipeline.shards.__main__ import main
from pipeline.shards.manifest import Manifest, publish, read_manifest, read_shards
from pipeline.shards.show import describe, text_of
from pipeline.shards.statistics import keep_statistics


def deny(directory: Storage, name: str, count: int) -> None:
    sink = io.BytesIO()
    pq.write_table(pa.table({"key": [str(n) for n in range(count)]}), sink)
    directory.write(f"deny/{name}.parquet", sink.getvalue())


def test_everything_is_told(make_dataset: Callable[..., Manifest], store: Storage) -> None:
    made = make_dataset(store, {"train": 50, "test": 12}, width=8, height=4, unlabelled=5)
    records = [r for split in made.splits for r in read_shards(store, split)]
    manifest = replace(made, read=65, dropped={"corrupt": 1, "http-404": 2}, ignored=3, source="https://me:secret@images/*.csv")
    publish(store, records, manifest)
    deny(store, "duplicates", 31)
    found = describe(store)
    assert not store.exists("statistics.json"), "to look writes nothing"
    assert found["deny"] == {"duplicates": 31} and found["versions"] == [1] and found["dropped"] == manifest.dropped
    lines = {line[:20].strip(): line for line in text_of(found).splitlines()}
    text = re.sub(" +", " ", text_of(found))
    for told in (
        "source https://***@images/*.csv", "split train 50 samples", "ledger 65 read = 62 written + 3 dropped", " http-404 2 (3.1%)",
        "ignored 3 files", "deny duplicates 31 (50.0%)", "width 8 in the median, 8 to 8 in nine of ten, 8 to 8 in all",
        "caption bytes", "a class has 16 to 17 samples; 13 have no label", "classes 3: 0, 1, 2", "counted 62 samples of 4 shards of 4",
    ):  # fmt: skip
        assert told in text, (told, lines)
    assert text.index("http-404") < text.index("corrupt"), "the most frequent first"


def test_statistics_that_lie_there_are_taken(make_dataset: Callable[..., Manifest], store: Storage) -> None:
    manifest = make_dataset(store, {"train": 5})
    kept = keep_statistics(store, manifest)
    store.write("statistics.json", json.dumps({**json.loads(store.read("statistics.json")), "unlabelled": 77}).encode())
    assert describe(store)["statistics"]["unlabelled"] == 77 != kept.unlabelled


def test_the_command_prints_text_or_json(make_dataset: Callable[..., Manifest], s3: tuple[str, Callable[[], str]]) -> None:
    endpoint, make_bucket = s3
    url = f"{make_bucket()}/data"
    made = make_dataset(Storage(url, endpoint), {"train": 5})
    done = CliRunner().invoke(main, ["show", url, "--endpoint", endpoint])
    assert done.exit_code == 0 and "5 read = 5 written + 0 dropped" in done.stdout
    done = CliRunner().invoke(main, ["show", url, "--json", "--endpoint", endpoint])
    assert json.loads(done.stdout)["hash"] == made.hash == read_manifest(Storage(url, endpoint)).hash


def test_where_there_is_no_dataset_one_sentence_says_so(tmp_path: object) -> None:
    done = CliRunner().invoke(main, ["show", str(tmp_path)])
    assert done.exit_code == 3 and "there is no dataset here (no manifest.json)" in done.stderr and done.stdout == ""
