"""One rank of pre-training. Runs under Ray Train, and without Ray under torchrun:

    torchrun --nproc-per-node 2 -m pipeline.train.worker CONFIG [section.key=value ..]

How a run goes: join the group, open the dataset, plan, build the model, start the engine, restore the newest
checkpoint, train to the end, saving on the way.
"""

from __future__ import annotations

import ctypes
import os
import platform
import sys
import time
from collections import Counter
from contextlib import nullcontext
from dataclasses import replace

import click
import torch

from pipeline.checkpoint import Checkpoints, ModelCard, Run, adapt_weights, claim_run
from pipeline.checkpoint.model import open_model
from pipeline.config import load_config
from pipeline.config.schema import Pretrain
from pipeline.core.errors import CheckpointError, ConfigError, StorageError, TesseraError
from pipeline.core.progress import Progress, say
from pipeline.core.tracking import Tracker
from pipeline.core.units import format_count
from pipeline.core.world import World
from pipeline.models import Model, build
from pipeline.models.options import Options
from pipeline.objectives import Facts, build_objective
from pipeline.plan import Plan, make_plan
from pipeline.stream import Collection, Stream, open_collection, open_dataset, open_stream
from pipeline.train.inputs import Prepared, check_captions, needs, open_inputs, options_of, prepare_inputs
from pipeline.train.loop import Row, train
from pipeline.train.optim import build_optimizer
from pipeline.train.saving import restore, restore_from, save
from pipeline.train.zero import Engine, check_precision, join_group

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # mallopt(3)


def run_worker(run: Run, world: World, tracker: Tracker | None) -> dict[str, float]:
    """Train this rank's share of `run` to the end; rank 0 has the tracker. Gives seconds by part of the work.

    Raises:
        TesseraError: what a person can mend, with one plain sentence; Diverged.
    """
    began = time.perf_counter()
    config = run.config
    p = _pretrain(run)
    check_precision(p.precision)
    join_group(world)
    endpoint = config.storage.endpoint
    data = open_collection(run.data, p.split, endpoint, block=p.loader.block, cache=p.loader.cache)
    held_out = open_dataset(run.dataset_url, p.validation.split, endpoint, cache=p.loader.cache) if p.validation else None
    check_captions(p, data)
    prepared = prepare_inputs(run, data, world)
    facts = _facts(run, data, prepared)
    plan = make_plan(config, data.samples, facts, world.size)
    checkpoints = Checkpoints(run.directory)
    had_any = world.broadcast(bool(checkpoints.steps()))
    options = options_of(p, len(data.classes), prepared)
    model = _start_model(run, options, had_any, tracker).to(world.device)
    stream = open_stream(
        data, global_batch=p.batch, micro_batch=p.micro_batch, rank=world.rank, world_size=world.size, workers=p.loader.workers,
        seed=config.seed, image=p.image, bad=p.loader.bad,
        tokenizer=prepared.tokenizer, text_length=prepared.context,
    )  # fmt: skip
    engine = Engine(model, build_optimizer(model, p.optimizer), p, stream.rounds, world)
    state = restore(engine, checkpoints, stream.view, world)
    if state is None and p.start and p.start.load == "all":
        state = restore_from(engine, p.start.from_, config.storage, stream.view, world)
    if state is None and had_any and p.start:  # the model holds neither our weights nor those it was to start from
        raise CheckpointError(
            f"checkpoints of {run.directory.url}: all are damaged and set aside; the same command again begins from {p.start.from_}"
        )
    first = state.commit.step if state else 0
    if state:
        stream.resume(state.loader)
    card = ModelCard(
        model=p.model.name,
        options=options.model_dump(mode="json"),
        objective=p.objective.name,
        classes=data.classes,
        mean=p.image.mean,
        std=p.image.std,
        dataset=data.hash,
        run=run.id,
        step=first,
        palette=prepared.palette.colors.tolist() if prepared.palette else None,
        tokenizer=prepared.tokenizer.to_json() if prepared.tokenizer else None,
    )
    inputs = open_inputs(config, prepared, data.classes, engine.dtype, world.device)
    objective = build_objective(p.objective.name, p.objective.arguments, inputs)
    hooks = Recorder(run, card, stream, engine, checkpoints, plan, state.history if state else [], world, tracker, first)
    hooks.seconds["start-up"] = time.perf_counter() - began
    began = time.perf_counter()
    with hooks.progress if world.is_main else nullcontext():
        train(engine, objective, stream, held_out, p, plan, config.seed, world, first, hooks)
    hooks.seconds["training and validation"] = time.perf_counter() - began - hooks.seconds["saving checkpoints"]
    return hooks.seconds


def _pretrain(run: Run) -> Pretrain:
    if run.config.pretrain is None:
        raise ConfigError("pretrain: is missing, and this is the training worker")
    return run.config.pretrain


def _facts(run: Run, data: Collection, prepared: Prepared) -> Facts:
    """Raises ConfigError where the objective needs labels and the data has none."""
    p = _pretrain(run)
    if "labels" in needs(p) and not data.classes:
        raise ConfigError(f"pretrain.objective: {p.objective.name!r} needs labels, and {run.dataset_url} has no classes")
    return prepared.facts(len(data.classes))


