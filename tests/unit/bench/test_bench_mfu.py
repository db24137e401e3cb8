"""The bench of GPUs, on tiny models without one: every variant's arithmetic, and that nothing it finds is lost."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner

from tests.bench.mfu import fp8, peers
from tests.bench.mfu.__main__ import NOT_RUN, Run, main
from tests.bench.mfu.measure import Bench, Settings
from tests.bench.mfu.recipes import VARIANTS, Recipe, recipe
from tests.bench.mfu.step import Step
from tests.bench.mfu.subjects import SUBJECTS

CPU = torch.device("cpu")
EAGER = Recipe(compiles="nothing", lr=1e-3)


def curve(name: str, how: Recipe, steps: int = 6) -> list[float]:
    subject = SUBJECTS[name]
    model = subject.make(CPU, small=True)
    step = Step(model, [subject.loss(16, model.options, CPU, seed) for seed in range(2)], how, CPU)
    return [float(step()) for _ in range(steps)]


@pytest.mark.parametrize("name", ["vit_h14", "clip_vit_h14", "igpt_xl"])
def test_every_way_of_taking_a_step_trains_the_same(name: str) -> None:
    exact = curve(name, replace(EAGER, weights="fp32", optimizer="foreach"))
    assert exact[-1] < exact[0], "it learns"
    assert curve(name, replace(EAGER, weights="fp32")) == pytest.approx(exact, abs=2e-5), "the flat optimiser is torch's"
    recomputed = curve(name, replace(EAGER, weights="fp32", recompute=0.5))
    assert recomputed == pytest.approx(exact, abs=2e-5)
    for changes in ({}, {"optimizer": "fused"}, {"weights": "autocast"}, {"compiles": "blocks", "backend": "aot_eager"}):
        assert curve(name, replace(EAGER, **changes)) == pytest.approx(exact, rel=0.03), changes  # type: ignore[arg-type]


def test_masters_behind_bf16_weights_keep_what_bf16_would_lose() -> None:
    """At a rate of 1e-6 no weight of a size near 1 moves in bf16, whose next number is 0.4% away."""
    how = replace(EAGER, lr=1e-6)
    for name in ("flat", "foreach"):
        layer = torch.nn.Linear(64, 64)
        torch.nn.init.ones_(layer.weight)
        step = Step(layer, [lambda model: model(torch.ones(2, 64, dtype=torch.bfloat16)).float().sum()], replace(how, optimizer=name), CPU)
        for _ in range(3):
            step()
        optimizer: Any = step.optimizer
        master = optimizer._parts[0].master if name == "flat" else optimizer._pairs[0][1][0]
        assert (layer.weight == 1).all() and master.dtype == torch.float32
        assert float(master.detach().flatten()[0]) == pytest.approx(1 - 3e-6 - 3e-7, abs=3e-7)  # AdamW's steps, and its decay


def test_products_in_8_bits_are_near_those_in_16() -> None:
    x = torch.randn(32, 64, dtype=torch.bfloat16, requires_grad=True)
    plain = torch.nn.Linear(64, 48).bfloat16()
    weights = torch.randn(32, 48, dtype=torch.bfloat16)

    def results(layer: torch.nn.Linear) -> list[torch.Tensor]:
        x.grad = layer.weight.grad = None
        out = layer(x)
        (out * weights).sum().backward()
        assert x.grad is not None and layer.weight.grad is not None
        return [out.detach(), x.grad, layer.weight.grad]

    expected = results(plain)
    assert fp8.convert(torch.nn.Sequential(plain)) == 1
    for got, want in zip(results(plain), expected, strict=True):
        apart = float((got - want).float().norm() / want.float().norm())
        assert 0.001 < apart < 0.08, "three bits of a number, two of a gradient's"


def test_parts_of_a_variant_go_together() -> None:
    found, batch = recipe("cudnn+fp8+recompute-half@48", EAGER)
    assert (found.attention, found.fp8, found.recompute, batch) == ("cudnn", True, 0.5, 48)
    for wrong in ("cudnn+nothing", "base@many"):
        with pytest.raises(ValueError, match=r"is no variant|should be a number"):
            recipe(wrong, EAGER)
    assert all(recipe(name, EAGER) for name in VARIANTS)


@pytest.mark.parametrize("name", ["vit_h14", "clip_vit_h14", "igpt_l"])
def test_the_peers_model_has_our_shape(name: str) -> None:
    """As many parameters, but for iGPT's start mark, which there is one colour more, and the loss of an untrained model."""
    subject = SUBJECTS[name]
    ours = subject.make(CPU, small=True)
    theirs = peers.make("transformers", subject.peers["transformers"], ours.options, CPU)
    more = sum(p.numel() for p in theirs.parameters()) - ours.parameter_count
    allowed = {"vit_h14": 0, "clip_vit_h14": 0, "igpt_l": 20 * 64}[name]
    assert abs(more) <= allowed
    with torch.no_grad():
        values = [float(subject.loss(8, ours.options, CPU, how=how)(model)) for model, how in ((ours, "ours"), (theirs, "transformers"))]
    assert values[0] == pytest.approx(values[1], rel=0.25)


