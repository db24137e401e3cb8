from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from pydantic import ValidationError

from pipeline.config import Config, fingerprint, load_config, parse_config
from pipeline.config.data import Data
from pipeline.config.load import parse_yaml
from pipeline.core.errors import ConfigError
from pipeline.core.units import Duration

ROOT = Path(__file__).parents[3]
CONTRACT = """
extends: base.yaml
name: clip-l14
storage: s3://lab/runs
tracking: {uri: "http://mlflow:5000", experiment: tessera}
cluster: {extends: ../cluster/spot.yaml, gpus: 64, min_gpus: 8}
pretrain:
  model: clip_vit_l14
  objective: contrastive
  image: {pixels: 224, crop: random-square, flip: false}
  start: null
  batch: 32768
  micro_batch: 256
  duration: 12.8B samples
  optimizer: {name: adamw, lr: 5e-4, betas: [0.9, 0.98], eps: 1e-6, weight_decay: 0.2}
  schedule: {name: cosine, warmup: 2000 steps}
  precision: bf16
  zero: {stage: 2}
  save: {every: 10 minutes, keep: 3}
  validate: {every: 1 epoch}
evaluate: {suites: [vtab-1k], protocols: [fine-tune, linear, few-shot, zero-shot], seeds: 3}
"""
DATA = "data: s3://lab/data/laion@3\n"
SHARD = """
shard:
  source: {format: urls, url: "s3://lab/laion/*.parquet", columns: {url: URL, caption: TEXT}}
  splits: {train: 0.99, test: 0.01}
  workers: 64
  images: {resize: {side: shorter, pixels: 256}, min_pixels: 64}
  size: 256 MiB
"""
MINIMAL: dict[str, Any] = {"name": "t", "storage": "runs", "data": "/d", "pretrain": {"model": "vit_b16", "duration": "90 epochs"}}


def write(folder: Path, **files: str) -> None:
    for name, text in files.items():
        path = folder / name.replace("__", "/")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.with_suffix(".yaml").write_text(text)


def minimal(**changes: Any) -> dict[str, Any]:
    return {**MINIMAL, "pretrain": {**MINIMAL["pretrain"], **changes}}


def clustered(**cluster: int) -> dict[str, Any]:
    return {**MINIMAL, "cluster": cluster}


def error(values: dict[str, Any]) -> str:
    with pytest.raises(ConfigError) as e:
        parse_config(values)
    assert "\n" not in str(e.value)
    return str(e.value)


@pytest.mark.parametrize("data", [DATA, SHARD], ids=["data", "shard"])
def test_the_contract(tmp_path: Path, data: str) -> None:
    """Every key of the example in the design."""
    write(
        tmp_path, recipes__clip=CONTRACT + data, recipes__base="seed: 7\n", cluster__spot="address: http://head:8265\ngpus: 1\nretries: 9\n"
    )
    config = load_config(tmp_path / "recipes" / "clip.yaml")
    p, c = config.pretrain, config.cluster
    assert p is not None and config.evaluate is not None
    assert (config.seed, c.address, c.gpus, c.min_gpus, c.retries) == (7, "http://head:8265", 64, 8, 9)
    assert (p.model.name, p.objective.name, p.start, p.optimizer.lr, p.optimizer.eps) == ("clip_vit_l14", "contrastive", None, 5e-4, 1e-6)
    assert (p.duration, p.save.every) == (Duration(12.8e9, "sample"), Duration(10, "minute"))
    assert p.validation is not None and p.validation.every == Duration(1, "epoch")
    assert [s.name for s in config.evaluate.suites] == ["vtab-1k"]
    if config.shard:
        assert config.shard.size == 2**28 and config.shard.images.resize is not None and config.shard.source.columns["url"] == "URL"
    else:
        assert config.data == [Data(url="s3://lab/data/laion@3")]


