"""What a page tells of one run, gathered from its directory."""

from __future__ import annotations

import base64
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import yaml

from pipeline.checkpoint import ModelCard, read_history
from pipeline.checkpoint.goodput import Goodput, Job, read_jobs, summarise
from pipeline.checkpoint.model import find_card
from pipeline.checkpoint.run import find_record
from pipeline.config import Config, fingerprint
from pipeline.core.errors import NoSuchRun
from pipeline.core.storage import Storage
from pipeline.core.tracking import redact
from pipeline.core.units import format_bytes, format_count
from pipeline.evaluate import Result, read_results
from pipeline.evaluate.drawn import ABOUT, COMPLETIONS, SAMPLES
from pipeline.evaluate.tasks import look_up
from pipeline.report.dataset import Described, describe_dataset
from pipeline.report.pictures import Picture, choose_right, choose_wrong, show
from pipeline.report.plots import Plot, draw_curves, draw_layers
from pipeline.report.running import draw_running
from pipeline.shards.manifest import Manifest
from pipeline.stream import open_dataset

WRONG, RIGHT = 12, 12
_PREDICTED = ("supervised", "zero-shot")  # protocols that keep what the model said of each image; the first ones head the page


class Shown(NamedTuple):
    """A run to be shown; `dataset_url` is the dataset that it was trained on."""

    run: Storage
    config: Config
    dataset_url: str | None


@dataclass(frozen=True)
class Span:
    """Seconds of a stage, and of its parts; shares are of the whole run."""

    stage: str
    seconds: float
    share: float
    parts: list[tuple[str, float, float]]


@dataclass(frozen=True)
class Drawn:
    """Two sheets of pictures that the model drew, as data URIs; a row of `completions` is an image, what was given of it, `tries`."""

    completions: str
    samples: str
    suite: str
    tries: int


@dataclass(frozen=True)
class View:
    """Parts whose data is not there are empty or None. `predicted` is the result whose mistakes (`wrong`) and hits (`right`) are shown."""

    name: str
    config: Config
    url: str
    facts: list[tuple[str, str]]
    results: list[Result]
    headline: Result | None
    predicted: Result | None
    wrong: list[Picture]
    right: list[Picture]
    wrong_total: int
    drawn: Drawn | None
    layers: list[Plot]
    plots: list[Plot]
    manifest: Manifest | None
    source: str
    dataset: Described | None
    goodput: Goodput | None
    jobs: list[Job]
    spans: list[Span]
    config_text: str
    config_hash: str


def gather(shown: Shown) -> View:
    """Raises DataError where the dataset is damaged."""
    run, config, dataset_url = shown
    results, history, card = read_results(run), read_history(run), _find_card(run)
    manifest, dataset = _read_data(config, dataset_url)
    predicted, wrong, right = _read_predictions(results, config.storage.endpoint)
    jobs = _read_jobs(run)
    return View(
        name=config.name,
        config=config,
        url=redact(run.url),
        facts=_facts(config, card, manifest, history),
        results=results,
        headline=_headline(results),
        predicted=predicted,
        wrong=wrong,
        right=right,
        wrong_total=round(predicted.n * (1 - predicted.value)) if predicted else 0,
        drawn=_read_drawn(run),
        layers=[draw_layers(r.details["layers"], r.details["best"], r.suite, config.name) for r in results if r.protocol == "layers"],
        plots=draw_curves(history, card.objective if card else "classify", config.name) + draw_running(history, config.name),
        manifest=manifest,
        source=redact(manifest.source) if manifest else "",
        dataset=dataset,
        goodput=summarise(jobs, config.cluster.price, config.cluster.currency) if jobs else None,
        jobs=jobs,
        spans=_spans(run),
        config_text=_config_text(config),
        config_hash=fingerprint(config),
    )


def _headline(results: list[Result]) -> Result | None:
    """The score to begin with: the model's own head, or its zero-shot, or else the best."""
    own = [r for protocol in _PREDICTED for r in results if r.protocol == protocol]
    return own[0] if own else max(results, key=lambda r: r.value, default=None)


