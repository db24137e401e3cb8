from __future__ import annotations

import importlib.util
import json
import math
import pickle
import platform
import threading
from collections.abc import Callable
from itertools import islice, pairwise
from pathlib import Path
from typing import Any

import pytest
import torch

from pipeline.config.pretrain import Optimizer
from pipeline.config.schema import Cluster
from pipeline.core.errors import CheckpointError, ConfigError, Diverged
from pipeline.core.storage import Storage
from pipeline.core.world import World
from pipeline.models import create
from pipeline.stream import open_stream
from pipeline.train.job import choose_workers
from pipeline.train.library import _hidden, check_precision, is_slow
from pipeline.train.optim import OPTIMIZERS, build_optimizer, parameter_groups
from pipeline.train.schedule import SCHEDULES, factor


@pytest.mark.parametrize(
    ("name", "step", "value"),
    [
        ("cosine", 0, 0.25), ("cosine", 2, 0.75), ("cosine", 3, 1.0), ("cosine", 4, 1.0),
        ("cosine", 54, 0.5), ("cosine", 29, 0.5 * (1 + math.cos(math.pi / 4))), ("cosine", 103, 0.5 * (1 + math.cos(math.pi * 0.99))),
        ("linear", 1, 0.5), ("linear", 4, 1.0), ("linear", 54, 0.5), ("linear", 103, 0.01),
        ("constant", 3, 1.0), ("constant", 103, 1.0),
    ],
)  # fmt: skip
def test_schedule(name: str, step: int, value: float) -> None:
    """104 steps, 4 of them to warm up."""
    assert factor(name, step, 104, 4) == pytest.approx(value, abs=1e-12)


@pytest.mark.parametrize("name", sorted(SCHEDULES))
def test_schedules_without_warmup_and_of_one_step(name: str) -> None:
    assert factor(name, 0, 10, 0) == 1.0 and factor(name, 0, 1, 0) == 1.0
    rates = [factor(name, s, 50, 0) for s in range(50)]
    assert all(a >= b >= 0 for a, b in pairwise(rates)) and rates[-1] > 0  # no step is wasted
    assert factor(name, 3, 4, 9) == pytest.approx(4 / 9)  # all of it warm-up