def test_rows_tell_figures_and_failures() -> None:
    bench = Bench(Settings("vit_h14", CPU, small=True, seconds=0.01, pairs=2, backend="aot_eager", rate=1e9, kernels=True))
    [row] = bench.rows("eager@32")
    assert row["batch"] == 32 and bench.best == "eager"
    assert row["tflops"] == pytest.approx(row["images_per_s"] * bench.flops / 1e12)
    assert row["mfu"] == pytest.approx(row["tflops"] / 989) and row["of_measured"] == pytest.approx(row["tflops"] * 1000)
    assert len(row["kernels"]) > 5 and "failure" not in row
    [graph] = bench.rows("graph")
    assert graph["failure"] == "RuntimeError: CUDA graphs need a GPU"
    [peer] = bench.rows("transformers+eager")
    assert peer["theirs_images_per_s"] > 0 and len(peer["ratio"]) == 3
    [none] = bench.rows("open_clip")
    assert none["failure"] == "LookupError: open_clip has no vit_h14"
    assert [row["batch"] for row in bench.rows("sweep")] == [8, 16, 32, 64]
    [loss] = bench.rows("fp8-loss")
    assert 0 < loss["apart"] < 0.05


def test_the_command_writes_each_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    out = tmp_path / "rows.jsonl"
    usual = ["--device", "cpu", "--small", "--seconds", "0.01", "--only", "vit_h14", "--out", str(out)]
    done = CliRunner().invoke(main, [*usual, "--variants", "eager graph"])
    assert done.exit_code == 0, done.output
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert [row["variant"] for row in rows] == ["matrix rate", "eager", "graph"]
    assert rows[1]["of_measured"] > 0 and rows[2]["failure"].startswith("RuntimeError")
    late = CliRunner().invoke(main, [*usual, "--variants", "eager base", "--budget", "0"])
    assert late.exit_code == 0 and late.output.count(NOT_RUN) == 2
    wrong = CliRunner().invoke(main, [*usual, "--variants", "eagre"])
    assert wrong.exit_code == 2 and "'eagre' is no variant" in wrong.output


def test_a_process_that_dies_is_a_row() -> None:
    run = Run("cpu", True, 0.01, 2, "no-such-backend", None, False)
    rows = list(run.rows("vit_h14", ["norms", "eager"], 300))
    assert "failure" in rows[1] and rows[2]["images_per_s"] > 0, "what cannot be compiled does not stop the rest"
    _, row, other = run.rows("no-such-model", ["base", "eager"], 300)  # the first tells the matrix rate
    assert row["failure"].startswith("ended with 1: KeyError") and other["failure"] == NOT_RUN


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so() -> None:
    done = CliRunner().invoke(main, [])
    assert done.exit_code == 0 and done.output.startswith("No GPU is at hand") and done.output.count("\n") == 1