@pytest.mark.parametrize("path", sorted((ROOT / "configs").rglob("*.yaml")), ids=lambda p: p.name)
def test_shipped_configs(path: Path) -> None:
    if path.parent.name == "cluster":  # a part, which others extend
        parse_config({**MINIMAL, "cluster": parse_yaml(path.read_text(), str(path))})
    else:
        load_config(path)


def test_extends(tmp_path: Path) -> None:
    write(
        tmp_path,
        a="extends: b.yaml\nname: a\npretrain: {batch: 128, model: {drop_path: 0.1}, optimizer: {betas: [0.8, 0.9]}}\ncluster: local\n",
        b="extends: sub/c.yaml\npretrain: {batch: 512, duration: 2 epochs, optimizer: {lr: 1e-2}}\n",
        sub__c="name: c\nstorage: {url: s3://lab, endpoint: http://x}\ndata: s3://d\nseed: 3\npretrain: {model: vit_b16, duration: 1 epoch}\ncluster: {gpus: 3}\n",
    )
    config = load_config(tmp_path / "a.yaml", ["pretrain.batch=64", "pretrain.model.depth=2", "storage.endpoint=http://y", "seed=4"])
    p = config.pretrain
    assert p is not None
    assert (config.name, config.seed, config.storage.endpoint) == ("a", 4, "http://y")
    assert (p.batch, p.duration.value, p.optimizer.lr, p.optimizer.betas) == (64, 2, 1e-2, (0.8, 0.9))
    assert (p.model.name, p.model.arguments) == ("vit_b16", {"drop_path": 0.1, "depth": 2})  # the plain word of c is a section here
    assert config.cluster.is_local and config.cluster.gpus is None  # a plain word replaces a section


def test_plain_words() -> None:
    words = parse_config(
        {
            **minimal(objective="classify", start="/runs/a@5", schedule="linear", palette="/p.npy", text="/t.json"),
            "cluster": "local",
            "storage": "s3://a",
        }
    )
    spelt = parse_config(
        {
            **minimal(
                objective={"name": "classify"},
                start={"from": "/runs/a@5"},
                schedule={"name": "linear"},
                model={"name": "vit_b16"},
                palette={"url": "/p.npy"},
                text={"tokenizer": "/t.json"},
            ),
            "cluster": {"name": "local"},
            "storage": {"url": "s3://a"},
        }
    )
    assert words == spelt


def test_samples_as_people_write_them() -> None:
    """Without a URL there is something to plan with."""
    for given, samples in (("1.28M", 1_280_000), (1_281_167, 1_281_167), ("14.2 M", 14_200_000)):
        assert parse_config({**MINIMAL, "data": {"samples": given, "classes": "21k"}}).data == [Data(samples=samples, classes=21_000)]
    assert Data(url="a", samples="1k").samples == 1000  # type: ignore[arg-type]


def test_null_takes_an_argument_away() -> None:
    """One that an extended file gave."""
    config = parse_config(minimal(model={"name": "vit_b16", "drop_path": 0.1, "depth": 2}), ["pretrain.model.drop_path=null"])
    assert config.pretrain is not None and config.pretrain.model.arguments == {"depth": 2}


def test_a_palette_becomes_a_section() -> None:
    p = parse_config(minimal(palette="three-bit"), ["pretrain.palette.colors=16"]).pretrain
    assert p is not None and p.palette is not None and (p.palette.url, p.palette.colors) == ("three-bit", 16)


