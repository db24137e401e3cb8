"""What `--plan` predicts against what training took, on CPUs: the memory's peak, and the bytes that gloo carried.

    python -m tests.bench.plan [MODEL,PRECISION,STAGE,RANKS[,ROUNDS] ..]     # all of them take an hour on two cores

Models: vit, igpt, clip, with about 200 million parameters each, so that the state is 2 GiB or more. Each combination trains two steps by
the real engine (`pipeline.train.trial`), one process a rank, in a network namespace of its own (`unshare -n`, which needs root): the bytes
are those of its loopback in the second step, so nobody else's are among them, and headers and acknowledgements are. Memory is VmHWM of a
rank above its VmRSS once all is imported and the process group is there, the most of all ranks; what is freed stays with the process as
in training (train/worker.keep_memory). Buckets are DeepSpeed's defaults, 5e8 numbers. In bf16 the images are smaller: on a CPU without such
instructions a step takes minutes.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from pipeline.config import parse_config
from pipeline.plan.traffic import traffic_of
from pipeline.plan.workload import Workload
from pipeline.train.inputs import planned_facts
from tests.bench.pairs import machine

ROOT = Path(__file__).parents[2]
CLASSES, STEPS = 1000, 2
MODELS: dict[str, dict[str, Any]] = {
    "vit": {
        "model": {"name": "vit", "width": 1024, "depth": 16, "heads": 16, "patch": 16}, "image": {"pixels": 112}, "micro_batch": 4,
    },
    "igpt": {
        "model": {"name": "igpt", "width": 1024, "depth": 16, "heads": 8}, "image": {"pixels": 16}, "objective": "next-pixel", "micro_batch": 1,
    },
    "clip": {
        "model": {
            "name": "clip", "embed": 512, "vision": {"kind": "vit", "width": 1024, "depth": 12, "heads": 16, "patch": 16},
            "text": {"width": 512, "depth": 12, "heads": 8},
        },
        "image": {"pixels": 112}, "objective": "contrastive", "micro_batch": 4,
    },
}  # fmt: skip
SMALL: dict[str, dict[str, Any]] = {
    "vit": {"image": {"pixels": 32}},
    "igpt": {"image": {"pixels": 4}},
    "clip": {"image": {"pixels": 32}, "text": {"length": 8}},
}
ALL = [
    *(f"vit,fp32,{stage},{ranks}" for ranks in (1, 2) for stage in range(4)),
    *(f"{model},fp32,{stage},2" for model in ("clip", "igpt") for stage in (1, 2, 3)),
    *("clip,fp32,0,1", "igpt,fp32,0,1", "igpt,fp32,3,1"),
    *(f"{model},bf16,{stage},2" for model in ("vit", "clip", "igpt") for stage in (1, 2, 3)),
    *("vit,fp32,1,2,2", "vit,fp32,2,2,2", "vit,fp32,3,2,2"),
]


def measure(model: str, precision: str, stage: int, ranks: int, rounds: int) -> dict[str, float]:
    """Predicted and measured peak of a worker, and bytes that a worker sends in a step."""
    section = {**MODELS[model], **(SMALL[model] if precision == "bf16" else {})}
    section |= {"batch": section["micro_batch"] * ranks * rounds, "duration": "10 steps", "precision": precision, "zero": {"stage": stage}}
    values = {"name": "plan", "storage": "runs", "data": "/data", "pretrain": section}
    p = parse_config(values).pretrain
    assert p is not None
    load = Workload(p, planned_facts(p, CLASSES), ranks, on_cpu=True)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "config.json"
        file.write_text(json.dumps(values))
        trial = f"{sys.executable} -m pipeline.train.trial {file} {CLASSES} {rounds} {STEPS}"
        started = " & ".join(f"RANK={r} LOCAL_RANK={r} {trial} > {folder}/{r} 2> {folder}/{r}.log" for r in range(ranks))
        env = {
            **os.environ, "PYTHONPATH": str(ROOT), "WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": "29555", "CUDA_VISIBLE_DEVICES": "",
        }  # fmt: skip
        subprocess.run(["unshare", "-n", "bash", "-c", f"ip link set lo up; {started} & wait"], env=env, check=True)
        found = [
            json.loads(line) for r in range(ranks) for line in (Path(folder) / str(r)).read_text().splitlines() if line.startswith("{")
        ]
        if len(found) != ranks:
            raise SystemExit((Path(folder) / "0.log").read_text()[-2000:])
    return {
        "planned_peak": load.memory.peak,
        "peak": max(trial["peak_bytes"] for trial in found),
        "planned_sent": traffic_of(load).total,
        "sent": found[0]["sent"] / ranks,
    }


def main() -> None:
    print(machine())
    print("| model, precision, stage, ranks | peak, GiB: planned | measured | ratio | sent a step, MiB: planned | carried | ratio |")
    print("|---|---|---|---|---|---|---|")
    worst = [0.0, 0.0]
    for job in sys.argv[1:] or ALL:
        model, precision, stage, ranks, *rounds = job.split(",")
        m = measure(model, precision, int(stage), int(ranks), int(rounds[0]) if rounds else 1)
        memory, sent = m["planned_peak"] / m["peak"], m["planned_sent"] / m["sent"] if int(ranks) > 1 else 1.0
        worst = [max(worst[0], abs(memory - 1)), max(worst[1], abs(sent - 1))]
        wire = f"{m['planned_sent'] / 2**20:.0f} | {m['sent'] / 2**20:.0f} | {sent:.3f}" if int(ranks) > 1 else "- | - | -"
        print(f"| {job} | {m['planned_peak'] / 2**30:.2f} | {m['peak'] / 2**30:.2f} | {memory:.3f} | {wire} |", flush=True)
    print(f"furthest: memory {worst[0]:.1%} (goal 10%), bytes {worst[1]:.1%} (goal 5%)")


if __name__ == "__main__":
    main()