def test_what_decays() -> None:
    model = create("vit", width=16, depth=1, heads=2, patch=4, pixels=8, classes=3)
    names = {id(p): n for n, p in model.named_parameters()}
    decay, keep = parameter_groups(model, Optimizer(weight_decay=0.3))
    assert (decay["weight_decay"], keep["weight_decay"]) == (0.3, 0.0)
    assert {names[id(p)] for p in decay["params"]} == {
        "patch_embed.proj.weight", "head.weight", *(f"blocks.0.{m}.weight" for m in ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2"))
    }  # fmt: skip
    assert len(decay["params"]) + len(keep["params"]) == len(names)


def test_what_does_not_decay_of_other_models() -> None:
    """Positions of every kind, tokens and probes, wherever they are in the model."""
    tower = {"kind": "vit", "width": 16, "depth": 1, "heads": 2, "patch": 4}
    text = {"kind": "transformer", "width": 16, "depth": 1, "heads": 2}
    relative = {"positions": "relative", "pool": "map"}
    for model, kept in (
        (create("vit", width=16, depth=1, heads=2, patch=4, pixels=8, **relative), {"blocks.0.attn.relative.weight", "attn_pool.latent"}),
        (create("vit", width=16, depth=1, heads=2, patch=4, pixels=8, positions="learned-2d"), {"cls_token", "pos_embed_x", "pos_embed_y"}),
        (create("clip", embed=8, vision={**tower, **relative}, text=text, pixels=8), {"visual.attn_pool.latent"}),
        (create("igpt", width=16, depth=1, heads=2, pixels=4), {"wte.weight", "wpe.weight"}),
    ):
        names = {id(p): n for n, p in model.named_parameters() if p.ndim > 1}
        left = {names[id(p)] for p in parameter_groups(model, Optimizer(weight_decay=0.3))[1]["params"] if id(p) in names}
        assert kept <= left
        decayed = {names[id(p)] for p in parameter_groups(model, Optimizer(weight_decay=0.3))[0]["params"]}
        assert all(n.endswith((".weight", "pos_embed")) for n in decayed), "CLIP decays its positions, as its paper says"


@pytest.mark.parametrize("name", sorted(OPTIMIZERS))
def test_optimizers(name: str) -> None:
    config = Optimizer(name=name, lr=0.1, betas=(0.8, 0.95), eps=1e-5, momentum=0.7, weight_decay=0.2)
    optimizer = build_optimizer(create("vit", width=16, depth=1, heads=2, patch=4, pixels=8, classes=3), config)
    assert type(optimizer).__name__.lower() == name.replace("-", "")
    first = optimizer.param_groups[0]
    assert (first["lr"], first["weight_decay"]) == (0.1, 0.2) and optimizer.param_groups[1]["weight_decay"] == 0
    expected = (
        {"momentum": 0.7} if name == "sgd" else {"betas": (0.8, 0.95)} if name == "adafactor" else {"betas": (0.8, 0.95), "eps": 1e-5}
    )
    assert {key: first[key] for key in expected} == expected


def test_layers_learn_at_rates_of_their_own() -> None:
    """BEiT's layer-wise decay: the head at the whole rate, each block below the next one's at half of it, what comes before them last."""
    model = create("vit", width=16, depth=2, heads=2, patch=4, pixels=8, classes=3)
    names = {id(p): n for n, p in model.named_parameters()}
    groups = parameter_groups(model, Optimizer(weight_decay=0.3, head_weight_decay=3.0, layer_decay=0.5, undecayed=("*mlp*",)))
    scales = {names[id(p)]: group["lr_scale"] for group in groups for p in group["params"]}
    assert (scales["head.weight"], scales["norm.weight"], scales["blocks.1.mlp.fc1.bias"]) == (1, 1, 0.5)
    assert (scales["blocks.0.attn.qkv.weight"], scales["patch_embed.proj.weight"], scales["cls_token"]) == (0.25, 0.125, 0.125)
    decays = {names[id(p)]: group["weight_decay"] for group in groups for p in group["params"]}
    assert (decays["head.weight"], decays["blocks.0.mlp.fc1.weight"], decays["blocks.0.attn.qkv.weight"]) == (3.0, 0, 0.3)
    assert sum(len(group["params"]) for group in groups) == len(names)


def test_layers_of_two_towers() -> None:
    tower = {"width": 16, "depth": 3, "heads": 2}
    model = create(
        "clip", embed=8, vision={"kind": "vit", "patch": 4, **tower}, text={"kind": "transformer", **tower, "depth": 1}, pixels=8
    )
    names = {id(p): n for n, p in model.named_parameters()}
    groups = parameter_groups(model, Optimizer(layer_decay=0.5))
    scales = {names[id(p)]: group["lr_scale"] for group in groups for p in group["params"]}
    assert (scales["visual.blocks.0.norm1.bias"], scales["visual.patch_embed.proj.weight"]) == (1 / 8, 1 / 16)
    assert (scales["text.blocks.0.norm1.bias"], scales["text.token_embed.weight"], scales["logit_scale"]) == (1 / 2, 1 / 4, 1)


@pytest.mark.parametrize("world_size", [1, 2, 3, 5, 7])
def test_batch_weights(make_dataset: Callable[..., Any], tmp_path: Path, world_size: int) -> None:
    """What `train` multiplies a loss by, and what DeepSpeed divides it by, leave 1 / n of each real micro-batch."""
    make_dataset(Storage(str(tmp_path)), {"train": 20})
    shares: dict[int, float] = {}
    for rank in range(world_size):
        stream = open_stream(str(tmp_path), global_batch=20, micro_batch=4, rank=rank, world_size=world_size, size=8)
        for batch in islice(iter(stream), stream.rounds):
            factor = batch.weight * stream.rounds * stream.world_size / stream.pieces
            shares[batch.index] = shares.get(batch.index, 0) + factor / stream.rounds / world_size
    assert [shares[n] for n in range(5)] == pytest.approx([0.2] * 5) and not any(shares[n] for n in shares if n >= 5)


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_fp16_needs_a_gpu() -> None:
    with pytest.raises(ConfigError, match=r"pretrain.precision: 'fp16' needs a GPU \(allowed on a CPU: bf16, fp32\)"):
        check_precision("fp16")
    check_precision("bf16")
    check_precision("fp32")


@pytest.mark.skipif(torch.cuda.is_available() or platform.machine() != "x86_64", reason="not an x86 machine without a GPU")
def test_bf16_is_slow_without_instructions_for_it() -> None:
    flags = Path("/proc/cpuinfo").read_text().split()
    assert is_slow("bf16") == ("avx512f" not in flags), flags
    assert not is_slow("fp32")


def test_world() -> None:
    world = World()
    assert world.is_main and world.sum([1.5, 2]) == [1.5, 2.0] and world.broadcast("x") == "x" and world.gather(3) == [3]
    world.barrier()
    assert not World(1, 2).is_main


def test_world_from_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    assert World.from_environment() == World(0, 1, 0)
    for name, value in {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1"}.items():
        monkeypatch.setenv(name, value)
    assert World.from_environment() == World(5, 8, 1)


def test_errors_of_training_cross_processes() -> None:
    for error in (Diverged("pretrain: the loss is nan"), CheckpointError("x")):
        assert str(pickle.loads(pickle.dumps(error))) == str(error)  # noqa: S301
    assert math.isnan(json.loads(json.dumps({"grad": math.nan}))["grad"])


@pytest.mark.parametrize(
    ("cluster", "gpus", "cores", "workers"),
    [
        ({}, 0, 8, 2),
        ({}, 0, 1, 1),
        ({}, 4, 8, 4),
        ({"gpus": 0}, 4, 8, 2),
        ({"gpus": 2}, 4, 8, 2),
        ({"gpus": 8, "min_gpus": 2}, 4, 8, 4),
        ({"workers": 3}, 0, 8, 3),
        ({"workers": 3}, 4, 8, 3),
        ({"workers": 4, "min_workers": 1}, 3, 8, 3),
        ({"workers": 4, "min_workers": 1}, 8, 8, 4),
        ({"min_workers": 3}, 4, 8, 4),
        ({"min_workers": 3}, 0, 8, 3),
        ({"min_workers": 1}, 0, 8, 2),
        ({"gpus": 8, "min_workers": 2}, 4, 8, 4),
        ({"gpus": 8, "workers": 8, "min_gpus": 2}, 4, 8, 4),
        ({"gpus": 8, "workers": 3, "min_gpus": 2}, 4, 8, 3),
        ({"gpus": 0, "workers": 4, "min_workers": 2}, 8, 3, 3),
    ],
)
def test_workers(cluster: dict[str, int], gpus: int, cores: int, workers: int) -> None:
    assert choose_workers(Cluster.model_validate(cluster), gpus, cores) == workers


@pytest.mark.parametrize(
    ("cluster", "gpus", "message"),
    [
        ({"gpus": 8}, 4, "cluster.gpus: 8 are asked for, the cluster has 4 GPUs"),
        ({"gpus": 8, "min_gpus": 5}, 4, "cluster.min_gpus: 5 are asked for, the cluster has 4 GPUs"),
        ({"gpus": 8, "workers": 8, "min_gpus": 2}, 1, "cluster.min_gpus: 2 are asked for, the cluster has 1 GPU"),
        ({"gpus": 8, "min_workers": 2}, 0, "cluster.min_workers: 2 are asked for, the cluster has 0 GPUs"),
        ({"min_workers": 4}, 3, "cluster.min_workers: 4 are asked for, and there are 3 GPUs for them"),
        ({"min_workers": 3}, 0, "cluster.min_workers: 3 are asked for, and there are 2 cores for them"),
        ({"workers": 9}, 0, "cluster.workers: 9 are asked for, and there are 2 cores for them"),
        ({"workers": 9}, 4, "cluster.workers: 9 are asked for, and there are 4 GPUs for them"),
    ],
)
def test_more_workers_than_the_cluster_has(cluster: dict[str, int], gpus: int, message: str) -> None:
    with pytest.raises(ConfigError, match=f"^{message}$"):
        choose_workers(Cluster.model_validate(cluster), gpus, 2)


def test_a_module_is_hidden_from_one_thread_alone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "no_such_one.py").write_text("")
    monkeypatch.syspath_prepend(str(tmp_path))
    found: list[bool] = []

    def look() -> None:
        found.append(importlib.util.find_spec("no_such_one") is not None)

    with _hidden("no_such_one"):
        with pytest.raises(ModuleNotFoundError):
            importlib.import_module("no_such_one")
        other = threading.Thread(target=look)
        other.start()
        other.join()
    look()
    assert found == [True, True]
