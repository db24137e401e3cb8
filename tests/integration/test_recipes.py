"""The shipped recipes: every one is loaded and planned without data, against the papers' numbers; of each family one trains."""

from __future__ import annotations

import json
import math
import os
import re
import subprocess
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from pipeline.checkpoint import find_model, read_history
from pipeline.config import Config, load_config
from pipeline.core.storage import Storage
from pipeline.plan import Plan
from pipeline.preflight import check_config, plan_config

ROOT = Path(__file__).parents[2]
RECIPES = ROOT / "configs" / "pretrain"

JFT, JFT3B, I21K, I1K, WIT = 303_000_000, 3_000_000_000, 14_197_122, 1_281_167, 400_000_000
CLASSES = {JFT: 18_291, JFT3B: 29_593, I21K: 21_843, I1K: 1_000}
WIDTH = {"b": 768, "l": 1024, "h": 1280}
# Parameters of ViTs at 224 pixels, with a class token and no head, by size and patch; BiT's without a head.
BODY = {"b16": 85_798_656, "b32": 87_455_232, "l16": 303_301_632, "l32": 305_510_400, "h14": 630_764_800, "r50_b16": 97_890_112}
BODY |= {"r50_b32": 109_586_240 + 590_592, "r50_l16": 315_458_624, "r50_l32": 327_969_856}
BODY |= {"ti16": 5_524_416, "s16": 21_665_664, "s32": 22_493_952}
BIT = {"r50x1": 23_500_352, "r152x2": 232_238_208}


def vit(body: str, data: int) -> int:
    """With the head of pre-training, which has one hidden layer."""
    width = WIDTH[body.removeprefix("r50_")[0]]
    return BODY[body] + width * (width + 1) + (width + 1) * CLASSES[data]


def augreg(body: str, width: int) -> int:
    """Pooled, without a class token and its position."""
    return BODY[body] - 2 * width + (width + 1) * CLASSES[I21K]


def scaling(body: int, width: int, mlp: int) -> int:
    """`body` has a class token; attention pools instead: a query, its four projections, a norm and an MLP."""
    pool = width + 4 * (width + 1) * width + 2 * width + 2 * width * mlp + mlp + width
    return body - 2 * width + pool + (width + 1) * CLASSES[JFT3B]


class Published(NamedTuple):
    """A run of a paper: `seen` samples in batches of `batch`, at a peak rate `lr` and with a weight decay; its compute in exaFLOPs."""

    parameters: int
    seen: float
    batch: int
    lr: float
    weight_decay: float
    warmup: int = 10_000
    compute: float | None = None