def test_a_plain_word_becomes_a_section(tmp_path: Path) -> None:
    """What it stands for depends on where it is: in a file that extends, in a part, and in overrides."""
    write(
        tmp_path,
        base="name: t\nstorage: s3://lab\ndata: s3://d\npretrain: {model: vit_b16, duration: 1 epoch, start: s3://lab/a}\n",
        over="extends: base.yaml\nstorage: {endpoint: http://x}\npretrain: {start: {load: all}, model: {drop_path: 0.1}}\n",
        part="extends: base.yaml\npretrain: {extends: sub/b.yaml, start: {load: all}}\n",
        sub__b="start: s3://lab/b\n",
    )
    for config in (
        load_config(tmp_path / "over.yaml"),
        load_config(tmp_path / "base.yaml", ["storage.endpoint=http://x", "pretrain.start.load=all", "pretrain.model.drop_path=0.1"]),
    ):
        assert config.storage.model_dump() == {"url": "s3://lab", "endpoint": "http://x", "conditional": True}
        assert config.pretrain is not None and config.pretrain.start is not None
        assert (config.pretrain.start.from_, config.pretrain.start.load) == ("s3://lab/a", "all")
        assert config.pretrain.model.arguments == {"drop_path": 0.1}
    for name, overrides in (("part", []), ("base", ["pretrain.start=s3://lab/b", "pretrain.start.load=all"])):
        p = load_config(tmp_path / f"{name}.yaml", overrides).pretrain
        assert p is not None and p.start is not None and (p.start.from_, p.start.load) == ("s3://lab/b", "all")


