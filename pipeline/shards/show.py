"""What a dataset is, in numbers: its ledger, how it is distributed, its versions and deny-lists. As plain values, and as text of these."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import asdict
from typing import Any

from pipeline.core.storage import Storage
from pipeline.core.text import aligned
from pipeline.core.tracking import redact
from pipeline.core.units import format_bytes
from pipeline.shards.denied import list_denied
from pipeline.shards.manifest import read_manifest
from pipeline.shards.statistics import Quantity, find_statistics, gather_statistics

_NAMED = 10  # classes, dropped samples
_VERSION = re.compile(r"manifest-v(\d+)\.json")


def describe(directory: Storage) -> dict[str, Any]:
    """The manifest's fields; `versions` that can be read; `deny`, samples by list; `contamination`, a row a split of each evaluation set;
    `statistics`, which are gathered where they do not lie there, and not written.

    Raises:
        DataError: there is no dataset, or it is damaged.
    """
    manifest = read_manifest(directory)
    statistics = find_statistics(directory, manifest) or gather_statistics(directory, manifest)
    numbers = {int(match[1]) for name in directory.names() if (match := _VERSION.fullmatch(name))}
    denied, contaminated = list_denied(directory, manifest.version)
    return {
        "url": directory.url,
        **asdict(manifest) | {"source": redact(manifest.source)},
        "versions": sorted(numbers | {manifest.version}),
        "deny": {one.name: one.samples for one in denied},
        "contamination": [asdict(one) for one in contaminated],
        "statistics": asdict(statistics),
    }


def text_of(found: Mapping[str, Any]) -> str:
    """A page of text."""
    statistics, written = found["statistics"], found["written"]
    classes, older = found["classes"], [n for n in found["versions"] if n != found["version"]]
    lines = [
        ("dataset", found["url"]),
        ("version", f"{found['version']}{'; earlier ones: ' + ', '.join(f'@{n}' for n in older) if older else ''}"),
        ("hash", found["hash"]),
        ("source", found["source"]),
        *((f"split {name}", f"{count:,} samples") for name, count in found["splits"].items()),
        ("shards", f"{statistics['shards']:,}, {format_bytes(found['bytes'])}"),
        ("classes", f"{len(classes):,}: {', '.join(classes[:_NAMED])}{', ..' if len(classes) > _NAMED else ''}" if classes else "none"),
        ("", ""),
        ("ledger", f"{found['read']:,} read = {written:,} written + {found['read'] - written:,} dropped" if found["read"] else "not known"),
        *((f"  {reason}", _share(count, found["read"])) for reason, count in _most_first(found["dropped"])),
        *([("ignored", f"{found['ignored']:,} files that are no images")] if found["ignored"] else []),
        *((f"deny {name}", _share(count, written)) for name, count in found["deny"].items()),
        *((f"  {c['split']} of {c['url']}", _share(c["exact"] + c["near"], c["images"])) for c in found["contamination"]),
        ("", ""),
        ("counted", f"{statistics['samples']:,} samples of {statistics['read']:,} shards of {statistics['shards']:,}"),
        *_quantities(statistics),
    ]
    if statistics["labels"]:
        labels = statistics["labels"]
        lines.append(("a class has", f"{min(labels):,} to {max(labels):,} samples; {statistics['unlabelled']:,} have no label"))
    return aligned(lines)


def _quantities(statistics: Mapping[str, Any]) -> list[tuple[str, str]]:
    pixels: Callable[[float], str] = "{:,.0f}".format
    spelt = {"width": pixels, "height": pixels, "image_bytes": format_bytes, "caption_bytes": pixels}
    lines = []
    for name, values in {**statistics["measures"], **statistics["columns"]}.items():
        lines.append((name.replace("_", " "), _told(Quantity(**values), spelt.get(name, "{:.4g}".format))))
    return lines


def _told(quantity: Quantity, spell: Callable[[float], str]) -> str:
    if quantity.least is None or quantity.most is None:
        return "none"
    low, median, high = (spell(quantity.quantile(share)) for share in (0.05, 0.5, 0.95))
    without = f"; {quantity.missing:,} without" if quantity.missing else ""
    return f"{median} in the median, {low} to {high} in nine of ten, {spell(quantity.least)} to {spell(quantity.most)} in all{without}"


def _most_first(dropped: Mapping[str, int]) -> list[tuple[str, int]]:
    return sorted(dropped.items(), key=lambda item: (-item[1], item[0]))


def _share(count: int, of: int) -> str:
    return f"{count:,} ({100 * count / max(1, of):.1f}%)"
