"""Training steps against those of other projects, and sampling with a cache against recomputing.

    python -m tests.bench.models [vit] [clip] [igpt] [sampling] [--peers DIR --python PY] [--pairs 20] [--steps 6]

`DIR` holds the peers' scripts (`step_*.py`), `PY` is a Python that has their packages. Ours and theirs take turns, each in a process of its
own, with the same shapes, precision and loss: three steps to warm up, then the median of `--steps` steps of forward, backward and fused
AdamW. Printed: the median of the ratios, pair by pair, and the 95% interval of that median (percentile bootstrap, 10,000 draws).
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import click
import numpy as np
import torch
import torch.nn.functional as F

from pipeline.models import create
from pipeline.models.sampling import next_logits, sample
from pipeline.train.heap import keep_memory
from tests.bench.pairs import interval, machine, median, race

Loss = Callable[[torch.nn.Module, torch.device], torch.Tensor]


# One function a peer: inputs as the peer's script makes them, and the loss it takes.


def next_pixel(batch: int) -> Loss:
    pixels = torch.randint(0, 512, (batch, 1024))
    return lambda model, device: F.cross_entropy(model(pixels.to(device)).flatten(0, 1).float(), pixels.to(device).flatten())


def classes(batch: int) -> Loss:
    x, y = torch.randn(batch, 3, 224, 224), torch.randint(0, 1000, (batch,))
    return lambda model, device: F.cross_entropy(model(x.to(device)).float(), y.to(device))


def pairs_of(batch: int) -> Loss:
    """The loss written as open_clip's: logits of both sides, cross-entropy of each."""
    images, texts = torch.randn(batch, 3, 224, 224), torch.randint(1, 49000, (batch, 77))
    texts[:, 20] = 49407

    def loss(model: torch.nn.Module, device: torch.device) -> torch.Tensor:
        image, text, scale = model(images.to(device), texts.to(device))
        logits, own = scale * image @ text.T, torch.arange(batch, device=device)
        return (F.cross_entropy(logits, own) + F.cross_entropy(logits.T, own)) / 2

    return loss


class Step(NamedTuple):
    """A row of the table: our model; the peer's script and its name of the model; the least ratio wanted."""

    model: str
    script: str
    theirs: str
    batch: int
    loss: Callable[[int], Loss]
    goal: float
    options: Mapping[str, Any] = {}


STEPS = {
    "vit": Step("vit_s16", "step_timm.py", "vit_small_patch16_224", 16, classes, 1.0),
    # open_clip's ViT-B-32 has the plain GELU; OpenAI's, and ours as published, the quick one.
    "clip": Step("clip_vit_b32", "step_open_clip.py", "ViT-B-32", 16, pairs_of, 1.0, {"activation": "gelu"}),
    "igpt": Step("igpt_s", "step_hf_igpt.py", "s", 2, next_pixel, 1.5),
}
SAMPLING_GOAL = 20.0


# What runs in a process of its own


def time_step(what: Step, steps: int, bf16: bool, compiled: bool) -> dict[str, float]:
    """As the peers' scripts time theirs."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    keep_memory()  # as our worker does
    model: torch.nn.Module = create(what.model, **what.options).to(device).train()
    if compiled:
        model = torch.compile(model)  # type: ignore[assignment]
    optimizer, loss_of = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True), what.loss(what.batch)

    def step() -> None:
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=bf16):
            loss = loss_of(model, device)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if device.type == "cuda":
            torch.cuda.synchronize()

    for _ in range(3):
        step()
    times = []
    for _ in range(steps):
        begun = time.perf_counter()
        step()
        times.append(time.perf_counter() - begun)
    return {"samples_per_s": what.batch / statistics.median(times)}


def time_sampling(recompute: bool, batch: int, places: int = 8) -> dict[str, float]:
    """Images/s of iGPT-S at 32 x 32. With the cache all 1,024 tokens are sampled and timed. Recomputing is timed at `places` evenly spread
    over them, one look at each, and integrated between them by the trapezium rule."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = create("igpt_s", seed=0).to(device)
    tokens = torch.randint(0, 512, (batch, 1024), device=device)

    def seconds(prompt: int, looks: int) -> float:
        """That `looks` tokens after a prompt take."""
        begun = time.perf_counter()
        for _ in islice(next_logits(model, tokens, prompt, recompute=recompute), looks):
            pass
        if device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - begun

    seconds(64, 2)
    if recompute:
        at = np.linspace(0, 1023, places).round().astype(int)
        whole = float(np.trapezoid([seconds(int(n), 1) for n in at], at)) * 1024 / 1023
    else:
        begun = time.perf_counter()
        sample(model, batch)
        whole = time.perf_counter() - begun
    return {"samples_per_s": batch / whole}