VIT: dict[str, Published] = {
    "vit-b16-jft": Published(vit("b16", JFT), 7 * JFT, 4096, 8e-4, 0.1, compute=224),
    "vit-b32-jft": Published(vit("b32", JFT), 7 * JFT, 4096, 8e-4, 0.1, compute=55),
    "vit-l16-jft": Published(vit("l16", JFT), 7 * JFT, 4096, 4e-4, 0.1, compute=783),
    "vit-l16-jft-14ep": Published(vit("l16", JFT), 14 * JFT, 4096, 4e-4, 0.1, compute=1567),
    "vit-l32-jft": Published(vit("l32", JFT), 7 * JFT, 4096, 6e-4, 0.1, compute=196),
    "vit-h14-jft": Published(vit("h14", JFT), 14 * JFT, 4096, 3e-4, 0.1, compute=4262),
    "vit-r50-b16-jft": Published(vit("r50_b16", JFT), 7 * JFT, 4096, 8e-4, 0.1, compute=274),
    "vit-r50-b32-jft": Published(vit("r50_b32", JFT), 7 * JFT, 4096, 8e-4, 0.1, compute=106),
    "vit-r50-l16-jft": Published(vit("r50_l16", JFT), 7 * JFT, 4096, 4e-4, 0.1, compute=1668 / 2),  # of 14 epochs; 859 of 7 are more than half
    "vit-r50-l32-jft": Published(vit("r50_l32", JFT), 7 * JFT, 4096, 2e-4, 0.1, compute=246),
    "bit-r50x1-jft": Published(BIT["r50x1"] + 2049 * CLASSES[JFT], 7 * JFT, 4096, 1e-3, 0.1),
    "bit-r152x2-jft": Published(BIT["r152x2"] + 4097 * CLASSES[JFT], 7 * JFT, 4096, 6e-4, 0.1),
    "vit-b16-jft-masked": Published(BODY["b16"] + 768 + 769 * 512, 1e6 * 4096, 4096, 2e-4, 0.1),
    **{f"vit-{n}-i21k": Published(vit(n, I21K), 90 * I21K, 4096, 1e-3, 0.03) for n in ("b16", "b32", "l16", "l32")},
    **{f"vit-{n}-i1k": Published(vit(n, I1K), 300 * I1K, 4096, 3e-3, 0.3) for n in ("b16", "b32", "l16", "l32")},
    **{
        f"vit-{n}-i21k-augreg": Published(augreg(n, width), 300 * I21K, 4096, 1e-3, 0.1)
        for n, width in (("ti16", 192), ("s16", 384), ("s32", 384), ("b16", 768), ("b32", 768), ("l16", 1024))
    },
    # arXiv 2106.04560, table 2, has the GFLOPs of an image.
    "vit-g14-jft3b": Published(scaling(1_011_202_432, 1408, 6144), 1e6 * 16384, 16384, 8e-4, 0.03, compute=3 * 533.1e-9 * 1e6 * 16384),
    "vit-bigg14-jft3b": Published(scaling(1_842_775_680, 1664, 8192), 1e6 * 16384, 16384, 8e-4, 0.03, compute=3 * 965.3e-9 * 1e6 * 16384),
}  # fmt: skip
IGPT: dict[str, Published] = {
    "igpt-s": Published(76_571_648, 1e6 * 128, 128, 3e-3, 0, 10_010),
    "igpt-m": Published(455_157_760, 1e6 * 128, 128, 3e-3, 0, 10_010),
    "igpt-l": Published(1_362_250_752, 1e6 * 128, 128, 1e-3, 0, 10_010),
    "igpt-l-48": Published(1_364_216_832, 1e6 * 128, 128, 1e-2, 0, 10_010),
    "igpt-xl": Published(6_810_875_904, 2e6 * 64, 64, 3e-4, 0, 20_019),
    "igpt-s-bert": Published(76_571_648, 1e6 * 128, 128, 1e-2, 0, 10_010),
    "igpt-m-bert": Published(455_157_760, 1e6 * 128, 128, 3e-3, 0, 10_010),
    "igpt-l-bert": Published(1_362_250_752, 1e6 * 128, 128, 1e-3, 0, 10_010),
}
_CLIP = {
    "clip-vit-b32": (151_277_313, 5e-4), "clip-vit-b16": (149_620_737, 5e-4), "clip-vit-l14": (427_616_513, 4e-4),
    "clip-rn50": (102_007_137, 5e-4), "clip-rn101": (119_688_033, 5e-4), "clip-rn50x4": (178_300_601, 5e-4),
    "clip-rn50x16": (290_979_217, 4e-4), "clip-rn50x64": (623_258_305, 3.6e-4),
}  # fmt: skip
_BLOCKS = 12 * (12 * 768**2 + 13 * 768)  # of a Transformer of size B
_DECODER = 12 * (8 * 512**2 + 8 * 512 + 8 * 512**2 + 5 * 512 + 6 * 512)  # attention twice, an MLP, three norms
CLIP: dict[str, Published] = {
    **{name: Published(parameters, 32 * WIT, 32768, lr, 0.2, 2000) for name, (parameters, lr) in _CLIP.items()},
    "clip-vit-l14-336": Published(427_944_193, WIT, 32768, 2e-5, 0.2, 2000),
    "clip-rn50-words": Published(38_316_896 + 49408 * 512 + 512 * 1024 + 1, WIT, 32768, 5e-4, 0.2, 2000),
    "rn50-words": Published(23_508_032 + 2049 * 49408, WIT, 32768, 5e-4, 0.2, 2000),
    # CLIP's image tower without its pooling, a projection, tied embeddings, positions, the decoder, its norm.
    "rn50-caption": Published(23_527_264 + 2049 * 512 + 49408 * 512 + 77 * 512 + _DECODER + 2 * 512, WIT, 32768, 5e-4, 0.2, 2000),
    "siglip-vit-b16": Published(
        769 * 768 + 196 * 768 + _BLOCKS + 2 * 768 + (768 + 4 * 769 * 768 + 2 * 768 + 8 * 768**2 + 5 * 768) + 768**2
        + 32000 * 768 + 64 * 768 + _BLOCKS + 2 * 768 + 768**2 + 2, 9e9, 32768, 1e-3, 0.1, 2000,
    ),
}  # fmt: skip
OTHERS: dict[str, Published] = {
    **{
        f"deit-{name}": Published(parameters, 300 * I1K, 1024, 1e-3, 0.05, 6_256)
        for name, parameters in {
            "ti": 5_717_416, "s": 22_050_664, "b": 86_567_656, "ti-distilled": 5_910_800, "s-distilled": 22_436_432, "b-distilled": 87_338_192,
        }.items()
    },
    "mae-b": Published(111_655_680, 800 * I1K, 4096, 2.4e-3, 0.05, 12_512),
    "mae-l": Published(329_239_296, 800 * I1K, 4096, 2.4e-3, 0.05, 12_512),
    "mae-h": Published(656_613_964, 800 * I1K, 4096, 2.4e-3, 0.05, 12_512),
    "resnet50-i1k": Published(25_557_032, 90 * I1K, 8192, 3.2, 1e-4, 782),
}  # fmt: skip
PUBLISHED = VIT | IGPT | CLIP | OTHERS