def _read_data(config: Config, dataset_url: str | None) -> tuple[Manifest | None, Described | None]:
    """The manifest and what there is to tell, with samples of the split that was trained on; nothing where there is no dataset."""
    if dataset_url is None:
        return None, None
    manifest = look_up(dataset_url, config.storage.endpoint)
    if manifest is None:
        return None, None
    split = next((name for name in (_train_split(config), *manifest.splits) if manifest.splits.get(name)), None)
    if split is None:
        return manifest, None
    return manifest, describe_dataset(dataset_url, split, config.storage.endpoint, config.name)


def _train_split(config: Config) -> str:
    if config.pretrain:
        return config.pretrain.split
    return next(iter(config.shard.splits)) if config.shard else "train"


def _read_predictions(results: list[Result], endpoint: str | None) -> tuple[Result | None, list[Picture], list[Picture]]:
    """The result whose predictions are shown, its surest mistakes, and some of what it got right."""
    for result in (r for protocol in _PREDICTED for r in results if r.protocol == protocol):
        if look_up(result.details["data"], endpoint) is not None:
            kept = result.details["predictions"]
            dataset = open_dataset(result.details["data"], result.details["split"], endpoint)
            return result, show(result, dataset, choose_wrong(kept, WRONG)), show(result, dataset, choose_right(kept, RIGHT))
    return None, [], []


def _read_drawn(run: Storage) -> Drawn | None:
    try:
        about = json.loads(run.read(ABOUT))
        completions, samples = (f"data:image/png;base64,{base64.b64encode(run.read(path)).decode()}" for path in (COMPLETIONS, SAMPLES))
    except FileNotFoundError:
        return None
    return Drawn(completions, samples, about["suite"], about["tries"])


def _find_card(run: Storage) -> ModelCard | None:
    """Of the model that was trained, where one was."""
    try:
        return find_card(run)
    except NoSuchRun:
        return None


def _facts(config: Config, card: ModelCard | None, manifest: Manifest | None, history: Sequence[dict[str, float]]) -> list[tuple[str, str]]:
    """(what, how much) for the head of the page."""
    facts: list[tuple[str, str]] = []
    if card:
        facts.append(("model", card.model))
        facts.append(("objective", card.objective))
        facts.append(("parameters", format_count(card.make(device="meta").parameter_count)))
        facts.append(("input", f"{card.pixels} x {card.pixels} px"))
    elif config.evaluate and config.evaluate.model:
        facts.append(("model", redact(config.evaluate.model)))
    if history:
        facts.append(("steps", f"{max(row['step'] for row in history):,.0f}"))
        facts.append(("images seen", format_count(max(row.get("samples", 0) for row in history))))
        for what, name in (("updates left out", "guard/skipped_steps"), ("went back", "guard/rewinds")):
            if count := max(row.get(name, 0) for row in history):
                facts.append((what, f"{count:,.0f}"))
    if manifest:
        facts.append(("images", f"{manifest.written:,}"))
        if manifest.classes:
            facts.append(("classes", f"{len(manifest.classes):,}"))
    if manifest and not card and config.shard:
        facts.append(("kept", f"{100 * manifest.written / manifest.read:.1f}%"))
        facts.append(("shards", format_bytes(manifest.bytes)))
        facts.append(("version", str(manifest.version)))
    if not config.storage.conditional:
        facts.append(("store", "takes no conditions: two jobs of this run could collide"))
    return facts


def _read_jobs(run: Storage) -> list[Job]:
    try:
        run_id = find_record(run.url, run.endpoint)["id"]
    except NoSuchRun:
        run_id = None
    return read_jobs(run, run_id)


def _spans(run: Storage) -> list[Span]:
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
        spans.append(Span(stage, seconds, seconds / whole, named))
    return spans


def _config_text(config: Config) -> str:
    """The resolved config as YAML; a password in a URL is hidden."""
    text = yaml.safe_dump(config.model_dump(mode="json", by_alias=True, exclude_none=True), sort_keys=False, allow_unicode=True, width=110)
    return re.sub(r"//[^/@\s]*@", "//***@", text)
