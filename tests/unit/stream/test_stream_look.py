"""`python -m pipeline.stream`: the real command on real datasets and a real run directory."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from click.testing import CliRunner, Result
from PIL import Image, ImageColor

from pipeline.checkpoint import Checkpoints, Run, claim_run
from pipeline.checkpoint.commit import STATE
from pipeline.checkpoint.fragments import WEIGHT, Fragment
from pipeline.config import parse_config
from pipeline.core.storage import Storage
from pipeline.shards.manifest import Manifest, publish, read_manifest, read_shards
from pipeline.stream import Stream, open_collection, open_dataset, open_stream
from pipeline.stream.__main__ import main
from pipeline.stream.sheet import _MARK, _SIDE, _TEXT, Card, _cut, _font, _wrapped, draw
from tests.checkpoints import commit_fragments

Maker = Callable[..., Manifest]


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What other tests fetched of the same bytes would hide damage."""
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))


@pytest.fixture(scope="module")
def url(make_dataset: Maker, tmp_path_factory: pytest.TempPathFactory) -> str:
    """50 samples for training in three shards, every tenth without label, and 12 for testing."""
    folder = tmp_path_factory.mktemp("data")
    make_dataset(Storage(str(folder)), {"train": 50, "test": 12}, width=12, height=10, unlabelled=10)
    return str(folder)


@pytest.fixture
def dataset(store: Storage, make_dataset: Maker) -> Storage:
    """The same on each kind of store, to be damaged; more samples than a block has."""
    make_dataset(store, {"train": 200}, width=12, height=10, per_shard=100)
    return store


def look(*words: object, endpoint: str | None = None) -> Result:
    return CliRunner().invoke(main, [*map(str, words), *(["--endpoint", endpoint] if endpoint else [])])


def found(*words: object, endpoint: str | None = None) -> dict[str, Any]:
    done = look(*words, "--json", endpoint=endpoint)
    assert done.exit_code == 0, done.output
    return json.loads(done.stdout)


def rewrite_index(directory: Storage, name: str, change: Callable[[pa.Table], pa.Table]) -> None:
    sink = io.BytesIO()
    pq.write_table(change(pq.read_table(io.BytesIO(directory.read(name)))), sink)
    directory.write(name, sink.getvalue())


def flip(directory: Storage, name: str, at: int) -> None:
    data = bytearray(directory.read(name))
    data[at] ^= 1
    directory.write(name, bytes(data))


# Counts


def test_counts(store: Storage, make_dataset: Maker) -> None:
    manifest = make_dataset(store, {"train": 50, "test": 12}, width=12, height=10, unlabelled=10)
    publish(store, [*read_shards(store, "train"), *read_shards(store, "test")], replace(manifest, read=65, dropped={"corrupt": 3}))

    def change(index: pa.Table) -> pa.Table:
        without = pa.array([-1, 0, *index["txt_length"].to_pylist()[2:]])
        index = index.set_column(index.column_names.index("txt_length"), "txt_length", without)
        return index.append_column("score", pa.array([None, *map(float, range(19))], pa.float64()))

    rewrite_index(store, "train-00000.index.parquet", change)
    counts = found(store.url, endpoint=store.endpoint)["dataset"]
    sizes = {name: len(store.read(name)) for name in store.names() if name.endswith(".tar")}
    assert counts["splits"] == {
        split: {"samples": n, "shards": shards, "bytes": sum(size for name, size in sizes.items() if name.startswith(split))}
        for split, n, shards in (("test", 12, 1), ("train", 50, 3))
    }
    assert (counts["version"], counts["hash"], counts["source"], counts["dropped"]) == (1, manifest.hash, "made", {"corrupt": 3})
    assert counts["classes"] == {"number": 3, "first": ["0", "1", "2"]}
    assert counts["looked_at"] == {"split": "train", "samples": 50, "indices": 3, "shards": 3}
    assert counts["with"] == {"label": 45, "caption": 48, "json": 50}
    assert counts["sizes"]["width"] == dict.fromkeys(("5%", "median", "95%"), 12) and counts["sizes"]["height"]["median"] == 10
    of = [sum(n % 3 == c for n in range(50) if n % 10) for c in range(3)]  # [15, 15, 15], less what has no label
    assert counts["samples_a_class"]["most"]["samples"] == max(of) and counts["samples_a_class"]["least"]["samples"] == min(of)
    assert counts["columns"] == {"score": {"values": 19, "min": 0.0, "median": 9.0, "max": 18.0}}
    text = look(store.url, "--split", "test", endpoint=store.endpoint).stdout
    assert "indices      of 1 shards of 1 of split test" in text and "captions     12 of 12 samples" in text and "3 corrupt" in text