def test_every_recipe_is_in_the_table() -> None:
    assert {path.stem for path in RECIPES.rglob("*.yaml")} == set(PUBLISHED)


@pytest.mark.parametrize("name", sorted(path.name for path in (ROOT / "configs").glob("*.yaml")))
def test_a_config_that_needs_data_is_sound_in_itself(name: str) -> None:
    config = load_config(ROOT / "configs" / name)
    check_config(config)
    assert config.name == name.removesuffix(".yaml")


@cache
def planned(name: str) -> tuple[Config, Plan]:
    config = load_config(RECIPES / f"{name}.yaml")
    check_config(config)
    plan, estimated, _ = plan_config(config)
    assert plan is not None and estimated
    return config, plan


@pytest.mark.parametrize("name", sorted(PUBLISHED))
def test_a_recipe_is_the_published_run(name: str) -> None:
    config, plan = planned(name)
    p, paper = config.pretrain, PUBLISHED[name]
    assert p is not None and config.name == name
    assert plan.parameters == paper.parameters
    assert plan.steps == math.ceil(paper.seen / paper.batch) and plan.warmup == paper.warmup
    assert (p.batch, p.optimizer.lr, p.optimizer.weight_decay) == (paper.batch, paper.lr, paper.weight_decay)
    assert plan.memory.items["activations"] < 70 * 2**30, "a micro-batch fits into one accelerator of 80 GB"
    if paper.compute:  # within 2%, and what the paper's rounding to whole numbers leaves open
        assert plan.flops_a_sample * plan.samples / 1e18 == pytest.approx(paper.compute, abs=0.02 * paper.compute + 0.5)


@pytest.mark.parametrize("name", sorted(PUBLISHED))
def test_a_recipe_says_what_it_is(name: str) -> None:
    text = (RECIPES / f"{name}.yaml").read_text()
    header = re.match(r"(# .*\n)+", text)
    assert header, "a recipe begins with its header"
    said = re.findall(r"^# (\w+): +(\S.*)$", header[0], re.MULTILINE)
    assert [key for key, _ in said if key != "Differs"] == ["What", "Data", "Command", "Cost", "Expect"]
    assert dict(said)["Command"].startswith(f"python launch/submit.py configs/pretrain/{name}.yaml data.url=URL ")
    cost = re.search(r"([\d,.]+) exaFLOPs by --plan", header[0])
    _, plan = planned(name)
    assert cost and float(cost[1].replace(",", "")) == pytest.approx(plan.flops_a_sample * plan.samples / 1e18, rel=0.006)


# Which recipe of each family trains, with what makes it small beside the overrides of all.
VIT_SIZE = ["width=16", "depth=1", "heads=2", "mlp=32"]
TEXT_SIZE = ["text.width=16", "text.depth=1", "text.heads=2"]
TOWER = ["embed=16", "vision.patch=8", *(f"vision.{size}" for size in VIT_SIZE), *TEXT_SIZE]
RESNET_TOWER = ["vision.width=8", "vision.depths=[1, 1, 1, 1]", *TEXT_SIZE]
SMALL: dict[str, list[str]] = {
    "vit-b32-jft": [*VIT_SIZE, "patch=8", "representation=16"],
    "vit-r50-b32-jft": [*VIT_SIZE, "stem=[1, 1, 1, 1]", "representation=16"],
    "bit-r50x1-jft": ["depths=[1, 1, 1, 1]"],
    "vit-b16-jft-masked": [*VIT_SIZE, "patch=8"],
    "vit-ti16-i21k-augreg": [*VIT_SIZE, "patch=8"],
    "vit-l16-i21k-augreg": [*VIT_SIZE, "patch=8"],
    "vit-g14-jft3b": [*VIT_SIZE, "patch=8"],
    "igpt-s": ["width=16", "depth=1", "heads=2"],
    "igpt-s-bert": ["width=16", "depth=1", "heads=2"],
    "clip-vit-l14": TOWER,
    "clip-vit-l14-336": TOWER,
    "clip-rn50": ["embed=16", *RESNET_TOWER],
    "clip-rn50-words": ["embed=16", *RESNET_TOWER],
    "rn50-words": ["depths=[1, 1, 1, 1]"],
    "rn50-caption": RESNET_TOWER,
    "siglip-vit-b16": TOWER,
    "resnet50-i1k": ["depths=[1, 1, 1, 1]"],
    "deit-ti": [*VIT_SIZE, "patch=8"],
    "deit-ti-distilled": [*VIT_SIZE, "patch=8"],
    "mae-b": [*VIT_SIZE, "patch=8", "decoder_width=16", "decoder_depth=1", "decoder_heads=2"],
}
STEPS, PIXELS, CLASSES_HERE, COLORS = 2, 32, 3, 8


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, make_dataset: Callable[..., Any]) -> Path:
    """The storage of one small run of each, trained one after the other in a process of its own."""
    root = tmp_path_factory.mktemp("recipes")
    make_dataset(Storage(str(root / "data")), {"train": 24}, width=PIXELS, height=PIXELS, classes=CLASSES_HERE)
    (root / "jobs.json").write_text(
        json.dumps([{"config": str(RECIPES / f"{name}.yaml"), "overrides": overrides(name, root)} for name in SMALL])
    )
    env = {
        **os.environ, "PYTHONPATH": str(ROOT), "TORCH_EXTENSIONS_DIR": str(root / "extensions"), "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
    }  # fmt: skip
    drive = ROOT / "tests" / "unit" / "train" / "drive.py"
    done = subprocess.run(
        [sys.executable, str(drive), str(root / "jobs.json"), str(root / "results.json")],
        env=env,
        capture_output=True,
        text=True,
        timeout=500,
    )
    assert done.returncode == 0, done.stderr[-5000:]
    errors = [result["error"] for result in json.loads((root / "results.json").read_text())]
    assert dict(zip(SMALL, errors, strict=True)) == dict.fromkeys(SMALL)
    return root / "runs"


