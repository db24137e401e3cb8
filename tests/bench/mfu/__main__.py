"""How much of a GPU a training step uses, next to other projects', and what each way of taking the step gives.

    python -m tests.bench.mfu [--only vit_h14 --only igpt_xl] [--variants "base fp8 cudnn+max-autotune@256 sweep timm timm+eager"]
                              [--budget 540] [--out FILE] [--kernels]

One GPU; no Ray. Of this project only `pipeline/models` is used (and `pipeline/train` for the variants deepspeed, zero-2, zero-3 and
offload, which are skipped where something for them is missing), so it needs torch 2.8 or later, numpy, click and pydantic, and runs with
timm, transformers and open_clip where they are installed. A step is forward, backward and AdamW on random images that lie on the GPU: no
loader, no clipping. Floating-point operations are three times `pipeline.models.flops` (2 a multiply-add, causal attention as a full
square, recomputation not counted), for the peers' models as well. MFU is told against 989 TFLOP/s and against the best bf16 product
measured by the same process just before.

Each model has a process of its own, which is begun again where a variant kills it. A line of JSON a row goes to `--out` as soon as it is
known, failures too, so that a run that is cut off keeps what it found. A variant is a name of `recipes.py` (several joined by +, a
micro-batch after @); `sweep`: the best one so far at growing micro-batches until out of memory; `fp8-loss`: whether the loss in 8 bits
stays near that in 16; a peer's name: that project's model (autocast, compiled, fused AdamW; `timm+eager`: not compiled) and ours by the
best variant so far, in turn. `--device cpu --small` runs the same code on tiny models.
"""

from __future__ import annotations

import json
import os
import selectors
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import click
import torch

from tests.bench.mfu import peers
from tests.bench.mfu.device import PEAK, SHAPES, SMALL_SHAPES, matrix_rates, name
from tests.bench.mfu.measure import FP8_LOSS, SWEEP, Bench, Row, Settings, failure
from tests.bench.mfu.recipes import BASE, VARIANTS, Recipe, recipe
from tests.bench.mfu.subjects import SUBJECTS
from tests.bench.pairs import machine

RATE = "matrix rate"
# The order is that of what is most wanted, in case the time is over before the end.
USUAL = [
    BASE, "cudnn", "flash", "eager", "autocast", "fused", SWEEP, *peers.PEERS, "fp8", FP8_LOSS, "norms", "whole", "graph",
    "max-autotune", "reduce-overhead", "foreach", "efficient", "math", "recompute-half", "recompute", "deepspeed", "zero-3", "offload",
]  # fmt: skip
NOT_RUN = "not run: no time is left for it"
GRACE = 10.0  # seconds that a process may be late


# The process of one model


def run_child(task: dict[str, Any]) -> None:
    """Measures, and prints a line of JSON before each variant and one a row."""
    began, longest = time.monotonic(), 0.0
    device = torch.device(task["device"])
    rates = matrix_rates(device, SMALL_SHAPES if task["small"] else SHAPES, 0.05 if task["small"] else 0.4)
    shape, rate = max(rates.items(), key=lambda each: each[1])
    tell({
        "model": task["model"], "variant": RATE, "tflops": rate / 1e12, "rates": rates,
        "note": f"bf16, {shape}; " + ", ".join(f"{name}: {each / 1e12:,.0f}" for name, each in rates.items()),
    })  # fmt: skip
    settings = Settings(
        task["model"], device, task["small"], task["seconds"], task["pairs"], task["backend"], task["batch"], task["kernels"], rate
    )
    bench = Bench(settings, task["best"])
    for variant in task["variants"]:
        if time.monotonic() - began + longest > task["budget"]:
            tell({"model": task["model"], "variant": variant, "failure": NOT_RUN})
            continue
        started = time.monotonic()
        tell({"begin": variant})
        try:
            for row in bench.rows(variant):
                tell(row | {"best": bench.best})
        except Exception as e:  # noqa: BLE001 - nothing works any more on this device, in this process
            tell({"model": task["model"], "variant": variant, "failure": failure(e)})
            tell({"end": variant})
            sys.exit(1)
        tell({"end": variant})
        longest = max(longest, time.monotonic() - started)
        if uses_deepspeed(variant):  # it keeps hold of memory
            return