def test_of_many_shards_a_few_indices_are_looked_at(make_dataset: Maker, tmp_path: Path) -> None:
    """And a search stops where it has found."""
    make_dataset(Storage(str(tmp_path)), {"train": 80}, per_shard=1)
    counts = found(tmp_path)["dataset"]
    assert counts["looked_at"] == {"split": "train", "samples": 64, "indices": 64, "shards": 80}
    (tmp_path / "train-00079.index.parquet").unlink()
    (tmp_path / "train-00000.index.parquet").write_bytes(b"no Parquet")
    done = look(tmp_path)
    assert done.exit_code == 0 and "of 64 shards of 80 of split train" in done.stdout and "62 of 62 samples" in done.stdout
    assert "warning" in done.stderr and "train-00079.index.parquet: is missing; it is passed over" in done.stderr
    (tmp_path / "train-00000.index.parquet").unlink()
    done = look(tmp_path, "--key", open_dataset(str(tmp_path))[7].key)
    assert done.exit_code == 0 and "train-00007.tar, row 0" in done.stdout and "train-00079" not in done.stderr


# Samples


def test_samples_by_key(dataset: Storage, tmp_path: Path) -> None:
    samples = [open_dataset(dataset.url, endpoint=dataset.endpoint)[n] for n in (3, 150)]
    keys = [word for s in reversed(samples) for word in ("--key", s.key)]
    shown = found(dataset.url, *keys, "--out", tmp_path / "out", endpoint=dataset.endpoint)["samples"]
    assert [s["number"] for s in shown] == [150, 3] and (shown[0]["shard"], shown[0]["row"]) == ("train-00001.tar", 50)
    for values, sample in zip(reversed(shown), samples, strict=True):
        assert (values["key"], values["label"], values["caption"], values["json"]) == (sample.key, sample.label, sample.text, sample.meta)
        assert (values["format"], values["width"], values["height"], values["bytes"]) == ("png", 12, 10, len(sample.image))
        assert values["sha256_ok"] and not values["problem"]
        files = {Path(f).suffix: Path(f).read_bytes() for f in values["files"]}
        assert files == {".png": sample.image, ".txt": sample.text.encode(), ".cls": str(sample.label).encode(), ".json": sample.json}
    text = look(dataset.url, *keys[:2], endpoint=dataset.endpoint).stdout
    assert f"key      {samples[1].key}\n" in text and "sample   150 of split train\n" in text and "(ok)" in text


def test_a_key_that_is_a_path_stays_below_the_folder(url: str, tmp_path: Path) -> None:
    from pipeline.stream.look import describe, write_files

    values, sample = describe(open_dataset(url), 5)
    assert sample
    files = [Path(f) for f in write_files(tmp_path / "out", values | {"key": "../../a/b c"}, sample)]
    assert {f.parent for f in files} == {tmp_path / "out"} and all(f.name.startswith("5-") for f in files)


def test_an_absent_key(url: str) -> None:
    key = open_dataset(url)[31].key
    typed = key[:-1] + "x"
    done = look(url, "--key", typed)
    assert done.exit_code == 3 and done.stdout == ""
    assert f"none of the 50 samples of split 'train' has the key {typed!r}, did you mean {key!r}?" in done.stderr
    assert "Traceback" not in done.stderr


