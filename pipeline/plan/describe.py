"""A plan in words and numbers, for `--plan`."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from pipeline.config import Config, fingerprint
from pipeline.core.units import format_bytes, format_count, format_flops, format_seconds
from pipeline.plan.fit import as_typed, smallest_change
from pipeline.plan.plan import UPLOAD, Plan
from pipeline.shards.forecast import Forecast

_FIELDS = (
    "steps",
    "warmup",
    "samples",
    "samples_an_epoch",
    "log_every",
    "validate_every",
    "parameters",
    "flops_a_sample",
    "cooldown",
    "timescale",
)


def describe(config: Config, plan: Plan | None, estimated: bool, workers: int, shard: Forecast | None = None) -> dict[str, Any]:
    """Plain values: the resolved config, its hash, what sharding will take, and the plan of pre-training where there is one, whose main
    figures are at the top."""
    stages = [name for name in ("shard", "pretrain", "evaluate") if getattr(config, name)]
    facts: dict[str, Any] = {
        "config": config.model_dump(mode="json", by_alias=True),
        "hash": fingerprint(config),
        "stages": [*stages, "report"],
    }
    if shard is not None:
        facts["shard"] = asdict(shard)
    if plan and config.pretrain:
        p, pace = config.pretrain, plan.pace
        change = smallest_change(plan.load, plan.device.memory) if plan.fits is False else None
        facts |= {
            "parameters": plan.parameters,
            "flops_per_sample": plan.flops_a_sample,
            "memory_bytes_per_worker": _memory(plan),
            "checkpoint_bytes": plan.checkpoint_bytes,
            "save_seconds": plan.save_seconds,
            "upload_bytes_per_s": UPLOAD,
            "steps": plan.steps,
            "samples": plan.samples,
            "workers": workers,
            "device": asdict(plan.device),
            "bytes_sent_per_step": {**asdict(plan.traffic), "total": plan.traffic.total},
            "step_seconds": asdict(pace),
            "mfu": pace.mfu,
            "calibrated": plan.measured is not None,
            "hours": plan.hours,
            "gpu_hours": plan.gpu_hours,
            "cost": plan.cost,
            "currency": config.cluster.currency,
            "fits": plan.fits,
            "smallest_change": change,
        }
        if reading := plan.reading:
            rate = pace.samples_per_second
            facts["store"] = {"bytes_per_s": rate * reading.sample_bytes, "requests_per_s": rate * reading.requests / 1000}
        facts["pretrain"] = {
            **{name: getattr(plan, name) for name in _FIELDS},
            "memory": {**plan.memory.items},
            "reading": asdict(plan.reading) if plan.reading else None,
            "samples_are_estimated": estimated,
            "workers": workers,
            "micro_batches_a_step": p.batch // p.micro_batch,
            "rounds_a_step": plan.load.rounds,
            "memory_a_worker": plan.peak,
            "training_flops": plan.flops_a_sample * plan.samples,
            "requests_a_1000_samples": plan.reading.requests if plan.reading else None,
        }
    return facts


def _memory(plan: Plan) -> dict[str, Any]:
    """The items at their most, the fullest moment and what is there then, and what lies in the host's memory beside a GPU."""
    m = plan.memory
    return {
        **m.items, "peak": plan.peak, "peak_at": m.peak_at, "at_peak": m.at_peak, "moments": m.moments,
        "activations_by_layer": plan.load.live.kept, "host": m.host, "buckets": m.buckets,
    }  # fmt: skip


