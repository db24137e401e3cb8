"""`shard.scores` and `shard.takedown`: columns by a CLIP model or a function, and the deny-lists made of them."""

from __future__ import annotations

import io
import shutil
import sqlite3
from collections.abc import Callable
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
import torch.nn.functional as F
from click.testing import CliRunner
from PIL import Image

from pipeline.checkpoint import ModelCard, claim_run
from pipeline.config import Config, parse_config
from pipeline.config.data import Bound
from pipeline.config.shard import Score
from pipeline.core.errors import CheckpointError, ConfigError, DataError
from pipeline.core.storage import Storage
from pipeline.evaluate import scoring
from pipeline.evaluate.__main__ import main
from pipeline.evaluate.scoring import Similarity, check_scores, score_columns, score_dataset
from pipeline.models import create, formats
from pipeline.models.clip import CLIP
from pipeline.preflight import check_config, check_resources
from pipeline.shards.columns import find_columns
from pipeline.shards.manifest import Manifest, ShardTable
from pipeline.shards.rows import Row, read_index, read_rows
from pipeline.stages import _Stages
from pipeline.stream import open_dataset
from pipeline.stream.text import Tokenizer
from tests.checkpoints import commit_model

MEAN, STD = (0.48, 0.45, 0.4), (0.26, 0.25, 0.27)
State = dict[str, torch.Tensor]
OPTIONS: dict[str, Any] = {
    "pixels": 8, "embed": 8, "context": 12,
    "vision": {"kind": "vit", "patch": 4, "width": 16, "depth": 1, "heads": 2},
    "text": {"kind": "transformer", "width": 16, "depth": 1, "heads": 2},
}  # fmt: skip


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.train([f"train {n} test {n}" for n in range(40)] * 2, 530)


@pytest.fixture(scope="module")
def card(tokenizer: Tokenizer) -> ModelCard:
    options = {**OPTIONS, "vocabulary": tokenizer.size}
    card = ModelCard("clip", options, "contrastive", [], MEAN, STD, "hash", "tiny", 4, tokenizer=tokenizer.to_json())
    return replace(card, options=card.make(device="meta").options.model_dump(mode="json"))


@pytest.fixture(scope="module")
def run(card: ModelCard, tmp_path_factory: pytest.TempPathFactory) -> str:
    """Two checkpoints of fresh weights, at steps 4 and 9."""
    url = str(tmp_path_factory.mktemp("clip") / "run")
    for seed, step in enumerate((4, 9)):
        commit_model(url, card, card.make(seed=seed).state_dict(), step=step)
    return url


@pytest.fixture
def data(make_dataset: Callable[..., Manifest], tmp_path: Path) -> Storage:
    directory = Storage(str(tmp_path / "data"))
    make_dataset(directory, {"train": 45, "test": 7}, width=21, height=14)
    return directory


def cosines(directory: Storage, split: str, model: torch.nn.Module, tokenizer: Tokenizer) -> list[float]:
    """Worked out sample by sample, by the model's own towers, with Pillow's resize for the view."""
    dataset, found = open_dataset(directory.url, split), []
    for n in range(len(dataset)):
        image = Image.open(io.BytesIO(dataset[n].image)).convert("RGB").resize((12, 8), Image.Resampling.BICUBIC).crop((2, 0, 10, 8))
        pixels = (torch.from_numpy(np.array(image)).float() / 255 - torch.tensor(MEAN)) / torch.tensor(STD)
        with torch.inference_mode():
            seen, read = model.visual(pixels.permute(2, 0, 1)[None]), model.text(tokenizer([dataset[n].text], 12))  # type: ignore[operator]
            found.append(float(F.cosine_similarity(seen, read)))
    return found


def column(directory: Storage, name: str, split: str) -> list[float | None]:
    return [v for record in ShardTable(directory, split) for v in read_index(directory, record.index_name)[name].to_pylist()]


@pytest.mark.usefixtures("cluster")
def test_a_score_is_the_cosine_that_the_model_gives(data: Storage, run: str, card: ModelCard, tokenizer: Tokenizer) -> None:
    metrics = score_dataset(data, [Score(column="clip", model=f"{run}@4", batch=16)])
    found = {split: column(data, "clip", split) for split in ("train", "test")}
    for split, values in found.items():
        expected = cosines(data, split, card.make(seed=0).eval(), tokenizer)
        assert values == pytest.approx(expected, abs=2e-3)  # Pillow rounds pixels of its two passes to whole numbers
    everything = [v for values in found.values() for v in values if v is not None]
    assert metrics == {
        "shard/score/clip/mean": pytest.approx(np.mean(everything)),
        "shard/score/clip/min": min(everything),
        "shard/score/clip/max": max(everything),
        "shard/score/clip/missing": 0,
        "shard/score/clip/denied": 0,
    }
    # The newest checkpoint is another model, and so another maker; the one before gives the same numbers again.
    score_dataset(data, [Score(column="clip", model=run)])
    assert column(data, "clip", "train") != found["train"]
    score_dataset(data, [Score(column="clip", model=f"{run}@4", batch=5)])
    assert column(data, "clip", "train") == pytest.approx(found["train"], abs=1.5e-6)