def test_damage_is_shown(dataset: Storage) -> None:
    keys = [open_dataset(dataset.url, endpoint=dataset.endpoint).key_of(n) for n in (0, 1)]  # the images stay where they are
    flip(dataset, "train-00000.tar", 700)

    def another(index: pa.Table) -> pa.Table:
        digests = ["0" * 64 if key == keys[1] else d for key, d in zip(index["key"].to_pylist(), index["sha256"].to_pylist(), strict=True)]
        return index.set_column(index.column_names.index("sha256"), "sha256", pa.array(digests))

    rewrite_index(dataset, "train-00000.index.parquet", another)
    one, two = found(dataset.url, "--key", keys[0], "--key", keys[1], endpoint=dataset.endpoint)["samples"]
    assert "its crc32 differs" in one["problem"] and one["sha256_ok"] is None
    assert two["problem"] == "" and two["sha256_ok"] is False
    assert "ANOTHER" in look(dataset.url, "--key", keys[1], endpoint=dataset.endpoint).stdout


def test_positions(dataset: Storage) -> None:
    """On a store the order depends on the batch too."""
    batch, seed = 20, 3
    stream = open_stream(dataset.url, global_batch=batch, micro_batch=batch, size=8, seed=seed, endpoint=dataset.endpoint)
    keys = [key for made in islice(iter(stream), 200 // batch + 1) for key in made.keys]
    wanted = [0, 5, batch, 199, 200]
    words = [word for p in wanted for word in ("--position", p)]
    shown = found(dataset.url, *words, "--batch", batch, "--seed", seed, endpoint=dataset.endpoint)["samples"]
    assert [s["key"] for s in shown] == [keys[p] for p in wanted]
    assert [(s["position"], s["epoch"]) for s in shown] == [(p, p // 200) for p in wanted]


# Runs

BATCH, MICRO = 20, 4


def make_run(store: Storage, data: list[dict[str, Any]], **pretrain: Any) -> Run:
    section = {"model": "vit_b16", "image": {"pixels": 8}, "batch": BATCH, "micro_batch": MICRO, "duration": "12 steps", **pretrain}
    where = {"url": store.url, "endpoint": store.endpoint}
    return claim_run(parse_config({"name": "probe", "seed": 5, "storage": where, "data": data, "pretrain": section}))


def stream_of(run: Run) -> Stream:
    """As the training worker opens it."""
    p = run.config.pretrain
    assert p
    data = open_collection(run.data, p.split, run.config.storage.endpoint, block=p.loader.block, cache=p.loader.cache)
    return open_stream(data, global_batch=p.batch, micro_batch=p.micro_batch, seed=run.config.seed, image=p.image, bad=1.0)


def commit(run: Run, step: int, loader: dict[str, Any]) -> None:
    checkpoints = Checkpoints(run.directory)
    lease = checkpoints.newest_lease() or checkpoints.acquire()
    state = [Fragment(WEIGHT, "a", 0, torch.zeros(1))]
    files = {STATE: json.dumps({"loader": loader}).encode()}
    commit_fragments(checkpoints, lease, state, step, files, samples=loader["consumed"], view=loader["view"])


def shown_at(run: Run, step: int) -> dict[str, Any]:
    return found("--run", run.directory.url, "--step", step, endpoint=run.directory.endpoint)["step"]


@pytest.fixture
def run(dataset: Storage, make_dataset: Maker, tmp_path: Path) -> Run:
    """On a store of one dataset; else of two by weight, each sample twice in a row, and some left out."""
    if not dataset.is_local:
        return make_run(dataset / "runs", [{"url": dataset.url}])
    make_dataset(dataset / "other", {"train": 60}, width=16, height=12)
    (tmp_path / "deny.txt").write_text("\n".join(open_dataset(dataset.url)[n].key for n in range(0, 200, 3)))
    data = [{"url": dataset.url, "deny": [str(tmp_path / "deny.txt")], "weight": 3}, {"url": (dataset / "other").url, "weight": 2}]
    return make_run(dataset / "runs", data, image={"pixels": 8, "repeats": 2})


def test_the_samples_of_a_step(run: Run, dataset: Storage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What training was given, the samples that stood in for damaged ones included, though the fault has passed since."""
    victim = stream_of(run).mixture.at(2 * BATCH, BATCH)
    d, number = int(victim.dataset[7]), int(victim.number[7])
    damaged = stream_of(run).datasets[d]
    key, shard = damaged.key_of(number), damaged.shards[damaged.locate(number)[0]].name
    index = pq.read_table(io.BytesIO(damaged.directory.read(shard.replace(".tar", ".index.parquet")))).to_pylist()
    at = next(row["image_offset"] for row in index if row["key"] == key) + 20
    flip(damaged.directory, shard, at)
    stream = stream_of(run)
    batches = list(islice(iter(stream), 4 * BATCH // MICRO))
    commit(run, 4, stream.state())
    flip(damaged.directory, shard, at)  # the fault passes
    (tmp_path / "another machine").mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "another machine"))

    steps = {step: shown_at(run, step) for step in (1, 3, 4)}
    for step, shown in steps.items():
        given = batches[(step - 1) * BATCH // MICRO : step * BATCH // MICRO]
        assert [s["key"] for s in shown["samples"]] == [k for b in given for k in b.keys]
        assert [s["caption"] for s in shown["samples"]] == [t for b in given for t in b.texts]
        assert [s["label"] for s in shown["samples"]] == [n for b in given for n in b.labels.tolist()]
        assert [s["micro_batch"] for s in shown["samples"]] == [b.index for b in given for _ in b.keys]
        assert [s["position"] for s in shown["samples"]] == list(range((step - 1) * BATCH, step * BATCH))
        assert not shown["notes"]
        assert [s["position"] for s in shown["samples"] if s["replaced"]] == [r.position for b in given for r in b.replaced]
    gone = steps[3]["samples"][7]["replaced"]
    assert (gone["key"], gone["shard"], gone["reason"]) == (key, shard, "checksum") and steps[3]["samples"][7]["key"] != key
    text = look(
        "--run", run.directory.url, "--step", 3, "--sheet", tmp_path / "s.png", "--count", 20, "--position", 47, endpoint=dataset.endpoint
    ).stdout
    marked = [line for line in text.splitlines() if f"replaces {key} of {shard}: the bytes are not those the index names" in line]
    assert marked and "step 3 of 12" in text and f"replaces  {key}" in text
    sheet = np.asarray(Image.open(tmp_path / "s.png"))
    assert (sheet == ImageColor.getrgb(_MARK)).all(axis=2).sum() > 1500  # a frame and a tag


def test_steps_that_no_checkpoint_has_seen(url: str, tmp_path: Path) -> None:
    run = make_run(Storage(str(tmp_path)), [{"url": url}])
    keys = [key for batch in islice(iter(stream_of(run)), 2 * BATCH // MICRO) for key in batch.keys]
    shown = shown_at(run, 2)
    assert [s["key"] for s in shown["samples"]] == keys[BATCH:] and "there is no checkpoint yet" in shown["notes"][0]
    commit(run, 1, {**stream_of(run).state(), "consumed": BATCH})
    (tmp_path / "probe/checkpoints/step-9").mkdir()  # an attempt that never was committed
    assert "after the newest checkpoint, of step 1" in shown_at(run, 2)["notes"][0]
    assert not shown_at(run, 1)["notes"]
    done = look("--run", tmp_path / "probe", "--step", 13)
    assert done.exit_code == 3 and "there is no step 13 in it (its steps: 1 to 12)" in done.stderr


def test_a_run_that_goes_on_from_another(url: str, tmp_path: Path) -> None:
    """Its steps are counted from where that one was."""
    run = make_run(Storage(str(tmp_path)), [{"url": url}], start={"from": "/other", "load": "all"})
    done = look("--run", tmp_path / "probe", "--step", 11)
    assert done.exit_code == 3 and "where its steps begin is not known" in done.stderr
    stream = stream_of(run)
    stream.resume({**stream.state(), "consumed": 5 * BATCH})
    batches = list(islice(iter(stream), BATCH // MICRO))
    commit(run, 11, stream.state())
    shown = shown_at(run, 11)
    assert [s["key"] for s in shown["samples"]] == [k for b in batches for k in b.keys] and "goes on from /other" in shown["notes"][0]


def test_other_data_than_the_run_had(make_dataset: Maker, tmp_path: Path) -> None:
    data = Storage(str(tmp_path / "data"))
    make_dataset(data, {"train": 50}, width=12, height=10)
    run = make_run(Storage(str(tmp_path)), [{"url": data.url}])
    commit(run, 1, {**stream_of(run).state(), "consumed": BATCH})
    assert len(found(data.url, "--run", run.directory.url, "--step", 1)["step"]["samples"]) == BATCH
    done = look("/elsewhere", "--run", run.directory.url, "--step", 1)
    assert done.exit_code == 3 and f"it was trained on {data.url}, not on /elsewhere" in done.stderr
    make_dataset(data, {"train": 51}, width=12, height=10)
    done = look("--run", run.directory.url, "--step", 1)
    assert done.exit_code == 3 and "its data are no longer what it was trained on" in done.stderr


# The sheet


def test_a_sheet_shows_its_samples(url: str, tmp_path: Path) -> None:
    done = look(url, "--sheet", tmp_path / "s.png", "--count", 9)
    assert done.exit_code == 0 and "9 samples drawn" in done.stdout
    sheet = np.asarray(Image.open(tmp_path / "s.png"))
    samples = [open_dataset(url)[n] for n in np.linspace(0, 49, 9).round().astype(int).tolist()]
    for sample in samples:
        tiny = Image.open(io.BytesIO(sample.image))
        large = np.asarray(tiny.resize((tiny.width * 12, tiny.height * 12), Image.Resampling.NEAREST))
        hits = (sheet[: -large.shape[0], : -large.shape[1]] == large[0, 0]).all(axis=2).nonzero()
        assert any((sheet[y : y + large.shape[0], x : x + large.shape[1]] == large).all() for y, x in zip(*hits, strict=True))
    look(url, "--sheet", tmp_path / "t.png", "--count", 9, "--seed", 1)
    look(url, "--sheet", tmp_path / "u.png", "--count", 9, "--seed", 1)
    assert (tmp_path / "t.png").read_bytes() == (tmp_path / "u.png").read_bytes() != (tmp_path / "s.png").read_bytes()


def test_an_image_that_cannot_be_read_has_a_card_too(make_dataset: Maker, tmp_path: Path) -> None:
    dataset = Storage(str(tmp_path / "data"))
    make_dataset(dataset, {"train": 20}, width=12, height=10)
    whole = found(dataset.url, "--sheet", tmp_path / "s.png", "--count", 5)
    flip(dataset, "train-00000.tar", 700)
    assert found(dataset.url, "--sheet", tmp_path / "t.png", "--count", 5)["sheet"]["samples"] == 5
    assert whole["sheet"] == {"path": str(tmp_path / "s.png"), "samples": 5}
    one, two = (np.asarray(Image.open(tmp_path / name)).astype(int) for name in ("s.png", "t.png"))
    different = np.abs(one - two).sum(axis=2).nonzero()
    assert one.shape == two.shape and different[1].max() < one.shape[1] // 4  # the first card alone


@pytest.mark.parametrize(
    "text", ["short", "a caption of several words that takes up more than one line", "w" * 100, "two words", "湖" * 90, ""]
)
def test_captions_fit_their_card(text: str) -> None:
    lines = _wrapped(text)
    assert len(lines) <= 2 and all(_font(*_TEXT).getlength(line) <= _SIDE - 24 for line in lines)
    told = "".join(lines).replace("…", "").replace(" ", "")
    assert text.replace(" ", "").startswith(told) and (told == text.replace(" ", "")) == (not text or "…" not in lines[-1])
    assert _cut(text, _TEXT, 10_000) == text


@pytest.mark.parametrize("count", [1, 3, 64, 1000])
def test_sheets_of_any_size(count: int) -> None:
    assert draw([Card(None, "x", "")] * count, "a very long title " * 100, "subtitle").size[0] < 4000


# The rest


def test_verify(dataset: Storage) -> None:
    read = found(dataset.url, "--verify", endpoint=dataset.endpoint)["verify"]
    assert read == {"problems": [], "samples": 200, "shards": 2, "bytes": read["bytes"]} and read["bytes"] > 200 * 512
    key = open_dataset(dataset.url, endpoint=dataset.endpoint)[0].key
    flip(dataset, "train-00000.tar", 700)
    done = look(dataset.url, "--verify", "--json", endpoint=dataset.endpoint)
    assert done.exit_code == 3 and key in {p["key"] for p in json.loads(done.stdout)["verify"]["problems"]}
    done = look(dataset.url, "--verify", endpoint=dataset.endpoint)
    assert done.exit_code == 3 and f"sample {key}" in done.stdout and "problems" in done.stderr and "Traceback" not in done.stderr


def test_speed(dataset: Storage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipeline.stream.speed._BARE_S", 0.1)
    words = [dataset.url, "--speed", "--size", 16, "--batch", 8, "--batches", 3, "--workers", 2]
    speed = found(*words, endpoint=dataset.endpoint)["speed"]
    assert (speed["workers"], speed["images"], speed["pixels"], speed["samples"]) == (2, 24, 16, 200)
    assert 0 < speed["first_batch_s"] < 20 and speed["bare_images_per_s"] > 100 and speed["images_per_s"] > 10
    mean = sum(len(dataset.read(f"train-0000{n}.tar")) for n in range(2)) / 200
    assert speed["mb_per_s"] == pytest.approx(speed["images_per_s"] * mean / 1e6)
    flip(dataset, "train-00000.tar", 700)  # a damaged sample stops no measurement
    assert "images/s" in look(*words, "--batches", 30, endpoint=dataset.endpoint).stdout
    assert not list(tmp_path.glob("tessera-speed-*"))


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        ([], 2, "Missing argument 'DATASET' (or --run)"),
        (["DATA", "--nonsense"], 2, "No such option"),
        (["DATA", "--step", 3], 2, "--step is of a run"),
        (["DATA", "--out", "x"], 2, "--out writes the samples of --key or --position"),
        (["--run", "DATA"], 2, "--run needs --step or --position or --skipped"),
        (["DATA", "--skipped"], 2, "--skipped is of a run"),
        (["--run", "DATA", "--step", 1, "--verify"], 2, "are of a dataset: leave out --run"),
        (["--run", "DATA", "--step", 1], 102, "there is no run here (no run.yaml)"),
        (["DATA/none"], 3, "there is no dataset here (no manifest.json)"),
        (["DATA@2"], 3, "there is no version 2 (allowed: 1)"),
        (["DATA", "--split", "val"], 3, "there is no split 'val' (allowed: test, train)"),
        (["DATA", "--sheet", "/proc/none/s.png"], 3, "--sheet /proc/none/s.png: cannot be written"),
        (["DATA", "--position", 1, "--out", "/proc/none"], 3, "--out /proc/none: cannot be written"),
    ],
)
def test_mistakes_end_in_one_sentence(url: str, words: list[object], code: int, message: str) -> None:
    done = look(*(str(w).replace("DATA", url) for w in words))
    assert done.exit_code == code and message in done.stderr and "Traceback" not in done.stderr


def test_a_run_without_pre_training(tmp_path: Path) -> None:
    claim_run(parse_config({"name": "probe", "storage": str(tmp_path), "shard": {"source": {"url": str(tmp_path)}}}))
    done = look("--run", tmp_path / "probe", "--step", 1)
    assert done.exit_code == 3 and "has no pretrain section" in done.stderr


def test_the_command(url: str) -> None:
    done = subprocess.run([sys.executable, "-m", "pipeline.stream", url, "--json"], capture_output=True, text=True, timeout=120, check=True)
    assert json.loads(done.stdout)["dataset"]["splits"]["train"]["samples"] == 50


def test_the_manifest_is_read_as_it_is(url: str) -> None:
    assert found(f"{url}@1")["dataset"]["hash"] == read_manifest(Storage(url)).hash
