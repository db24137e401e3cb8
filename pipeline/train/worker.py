"""One rank of pre-training. Runs under Ray Train, and without Ray under torchrun:

    torchrun --nproc-per-node 2 -m pipeline.train.worker CONFIG [section.key=value ..]

How a run goes: join the group, open the dataset, plan, build the model, start the engine, restore the newest
checkpoint, train to the end, saving on the way.
"""

from __future__ import annotations

import os
import sys
import time
from contextlib import ExitStack

import click
import torch

from pipeline.checkpoint import Checkpoints, Lease, ModelCard, Run, adapt_weights, claim_run
from pipeline.checkpoint.lease import check_conditional
from pipeline.checkpoint.ledger import Ledger
from pipeline.checkpoint.model import open_model
from pipeline.checkpoint.requests import Requests
from pipeline.checkpoint.retain import retention_of
from pipeline.checkpoint.run import kept_micro_batch, run_directory
from pipeline.checkpoint.save import Saver
from pipeline.config import Config, load_config
from pipeline.config.data import Data
from pipeline.config.pretrain import Pretrain
from pipeline.core.command import run_rank
from pipeline.core.errors import ConfigError, OutOfMemory, Preempted, TesseraError
from pipeline.core.progress import say
from pipeline.core.tracking import Tracker
from pipeline.core.world import World
from pipeline.models import Model, build
from pipeline.models.options import Options
from pipeline.objectives import Facts, build_objective
from pipeline.plan import make_plan
from pipeline.plan.devices import host_memory, this_machine
from pipeline.plan.fit import explain_out_of_memory, has_auto, is_out_of_memory, settle
from pipeline.stream import Collection, open_collection, open_dataset, open_stream
from pipeline.train.communication import watching
from pipeline.train.heap import stay_outside
from pipeline.train.inputs import Prepared, check_captions, named_inputs, needs, open_inputs, options_of, planned_facts, prepare_inputs
from pipeline.train.keeper import Regroup, Signals
from pipeline.train.library import check_deepspeed, check_precision, join_group
from pipeline.train.loop import train
from pipeline.train.optim import build_optimizer
from pipeline.train.preflight import check_pretrain
from pipeline.train.recorder import Recorder
from pipeline.train.saving import fragments, on_main, restore, restore_from
from pipeline.train.scores import open_scores
from pipeline.train.validate import HeldOut
from pipeline.train.watch import SAVING, STARTING, Watch, beat
from pipeline.train.zero import Engine

_NO_SECTION = "pretrain: is missing, and this is the training worker"


def run_worker(run: Run, world: World, tracker: Tracker | None, signals: Signals) -> tuple[dict[str, float], bool]:
    """Train this rank's share of `run`; rank 0 has the tracker. Gives seconds by part of the work, and whether training is finished or is
    to be gone on with by another group of workers, which `signals` may ask for.

    Raises:
        TesseraError: what a person can mend, with one plain sentence; Diverged, Fenced; Preempted where `signals` ask for the end.
    """
    with Ledger(run, world) as ledger:
        try:
            seconds, ledger.is_finished = _run(run, world, tracker, signals, ledger)
        except (MemoryError, RuntimeError) as e:
            if is_out_of_memory(e):
                raise _out_of_memory(run, world) from e
            raise
        return seconds, ledger.is_finished


def _out_of_memory(run: Run, world: World) -> OutOfMemory:
    """With what the plan has most of, and the smallest change that fits."""
    p = _pretrain(run)
    data = open_collection(run.data, p.split, run.config.storage.endpoint, block=p.loader.block, cache=p.loader.cache)
    plan = make_plan(run.config, data.samples, planned_facts(p, len(data.classes)), world.size)
    has = torch.cuda.mem_get_info(world.device)[1] if world.device.type == "cuda" else host_memory() // world.size
    return OutOfMemory(explain_out_of_memory(plan, has))


def _run(run: Run, world: World, tracker: Tracker | None, signals: Signals, ledger: Ledger) -> tuple[dict[str, float], bool]:
    began = time.perf_counter()
    p = _pretrain(run)
    check_precision(p.precision)
    join_group(world)
    with Watch(run, world, p.guard.hang.seconds if p.guard.hang else None):
        return _run_watched(run, world, tracker, signals, ledger, began)