def similarity(run: str) -> Similarity:
    made = score_columns(Score(column="c", model=f"{run}@4"), None, "score.0").make
    assert isinstance(made, Similarity)
    return made


def test_a_gpu_is_not_allowed_to_round(data: Storage, run: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """By default cuDNN's convolutions would be in TF32; and somebody may have allowed it for products."""
    products, convolutions, seen = torch.backends.cuda.matmul, torch.backends.cudnn, list[tuple[bool, bool]]()
    real, score = CLIP.encode_image, similarity(run)

    def noted(self: CLIP, images: torch.Tensor) -> torch.Tensor:
        seen.append((products.allow_tf32, convolutions.allow_tf32))
        return real(self, images)

    monkeypatch.setattr(CLIP, "encode_image", noted)
    products.allow_tf32 = True
    try:
        score(all_rows(data)[:3])
        assert seen == [(False, False)] and (products.allow_tf32, convolutions.allow_tf32) == (True, True)
    finally:
        products.allow_tf32 = False


def all_rows(data: Storage) -> list[Row]:
    return [
        row
        for record in ShardTable(data)
        for rows in read_rows(data, record.name, read_index(data, record.index_name), frozenset({"image", "txt"}), 64)
        for row in rows
    ]


def test_the_same_pixels_give_the_same_cosine(data: Storage, run: str, card: ModelCard, tokenizer: Tokenizer) -> None:
    from pipeline.stream.batches import evaluation_batches

    model, found, expected = card.make(seed=0).eval(), dict[str, float | None](), dict[str, float]()
    for split in ("train", "test"):
        for batch in evaluation_batches(open_dataset(data.url, split), 8, 45):
            pixels = (batch.images.double() / 255 - torch.tensor(MEAN)) / torch.tensor(STD)
            with torch.inference_mode():
                seen, read = model.visual(pixels.permute(0, 3, 1, 2).float()), model.text(tokenizer(batch.texts, 12))  # type: ignore[operator]
            expected |= dict(zip(batch.keys, F.cosine_similarity(seen, read).tolist(), strict=True))
    rows = all_rows(data)
    for size in (1, 7, 52):
        for at in range(0, 52, size):
            [scores] = similarity(run)(rows[at : at + size])
            found |= dict(zip((row.key for row in rows[at : at + size]), scores, strict=True))
        assert found == pytest.approx(expected, abs=1e-5)
        assert len(found) == 52 and len({round(v or 0, 3) for v in found.values()}) > 10


def test_what_has_no_caption_or_image_has_no_score(data: Storage, run: str) -> None:
    rows = all_rows(data)[:6]
    [whole] = similarity(run)(rows)
    holes = [
        rows[0],
        replace(rows[1], text=None),
        replace(rows[2], text=" \n"),
        replace(rows[3], image=b"\xff\xd8 no JPEG"),
        rows[4],
        rows[5],
    ]
    [scores] = similarity(run)(holes)
    assert [s is None for s in scores] == [False, True, True, True, False, False]
    assert [s for s in scores if s is not None] == pytest.approx([whole[0], whole[4], whole[5]], abs=1.5e-6)
    assert similarity(run)([replace(rows[0], text=None)]) == [[None]]


def test_a_model_is_made_once_a_process(data: Storage, run: str, monkeypatch: pytest.MonkeyPatch) -> None:
    made, rows, open_tower = [], all_rows(data), scoring.open_tower
    monkeypatch.setattr(scoring, "_at_hand", {})
    monkeypatch.setattr(scoring, "open_tower", lambda card, state: (made.append(card.step), open_tower(card, state))[1])
    for _ in range(3):
        similarity(run)(rows[:2])
    assert made == [4]


def test_published_models_need_their_tokenizer(tokenizer: Tokenizer, tmp_path: Path, data: Storage) -> None:
    model = create("clip", **OPTIONS, vocabulary=tokenizer.size, seed=3)
    formats.export(model, str(tmp_path / "hf"), "hf", mean=MEAN, std=STD)
    tokenizer.save(str(tmp_path / "tokens.json"))
    Tokenizer.train(["red"] * 2, 516).save(str(tmp_path / "small.json"))
    bare = Score(column="c", model=str(tmp_path / "hf"))
    with pytest.raises(ConfigError, match=r"shard.scores.0.tokenizer: is missing; .*hf comes without its tokens"):
        check_scores([bare], None)
    with pytest.raises(ConfigError, match=r"shard.scores.0.tokenizer: has 51\d tokens, and .*hf is of"):
        check_scores([bare.model_copy(update={"tokenizer": str(tmp_path / "small.json")})], None)
    with pytest.raises(DataError, match=r"none.json: there is no such file"):
        check_scores([bare.model_copy(update={"tokenizer": str(tmp_path / "none.json")})], None)
    whole = bare.model_copy(update={"tokenizer": str(tmp_path / "tokens.json")})
    check_scores([whole], None)
    rows = all_rows(data)[:5]
    [scores] = score_columns(whole, None, "s").make(rows)
    commit_model(
        str(tmp_path / "run"),
        ModelCard("clip", model.options.model_dump(mode="json"), "contrastive", [], MEAN, STD, "h", "r", 1, tokenizer=tokenizer.to_json()),
        model.state_dict(),
    )
    [peer] = score_columns(Score(column="c", model=str(tmp_path / "run")), None, "s").make(rows)
    assert scores == pytest.approx(peer, abs=1e-5)


def test_what_cannot_score_is_refused_before(run: str, tmp_path: Path) -> None:
    vit = {"pixels": 8, "patch": 4, "width": 8, "depth": 1, "heads": 1, "classes": 2}
    other = ModelCard("vit", vit, "classify", ["0", "1"], MEAN, STD, "hash", "vit", 1)
    commit_model(str(tmp_path / "vit"), other, other.make().state_dict())
    fine = Score(column="a", model=run)
    for score, kind, told in [
        (
            Score(column="b", model=str(tmp_path / "vit")),
            ConfigError,
            r"shard.scores.1.model: .*vit is a model 'vit', and only those of clip",
        ),
        (Score(column="b", model=str(tmp_path / "none")), CheckpointError, r"shard.scores.1.model: "),
        (Score(column="b", model=f"{run}@5"), CheckpointError, r"shard.scores.1.model: "),
        (Score(column="b", function="nowhere.at_all"), ConfigError, r"shard.scores.1.function: the module nowhere"),
        (Score(column="a", model=run), ConfigError, r"shard.scores.1.column: 'a' cannot be added, shard.scores.0 has it"),
        (Score(column="sha256", model=run), ConfigError, r"shard.scores.1.column: 'sha256' cannot be added, every index has this"),
    ]:
        with pytest.raises(kind, match=told):
            check_scores([fine, score], None)


@pytest.fixture
def captions(root: Path, tmp_path: Path) -> Path:
    """120 images, a caption for two of three."""
    tree = shutil.copytree(root / "tree", tmp_path / "tree")
    for n, path in enumerate(sorted(tree.rglob("*.png"))):
        if n % 3:
            path.with_suffix(".txt").write_text(f"train {n}")
    return tree


def config_of(tmp_path: Path, source: Path, **shard: Any) -> Config:
    section = {"source": {"url": str(source)}, "splits": {"train": 1.0}, **shard}
    return parse_config({"name": "t", "storage": str(tmp_path / "runs"), "cluster": "local", "shard": section})


@pytest.mark.usefixtures("cluster")
def test_a_config_scores_filters_and_takes_down(captions: Path, run: str, tmp_path: Path) -> None:
    (tmp_path / "list").write_text("red/00.png\nred/none.png\n")
    scores = [
        {"column": "clip", "model": run, "keep": {"min": -1}},
        {"column": "bright", "function": "tests.unit.shards.makers.brightness", "keep": {"max": 109.5}},
    ]
    config = config_of(tmp_path, captions, scores=scores, takedown=[str(tmp_path / "list")])
    check_config(config)
    check_resources(config)
    claimed = claim_run(config)
    for _ in range(2):  # the second time all is there
        tracker = claimed.tracker()
        _Stages(claimed, tracker, "")._shard()
        tracker.close(timeout=60)
    directory = claimed.directory / "shards"
    assert sorted(find_columns(directory)) == ["bright", "clip"]
    denied = {name: pq.read_table(f"{directory.url}/deny/{name}.parquet") for name in ("score-clip", "score-bright", "takedown")}
    assert len(denied["score-clip"]) == 40 == denied["score-clip"]["value"].null_count
    dataset = open_dataset(directory.url, deny=[f"{directory.url}/deny/{name}.parquet" for name in denied])
    left = {dataset[n].meta["source"] for n in range(len(dataset))}
    assert "red/00.png" not in left and all(dataset[n].text for n in range(len(dataset)))
    bright = dict(zip(*(denied["score-bright"][c].to_pylist() for c in ("key", "value")), strict=True))
    assert all(value > 109.5 for value in bright.values()) and 0 < len(bright) < 120
    with closing(sqlite3.connect(tmp_path / "runs" / "mlflow.db")) as database:
        logged = dict(database.execute("select key, value from metrics where key like 'shard/%'").fetchall())
    assert logged["shard/score/clip/missing"] == 40 and logged["shard/score/bright/denied"] == len(bright)
    assert (logged["shard/takedown/samples"], logged["shard/takedown/unmatched"]) == (1, 1)
    # Without `keep` the list of a column goes; a takedown list that the config does not name any more stays.
    again = config_of(tmp_path, captions, scores=[{k: v for k, v in scores[1].items() if k != "keep"}])
    _Stages(replace(claimed, config=again), claimed.tracker(), "")._mark(directory)
    assert directory.names("deny") == ["score-clip.parquet", "takedown.parquet"]


@pytest.mark.usefixtures("cluster")
def test_a_run_that_has_trained_keeps_the_data_it_began_with(captions: Path, run: str, card: ModelCard, tmp_path: Path) -> None:
    model = {"name": "vit", "patch": 4, "width": 8, "depth": 1, "heads": 1}
    config = config_of(tmp_path, captions, scores=[{"column": "a", "model": str(tmp_path / "none")}], takedown=[str(tmp_path / "none")])
    pretrain = {"model": model, "image": {"pixels": 8}, "duration": "1 epoch", "batch": 8, "micro_batch": 8, "precision": "fp32"}
    config = parse_config({**config.model_dump(mode="json", by_alias=True, exclude_none=True), "pretrain": pretrain})
    with pytest.raises(CheckpointError, match=r"shard.scores.0.model"):
        check_resources(config)
    claimed = claim_run(config)
    commit_model(claimed.directory, card, card.make(seed=0).state_dict())
    check_resources(config)  # neither is asked for any more
    tracker = claimed.tracker()
    _Stages(claimed, tracker, "")._shard()
    tracker.close(timeout=60)
    assert find_columns(claimed.directory / "shards") == {}
    with pytest.raises(CheckpointError, match=r"shard.scores.0.model"):
        check_resources(config, fresh=True)


def test_preflight_refuses_what_can_be_known(captions: Path, run: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"shard.scores.0.column: 'cls' cannot be added"):
        check_config(config_of(tmp_path, captions, scores=[{"column": "cls", "model": run}]))
    with pytest.raises(CheckpointError, match=r"shard.scores.0.model"):
        check_resources(config_of(tmp_path, captions, scores=[{"column": "a", "model": str(tmp_path / "none")}]))
    with pytest.raises(DataError, match=r"shard.takedown.0: there is no file"):
        check_resources(config_of(tmp_path, captions, takedown=[str(tmp_path / "none")]))
    with pytest.raises(ConfigError, match=r"shard.scores.0.tokenizer: is a model's, and a function has none"):
        config_of(tmp_path, captions, scores=[{"column": "a", "function": "a.b", "tokenizer": "x"}])
    with pytest.raises(ConfigError, match=r"shard.scores.0.gpus"):
        config_of(tmp_path, captions, scores=[{"column": "a", "function": "a.b", "gpus": 2}])


@pytest.mark.usefixtures("cluster")
def test_the_command(data: Storage, run: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("pipeline.evaluate.__main__.connect_ray", lambda local: None)  # the tests' own is there

    def ask(*words: str) -> tuple[int, str]:
        done = CliRunner().invoke(main, ["score", *words])
        return done.exit_code, done.output

    code, output = ask(data.url, "--column", "clip", "--model", run, "--min", "0", "--batch", "20")
    values = [v for split in ("train", "test") for v in column(data, "clip", split) if v is not None]
    below = sum(value < 0 for value in values)
    assert code == 0 and 0 < below < 52 and len(pq.read_table(f"{data.url}/deny/score-clip.parquet")) == below
    assert f"denied   {below}" in output.splitlines() and "missing  0" in output.splitlines()
    code, output = ask(data.url, "--column", "clip", "--model", run)
    assert code == 0 and data.names("deny") == [] and "clip: there already" in output
    for words, told in [
        ([data.url, "--column", "a"], "score: give either --model"),
        ([data.url, "--column", "a/b", "--model", run], "--column: 'a/b' may hold letters"),
        ([data.url, "--column", "key", "--model", run], "score.0.column: 'key' cannot be added"),
        ([str(tmp_path / "none"), "--column", "a", "--model", run], "there is no dataset here"),
    ]:
        code, output = ask(*words)
        assert code == 3 and told in output
    with pytest.raises(ConfigError, match=r"the shards in .* have no column 'b'"):
        scoring.deny_by_score(data, "b", Bound(min=0))