def readme_examples(folder: Path) -> list[Path]:
    shutil.copy(ROOT / "configs" / "quickstart.yaml", folder)
    blocks = re.findall(r"```yaml\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.DOTALL)
    write(folder, **{f"readme{n}": block for n, block in enumerate(blocks)})
    return [folder / f"readme{n}.yaml" for n in range(len(blocks))]


def test_the_readme(tmp_path: Path) -> None:
    examples = readme_examples(tmp_path)
    assert examples
    for path in examples:
        config = load_config(path)
        assert config.storage.url.startswith("s3://") and config.storage.endpoint and config.cluster.address and config.pretrain


def test_paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/ada")
    monkeypatch.chdir(tmp_path)
    suites = ["a", {"name": "b", "data": "own"}, {"name": "c", "data": "~/c"}, {"name": "d", "data": "d"}, {"name": "e", "data": None}]
    config = parse_config({**minimal(start="~/runs/a@5"), "storage": {"url": "~/runs"}, "data": "s3://~/d", "evaluate": {"suites": suites}})
    assert config.pretrain is not None and config.pretrain.start is not None and config.evaluate is not None
    assert (config.storage.url, config.data, config.pretrain.start.from_) == (
        "/home/ada/runs",
        [Data(url="s3://~/d")],
        "/home/ada/runs/a@5",
    )
    assert [s.data for s in config.evaluate.suites] == [None, "own", "/home/ada/c", f"{tmp_path}/d", None]
    section = minimal(palette="p.npy", text={"tokenizer": "~/t.json"}, objective={"name": "distil", "teacher": "runs/b@7"})
    named = parse_config(section).pretrain
    assert named is not None and named.palette is not None and named.text is not None
    assert (named.palette.url, named.text.tokenizer) == (f"{tmp_path}/p.npy", "/home/ada/t.json")
    assert named.objective.arguments == {"teacher": f"{tmp_path}/runs/b@7"}
    for palette in ("three-bit", {"url": "three-bit"}):
        kept = parse_config(minimal(palette=palette)).pretrain
        assert kept is not None and kept.palette is not None and kept.palette.url == "three-bit"
    models = {"model": "runs/a", "palette": "three-bit", "tokenizer": "t.json", "suites": ["a"]}
    alone = parse_config({"name": "t", "storage": "r", "evaluate": models}).evaluate
    assert alone is not None and (alone.model, alone.palette, alone.tokenizer) == (f"{tmp_path}/runs/a", "three-bit", f"{tmp_path}/t.json")
    source = parse_config({"name": "t", "storage": "own", "shard": {"source": {"url": "~/images"}}})
    assert source.shard is not None and (source.shard.source.url, source.storage.url) == ("/home/ada/images", f"{tmp_path}/own")


def test_files_are_utf_8(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_bytes("name: t\nstorage: /läufe\ndata: /d\npretrain: {model: m, duration: 1 epoch}\n".encode())
    assert load_config(tmp_path / "a.yaml").storage.url == "/läufe"


@pytest.mark.parametrize(
    ("path", "url"),
    [
        ("storage", "s3://key:secret@lab/runs"),
        ("storage.url", "s3://key:secret@lab/runs"),
        ("storage.endpoint", "https://me:secret@s3.lab"),
        ("tracking.uri", "postgresql://me:secret@db/mlflow"),
        ("cluster.address", "http://me:secret@head:8265"),
        ("data", "http://me:secret@data/d@3"),
        ("data.url", "http://me:secret@data/d@3"),
        ("data.deny", "[a.txt, 'http://me:secret@data/d@3']"),
        ("shard.source.url", "ftp://me:secret@data/d"),
        ("pretrain.start", "http://me:secret@runs/a@5"),
        ("pretrain.start.from", "http://me:secret@runs/a@5"),
        ("evaluate.suites", "[{name: x, data: 'http://me:secret@data/d'}]"),
    ],
)
def test_passwords_are_refused(path: str, url: str) -> None:
    with pytest.raises(ConfigError) as e:
        parse_config(MINIMAL, [f"{path}={url}"])
    assert str(e.value).startswith(path) and "holds a password; give it in the environment (for MLflow MLFLOW_TRACKING_USERNAME" in str(
        e.value
    )
    assert "secret" not in str(e.value)


def test_what_is_no_password() -> None:
    for url in ("s3://lab/a:b@3", "http://me@mlflow:5000", "sqlite:///a:b@c.db", "http://head:8265/x@y"):
        assert parse_config(MINIMAL, [f"tracking.uri={url}", f"data={url}"]).data == [Data(url=url)]


def test_numbers_as_people_write_them() -> None:
    values = parse_yaml("[5e-4, 1E3, -2.e+5, .5e1, 1e, 5, 1.5, 2024-01-01x, e5]", "x")
    assert values == [5e-4, 1000.0, -2e5, 5.0, "1e", 5, 1.5, "2024-01-01x", "e5"]
    assert all(isinstance(v, float) for v in values[:4])


def test_overrides_are_yaml(tmp_path: Path) -> None:
    write(tmp_path, a="name: a\nstorage: runs\ndata: /d\npretrain: {model: vit_b16, duration: 1 epoch}\n")
    overrides = ["pretrain.optimizer={lr: 5e-4, betas: [0.9, 0.95]}", "pretrain.image.flip=false", "pretrain.duration=3 epochs", "name=b=c"]
    with pytest.raises(ConfigError, match=r"^name: 'b=c' may hold letters, digits"):
        load_config(tmp_path / "a.yaml", overrides)
    p = load_config(tmp_path / "a.yaml", overrides[:-1]).pretrain
    assert p is not None and (p.optimizer.lr, p.image.flip, p.duration.value) == (5e-4, False, 3)
    for bad, words in {
        "batch": r"override 'batch': write section.key=value",
        "=3": r"write section.key=value",
        "pretrain.duration.unit.x=3": r"no such key|should be|needs",
        "seed.x=3": r"seed",
        "pretrain.batch=[1": r"override 'pretrain.batch=\[1'.*not YAML",
    }.items():
        with pytest.raises(ConfigError, match=words):
            load_config(tmp_path / "a.yaml", [bad])


def test_files_that_are_no_configs(tmp_path: Path) -> None:
    write(
        tmp_path, quickstart="name: [", a="extends: b.yaml\n", b="extends: a.yaml\n", list="- 1\n", twice="name: a\nseed: 1\nname: b\n",
        deep="pretrain:\n  optimizer: {lr: 1, lr: 2}\n", two="extends: [a.yaml, b.yaml]\n", lost="extends: quikstart.yaml\n",
    )  # fmt: skip
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00")
    for name, words in {
        "quikstart": r"config: there is no file .*/quikstart.yaml, did you mean 'quickstart.yaml'\?",
        "quickstart": r"quickstart.yaml, line \d: this is not YAML \(.+\)",
        "a": r"a.yaml: extends itself, by way of a.yaml and b.yaml",
        "list": r"list.yaml: a config is a mapping of keys to values, this is a list",
        "twice": r"the key 'name' is given twice",
        "deep": r"the key 'lr' is given twice",
        "two": r"two.yaml: extends names one file, this is a list",
        "lost": r"there is no file .*quikstart.yaml, did you mean 'quickstart.yaml'\?",
        "binary": r"config: cannot read .*binary.yaml",
    }.items():
        with pytest.raises(ConfigError, match=words):
            load_config(tmp_path / f"{name}.yaml")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (minimal(bacth=3), "pretrain.bacth: no such key, did you mean 'batch'? (allowed: average, batch, compile, "),
        ({**MINIMAL, "pretain": {}}, "pretain: no such key, did you mean 'pretrain'? (allowed: cluster, data, "),
        (minimal(optimizer={"lrr": 1}), "pretrain.optimizer.lrr: no such key, did you mean 'lr'? (allowed: betas, clip, eps, head_weight_decay, "),
        ({**MINIMAL, "evaluate": {"suites": [{"name": "x", "dta": "y"}]}}, "evaluate.suites.0.dta: no such key, did you mean 'data'? (allowed: class_names, data, name, templates, test, train)"),
        (minimal(batch="many"), "pretrain.batch: 'many' should be a valid integer"),
        (minimal(batch=0), "pretrain.batch: 0 should be greater than or equal to 1"),
        (minimal(precision="int8"), "pretrain.precision: 'int8' should be 'fp32', 'bf16' or 'fp16'"),
        (minimal(zero={"stage": 4}), "pretrain.zero.stage: 4 should be 0, 1, 2 or 3"),
        (minimal(image={"flip": "yes"}), "pretrain.image.flip: 'yes' should be a valid boolean"),
        (minimal(optimizer={"betas": [0.9, 1.5]}), "pretrain.optimizer.betas.1: 1.5 should be less than 1"),
        (minimal(optimizer={"betas": [0.9, 1]}), "pretrain.optimizer.betas.1: 1 should be less than 1"),
        (minimal(image={"scale": [0, 1]}), "pretrain.image.scale.0: 0 should be greater than 0"),
        (minimal(image={"scale": [1, 0.5]}), "pretrain.image.scale: [1, 0.5] must give the smaller number first"),
        (minimal(image={"ratio": [1.3, 0.7]}), "pretrain.image.ratio: [1.3, 0.7] must give the smaller number first"),
        (minimal(duration=90), "pretrain.duration: 90 needs a number and a unit, such as '90 epochs'"),
        (minimal(duration="3 hours"), "pretrain.duration: '3 hours' must be counted in epochs, samples or steps, not in time"),
        (minimal(duration="0 epochs"), "pretrain.duration: '0 epochs' must be more than zero"),
        (minimal(duration="1e400 steps"), "pretrain.duration: '1e400 steps' must be at most 1e+15"),
        (minimal(save={"every": "1e400 hours"}), "pretrain.save.every: '1e400 hours' must be at most 1e+15"),
        (minimal(batch=100, micro_batch=64), "pretrain.batch: 100 is not a multiple of micro_batch (64)"),
        (clustered(gpus=1, min_gpus=2), "cluster.min_gpus: 2 is the least of cluster.gpus, which is 1"),
        (clustered(min_gpus=2), "cluster.min_gpus: 2 is the least of cluster.gpus, which is not given"),
        (clustered(workers=2, min_workers=4), "cluster.min_workers: 4 is the least of cluster.workers, which is 2"),
        (clustered(gpus=2, min_workers=4), "cluster.min_workers: 4 is the least of cluster.gpus, which is 2, and each worker has one"),
        (clustered(gpus=8, workers=2, min_gpus=4), "cluster.min_gpus: 4 is the least of cluster.workers, which is 2, and each has one GPU"),
        (minimal(save={"patience": "5 minutes"}), "pretrain.save.patience: 5 minutes is shorter than pretrain.save.retry, which is 10 minutes"),
        (minimal(save={"retry": "3 hours"}), "pretrain.save.patience: 2 hours is shorter than pretrain.save.retry, which is 3 hours"),
        (minimal(save={"best": "validate/loss"}), "pretrain.save.best: validate/loss is measured by validation, and there is no section pretrain.validate"),
        ({k: v for k, v in MINIMAL.items() if k != "name"}, "name: is missing"),
        ({**MINIMAL, "name": "../x"}, "name: '../x' may hold letters, digits, '.', '_' and '-' only"),
        ({**MINIMAL, "name": "data"}, "name: 'data' is kept for what lies beside the runs (kept: data, mlartifacts, mlflow.db)"),
        ({"name": "t", "storage": "r"}, "config: nothing to do: needs at least one of the sections shard, pretrain, evaluate"),
        ({k: v for k, v in MINIMAL.items() if k != "data"}, "pretrain: needs data, a dataset's URL, or a shard section that makes one"),
        ({**MINIMAL, "data": []}, "data: [] names no dataset"),
        ({**MINIMAL, "data": [{"url": "a", "weight": 1}, "b"]}, "weight: is given for some of the datasets only; give it for all or for none"),
        ({**MINIMAL, "data": {"url": "a", "where": {"score": {}}}}, "data.0.where.score.min: is missing, and max too; a bound needs one of them"),
        ({**MINIMAL, "shard": {"source": {"url": "x"}}}, "data: give either data or a shard section, not both"),
        ({"name": "t", "storage": "r", "data": "d", "evaluate": {"suites": ["x"]}}, "evaluate.model: is missing, and there is no pretrain section"),
        ({**MINIMAL, "evaluate": {"suites": ["x"], "model": "/m"}}, "evaluate.model: give either that or a pretrain section"),
        ({**MINIMAL, "data": {}}, "data.0.url: is missing, and samples too; name the dataset, or say how many samples to plan for"),
        ({**MINIMAL, "data": {"classes": 10}}, "data.0.url: is missing, and samples too"),
        ({**MINIMAL, "data": ["a", {"weight": 2}]}, "data.1.url: is missing, and samples too"),
        ({**MINIMAL, "data": {"samples": "many"}}, "data.0.samples: 'many' needs a whole number of 1 or more, such as 1281167 or '14.2M' (k, M, B)"),
        ({**MINIMAL, "data": {"samples": 0}}, "data.0.samples: 0 needs a whole number of 1 or more"),
        ({**MINIMAL, "data": {"url": "a", "classes": True}}, "data.0.classes: True needs a whole number of 1 or more"),
        (minimal(palette={"colors": 1}), "pretrain.palette.colors: 1 should be greater than or equal to 2"),
        (minimal(palette={"colors": 2**15 + 1}), "pretrain.palette.colors: 32769 should be less than or equal to 32768"),
        (minimal(palette={"colours": 8}), "pretrain.palette.colours: no such key, did you mean 'colors'? (allowed: colors, sha256, url)"),
        (minimal(text={"length": 2}), "pretrain.text.length: 2 should be greater than or equal to 3"),
        ({**MINIMAL, "evaluate": {"suites": []}}, "evaluate.suites: [] "),
        ({"name": "t", "storage": "r", "shard": {"source": {"url": "x"}, "splits": {"a": 0.5, "b": 0.4}}}, "the fractions must add up to 1, these add up to 0.9"),
        ({"name": "t", "storage": "r", "shard": {"source": {"url": "x"}, "size": "256 mb"}}, "shard.size: '256 mb' needs a number and a unit, such as '256 MiB'"),
        ({"name": "t", "storage": "r", "shard": {"source": {"url": "x"}, "size": "1e400 MiB"}}, "shard.size: '1e400 MiB' is too large"),
        ({**MINIMAL, "seed": 2**32}, "seed: 4294967296 should be less than 4294967296"),
        ({**MINIMAL, "seed": -1}, "seed: -1 should be greater than or equal to 0"),
    ],
    ids=lambda x: x[:40] if isinstance(x, str) else "",
)  # fmt: skip
def test_messages(values: dict[str, Any], message: str) -> None:
    assert message in error(values)


