"""What `--plan` predicts against what training took, on CPUs: the memory's peak, and the bytes that gloo carried.

    python -m tests.bench.plan [--keep FILE] [MODEL,PRECISION,STAGE,RANKS[,ROUNDS][,recompute][,optimizer|all] ..]

Models: vit, igpt, clip, with about 200 million parameters each, so that the state is 2 GiB or more; ROUNDS micro-batches a step; `optimizer`
and `all` are offloaded. All of them take an hour on two cores. Each combination trains two steps by the real engine
(`pipeline.train.trial`), one process a rank, in a network namespace of its own (`unshare -n`, which needs root): the bytes are those of its
loopback in the second step, so nobody else's are among them, and headers and acknowledgements are. Memory is VmHWM of a rank above its
VmRSS once all is imported and the process group is there, the most of all ranks; what is freed stays with the process as in training
(train/heap.py). Buckets are as large as the model (train/settings.py). In bf16 the images are smaller: on a CPU without such
instructions a step takes minutes.

What was measured is kept in FILE, and not measured again: a plan that was mended is compared with it at once.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass
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
    *(f"{model},fp32,{stage},2" for model in MODELS for stage in range(4)),
    *(f"vit,fp32,{stage},1" for stage in range(4)),
    *("igpt,fp32,0,1", "igpt,fp32,3,1", "clip,fp32,0,1"),
    *("vit,fp32,1,2,2", "vit,fp32,2,2,2", "vit,fp32,3,2,2"),
    *("vit,fp32,2,2,optimizer", "vit,fp32,3,2,all"),
    *("igpt,fp32,1,2,recompute", "igpt,fp32,3,2,recompute"),
    *("vit,fp32,2,3", "vit,fp32,3,3"),
    *("vit,bf16,1,2", "vit,bf16,2,2", "igpt,bf16,3,2", "clip,bf16,2,2"),
]


@dataclass(frozen=True)
class Job:
    """One combination; `str` is how it is typed."""

    model: str
    precision: str
    stage: int
    ranks: int
    rounds: int = 1
    recompute: bool = False
    offload: str = "none"

    @classmethod
    def parse(cls, typed: str) -> Job:
        model, precision, stage, ranks, *more = typed.split(",")
        rounds = next((int(word) for word in more if word.isdigit()), 1)
        offload = next((word for word in more if word in ("optimizer", "all")), "none")
        return cls(model, precision, int(stage), int(ranks), rounds, "recompute" in more, offload)

    @property
    def values(self) -> dict[str, Any]:
        """Its config."""
        section = {**MODELS[self.model], **(SMALL[self.model] if self.precision == "bf16" else {})}
        section |= {
            "batch": section["micro_batch"] * self.ranks * self.rounds, "duration": "10 steps", "precision": self.precision,
            "zero": {"stage": self.stage, "offload": self.offload}, "recompute": self.recompute,
        }  # fmt: skip
        return {"name": "plan", "storage": "runs", "data": "/data", "pretrain": section}

    @property
    def load(self) -> Workload:
        p = parse_config(self.values).pretrain
        assert p is not None
        return Workload(p, planned_facts(p, CLASSES), self.ranks, on_cpu=True)


def measure(job: Job) -> list[dict[str, Any]]:
    """What each rank found (train/trial.Trial)."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "config.json"
        file.write_text(json.dumps(job.values))
        trial = f"{sys.executable} -m pipeline.train.trial {file} {CLASSES} {job.rounds} {STEPS}"
        started = " & ".join(f"RANK={r} LOCAL_RANK={r} {trial} > {folder}/{r} 2> {folder}/{r}.log" for r in range(job.ranks))
        env = {
            **os.environ, "PYTHONPATH": str(ROOT), "WORLD_SIZE": str(job.ranks), "LOCAL_WORLD_SIZE": str(job.ranks),
            "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29555", "CUDA_VISIBLE_DEVICES": "",
        }  # fmt: skip
        subprocess.run(["unshare", "-n", "bash", "-c", f"ip link set lo up; {started} & wait"], env=env, check=True)
        outputs = [(Path(folder) / str(r)).read_text().splitlines() for r in range(job.ranks)]
        found = [json.loads(line) for lines in outputs for line in lines if line.startswith("{")]
        if len(found) != job.ranks:
            raise SystemExit((Path(folder) / "0.log").read_text()[-2000:])
    return found


def main() -> None:
    arguments = sys.argv[1:]
    keep = Path(arguments[1]) if arguments[:1] == ["--keep"] else None
    arguments = arguments[2:] if keep else arguments
    kept = json.loads(keep.read_text()) if keep and keep.exists() else {}
    print(machine())
    print("| model, precision, stage, ranks | peak, GiB: planned | measured | ratio | sent a step, MiB: planned | carried | ratio |")
    print("|---|---|---|---|---|---|---|")
    worst = [0.0, 0.0]
    for typed in arguments or ALL:
        job = Job.parse(typed)
        if typed not in kept:
            kept[typed] = measure(job)
            if keep:
                keep.write_text(json.dumps(kept))
        peak, planned = max(rank["peak_bytes"] for rank in kept[typed]), job.load.memory.peak
        sent, planned_sent = kept[typed][0]["sent"] / job.ranks, traffic_of(job.load).total
        memory, wire = planned / peak, planned_sent / sent if job.ranks > 1 else 1.0
        worst = [max(worst[0], abs(memory - 1)), max(worst[1], abs(wire - 1))]
        carried = f"{planned_sent / 2**20:.0f} | {sent / 2**20:.0f} | {wire:.3f}" if job.ranks > 1 else "- | - | -"
        print(f"| {typed} | {planned / 2**30:.2f} | {peak / 2**30:.2f} | {memory:.3f} | {carried} |", flush=True)
    print(f"furthest: memory {worst[0]:.1%} (goal 10%), bytes {worst[1]:.1%} (goal 5%)")


if __name__ == "__main__":
    main()
