"""The model of a checkpoint that several ranks wrote, as others load it: the same bytes as an export of the whole model, in little memory."""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors import safe_open
from safetensors.torch import load, save

from pipeline.checkpoint import Checkpoints, Commit, ModelCard
from pipeline.checkpoint.commit import STATE
from pipeline.checkpoint.export import export
from pipeline.checkpoint.fragments import BLOCK, BUFFER, WEIGHT, Fragment, Index, own_share
from pipeline.checkpoint.memory import HostMemory
from pipeline.checkpoint.model import CARD
from pipeline.checkpoint.save import new_attempt
from pipeline.core.errors import CheckpointError, ConfigError, NoSuchRun, StorageError
from pipeline.core.storage import Storage
from pipeline.core.upload import Receipt
from pipeline.models import Model, create, formats
from pipeline.models.formats.weights import split
from tests.checkpoints import commit_model
from tests.faults import faulty_store
from tests.unit.models.formats.formats_models import (
    CLIP_RESNET,
    CLIP_VIT,
    IGPT,
    MAE,
    VIT,
    assert_close,
    assert_same,
    captions,
    images,
    large,
    make,
)

CASES: dict[str, tuple[str, dict[str, Any], str]] = {
    "vit": ("vit", VIT, "hf"),
    "vit, fixed positions": ("vit", {**VIT, "positions": "sincos-2d"}, "hf"),
    "deit": ("vit", {**VIT, "distilled": True}, "hf"),
    "mae": ("mae", MAE, "hf"),
    "clip": ("clip", CLIP_VIT, "hf"),
    "igpt": ("igpt", IGPT, "hf"),
    "igpt with biases": ("igpt", {**IGPT, "bias": True}, "hf"),
    "vit, timm": ("vit", {**VIT, "pool": "map"}, "timm"),
    "mae, timm": ("mae", MAE, "timm"),
    "clip, open_clip": ("clip", {**CLIP_VIT, "logit_bias": -10.0}, "open_clip"),
    "clip of a resnet, open_clip": ("clip", CLIP_RESNET, "open_clip"),
}


def card_of(model: Model, family: str, step: int = 7) -> ModelCard:
    options = model.options.model_dump(mode="json")
    names = [f"class {n}" for n in range(options.get("classes", 0))]
    return ModelCard(family, options, "some", names, (0.1, 0.2, 0.3), (0.4, 0.5, 0.6), "hash", "run-id", step)


# How state lies on ranks: at stage 0 and 3 a part of each tensor, at stages 1 and 2 a part of all tensors end to end.


def shares(tensors: dict[str, torch.Tensor], rank: int, ranks: int) -> list[Fragment]:
    found = (own_share(WEIGHT, name, tensor, rank, ranks) for name, tensor in tensors.items())
    return [f for f in found if f is not None]