def as_text(facts: dict[str, Any], config: str) -> str:
    lines = [config, f"hash         {facts['hash']}", f"stages       {', '.join(facts['stages'])}"]
    if s := facts.get("shard"):
        lines.append(
            f"shard        {'' if s['exact'] else 'about '}{s['rows']:,} rows in {s['parts']:,} parts; about {s['shards']:,} shards of "
            f"{s['rows_a_shard']:,} rows, {format_bytes(s['bytes'])} before any is dropped; planned in {s['passes']} passes over the rows, "
            f"in {s['ranges']:,} ranges, {format_bytes(s['plan_bytes'])} beside the shards meanwhile"
        )
    if p := facts.get("pretrain"):
        about = "about " if p["samples_are_estimated"] else ""
        lines += [
            f"steps        {about}{p['steps']:,} ({p['warmup']:,} of warm-up), "
            f"{about}{p['samples']:,} samples, {about}{p['samples_an_epoch']:,} an epoch",
            f"batch        {p['micro_batches_a_step']} micro-batches a step on {p['workers']} workers, {p['rounds_a_step']} each",
            f"parameters   {p['parameters']:,}",
            f"compute      {format_flops(p['flops_a_sample'])} a sample, {format_flops(p['training_flops'])} in all",
            *_memory_lines(facts),
            *_pace_lines(facts, about),
        ]
        if reading := p["reading"]:
            size, requests, store = reading["sample_bytes"], p["requests_a_1000_samples"], facts["store"]
            lines.append(
                f"store        {about}{format_bytes(size)} a sample, {about}{format_bytes(size * p['samples_an_epoch'])} an epoch; "
                f"every 1,000 samples/s ask for {format_bytes(1000 * size)}/s in {requests:,.0f} requests/s; "
                f"at this pace {format_bytes(store['bytes_per_s'])}/s in {store['requests_per_s']:,.1f} requests/s"
            )
        if facts["fits"] is False:
            device = facts["device"]
            lines.append(
                f"does not fit: {format_bytes(facts['memory_bytes_per_worker']['peak'])} a worker, and {device['name']} has "
                f"{format_bytes(device['memory'])}; smallest change that fits: {as_typed(facts['smallest_change'])}"
            )
    return "\n".join([*lines, "nothing was started"])


def _memory_lines(facts: dict[str, Any]) -> list[str]:
    """A table: one line an item, at its most and at the fullest moment."""
    memory, device = facts["memory_bytes_per_worker"], facts["device"]
    at = memory["at_peak"]
    of = f", {memory['peak'] / device['memory']:.0%} of {device['name']}'s {format_bytes(device['memory'])}" if device["memory"] else ""
    lines = [
        f"memory       {format_bytes(memory['peak'])} a worker at the fullest moment, {memory['peak_at']}{of}",
        f"{'':13}{'item':<14}{'most':>10}{'then':>12}",
    ]
    skipped = {"peak"}
    for item, size in memory.items():
        if isinstance(size, int) and size and item not in skipped:
            lines.append(f"{'':13}{item:<14}{format_bytes(size):>10}{format_bytes(at.get(item, 0)) if at.get(item) else '-':>12}")
    if memory["host"]:
        lines.append(f"host memory  {', '.join(f'{name} {format_bytes(size)}' for name, size in memory['host'].items())} a worker")
    return lines


def _pace_lines(facts: dict[str, Any], about: str) -> list[str]:
    pace, device, sent = facts["step_seconds"], facts["device"], facts["bytes_sent_per_step"]
    source = (
        "as measured here" if facts["calibrated"] else f"at {device['efficiency']:.0%} of {device['name']}'s peak; --calibrate measures"
    )
    unit = "worker" if device["name"] == "cpu" else "GPU"
    assumed = " (assumed: say cluster.device)" if device["is_assumed"] else ""
    parts = ", ".join(f"{name} {format_seconds(pace[name])}" for name in ("compute", "communication", "update"))
    kinds = ", ".join(f"{name.replace('_', '-')} {format_bytes(size)}" for name, size in sent.items() if size and name != "total")
    lines = [
        f"device       {device['name']}{assumed}",
        f"sent         {format_bytes(sent['total'])} a worker and step{f' ({kinds})' if kinds else ''}",
        f"pace         {format_seconds(pace['step'])} a step ({parts}; input {format_seconds(pace['input'])} beside it), {source}; "
        f"{format_count(pace['samples_per_second'])} samples/s, MFU {pace['mfu']:.1%}",
    ]
    if pace["input"] >= pace["step"]:
        lines.append(f"{'':13}the input is slower than the device: more pretrain.loader.workers would help")
    return [
        *lines,
        f"checkpoint   {format_bytes(facts['checkpoint_bytes'])}, {format_seconds(facts['save_seconds'])} a save at "
        f"{facts['upload_bytes_per_s'] / 1e6:.0f} MB/s a worker, beside the training",
        f"in all       {about}{facts['hours']:,.1f} hours, {facts['gpu_hours']:,.1f} {unit}-hours, {facts['cost']:,.0f} {facts['currency']}"
        f" at {device['price']:g} an hour",
    ]