def uses_deepspeed(variant: str) -> bool:
    return any(VARIANTS.get(each, {}).get("engine") == "deepspeed" for each in variant.partition("@")[0].split("+"))


def tell(what: dict[str, Any]) -> None:
    print(json.dumps(what), flush=True)


# Its parent


@dataclass
class Run:
    """What is asked of all models."""

    device: str
    small: bool
    seconds: float
    pairs: int
    backend: str
    batch: int | None
    kernels: bool

    def rows(self, model: str, variants: list[str], budget: float) -> Iterator[Row]:
        """Of one model, within `budget` seconds; what a process that died left is taken up by another."""
        end, best = time.monotonic() + budget, BASE
        left = list(variants)
        while left and budget > 0:
            task = {"model": model, "variants": left, "budget": end - time.monotonic(), "best": best, **asdict(self)}
            begun, died, before = None, "", len(left)
            for told in _lines(task, end + GRACE):
                if "died" in told:
                    died = told["died"]
                elif "begin" in told:
                    begun = told["begin"]
                    left = left[left.index(begun) + 1 :]
                elif "end" in told:
                    begun = None
                else:
                    best = told.pop("best", best)
                    if str(told.get("failure", "")).startswith(NOT_RUN):
                        left.remove(told["variant"])
                    yield told
            if begun is not None:
                yield {"model": model, "variant": begun, "failure": died}
            elif len(left) == before:  # it did not come so far as to begin one, nor would the next
                yield {"model": model, "variant": left.pop(0), "failure": died}
                break
            if time.monotonic() > end:
                break
        yield from ({"model": model, "variant": each, "failure": NOT_RUN} for each in left)


def _lines(task: dict[str, Any], end: float) -> Iterator[dict[str, Any]]:
    """What a process for `task` tells, then {"died": why} if it did not end well. It is killed at `end`."""
    command = [sys.executable, "-m", "tests.bench.mfu", "--child", json.dumps(task)]
    with (
        tempfile.TemporaryFile("w+") as errors,
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, env=os.environ | {"PYTHONUNBUFFERED": "1"}) as process,
        selectors.DefaultSelector() as ready,
    ):
        assert process.stdout is not None
        os.set_blocking(process.stdout.fileno(), False)
        ready.register(process.stdout, selectors.EVENT_READ)
        text, is_late = b"", False
        while not is_late:
            is_late = not ready.select(max(0.0, end - time.monotonic()))
            data = b"" if is_late else os.read(process.stdout.fileno(), 2**16)
            *lines, text = (text + data).split(b"\n")
            yield from (json.loads(line) for line in lines if line.startswith(b"{"))
            if not data:
                break
        if is_late:
            process.kill()
        if process.wait() or is_late:
            errors.seek(0)
            said = [line for line in errors.read().splitlines() if line.strip()]
            yield {"died": "killed: the time was over" if is_late else f"ended with {process.returncode}: {said[-1][:200] if said else ''}"}


# What people see


def table_row(row: Row) -> str:
    def told(key: str, form: str) -> str:
        return format(row[key], form) if key in row else ""

    note = row.get("failure") or row.get("note") or ""
    if "kernels" in row:
        note += "; ".join(f"{name} {share:.0%}" for name, _, share in row["kernels"][:5])
    if "clock_mhz" in row:
        note += f" {row['clock_mhz']:.0f} MHz, {row['power_w']:.0f} W"
    cells = [
        row["model"], row["variant"], told("batch", "d"), told("images_per_s", ",.1f"), told("tflops", ",.1f"), told("mfu", ".1%"),
        told("of_measured", ".1%"), f"{row['step_s'] * 1000:,.1f}" if "step_s" in row else "", told("peak_gib", ".1f"), note.strip(),
    ]  # fmt: skip
    return "| " + " | ".join(cells).replace("\n", " ") + " |"