def test_every_mistake_is_told() -> None:
    told = error(minimal(bacth=3, precision="int8"))
    assert "pretrain.bacth" in told and "; " in told and "pretrain.precision" in told


def test_bounds_that_meet_are_allowed() -> None:
    for cluster in (
        {"workers": 4, "min_workers": 4},
        {"gpus": 8, "min_gpus": 8, "workers": 8},
        {"gpus": 0, "min_gpus": 0, "min_workers": 3},
    ):
        assert parse_config(clustered(**cluster)).cluster.workers == cluster.get("workers")
    save = {"retry": "1 hour", "patience": "60 minutes", "best": {"metric": "validate/top1", "higher": True}}
    p = parse_config(minimal(save=save, validate={"every": "1 epoch"})).pretrain
    assert p is not None and p.save.best is not None and p.save.best.metric == "validate/top1"


def test_frozen() -> None:
    config = parse_config(MINIMAL)
    with pytest.raises(ValidationError, match="frozen"):
        config.seed = 1  # type: ignore[misc]
    with pytest.raises(ValidationError, match="frozen"):
        config.pretrain.batch = 1  # type: ignore[misc,union-attr]


def test_parse_config_leaves_its_input_alone() -> None:
    values = minimal(optimizer={"lr": 1e-3})
    before = json.dumps(values)
    parse_config(values)
    assert json.dumps(values) == before