def end_to_end(tensors: dict[str, torch.Tensor], rank: int, ranks: int) -> list[Fragment]:
    total = sum(t.numel() for t in tensors.values())
    low, high = rank * -(-total // ranks), min((rank + 1) * -(-total // ranks), total)
    found, at = [], 0
    for name, tensor in tensors.items():
        start, stop = max(low - at, 0), min(high - at, tensor.numel())
        if start < stop:
            found.append(Fragment(WEIGHT, name, start, tensor.reshape(-1)[start:stop]))
        at += tensor.numel()
    return found


LAYOUTS = {"shares": shares, "end to end": end_to_end}


def with_moments(fragments: Sequence[Fragment]) -> list[Fragment]:
    return [
        *fragments,
        *(Fragment(key, f.name, f.start, torch.full_like(f.tensor, 9)) for f in fragments for key in ("exp_avg", "exp_avg_sq")),
    ]


def commit_ranks(run: Storage, ranks: Sequence[Callable[[], list[Fragment]]], card: ModelCard, shapes: dict[str, list[int]]) -> Commit:
    """A checkpoint whose ranks hold what each of `ranks` gives."""
    checkpoints = Checkpoints(run)
    lease = checkpoints.newest_lease() or checkpoints.acquire()
    commit = Commit(card.step, 70, lease.generation, new_attempt(lease), len(ranks), 3, "view", "config", [])
    files = {STATE: json.dumps({"engine": {"shapes": shapes}}).encode(), CARD: card.to_json()}
    receipts = []
    for rank, make_fragments in enumerate(ranks):
        fragments, name = make_fragments(), f"rank-{rank:05d}-of-{len(ranks):05d}"
        memory = HostMemory(fragments)
        memory.fill(fragments)
        data = os.pread(memory.fd, memory.bytes, 0)
        blocks = [hashlib.sha256(data[at : at + BLOCK]).hexdigest() for at in range(0, len(data), BLOCK)]
        files |= {f"{name}.json": Index(f"{name}.safetensors", len(data), BLOCK, blocks, memory.pieces).to_json()}
        for key, part in {f"{name}.safetensors": data, **files}.items():
            checkpoints.directory.write(f"{commit.prefix}/{key}", part)
            receipts.append(Receipt(key, len(part), hashlib.sha256(part).hexdigest()))
        files = {}
        memory.close()
    checkpoints.commit(Commit(**{**vars(commit), "files": receipts}), lease)
    return checkpoints.read(card.step)


def commit_of(run: Storage, model: Model, family: str, layout: str = "shares", ranks: int = 3) -> Commit:
    state, names = dict(model.state_dict()), {name for name, _ in model.named_parameters()}
    weights = {name: t for name, t in state.items() if name in names}
    buffers = [Fragment(BUFFER, name, 0, t.reshape(-1)) for name, t in state.items() if name not in names]

    def part(rank: int) -> list[Fragment]:
        return with_moments(LAYOUTS[layout](weights, rank, ranks)) + (buffers if rank == 0 else [])

    shapes = {name: list(t.shape) for name, t in state.items()}
    return commit_ranks(run, [partial(part, rank) for rank in range(ranks)], card_of(model, family), shapes)


def contents(path: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in path.iterdir()}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("case", CASES)
def test_the_same_bytes_as_of_the_whole_model(tmp_path: Path, case: str, layout: str) -> None:
    family, options, to = CASES[case]
    model = make(family, options)
    commit = commit_of(Storage(str(tmp_path / "run")), model, family, layout)
    assert export(str(tmp_path / "run"), str(tmp_path / "out"), to) == commit
    card = card_of(model, family)
    formats.export(model, str(tmp_path / "whole"), to, mean=card.mean, std=card.std, classes=card.classes or None)
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")

    (weights,) = (tmp_path / "out").glob("*.safetensors")
    data = weights.read_bytes()
    assert data == save(load(data), {"format": "pt"}), "as safetensors itself writes it"
    found = formats.read(str(tmp_path / "out"))
    if not (family == "mae" and to == "timm"):  # that is the encoder alone
        assert_same(found, model)
    if family != "igpt" and to == "hf":
        assert (found.mean, found.std) == (card.mean, card.std)


@pytest.mark.parametrize("most", [None, 20_000])
@pytest.mark.parametrize("family", ["vit", "clip", "igpt"])
def test_transformers_computes_the_same(tmp_path: Path, family: str, most: int | None) -> None:
    model = make(family, {"vit": VIT, "clip": CLIP_VIT, "igpt": IGPT}[family])
    commit_of(Storage(str(tmp_path / "run")), model, family)
    export(f"{tmp_path}/run@7", str(tmp_path / "out"), "hf", most=most)
    kind = {"vit": "ViTForImageClassification", "clip": "CLIPModel", "igpt": "ImageGPTForCausalImageModeling"}[family]
    theirs, problems = getattr(transformers, kind).from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(problems.values()), problems
    ours, theirs = model.double(), theirs.double().eval()
    with torch.no_grad():
        if family == "vit":
            assert_close(ours(images(16)), theirs(images(16)).logits)
            assert theirs.config.id2label == {n: f"class {n}" for n in range(5)}
        elif family == "clip":
            seen, read, _ = ours(images(16), captions())
            both = theirs(input_ids=captions(), pixel_values=images(16))
            assert_close(seen, both.image_embeds)
            assert_close(read, both.text_embeds)
        else:
            tokens = torch.randint(0, 8, (2, 16), generator=torch.Generator().manual_seed(3))
            shifted = torch.cat([torch.full((2, 1), 8), tokens[:, :-1]], dim=1)
            assert_close(ours(tokens), theirs(input_ids=shifted).logits)


# In several files


def test_large_models_have_several_files(store: Storage) -> None:
    model = make("vit", VIT)
    commit_of(store, model, "vit")
    out = store / "out"
    export(store.url, out.url, "hf", endpoint=store.endpoint, most=30_000)
    names = [name for name in out.names() if name.endswith(".safetensors")]
    assert names == [f"model-{n:05d}-of-{len(names):05d}.safetensors" for n in range(1, len(names) + 1)] and len(names) > 3
    index, parts = json.loads(out.read("model.safetensors.index.json")), {name: load(out.read(name)) for name in names}
    assert index["weight_map"] == {name: file for file, tensors in parts.items() for name in tensors}
    sizes = {file: sum(t.numel() * 4 for t in tensors.values()) for file, tensors in parts.items()}
    assert index["metadata"]["total_size"] == sum(sizes.values()) and all(size <= 30_000 for size in sizes.values())
    assert_same(formats.read(out.url, endpoint=store.endpoint), model)
    assert_same(formats.read(f"{out.url}/model.safetensors.index.json", endpoint=store.endpoint), model)

    with pytest.raises(StorageError, match=r"is not empty, it holds config.json, model-00001-of-\d+.safetensors"):
        export(store.url, out.url, "hf", endpoint=store.endpoint)
    out.write("notes.txt", b"mine")
    export(store.url, out.url, "hf", endpoint=store.endpoint, force=True)
    left = {"config.json", "model.safetensors", "notes.txt", "preprocessor_config.json"}
    assert set(out.names()) == left, "nothing is left of the older export that readers could prefer"
    assert_same(formats.read(out.url, endpoint=store.endpoint), model)
    export(store.url, out.url, "hf", endpoint=store.endpoint, force=True, most=30_000)
    assert set(out.names()) == left - {"model.safetensors"} | {*names, "model.safetensors.index.json"}


def test_tensors_are_dealt_to_files_in_order() -> None:
    from pipeline.models.formats.lazy import Lazy

    tensors = {name: Lazy.of(torch.zeros(size // 4)) for name, size in (("a", 40), ("b", 60), ("c", 4), ("d", 400), ("e", 8), ("f", 92))}
    assert list(split("m.safetensors", tensors, 100).values()) == [["a", "b"], ["c"], ["d"], ["e", "f"]]
    assert list(split("m.safetensors", tensors, 100)) == [f"m-0000{n}-of-00004.safetensors" for n in (1, 2, 3, 4)]
    for most in (None, 604):
        assert split("m.safetensors", tensors, most) == {"m.safetensors": list("abcdef")}


def test_formats_of_one_file_have_one(tmp_path: Path) -> None:
    commit_of(Storage(str(tmp_path / "run")), make("vit", VIT), "vit")
    with pytest.raises(ConfigError, match=r"--max-file: timm reads its weights from one file \(allowed for: hf\)"):
        export(str(tmp_path / "run"), str(tmp_path / "out"), "timm", most=1000)
    assert not (tmp_path / "out").exists()


# What goes wrong


@pytest.mark.parametrize("most", [None, 1_000_000])
@pytest.mark.parametrize("what", ["weights", "missing", "index", "card"])
def test_damage_is_refused_and_nothing_is_published(store: Storage, what: str, most: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    model = large("vit", {**VIT, "width": 160, "depth": 4})  # several blocks of weights on each rank
    commit = commit_of(store, model, "vit", layout="end to end", ranks=2)
    key = {"weights": "rank-00001-of-00002.safetensors", "missing": "rank-00001-of-00002.safetensors", "index": "rank-00000-of-00002.json"}
    place = f"checkpoints/{commit.prefix}/{key.get(what, CARD)}"
    if what == "missing":
        store.remove(place)
    else:
        data = bytearray(store.read(place))
        data[len(data) - 9] ^= 1  # of the weights: those of the last layer
        store.write(place, bytes(data))
    put, uploads = Storage.put, []

    def noted(self: Storage, local: Path, key: str) -> None:
        uploads.append(key)
        put(self, local, key)

    monkeypatch.setattr(Storage, "put", noted)
    out = store / "out"
    for source in (store.url, f"{store.url}@7"):
        with pytest.raises(CheckpointError, match=r"step-7/.*(is damaged|is missing)"):
            export(source, out.url, "hf", endpoint=store.endpoint, most=most)
        assert out.names() == []
    assert len(uploads) > 2 or not (most and what in ("weights", "missing")), "files before the damage were there for a while"
    assert Checkpoints(store).steps() == [7], "it is looked at, not changed"
    formats.export(make("vit", VIT), out.url, "hf", endpoint=store.endpoint)
    before = {name: out.read(name) for name in out.names()}
    with pytest.raises(CheckpointError):
        export(store.url, out.url, "hf", endpoint=store.endpoint, force=True)
    assert {name: out.read(name) for name in out.names()} == before, "an older export stays until a file of the new one is whole"


def test_what_was_interrupted_leaves_nothing(store: Storage) -> None:
    model, out = make("vit", VIT), store / "out"
    seen: list[list[str]] = []

    def told(count: int) -> None:
        seen.append(out.names())
        if "model-00003-of" in "".join(seen[-1]):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        formats.export(model, out.url, "hf", endpoint=store.endpoint, most=30_000, told=told)
    assert len(seen[-1]) == 3 and not any(name.endswith(".json") for names in seen for name in names), "configs are the last"
    assert out.names() == []
    formats.export(model, out.url, "hf", endpoint=store.endpoint)
    assert_same(formats.read(out.url, endpoint=store.endpoint), model)


def test_a_store_that_stutters_is_asked_again(tmp_path: Path, s3: tuple[str, Callable[[], str]]) -> None:
    model = make("vit", VIT)
    commit_of(Storage(str(tmp_path / "run")), model, "vit")
    with faulty_store(s3[0]) as (endpoint, store):
        out = Storage(f"{s3[1]()}/out", endpoint)
        faults = iter(["error", "error", "half", "error", "reset"])
        store.plan = lambda method, path: next(faults, None) if method == "PUT" and "model-00002" in path else None
        export(str(tmp_path / "run"), out.url, "hf", endpoint=endpoint, most=30_000)
        assert (store.seen["error"], store.seen["half"], store.seen["reset"]) == (3, 1, 1)
        assert_same(formats.read(out.url, endpoint=endpoint), model)


def test_a_store_that_takes_nothing_is_found_out_first(tmp_path: Path, s3: tuple[str, Callable[[], str]]) -> None:
    commit_of(Storage(str(tmp_path / "run")), make("vit", VIT), "vit")
    with pytest.raises(StorageError, match=r"s3://no-such-bucket-of-ours/out"):
        export(str(tmp_path / "run"), "s3://no-such-bucket-of-ours/out", "hf", endpoint=s3[0])


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    path = tmp_path / "disk"
    path.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False) if os.getuid() == 0 else None
    if done is None or done.returncode:
        pytest.skip(f"mounting is not permitted here ({done.stderr.strip() if done else 'not root'})")
    yield path
    subprocess.run(["umount", str(path)], check=True)


def test_a_full_tmpdir(tmp_path: Path, small_disk: Path) -> None:
    """The command, as people see it."""
    commit_of(Storage(str(tmp_path / "run")), large("vit", {**VIT, "width": 64}), "vit")
    command = [sys.executable, "-m", "pipeline.checkpoint", "export", str(tmp_path / "run"), str(tmp_path / "out"), "--to", "hf"]
    done = subprocess.run(command, env={**os.environ, "TMPDIR": str(small_disk)}, capture_output=True, text=True, check=False)
    assert done.returncode == StorageError.exit_code, done.stderr
    sentence = rf"{small_disk}/tessera-\w+/model.safetensors: cannot write here .*, the disk is full \(TMPDIR names another place\)"
    assert re.search(sentence, done.stderr) and "Traceback" not in done.stderr
    assert not any(small_disk.iterdir()) and not any((tmp_path / "out").glob("*")), "nothing is left"


def test_no_tmpdir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "nowhere"))
    with pytest.raises(StorageError, match=r"^temporary directory: cannot write here .*, No such file or directory \(TMPDIR"):
        formats.export(make("vit", VIT), str(tmp_path / "out"), "hf")
    assert not any((tmp_path / "out").glob("*"))


def test_what_is_not_there(tmp_path: Path) -> None:
    run, out = Storage(str(tmp_path / "run")), str(tmp_path / "out")
    for url in (f"{tmp_path}/nowhere", f"{tmp_path}/nowhere@7"):
        with pytest.raises(NoSuchRun, match=f"run {tmp_path}/nowhere: there is no run here"):
            export(url, out, "hf")
    run.write("run.yaml", b"")
    with pytest.raises(NoSuchRun, match="there is no committed checkpoint here"):
        export(run.url, out, "hf")
    commit_of(run, make("vit", VIT), "vit")
    with pytest.raises(CheckpointError, match=r"step-8: there is no such committed checkpoint \(committed steps: 7\)"):
        export(f"{run.url}@8", out, "hf")
    with pytest.raises(ConfigError, match=r"--to: 'onxn' is not known .*\(allowed: hf, open_clip, timm\)"):
        export(run.url, out, "onxn")
    with pytest.raises(ConfigError, match="open_clip: has no vit"):
        export(run.url, out, "open_clip")
    assert not Path(out).exists()


def test_a_checkpoint_that_is_not_its_cards_model_is_refused(tmp_path: Path) -> None:
    run = Storage(str(tmp_path / "run"))
    model = make("vit", VIT)
    state = dict(model.state_dict())
    for step, (change, sentence) in enumerate([
        ({"norm.weight": torch.zeros(31)}, "its norm.weight is not as its card says"),
        ({"norm.other": torch.zeros(3)}, "its norm.other is not as its card says"),
    ]):  # fmt: skip
        commit_model(run, card_of(model, "vit", step), {**state, **change})
        with pytest.raises(CheckpointError, match=rf"checkpoint .*/step-{step}/.*: {sentence}"):
            export(run.url, str(tmp_path / "out"), "hf")
    card = card_of(model, "vit", 9)
    half = [lambda: [Fragment(WEIGHT, n, 0, t.reshape(-1)[: -(-t.numel() // 2)]) for n, t in state.items()]]
    commit_ranks(run, half, card, {name: list(t.shape) for name, t in state.items()})
    with pytest.raises(CheckpointError, match=r"holds no weight of .* from number"):
        export(run.url, str(tmp_path / "out"), "hf")
    none = [lambda: [Fragment(WEIGHT, n, 0, t.reshape(-1)) for n, t in state.items() if n != "norm.bias"]]
    commit_ranks(run, none, card_of(model, "vit", 10), {name: list(t.shape) for name, t in state.items()})
    with pytest.raises(CheckpointError, match=r"holds no norm.bias"):
        export(run.url, str(tmp_path / "out"), "hf")
    assert not any((tmp_path / "out").glob("*"))


# What it costs


def test_each_block_is_fetched_about_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Though there are moments beside the weights, and many tensors in a block."""
    model = large("vit", {**VIT, "width": 256, "depth": 12, "heads": 4})
    commit_of(Storage(str(tmp_path / "run")), model, "vit", "end to end", ranks=2)
    fetched = []
    read_into = Storage.read_into

    def counted(self: Storage, key: str, start: int, room: memoryview) -> int:
        fetched.append(count := read_into(self, key, start, room))
        return count

    monkeypatch.setattr(Storage, "read_into", counted)
    export(str(tmp_path / "run"), str(tmp_path / "out"), "hf")
    size = sum(t.numel() * 4 for t in model.state_dict().values())
    assert size <= sum(fetched) <= size + 2 * 2 * BLOCK and len(fetched) <= 6


_MEASURED = """
import sys
from pipeline.checkpoint.__main__ import main

def status(key):
    line = next(line for line in open("/proc/self/status") if line.startswith(key))
    return int(line.split()[1]) * 1024

before = status("VmRSS")
main(["export", *sys.argv[1:], "--to", "hf", "--max-file", "150 MB"], standalone_mode=False)
print(status("VmHWM") - before)
"""


def test_memory_holds_a_few_tensors(tmp_path: Path) -> None:
    """An iGPT of 0.8 GB, in tensors of at most 17 MB, all of whose large ones are transposed on the way."""
    with torch.device("meta"):
        shapes = {n: list(t.shape) for n, t in create("igpt", width=1024, depth=15, heads=8, pixels=32, colors=512).state_dict().items()}
    options = create("igpt", device="meta", width=1024, depth=15, heads=8, pixels=32, colors=512).options.model_dump(mode="json")
    card = ModelCard("igpt", options, "pixels", [], (0.5,) * 3, (0.5,) * 3, "hash", "run-id", 7)
    size, ranks, names = sum(4 * math.prod(s) for s in shapes.values()), 4, list(shapes)

    def numbers(name: str) -> torch.Tensor:
        return torch.arange(math.prod(shapes[name]), dtype=torch.float32) + names.index(name)

    def part(rank: int) -> list[Fragment]:
        found = (own_share(WEIGHT, name, numbers(name), rank, ranks) for name in names)
        return [Fragment(f.key, f.name, f.start, f.tensor.clone()) for f in found if f is not None]

    try:
        commit_ranks(Storage(str(tmp_path / "run")), [partial(part, rank) for rank in range(ranks)], card, shapes)
        command = [sys.executable, "-c", _MEASURED, str(tmp_path / "run"), str(tmp_path / "out")]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        peak = int(done.stdout.splitlines()[-1])
        assert size > 750_000_000 and len(list((tmp_path / "out").glob("model-*.safetensors"))) == 6
        assert peak < size / 2, f"{peak / 2**20:.0f} MiB of {size / 2**20:.0f} MiB"
        places = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())["weight_map"]
        ours = {f"transformer.h.{i}.mlp.c_fc.weight": f"blocks.{i}.mlp.fc1.weight" for i in (0, 14)}
        for theirs, name in ours.items():
            with safe_open(tmp_path / "out" / places[theirs], "pt") as file:
                assert torch.equal(file.get_tensor(theirs), numbers(name).view(shapes[name]).T)
    finally:
        shutil.rmtree(tmp_path / "run", ignore_errors=True)  # pytest keeps its directories
        shutil.rmtree(tmp_path / "out", ignore_errors=True)