HEAD = (
    f"| model | variant | micro-batch | images/s | TFLOP/s | MFU of {PEAK / 1e12:.0f} | of the matrix rate | ms a step | peak GiB | |\n"
    "|---|---|---|---|---|---|---|---|---|---|"
)


@click.command()
@click.option("--only", multiple=True, type=click.Choice(list(SUBJECTS)), help="models; by default all")
@click.option("--variants", default=" ".join(USUAL), help="with blanks between; by default all there are, a peer's where it has the model")
@click.option("--budget", default=540.0, show_default=True, help="seconds in all, shared among the models")
@click.option("--out", type=click.Path(dir_okay=False, path_type=Path), help="lines of JSON are added here")
@click.option("--batch", type=click.IntRange(1), help="micro-batch; by default one that fits on 139 GiB")
@click.option("--seconds", default=4.0, show_default=True, help="that each figure is timed for")
@click.option("--pairs", default=8, show_default=True, help="with each peer")
@click.option("--kernels", is_flag=True, help="name the kernels that take most of each variant's step")
@click.option("--backend", default="inductor", show_default=True, help="of torch.compile")
@click.option("--device", default="cuda", type=click.Choice(["cuda", "cpu"]), show_default=True)
@click.option("--small", is_flag=True, help="tiny models of the same families, to try the code")
@click.option("--child", hidden=True)
def main(
    only: tuple[str, ...], variants: str, budget: float, out: Path | None, batch: int | None, seconds: float, pairs: int, kernels: bool,
    backend: str, device: str, small: bool, child: str | None,
) -> None:  # fmt: skip
    if child:
        return run_child(json.loads(child))
    wanted = variants.split()
    for each in wanted:
        first, _, rest = each.partition("@")[0].partition("+")
        try:
            recipe(rest or BASE if first in (*peers.PEERS, SWEEP, FP8_LOSS) else each, Recipe())
        except ValueError as e:
            raise click.UsageError(f"--variants: {e}") from None
    if device == "cuda" and not torch.cuda.is_available():
        print(f"No GPU is at hand (torch {torch.__version__} sees none), so nothing is measured; --device cpu --small tries the code.")
        return None
    begun, run = time.monotonic(), Run(device, small, seconds, pairs, backend, batch, kernels)
    there = ", ".join(f"{each} {_version(each)}" if peers.installed(each) else f"no {each}" for each in (*peers.PEERS, "deepspeed"))
    where = name() if device == "cuda" else "CPU"
    print(f"{machine()}, torch {torch.__version__}, {where}; {there}\n\n{HEAD}", flush=True)
    models = list(only) or list(SUBJECTS)
    for n, model in enumerate(models):
        share = (budget - (time.monotonic() - begun)) / (len(models) - n)
        asked = [v for v in wanted if _has(model, v) or variants != " ".join(USUAL)]
        for row in run.rows(model, asked, share):
            print(table_row(row), flush=True)
            if out is not None:
                with out.open("a") as f:
                    f.write(json.dumps({"torch": torch.__version__, "where": where, "small": small, **row}) + "\n")
    return None


def _has(model: str, variant: str) -> bool:
    """Whether the variant means something for the model, by default."""
    return variant not in peers.PEERS or (variant in SUBJECTS[model].peers and peers.installed(variant))


def _version(package: str) -> str:
    from importlib.metadata import PackageNotFoundError, version

    for each in (package, f"{package}_torch"):
        try:
            return version(each)
        except PackageNotFoundError:
            continue
    return ""


if __name__ == "__main__":
    main()
