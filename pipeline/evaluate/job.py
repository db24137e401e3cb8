"""Stage 3 on Ray: a task for each score, and for each seed and learning rate of fine-tuning.

A task that fails does not stop the others, and what is done is kept: each result is written at once, and a result
whose fingerprint (of weights, data, preprocessing and settings) is there already is not worked out again. The only
file of this room that imports ray.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import ray
import torch
from ray.exceptions import RayError

from pipeline.checkpoint import ModelCard
from pipeline.config.schema import Config
from pipeline.core.errors import StageFailed, TesseraError, find_error
from pipeline.core.progress import Event, Progress, say, set_sink
from pipeline.core.storage import Storage
from pipeline.core.units import format_seconds
from pipeline.evaluate import drawn, fewshot, finetune, layers, probe, supervised, zeroshot
from pipeline.evaluate.finetune import Outcome, Settings
from pipeline.evaluate.protocols import Kind, fine_tune_pixels
from pipeline.evaluate.results import DIRECTORY, Result, find_result, in_order, make_result, metric_values, write_result
from pipeline.evaluate.subject import find_subject, training_view
from pipeline.evaluate.tasks import Task, find_tasks, fine_tune_seeds
from pipeline.evaluate.wanted import Wanted, Weights, hash_weights, list_wanted, pictures_wanted

_LOOK_EVERY = 0.5  # seconds
_RETRIES = 2  # of a task whose machine or process died


@dataclass
class _Running:
    """What has been handed to Ray: what each reference will give, and the outcomes of fine-tuning that came so far."""

    kinds: dict[ray.ObjectRef, tuple[str, Wanted]] = field(default_factory=dict)
    swept: dict[str, list[Outcome]] = field(default_factory=dict)  # by file
    tuned: dict[str, list[tuple[int, Outcome]]] = field(default_factory=dict)


def evaluate(config: Config, run: Storage, dataset_url: str) -> tuple[list[Result], dict[str, float]]:
    """Score the newest checkpoint of `run`, or the model that the config names, on every task and protocol of `config.evaluate`.

    Needs a Ray that is initialised. `dataset_url` is the dataset that the run was trained on. Returns the results and
    their values for tracking, `evaluate/<suite>/<protocol>/top1` and the ends of the interval, as fractions.

    Raises:
        NoSuchRun, CheckpointError, DataError: nothing to evaluate. TesseraError: a task failed; the others are done and kept.
    """
    card, state = find_subject(config, run)
    return evaluate_model(config, run, find_tasks(config, dataset_url), card, state)


def evaluate_model(
    config: Config, run: Storage, tasks: list[Task], card: ModelCard, state: dict[str, torch.Tensor]
) -> tuple[list[Result], dict[str, float]]:
    """As `evaluate`, for weights that are at hand."""
    weights = {name: tensor.numpy() for name, tensor in state.items()}
    digest = hash_weights(weights)
    wanted, pictures = list_wanted(config, tasks, card, digest), pictures_wanted(config, tasks, card, digest)
    results = [r for w in wanted if (r := find_result(run, w.file)) and r.fingerprint == w.fingerprint]
    kept = {r.file for r in results}
    has_pictures = pictures == drawn.pictures_fingerprint(run)
    _remove_stale(run, kept if pictures is None or not has_pictures else {*kept, drawn.ABOUT, drawn.COMPLETIONS, drawn.SAMPLES})
    missing = [w for w in wanted if w.file not in kept]
    if results:
        say(f"evaluate     {len(results)} of {len(wanted)} scores are there already")
    if pictures and not has_pictures:
        missing.append(Wanted(tasks[0], "pictures", "pictures", pictures))
    if missing:
        results += _work(config, run, missing, card, weights)
    results = in_order(results)
    return results, metric_values(results)


def _remove_stale(run: Storage, current: set[str]) -> None:
    """What is of an earlier checkpoint or other settings goes before anything new comes, so that no page ever mixes them."""
    for name in run.names(DIRECTORY):
        if name.endswith((".json", ".png")) and f"{DIRECTORY}/{name}" not in current:
            run.remove(f"{DIRECTORY}/{name}")


def _work(config: Config, run: Storage, wanted: list[Wanted], card: ModelCard, weights: Weights) -> list[Result]:
    """Work out what is `wanted`. Raises the first failure, once everything else is done."""
    board = ray.remote(num_cpus=0)(_Board).remote()
    running = _submit(config, wanted, card, weights, board)
    results: list[Result] = []
    failures: list[RayError] = []
    asked: ray.ObjectRef | None = board.news.remote()
    try:
        with Progress("evaluate", len(running.kinds), "tasks") as progress:
            while running.kinds:
                ready, _ = ray.wait(list(running.kinds), num_returns=1, timeout=_LOOK_EVERY)
                for reference in ready:
                    kind, one = running.kinds.pop(reference)
                    try:
                        done = _collect(config, run, running, kind, one, card, ray.get(reference))
                    except RayError as e:
                        failures.append(e)
                        done = []
                    for result in done:
                        write_result(run, result)
                    results += done
                    progress.update(1, f"{len(failures)} failed" if failures else "")
                if asked and ray.wait([asked], timeout=0)[0]:
                    asked = _show(progress, board, asked)
    finally:  # tasks that still run end with the driver; Ray (2.60) may abort the process that cancels one as it finishes
        ray.kill(board)
    if failures:
        raise _explain(failures) from failures[0]
    return results


def _submit(config: Config, wanted: list[Wanted], card: ModelCard, weights: Weights, board: Any) -> _Running:
    """Hand everything to Ray: seeds of fine-tuning wait there for the sweep that they need."""
    assert config.evaluate is not None
    ev, running = config.evaluate, _Running()
    seeds = [config.seed + i for i in range(ev.seeds)]
    view, micro_batch = training_view(config, card)
    tuning = Settings.of(ev.fine_tune, view, fine_tune_pixels(ev.fine_tune, Kind.of(card)), micro_batch)
    subject = ray.put((card, weights))
    alone = len(wanted) == 1 and "fine-tune" not in ev.protocols
    options: dict[str, Any] = {"num_cpus": 1, "max_retries": _RETRIES}
    has_gpu = ray.cluster_resources().get("GPU", 0) > 0

    def start(kind: str, one: Wanted, body: Callable[..., Any], *arguments: Any) -> ray.ObjectRef:
        gpus = (1.0 if kind in ("sweep", "tune") else 0.25) if has_gpu else 0
        task = ray.remote(_task).options(**options, num_gpus=gpus, name=f"{one.task.name} {one.name} {kind}")
        reference = task.remote(body, subject, board, one, alone, *arguments)
        running.kinds[reference] = (kind, one)
        return reference

    for one in wanted:
        match one.protocol:
            case "supervised":
                start("result", one, _supervised)
            case "zero-shot":
                start("result", one, _zeroshot)
            case "linear":
                start("result", one, _linear, config.seed)
            case "layers":
                start("result", one, _layers, config.seed)
            case "pictures":
                start("pictures", one, _pictures, ev.completions, config.seed)
            case "fine-tune":
                rates = ev.fine_tune.lr
                sweep = [start("sweep", one, _sweep, tuning, lr, config.seed) for lr in rates] if len(rates) > 1 else []
                for seed in range(config.seed, config.seed + fine_tune_seeds(config)):
                    start("tune", one, _tune, tuning, rates[0], seed, *sweep)
    for name in {one.task.name for one in wanted}:
        shots = [one for one in wanted if one.task.name == name and one.protocol == "few-shot"]
        if shots:
            start("results", shots[0], _fewshot, {int(o.name.partition("/")[2]): o.fingerprint for o in shots}, seeds)
    return running


def _collect(config: Config, run: Storage, running: _Running, kind: str, one: Wanted, card: ModelCard, value: Any) -> list[Result]:
    """The results that are finished now that a task has given `value`; pictures are written at once."""
    assert config.evaluate is not None
    match kind:
        case "pictures":
            drawn.write_pictures(run, value, one.fingerprint, one.task, config.evaluate.completions)
            return []
        case "result":
            return [value]
        case "results":
            return value
        case "sweep":
            running.swept.setdefault(one.file, []).append(value)
            return []
        case _:
            running.tuned.setdefault(one.file, []).append(value)
    tuned = [outcome for _, outcome in sorted(running.tuned[one.file], key=lambda pair: pair[0])]
    if len(tuned) < fine_tune_seeds(config):
        return []
    how, swept = config.evaluate.fine_tune, running.swept.get(one.file, [])
    details = {"pixels": fine_tune_pixels(how, Kind.of(card)), "steps": how.steps, "batch": how.batch, **finetune.describe(swept, tuned)}
    seconds = sum(o.seconds for o in [*swept, *tuned])
    correct = [o.correct for o in tuned]
    return [make_result(one.name, one.task, correct, tuned[0].n, seconds=seconds, fingerprint=one.fingerprint, details=details)]


def _show(progress: Progress, board: Any, asked: ray.ObjectRef) -> ray.ObjectRef | None:
    """Show what the board answered and ask it again; a board that died is done without."""
    try:
        progress.update(0, _news(ray.get(asked)))
    except RayError:
        return None
    return board.news.remote()


def _news(events: dict[str, Event]) -> str:
    """The newest word of any task: `digits fine-tune seed 0: 120/500 steps, 8.2 s left`."""
    if not events:
        return ""
    who, event = list(events.items())[-1]
    left = event.elapsed * (event.total - event.done) / max(1.0, event.done)
    return f"{who}: {event.done:,.0f}/{event.total:,.0f} {event.unit}, {format_seconds(left)} left"


def _explain(failures: list[RayError]) -> TesseraError:
    """What failed, as one error: of the first kind with a message meant for people, if there is any."""
    known = [e for failure in failures if (e := find_error(failure))]
    if known:
        return type(known[0])("; ".join(dict.fromkeys(str(e) for e in known)))
    lines = [line for line in str(failures[0]).splitlines() if line.strip()]
    return StageFailed(f"evaluate: {len(failures)} tasks failed; the first said: {lines[-1] if lines else type(failures[0]).__name__}")


# What runs on the workers


class _Board:
    """Where the tasks say how far they are, for the process that the person looks at."""

    def __init__(self) -> None:
        self._events: dict[str, Event] = {}

    def put(self, who: str, event: Event) -> None:
        self._events.pop(who, None)
        if not event.finished:
            self._events[who] = event

    def news(self) -> dict[str, Event]:
        return self._events


def _task(body: Callable[..., Any], subject: tuple[ModelCard, Weights], board: Any, one: Wanted, alone: bool, *arguments: Any) -> Any:
    torch.set_num_threads(len(os.sched_getaffinity(0)) if alone else 1)
    set_sink(lambda event: board.put.remote(f"{one.task.name} {one.name} {event.label}", event))
    card, weights = subject
    state = {name: torch.from_numpy(array.copy()) for name, array in weights.items()}  # Ray's arrays are read-only
    return body(card, state, one, *arguments)


def _supervised(card: ModelCard, state: dict[str, torch.Tensor], one: Wanted) -> Result:
    return supervised.evaluate_supervised(card, state, one.task, one.fingerprint)


def _linear(card: ModelCard, state: dict[str, torch.Tensor], one: Wanted, seed: int) -> Result:
    return probe.evaluate_linear(card, state, one.task, one.fingerprint, seed)


def _zeroshot(card: ModelCard, state: dict[str, torch.Tensor], one: Wanted) -> Result:
    return zeroshot.evaluate_zeroshot(card, state, one.task, one.fingerprint)


def _layers(card: ModelCard, state: dict[str, torch.Tensor], one: Wanted, seed: int) -> Result:
    return layers.evaluate_layers(card, state, one.task, one.fingerprint, seed)


def _pictures(card: ModelCard, state: dict[str, torch.Tensor], one: Wanted, count: int, seed: int) -> dict[str, bytes]:
    return drawn.draw_pictures(card, state, one.task, count, seed)


def _fewshot(card: ModelCard, state: dict[str, torch.Tensor], one: Wanted, fingerprints: dict[int, str], seeds: list[int]) -> list[Result]:
    return fewshot.evaluate_fewshot(card, state, one.task, fingerprints, seeds)


def _sweep(card: ModelCard, state: dict[str, torch.Tensor], one: Wanted, settings: Settings, lr: float, seed: int) -> Outcome:
    return finetune.sweep_lr(card, state, one.task, settings, lr, seed)


def _tune(
    card: ModelCard, state: dict[str, torch.Tensor], one: Wanted, settings: Settings, lr: float, seed: int, *swept: Outcome
) -> tuple[int, Outcome]:
    return seed, finetune.fine_tune(card, state, one.task, settings, finetune.choose_lr(swept) if swept else lr, seed)