def test_fingerprint() -> None:
    one = fingerprint(parse_config(minimal(optimizer={"lr": 5e-4, "eps": 1e-8})))
    again = fingerprint(
        parse_config(
            {
                "pretrain": {"optimizer": {"lr": 0.0005}, "duration": "90.0 epoch", "model": {"name": "vit_b16"}, "batch": 256, "precision": "bf16"},
                "seed": 0, "cluster": {"name": "ray"}, "data": "/d", "storage": {"url": "runs"}, "name": "t",
            }
        )
    )  # fmt: skip
    assert one == again and len(one) == 64
    assert fingerprint(parse_config(minimal(duration="2k samples"))) == fingerprint(parse_config(minimal(duration="2000 samples")))
    for change in ({"optimizer": {"lr": 5.1e-4}}, {"duration": "91 epochs"}, {"model": {"name": "vit_b16", "drop_path": 0.1}}):
        assert fingerprint(parse_config(minimal(**{"optimizer": {"lr": 5e-4}, **change}))) != one


def test_what_is_dumped_loads_again() -> None:
    config = parse_config(
        minimal(save={"every": "10 minutes"}, validate={"every": "2k steps"}, model={"name": "vit", "width": 8}, start="/r@3")
    )
    dumped = json.loads(json.dumps(config.model_dump(mode="json", by_alias=True)))
    assert parse_config(dumped) == config and "validate" in dumped["pretrain"] and dumped["pretrain"]["start"]["from"] == "/r@3"


def test_json_schema() -> None:
    schema = json.loads(json.dumps(Config.model_json_schema()))
    assert schema["additionalProperties"] is False and {"name", "storage", "pretrain"} <= set(schema["properties"])
    pretrain = schema["$defs"]["Pretrain"]["properties"]
    assert "validate" in pretrain and "pattern" in pretrain["duration"]


def test_json_schema_takes_what_loads(tmp_path: Path) -> None:
    schema = json.loads(json.dumps(Config.model_json_schema()))
    texts = [CONTRACT + DATA, CONTRACT + SHARD, *(p.read_text(encoding="utf-8") for p in readme_examples(tmp_path))]
    texts += [p.read_text(encoding="utf-8") for p in (ROOT / "configs").rglob("*.yaml") if p.parent.name != "cluster"]
    validator = jsonschema.Draft202012Validator(schema)
    for text in texts:
        validator.validate(parse_yaml(text, "text"))
    for wrong in (minimal(bacth=3), minimal(duration="3 parsecs"), minimal(optimizer=3), {**MINIMAL, "shard": "folder"}):
        assert not validator.is_valid(wrong)