def child(*what: str) -> list[str]:
    return [sys.executable, "-m", "tests.bench.models", "--child", json.dumps(what)]


def run_child(kind: str, *arguments: str) -> dict[str, float]:
    if kind == "sampling":
        return time_sampling(recompute=arguments[0] == "recompute", batch=int(arguments[1]))
    row = STEPS[kind]._replace(batch=int(arguments[1]))
    return time_step(row, int(arguments[0]), "bf16" in arguments, "compile" in arguments)


# The races


def report(label: str, other: str, found: dict[str, list[float]], goal: float) -> None:
    low, middle, high = interval([a / b for a, b in zip(found["ours"], found[other], strict=True)])
    verdict = "holds" if low >= goal - 0.02 else "does not hold"
    print(
        f"| {label} / {other}, {len(found['ours'])} pairs | {median(found['ours']):.3f} | {median(found[other]):.3f} "
        f"| {low:.2f}, **{middle:.2f}**, {high:.2f} | {goal:g}: {verdict} |",
        flush=True,
    )


@click.command()
@click.argument("names", nargs=-1, type=click.Choice([*STEPS, "sampling"]))
@click.option("--peers", type=click.Path(exists=True, file_okay=False, path_type=Path), help="folder of the peers' scripts")
@click.option("--python", default=sys.executable, help="a Python with the peers' packages")
@click.option("--pairs", default=20, show_default=True)
@click.option("--steps", default=6, show_default=True, help="that are timed in each process")
@click.option("--batch", type=int, help="samples a step, both sides; by default the peer's own, and one image sampled at once")
@click.option("--bf16", is_flag=True, help="autocast, both sides")
@click.option("--compile", "compiled", is_flag=True, help="torch.compile, both sides")
@click.option("--child", "what", hidden=True)
def main(
    names: tuple[str, ...],
    peers: Path | None,
    python: str,
    pairs: int,
    steps: int,
    batch: int | None,
    bf16: bool,
    compiled: bool,
    what: str | None,
) -> None:
    if what:
        print(json.dumps(run_child(*json.loads(what))))
        return
    names = names or (*STEPS, "sampling")
    if peers is None and set(names) & set(STEPS):
        raise click.UsageError("--peers: the folder of the peers' scripts is needed for " + ", ".join(n for n in names if n in STEPS))
    where = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    print(
        f"{machine()}, torch {torch.__version__}, {where}\n\n| ours / other | ours | other | low, median, high | goal |\n|---|---|---|---|---|"
    )
    flags = ["--bf16"] * bf16 + ["--compile"] * compiled
    for name in names:
        if name == "sampling":
            at_once = str(batch or 1)
            found = race(child(name, "cached", at_once), {"recomputing": child(name, "recompute", at_once)}, pairs, "samples_per_s")
            report(f"sampling, igpt_s, batch {at_once}: cached", "recomputing", found, SAMPLING_GOAL)
            continue
        row = STEPS[name]
        assert peers is not None
        size = str(batch or row.batch)
        ours = child(name, str(steps), size, *(flag.lstrip("-") for flag in flags))
        theirs = [python, str(peers / row.script), "--model", row.theirs, "--batch", size, "--steps", str(steps), *flags]
        report(f"step, {row.model}, batch {size}", row.script, race(ours, {row.script: theirs}, pairs, "samples_per_s"), row.goal)


if __name__ == "__main__":
    main()