def _run_watched(
    run: Run, world: World, tracker: Tracker | None, signals: Signals, ledger: Ledger, began: float
) -> tuple[dict[str, float], bool]:
    config, p = run.config, _pretrain(run)
    endpoint = config.storage.endpoint
    data = open_collection(run.data, p.split, endpoint, block=p.loader.block, cache=p.loader.cache)
    held_out = _open_held_out(p, run.dataset_url, endpoint)
    check_captions(p, data)
    prepared = prepare_inputs(run, data, world)
    facts = _facts(run, data, prepared)
    plan = make_plan(config, data.samples, facts, world.size)
    checkpoints = Checkpoints(run.directory)
    lease = on_main(world, lambda: _take_lease(checkpoints, config))
    ledger.open(lease.generation)
    had_any = bool(lease.base)
    options = options_of(p, len(data.classes), prepared)
    beat(STARTING)  # a part of it: of ranks in different ones, the others wait for the one that is furthest behind
    model = _start_model(run, options, had_any, tracker).to(world.device)
    stream = open_stream(
        data, global_batch=p.batch, micro_batch=p.micro_batch, rank=world.rank, world_size=world.size, workers=p.loader.workers,
        seed=config.seed, image=p.image, bad=p.loader.bad,
        tokenizer=prepared.tokenizer, text_length=prepared.context,
    )  # fmt: skip
    beat(STARTING)
    engine = Engine(model, build_optimizer(model, p.optimizer), p, stream.rounds, world)
    beat(STARTING)
    state = restore(engine, checkpoints, stream.view, world)
    origin = state.commit.generation if state else None
    if state is None and p.start and p.start.load == "all":
        state = restore_from(engine, p.start.from_, endpoint, stream.view, world)
    first = state.commit.step if state else 0
    if state:
        stream.resume(state.loader)
    beat(STARTING)
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
    saver = Saver(checkpoints, lease, fragments(engine, world), retention_of(p, plan.samples_an_epoch), p.save.retry.seconds, world)
    hooks = Recorder(run, card, stream, engine, saver, plan, state, world, tracker, signals, ledger)
    ledger.begin(first, origin, plan.steps)
    ready, is_finished = time.perf_counter(), True
    try:
        with ExitStack() as beside:
            if world.is_main:
                beside.enter_context(hooks.progress)
                beside.enter_context(Requests(run.directory, signals.events))
            beside.enter_context(watching(hooks.clock))
            train(engine, objective, stream, held_out, p, plan, config.seed, world, first, hooks)
            hooks.finish()
    except Regroup:
        is_finished = False
    finally:
        beat(SAVING)
        saver.close()
    saving = hooks.keeper.stalled
    whole = time.perf_counter() - ready
    return {"start-up": ready - began, "saving checkpoints": saving, "training and validation": whole - saving}, is_finished


def _pretrain(run: Run) -> Pretrain:
    if run.config.pretrain is None:
        raise ConfigError(_NO_SECTION)
    return run.config.pretrain


def _open_held_out(p: Pretrain, url: str, endpoint: str | None) -> HeldOut | None:
    if p.validation is None:
        return None
    dataset = open_dataset(url, p.validation.split, endpoint, cache=p.loader.cache)
    return HeldOut(dataset, open_scores(p, url, endpoint, p.loader.cache))


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


def _take_lease(checkpoints: Checkpoints, config: Config) -> Lease:
    check_conditional(checkpoints.run, config.storage.conditional)
    return checkpoints.acquire()


def stage_tracker(run: Run) -> Tracker:
    """The MLflow run of this run's pre-training, with its parameters."""
    from pipeline.checkpoint.run import flatten

    tracker = run.tracker("pretrain")
    tracker.params(flatten({"pretrain": _pretrain(run).model_dump(mode="json", by_alias=True), "seed": run.config.seed}))
    return tracker


def use_cores(processes: int) -> None:
    """On a machine without a GPU: share its cores among the training processes, instead of each taking all, and mind their heaps."""
    if not torch.cuda.is_available():
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // max(1, processes)))
        stay_outside()


def settled(config: Config, world: World) -> Config:
    """With numbers where it says `auto`: as rank 0 chooses them for its device, on every rank."""
    p = config.pretrain
    if p is None or not has_auto(p):
        return config
    check_precision(p.precision)
    join_group(world)

    def choose() -> Config:
        run, endpoint = run_directory(config), config.storage.endpoint
        own = config.data or [Data(url=(run / "shards").url)]
        classes = len(open_collection(own, p.split, endpoint, block=p.loader.block, cache=p.loader.cache).classes)
        facts = named_inputs(p, endpoint, run).facts(classes, planned_facts(p, classes))
        own_device = None if config.cluster.device else this_machine(int(os.environ.get("LOCAL_WORLD_SIZE", world.size)))
        return settle(config, facts, world.size, kept_micro_batch(config), own_device)

    return on_main(world, choose)


def checked(config: Config, world: World) -> Config:
    """As `settled`. Raises ConfigError, as `launch/submit.py` would, for what a worker would only meet as it starts, or never."""
    if config.pretrain is None:
        raise ConfigError(_NO_SECTION)
    check_pretrain(config.pretrain, has_many=len(config.data or []) > 1)
    config = settled(config, world)
    assert config.pretrain is not None, "it was there"
    check_deepspeed(config.pretrain)
    return config


@click.command()
@click.argument("config")
@click.argument("overrides", nargs=-1)
def main(config: str, overrides: tuple[str, ...]) -> None:
    """Train CONFIG's model from shards that are there already; one process a rank, started by torchrun."""
    world = World.from_environment()
    use_cores(int(os.environ.get("LOCAL_WORLD_SIZE", 1)))
    parent = tracker = None
    signals = Signals()
    try:
        # Every rank claims the run: whoever is first makes it, the others find the same.
        run = claim_run(checked(load_config(config, list(overrides)), world))
        if world.is_main:
            parent, tracker = run.tracker(), stage_tracker(run)
        with signals.listening():
            run_worker(run, world, tracker, signals)
        for each in filter(None, (tracker, parent)):
            each.close()
    except TesseraError as e:
        for each in filter(None, (tracker, parent)):
            each.close("KILLED" if isinstance(e, Preempted) else "FAILED", timeout=10)
        say(f"error: {e}")
        sys.exit(int(e.exit_code))


if __name__ == "__main__":
    run_rank(main)