def overrides(name: str, root: Path) -> list[str]:
    """Of a recipe: the model small, two steps of four small images in fp32; everything else as it is."""
    config = load_config(RECIPES / f"{name}.yaml")
    p = config.pretrain
    assert p is not None
    given = [
        f"storage={root}/runs", "cluster=local", f"data.url={root}/data", "pretrain.batch=4", "pretrain.micro_batch=2",
        f"pretrain.duration={STEPS} steps", "pretrain.schedule.warmup=1 step", "pretrain.log=1 step", "pretrain.precision=fp32",
        f"pretrain.image.pixels={8 if name.startswith('igpt') else PIXELS}", *(f"pretrain.model.{size}" for size in SMALL[name]),
    ]  # fmt: skip
    if p.schedule.cooldown:
        given.append("pretrain.schedule.cooldown=1 step")
    if p.text:
        given.append("pretrain.text={size: 520, length: 12}")
    if name.startswith("igpt"):
        given.append(f"pretrain.palette.colors={COLORS}")
    if p.start:
        given += [f"pretrain.start={root}/runs/clip-vit-l14", "pretrain.image.pixels=48", "pretrain.image.enlarge=true"]
    if p.objective.name == "distil":
        given.append(f"pretrain.objective.teacher={root}/runs/resnet50-i1k")
    return given


@pytest.mark.parametrize("name", SMALL)
def test_a_recipe_trains(trained: Path, name: str) -> None:
    rows = read_history(Storage(str(trained / name)))
    assert [row["step"] for row in rows] == [1, 2] and all(math.isfinite(row["train/loss"]) for row in rows)
    assert all(0 < row["train/grad_norm"] < math.inf for row in rows)


@pytest.mark.parametrize(
    ("name", "loss"),
    [
        ("vit-b32-jft", math.log(CLASSES_HERE)),  # a head of zeros
        ("igpt-s", math.log(COLORS)), ("igpt-s-bert", math.log(COLORS)),
        ("vit-b16-jft-masked", math.log(512)),
        # Sigmoids at a bias of -10: one class of each image is wrong by 10, nearly.
        ("vit-ti16-i21k-augreg", 10 + CLASSES_HERE * math.log1p(math.exp(-10))),
        ("vit-g14-jft3b", 10 + CLASSES_HERE * math.log1p(math.exp(-10))),
    ],
)  # fmt: skip
def test_the_first_loss_is_the_theoretical_one(trained: Path, name: str, loss: float) -> None:
    assert read_history(Storage(str(trained / name)))[0]["train/loss"] == pytest.approx(loss, rel=1e-5)


def test_a_run_that_starts_from_another_begins_with_its_weights(trained: Path) -> None:
    old, new = (find_model(Storage(str(trained / name)))[1] for name in ("clip-vit-l14", "clip-vit-l14-336"))
    assert set(old) == set(new) and new["visual.pos_embed"].shape[1] > old["visual.pos_embed"].shape[1]
    same = [name for name in old if name != "visual.pos_embed"]
    assert max(float((old[name] - new[name]).abs().max()) for name in same) < 1e-4  # two steps of at most 2e-5, and weight decay
