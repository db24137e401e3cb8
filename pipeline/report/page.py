"""The page of a run: everything one wants to know of it in one file that needs nothing else."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
import torch
import yaml

from pipeline import __version__
from pipeline.checkpoint import read_history
from pipeline.config import Config, fingerprint
from pipeline.core.storage import Storage
from pipeline.core.tracking import redact
from pipeline.core.units import format_bytes, format_count, format_seconds
from pipeline.evaluate import PROTOCOLS, Result, read_results
from pipeline.evaluate.tasks import look_up
from pipeline.models import build_model
from pipeline.report.pictures import Picture, choose_right, choose_wrong, show, strip
from pipeline.report.plots import draw_curves
from pipeline.shards.manifest import Manifest
from pipeline.stream import open_dataset

WRONG, RIGHT, STRIP, NAMED_DROPS, NAMED_CLASSES = 12, 12, 16, 12, 40
PATH = "report/index.html"


@dataclass(frozen=True)
class _Span:
    """Seconds of a stage, and of its parts; shares are of the whole run."""

    stage: str
    seconds: float
    share: float
    parts: list[tuple[str, float, float]]


def write_report(run: Storage, config: Config, dataset_url: str | None, command: str) -> str:
    """Publish the page as `<run>/report/index.html`; its URL."""
    run.write(PATH, build_report(run, config, dataset_url, command).encode())
    return f"{run.url}/{PATH}"


def build_report(run: Storage, config: Config, dataset_url: str | None, command: str) -> str:
    """HTML of what is in the run directory; parts whose data is not there are left out.

    `command` is what makes the run again.

    Raises:
        DataError: the dataset is damaged.
    """
    results = read_results(run)
    manifest, samples = _read_data(config, dataset_url)
    wrong, right = _read_predictions(results, config.storage.endpoint)
    history = read_history(run)
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    environment.filters |= {"percent": _percent, "seconds": format_seconds, "bytes": format_bytes, "called": _called}
    page = environment.get_template("page.html")
    return page.render(
        config=config,
        command=command,
        version=__version__,
        results=results,
        headline=_headline(results),
        explain=_explain,
        plots=draw_curves(history),
        facts=_facts(config, manifest, history),
        wrong=wrong,
        right=right,
        wrong_total=_count_wrong(results),
        manifest=manifest,
        source=redact(manifest.source) if manifest else "",
        samples=samples,
        named_drops=NAMED_DROPS,
        named_classes=NAMED_CLASSES,
        spans=_spans(run),
        config_text=_config_text(config),
        config_hash=fingerprint(config),
        url=redact(run.url),
    )


def _headline(results: list[Result]) -> Result | None:
    """The score to begin with: the model's own head, or else the best."""
    own = [r for r in results if r.protocol == "supervised"]
    return own[0] if own else max(results, key=lambda r: r.value, default=None)


def _called(result: Result) -> str:
    shots = result.details.get("shots")
    return f"{shots}-shot" if shots else result.name


def _explain(result: Result) -> str:
    details = result.details
    match result.protocol:
        case "few-shot":
            return f"least squares on frozen features of {details['shots']} image{'s' if details['shots'] > 1 else ''} a class"
        case "fine-tune":
            return (
                f"all weights trained on for {details['steps']} steps at {details['pixels']} x {details['pixels']} pixels, with a new head"
            )
        case "linear":
            warning = "" if details["converged"] else "; the solver stopped before it converged"
            return PROTOCOLS["linear"] + warning
        case _:
            return PROTOCOLS.get(result.protocol, "")


def _read_data(config: Config, dataset_url: str | None) -> tuple[Manifest | None, list[Picture]]:
    """The manifest and a few samples of the split that was trained on; nothing where there is no dataset."""
    if dataset_url is None:
        return None, []
    manifest = look_up(dataset_url, config.storage.endpoint)
    split = _train_split(config)
    if manifest is None or split not in manifest.splits:
        return manifest, []
    return manifest, strip(open_dataset(dataset_url, split, config.storage.endpoint), STRIP)


def _train_split(config: Config) -> str:
    if config.pretrain:
        return config.pretrain.split
    return next(iter(config.shard.splits)) if config.shard else "train"


def _read_predictions(results: list[Result], endpoint: str | None) -> tuple[list[Picture], list[Picture]]:
    """The surest mistakes of the model's own head, and some of what it got right."""
    for result in results:
        if result.protocol == "supervised" and look_up(result.details["data"], endpoint) is not None:
            kept = result.details["predictions"]
            dataset = open_dataset(result.details["data"], result.details["split"], endpoint)
            return show(result, dataset, choose_wrong(kept, WRONG)), show(result, dataset, choose_right(kept, RIGHT))
    return [], []


def _count_wrong(results: list[Result]) -> int:
    return next((round(r.n * (1 - r.value)) for r in results if r.protocol == "supervised"), 0)


def _facts(config: Config, manifest: Manifest | None, history: Sequence[dict[str, float]]) -> list[tuple[str, str]]:
    """(what, how much) for the head of the page."""
    facts: list[tuple[str, str]] = []
    if config.pretrain and manifest:
        p = config.pretrain
        with torch.device("meta"):
            model = build_model(p.model.name, p.model.arguments, pixels=p.image.pixels, classes=len(manifest.classes))
        facts.append(("model", p.model.name))
        facts.append(("parameters", format_count(sum(w.numel() for w in model.parameters()))))
        facts.append(("input", f"{p.image.pixels} x {p.image.pixels} px"))
    if history:
        facts.append(("steps", f"{max(row['step'] for row in history):,.0f}"))
        facts.append(("images seen", format_count(max(row.get("samples", 0) for row in history))))
    if manifest:
        facts.append(("images", f"{manifest.written:,}"))
        facts.append(("classes", f"{len(manifest.classes):,}"))
    return facts


def _spans(run: Storage) -> list[_Span]:
    """From `timings.json`, a list of {stage, part, seconds}; empty where there is none."""
    try:
        rows: list[dict[str, Any]] = json.loads(run.read("timings.json"))
    except FileNotFoundError:
        return []
    whole = sum(row["seconds"] for row in rows) or 1.0
    stages: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        stages.setdefault(row["stage"], []).append(row)
    spans = []
    for stage, parts in stages.items():
        seconds = sum(row["seconds"] for row in parts)
        named = [(row["part"], row["seconds"], row["seconds"] / whole) for row in parts if row["part"]]
        spans.append(_Span(stage, seconds, seconds / whole, named))
    return spans


def _config_text(config: Config) -> str:
    """The resolved config as YAML; a password in a URL is hidden."""
    text = yaml.safe_dump(config.model_dump(mode="json", by_alias=True, exclude_none=True), sort_keys=False, allow_unicode=True, width=110)
    return re.sub(r"//[^/@\s]*@", "//***@", text)


def _percent(fraction: float, digits: int = 1) -> str:
    """`98.7%`; with as many digits as it takes to tell nearly all from all."""
    while digits < 4 and fraction < 1 and round(100 * fraction, digits) == 100:
        digits += 1
    return f"{100 * fraction:.{digits}f}%"
