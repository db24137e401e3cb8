"""A plan in words and numbers, for `--plan`."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from pipeline.config import Config, fingerprint
from pipeline.core.units import format_bytes, format_flops
from pipeline.plan.plan import Plan


def describe(config: Config, plan: Plan | None, estimated: bool, workers: int) -> dict[str, Any]:
    """Plain values: the resolved config, its hash, and the plan of pre-training where there is one."""
    stages = [name for name in ("shard", "pretrain", "evaluate") if getattr(config, name)]
    facts: dict[str, Any] = {
        "config": config.model_dump(mode="json", by_alias=True),
        "hash": fingerprint(config),
        "stages": [*stages, "report"],
    }
    if plan and config.pretrain:
        p = config.pretrain
        facts["pretrain"] = {
            **asdict(plan),
            "samples_are_estimated": estimated,
            "workers": workers,
            "micro_batches_a_step": p.batch // p.micro_batch,
            "rounds_a_step": -(-(p.batch // p.micro_batch) // workers),
            "memory_a_worker": plan.memory.total,
            "training_flops": plan.flops_a_sample * plan.samples,
            "requests_a_1000_samples": plan.reading.requests if plan.reading else None,
        }
    return facts


def as_text(facts: dict[str, Any], config: str) -> str:
    lines = [config, f"hash         {facts['hash']}", f"stages       {', '.join(facts['stages'])}"]
    if p := facts.get("pretrain"):
        about = "about " if p["samples_are_estimated"] else ""
        memory = p["memory"]
        lines += [
            f"steps        {about}{p['steps']:,} ({p['warmup']:,} of warm-up), "
            f"{about}{p['samples']:,} samples, {about}{p['samples_an_epoch']:,} an epoch",
            f"batch        {p['micro_batches_a_step']} micro-batches a step on {p['workers']} workers, {p['rounds_a_step']} each",
            f"parameters   {p['parameters']:,}",
            f"compute      {format_flops(p['flops_a_sample'])} a sample, {format_flops(p['training_flops'])} in all",
            f"memory       {format_bytes(p['memory_a_worker'])} a worker: "
            + ", ".join(f"{name} {format_bytes(memory[name])}" for name in ("parameters", "gradients", "optimizer", "activations")),
        ]
        if reading := p["reading"]:
            size, requests = reading["sample_bytes"], p["requests_a_1000_samples"]
            lines.append(
                f"store        {about}{format_bytes(size)} a sample, {about}{format_bytes(size * p['samples_an_epoch'])} an epoch; "
                f"every 1,000 samples/s ask for {format_bytes(1000 * size)}/s in {requests:,.0f} requests/s"
            )
    return "\n".join([*lines, "nothing was started"])