def _start_model(run: Run, options: Options, has_own: bool, tracker: Tracker | None) -> Model:
    """A new model, or one with other weights where `pretrain.start` says so and no checkpoint of ours follows."""
    p = _pretrain(run)
    model = build(p.model.name, options, seed=run.config.seed)
    if p.start and p.start.load == "weights" and not has_own:
        where = "pretrain.start.from"
        card, weights = open_model(p.start.from_, run.config.storage.endpoint, where)
        model.load_state_dict(adapt_weights(card, weights, model, where))
        if tracker:
            tracker.tags({"tessera.start.run": card.run, "tessera.start.step": str(card.step)})
    return model


class Recorder:
    """The hooks of a run: history, tracking, progress, and checkpoints when they are due."""

    def __init__(
        self,
        run: Run,
        card: ModelCard,
        stream: Stream,
        engine: Engine,
        checkpoints: Checkpoints,
        plan: Plan,
        history: list[Row],
        world: World,
        tracker: Tracker | None,
        first: int,
    ) -> None:
        self.run, self.card, self.stream, self.engine, self.checkpoints = run, card, stream, engine, checkpoints
        self.plan, self.history, self.world, self.tracker = plan, history, world, tracker
        self.seconds: dict[str, float] = {"saving checkpoints": 0.0}
        self.progress = Progress("pretrain", plan.steps, "steps", done=first)
        self._saved_at = time.monotonic()
        self._every = _pretrain(run).save.every

    def record(self, row: Row) -> None:
        self.history.append(row)
        if not self.world.is_main:
            return
        if self.tracker:
            self.tracker.metrics({k if "/" in k else f"train/{k}": v for k, v in row.items() if k != "step"}, step=int(row["step"]))
        if "train/loss" in row:
            self.progress.text = f"loss {row['train/loss']:.3f}, {format_count(row['train/images_per_s'])} images/s"

    def after_step(self, step: int) -> None:
        if self.world.is_main:
            self.progress.update(1)
        if step == self.plan.steps or self._is_due(step):
            began = time.perf_counter()
            try:
                self._save(step)
            except StorageError as e:  # the same on every rank
                if step == self.plan.steps:
                    raise
                if self.world.is_main:
                    say(f"warning: the checkpoint at step {step:,} is not saved, training goes on ({e})")
            self._saved_at = time.monotonic()
            self.seconds["saving checkpoints"] += time.perf_counter() - began
            if self.world.is_main and self.tracker:
                self.tracker.metrics({"train/save_s": time.perf_counter() - began}, step=step)

    def _is_due(self, step: int) -> bool:
        if self._every.is_time:
            # Clocks differ: the first rank's decides.
            return self.world.sum([float(self.world.is_main and time.monotonic() - self._saved_at >= self._every.seconds)])[0] > 0
        return step % self._every.steps(_pretrain(self.run).batch, self.plan.samples_an_epoch) == 0

    def _save(self, step: int) -> None:
        p = _pretrain(self.run)
        self.engine.agree_on_buffers(self.stream.has_samples)
        new = self.stream.agree(self.world)
        save(self.engine, self.checkpoints, replace(self.card, step=step), self.stream.state(), self.history, p.save.keep, self.world)
        if new and self.world.is_main:
            reasons = ", ".join(f"{n} {reason}" for reason, n in Counter(r.reason for r in new).items())
            say(f"warning: {len(new)} samples could not be read and were replaced by others since the last checkpoint ({reasons})")


def stage_tracker(run: Run) -> Tracker:
    """The MLflow run of this run's pre-training, with its parameters."""
    from pipeline.checkpoint.run import flatten

    tracker = run.tracker("pretrain")
    tracker.params(flatten({"pretrain": _pretrain(run).model_dump(mode="json", by_alias=True), "seed": run.config.seed}))
    return tracker


def use_cores(processes: int) -> None:
    """On a machine without a GPU: share its cores among the training processes, instead of each taking all, and keep their memory."""
    if not torch.cuda.is_available():
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // max(1, processes)))
        keep_memory()


def keep_memory() -> None:
    """Have glibc keep what one step frees for the next. Else it gives it back to the kernel, and faults it in again page by page:
    16,000 to 200,000 faults a step of ViT-S/16 at a batch of 16, against less than 4,000."""
    if platform.libc_ver()[0] == "glibc":
        libc = ctypes.CDLL("libc.so.6")
        libc.mallopt(_MMAP_THRESHOLD, 32 * 2**20)  # the most there is
        libc.mallopt(_TRIM_THRESHOLD, 2**31 - 1)


@click.command()
@click.argument("config")
@click.argument("overrides", nargs=-1)
def main(config: str, overrides: tuple[str, ...]) -> None:
    """Train CONFIG's model from shards that are there already; one process a rank, started by torchrun."""
    world = World.from_environment()
    use_cores(int(os.environ.get("LOCAL_WORLD_SIZE", 1)))
    parent = tracker = None
    try:
        # Every rank claims the run: whoever is first makes it, the others find the same.
        run = claim_run(load_config(config, list(overrides)))
        if world.is_main:
            parent, tracker = run.tracker(), stage_tracker(run)
        run_worker(run, world, tracker)
        for each in filter(None, (tracker, parent)):
            each.close()
    except TesseraError as e:
        for each in filter(None, (tracker, parent)):
            each.close("FAILED", timeout=10)
        say(f"error: {e}")
        sys.exit(int(e.exit_code))


if __name__ == "__main__":
    main()
