"""What `look.py` and `steps.py` find, as text."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from pipeline.core.text import aligned
from pipeline.core.units import format_bytes, format_seconds
from pipeline.stream.ledger import REASONS

_CLASS, _CAPTION = 24, 60  # letters of each in a table
_OK = {True: "ok", False: "the image's is ANOTHER", None: "not compared"}


def count_text(found: Mapping[str, Any]) -> str:
    looked, classes, sizes = found["looked_at"], found["classes"], found["sizes"]
    names = ", ".join(classes["first"]) + (", .." if classes["number"] > len(classes["first"]) else "")
    lines = [
        ("dataset", f"{found['url']}, version {found['version']}"),
        ("hash", found["hash"]),
        ("source", found["source"]),
        *(
            (f"split {name}", f"{s['samples']:,} samples, {format_bytes(s['bytes'])}, {s['shards']:,} shards")
            for name, s in found["splits"].items()
        ),
        ("classes", f"{classes['number']:,}: {names}" if names else "none"),
        ("smallest", "{}x{} pixels".format(*found["smallest"])),
        ("dropped", ", ".join(f"{n:,} {reason}" for reason, n in found["dropped"].items()) or "none" if found["read"] else "not known"),
        ("", ""),
        ("indices", f"of {looked['indices']:,} shards of {looked['shards']:,} of split {looked['split']}"),
    ]
    for what, n in found["with"].items():
        lines.append((f"{what}s" if what != "json" else what, f"{n:,} of {looked['samples']:,} samples"))
    for what in ("width", "height", "bytes"):
        low, middle, high = (format_bytes(v) if what == "bytes" else f"{v:,.0f}" for v in sizes[what].values())
        lines.append((what, f"{middle} in the median, {low} to {high} in nine of ten"))
    if per := found["samples_a_class"]:
        ends = (f"{end} {per[end]['samples']:,} ({per[end]['class']})" for end in ("most", "least"))
        lines.append(("a class has", f"{', '.join(ends)}, median {per['median']:,.0f}"))
    for name, c in found["columns"].items():
        told = f"{c['min']:g} to {c['max']:g}, median {c['median']:g}" if c["values"] else "no value"
        lines.append((name, told + (f", {c['values']:,} of {looked['samples']:,} samples" if c["values"] < looked["samples"] else "")))
    return aligned(lines)


def sample_text(found: Mapping[str, Any]) -> str:
    label = (
        "none" if found["label"] < 0 else str(found["label"]) + (f" ({found['class']})" if found["class"] != str(found["label"]) else "")
    )
    where = [("position", f"{found['position']:,}, epoch {found['epoch']}"), ("dataset", found["dataset"])] if "position" in found else []
    lines = [
        *where,
        ("sample", f"{found['number']:,} of split {found['split']}"),
        ("shard", f"{found['shard']}, row {found['row']:,}"),
        ("key", found["key"]),
        ("label", label),
        ("caption", " ".join((found["caption"] or "").split()) or "none"),
        ("json", json.dumps(found["json"], ensure_ascii=False) if found["json"] else "none"),
        ("image", f"{found['format'] or 'not readable'}, {found['width']}x{found['height']} pixels, {format_bytes(found['bytes'])}"),
        ("sha256", f"{found['sha256']} ({_OK[found['sha256_ok']]})"),
        *([("problem", found["problem"])] if found["problem"] else []),
        *([("replaces", _replaced(found["replaced"]))] if found.get("replaced") else []),
        *(("written", path) for path in found.get("files", [])),
    ]
    return aligned(lines)


def step_text(found: Mapping[str, Any]) -> str:
    rows, start = found["samples"], found["start"]
    epochs = sorted({row["epoch"] for row in rows})
    replaced = sum(row["replaced"] is not None for row in rows)
    several = len({row["dataset"] for row in rows}) > 1
    heads = ["micro-batch", "position", *(["dataset"] if several else []), "shard", "key", "label", "caption", ""]
    table = [heads]
    for row in rows:
        of = [row["dataset"].rsplit("/", 1)[-1]] if several else []
        table.append(
            [
                str(row["micro_batch"]),
                str(row["position"]),
                *of,
                row["shard"],
                row["key"],
                shortened(row["class"], _CLASS),
                shortened(row["caption"], _CAPTION),
                _remark(row),
            ]
        )
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    body = ["  ".join(f"{cell:<{width}}" for cell, width in zip(line, widths, strict=True)).rstrip() for line in table]
    first = (
        f"step {found['step']:,} of {found['steps']:,} of {found['run']}: positions {start:,} to {start + len(rows) - 1:,}, "
        f"epoch {' and '.join(map(str, epochs))}, {replaced or 'none'} replaced"
    )
    return "\n".join([first, *(f"note: {note}" for note in found["notes"]), "", *body])


def skips_text(found: Sequence[Mapping[str, Any]]) -> str:
    """One line a batch, or range of them, and its samples where they are named."""
    lines = []
    for skip in found:
        lines.append(skip["told"])
        lines += [f"    {key}" for key in skip["keys"]]
    return "\n".join(lines) or "none was skipped, as far as the newest checkpoint knows"


def _remark(row: Mapping[str, Any]) -> str:
    if r := row["replaced"]:
        return f"replaces {_replaced(r)}"
    return f"cannot be read now: {row['problem']}" if row["problem"] else ""


def _replaced(r: Mapping[str, Any]) -> str:
    return f"{r['key']} of {r['shard']}: {REASONS.get(r['reason'], r['reason'])}"


def speed_text(found: Mapping[str, Any]) -> str:
    rate, bare = found["images_per_s"], found["bare_images_per_s"]
    return aligned(
        [
            ("loader", f"{rate:,.0f} images/s, {found['mb_per_s']:,.1f} MB/s on {found['workers']} threads, {found['pixels']} pixels"),
            ("bound", f"{bare:,.0f} images/s, where the threads only decode and crop images in memory; the loader has {rate / bare:.0%}"),
            ("first batch", f"after {format_seconds(found['first_batch_s'])}"),
            ("measured on", f"{found['images']:,} images, split {found['split']} has {found['samples']:,}"),
        ]
    )


def shortened(text: str, length: int) -> str:
    """In one line of at most `length` letters."""
    line = " ".join(text.split())
    return line if len(line) <= length else line[: length - 2].rstrip() + ".."
