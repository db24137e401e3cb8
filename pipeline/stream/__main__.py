"""python -m pipeline.stream DATASET: look into a dataset, or into a step of a run."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from pipeline.core.command import exit_codes
from pipeline.core.errors import DataError, UserError
from pipeline.core.storage import Storage
from pipeline.core.units import format_bytes

if TYPE_CHECKING:
    from pipeline.stream.reader import Dataset
    from pipeline.stream.steps import PastRun

_COUNT = 64


@dataclass(frozen=True)
class Asked:
    """What was typed; the fields are the options below."""

    dataset: str | None
    split: str | None
    sheet: Path | None
    count: int
    seed: int | None
    keys: tuple[str, ...]
    positions: tuple[int, ...]
    batch: int
    out: Path | None
    run: str | None
    step: int | None
    skipped: bool
    verify: bool
    speed: bool
    workers: int
    batches: int
    size: int
    as_json: bool
    endpoint: str | None


@click.command(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.argument("dataset", required=False)
@click.option("--split", help="By default train, or the first there is; --verify checks all.")
@click.option("--sheet", type=click.Path(path_type=Path, dir_okay=False), metavar="OUT.png", help="Draw samples: those asked for, or some.")
@click.option("--count", type=click.IntRange(1, 1024), default=_COUNT, show_default=True, help="Samples on the sheet, evenly spread.")
@click.option("--seed", type=click.IntRange(0, 2**32 - 1), help="Of the training order (default 0); with --sheet: samples at random.")
@click.option("--key", "keys", multiple=True, help="Show the sample of this key (repeatable).")
@click.option(
    "--position", "positions", type=click.IntRange(0, 2**62), multiple=True, help="Show what is here in the training order (repeatable)."
)
@click.option("--batch", type=click.IntRange(1), default=256, show_default=True, help="Global batch; the order on a store depends on it.")
@click.option("--out", type=click.Path(path_type=Path, file_okay=False), metavar="DIR", help="Write the files of the samples shown.")
@click.option("--run", metavar="URL", help="The directory of a run, whose data, seed and batch are used; DATASET may be left out.")
@click.option("--step", type=click.IntRange(1), help="List the samples of this optimiser step of --run.")
@click.option("--skipped", is_flag=True, help="List the batches of --run that did not train the model, and why.")
@click.option("--verify", is_flag=True, help="Check every byte; ends with exit code 3 where something is wrong.")
@click.option("--speed", is_flag=True, help="Measure the training loader.")
@click.option(
    "--workers",
    type=click.IntRange(1),
    default=os.cpu_count() or 1,
    show_default="one a core",
    help="Threads of --speed and --verify.",
)
@click.option("--batches", type=click.IntRange(1), default=50, show_default=True, help="Micro-batches that --speed takes after a warm-up.")
@click.option("--size", type=click.IntRange(1), default=224, show_default=True, help="Pixels a side, of --speed.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object instead of text.")
@click.option("--endpoint", envvar="AWS_ENDPOINT_URL", help="The endpoint of the S3-compatible store that the URLs are in.")
def main(**options: Any) -> None:
    """Look into DATASET. Without an option that asks for something: what it holds."""
    asked = Asked(**options)
    _check_usage(asked)
    with exit_codes():
        found: dict[str, Any] = {}
        for name, values, text in _answers(asked):
            if not asked.as_json:
                click.echo(f"\n{text}" if found else text)
            found[name] = values
        if asked.as_json:
            click.echo(json.dumps(found, indent=1, ensure_ascii=False))
        if problems := found.get("verify", {}).get("problems"):
            raise DataError(f"data {asked.dataset}: {len(problems):,} problem{'s' * (len(problems) > 1)}")


def _check_usage(asked: Asked) -> None:
    if not asked.dataset and not asked.run:
        raise click.UsageError("Missing argument 'DATASET' (or --run).")
    if asked.step and not asked.run:
        raise click.UsageError("--step is of a run: name it with --run.")
    if asked.skipped and not asked.run:
        raise click.UsageError("--skipped is of a run: name it with --run.")
    if asked.run and not (asked.step or asked.positions or asked.skipped):
        raise click.UsageError("--run needs --step or --position or --skipped.")
    if asked.run and (asked.keys or asked.verify or asked.speed or asked.split):
        raise click.UsageError("--key, --verify, --speed and --split are of a dataset: leave out --run.")
    if asked.out and not (asked.keys or asked.positions):
        raise click.UsageError("--out writes the samples of --key or --position.")


def _answers(asked: Asked) -> Iterator[tuple[str, Any, str]]:
    """(name, plain values, text) of each thing asked for."""
    from pipeline.stream import look, tell
    from pipeline.stream.steps import open_run

    run = open_run(asked.run, asked.endpoint) if asked.run else None
    if run and asked.dataset and Storage(asked.dataset).url not in (urls := [d.directory.url for d in run.positions.readers]):
        raise UserError(f"run {asked.run}: it was trained on {' and '.join(urls)}, not on {asked.dataset}; leave DATASET out")
    dataset = None if run else look.open_split(str(asked.dataset), asked.split, asked.endpoint)
    chosen: list[tuple[Dataset, int, str]] = []  # what a sheet is to show: dataset, number, mark
    if run and asked.step:
        step = run.step(asked.step)
        yield "step", step, tell.step_text(step)
        places = run.positions.at(step["start"], len(step["samples"]))
        chosen += [(place.dataset, place.number, "replaced" if place.replaced else "") for place in places]
    if run and asked.skipped:
        skips = run.skips()
        yield "skipped", skips, tell.skips_text(skips)
    if asked.keys or asked.positions:
        samples = []
        for of, number, about in _wanted(asked, dataset, run):
            values, sample = look.describe(of, number)
            values |= about | ({"files": look.write_files(asked.out, values, sample)} if asked.out and sample else {})
            samples.append(values)
            if not asked.step:
                chosen.append((of, number, "replaced" if about.get("replaced") else ""))
        yield "samples", samples, "\n\n".join(map(tell.sample_text, samples))
    if asked.sheet:
        yield _sheet(asked, dataset, run, chosen)
    if dataset and asked.verify:
        yield _verify(asked, dataset)
    if dataset and asked.speed:
        from pipeline.stream.speed import measure

        speed = measure(
            str(asked.dataset), dataset.split, asked.endpoint,
            workers=asked.workers, batches=asked.batches, size=asked.size, batch=asked.batch, seed=asked.seed or 0,
        )  # fmt: skip
        yield "speed", speed, tell.speed_text(speed)
    if dataset and not (chosen or asked.sheet or asked.verify or asked.speed):
        counts = look.count(dataset)
        yield "dataset", counts, tell.count_text(counts)


def _wanted(asked: Asked, dataset: Dataset | None, run: PastRun | None) -> Iterator[tuple[Dataset, int, dict[str, Any]]]:
    """(dataset, sample number, what else is known of it) of each key and position asked for."""
    from pipeline.stream.look import find_keys
    from pipeline.stream.steps import open_positions

    if dataset and asked.keys:
        yield from ((dataset, number, {}) for number in find_keys(dataset, asked.keys).values())
    if asked.positions:
        split = dataset.split if dataset else ""
        order = run.positions if run else open_positions(str(asked.dataset), split, asked.endpoint, asked.seed or 0, asked.batch)
        for place in (order.at(position)[0] for position in asked.positions):
            yield place.dataset, place.number, place.values()


def _sheet(asked: Asked, dataset: Dataset | None, run: PastRun | None, chosen: list[tuple[Dataset, int, str]]) -> tuple[str, Any, str]:
    from pipeline.shards.statistics import spread
    from pipeline.stream.look import choose
    from pipeline.stream.sheet import cards, draw, write_sheet

    assert asked.sheet is not None
    every = len(chosen)
    if chosen:
        shown = [chosen[n] for n in spread(every, asked.count)]
        of = run.directory.url if run else str(asked.dataset)
        what = f"step {asked.step:,}" if asked.step else "samples asked for"
        marked = sum(mark != "" for *_, mark in chosen)
        told = [
            what,
            f"{len(shown):,} of its {every:,} samples" if asked.step else f"{len(shown):,}",
            *([f"{marked:,} replaced"] if marked else []),
        ]
    else:
        assert dataset is not None
        numbers = choose(len(dataset), asked.count, asked.seed)
        shown, of = [(dataset, number, "") for number in numbers], dataset.directory.url
        classes = f"{len(dataset.classes):,} classes" if dataset.classes else "no classes"
        told = [f"split {dataset.split}", f"{len(dataset):,} samples", classes, format_bytes(float(dataset.shards.bytes.sum()))]
        told.append(f"{len(shown):,} shown, " + ("evenly spread" if asked.seed is None else f"at random (seed {asked.seed})"))
    write_sheet(draw(cards(shown), "/".join(of.rstrip("/").split("/")[-2:]), "   ·   ".join(told)), asked.sheet)
    return "sheet", {"path": str(asked.sheet), "samples": len(shown)}, f"{len(shown):,} samples drawn in {asked.sheet}"


def _verify(asked: Asked, dataset: Dataset) -> tuple[str, Any, str]:
    from pipeline.shards.manifest import ShardTable
    from pipeline.shards.verify import verify

    problems = []
    for problem in verify(dataset.directory, asked.split, asked.workers):
        problems.append({"file": problem.shard, "key": problem.key, "what": problem.what})
        if not asked.as_json:
            click.echo(str(problem))  # at once: a large dataset takes hours
    table = ShardTable(dataset.directory, asked.split)
    read = {"samples": int(table.samples.sum()), "shards": len(table), "bytes": int(table.bytes.sum())}
    text = (
        f"{'NOT sound' if problems else 'sound'}: {read['samples']:,} samples in {read['shards']:,} shards, {format_bytes(read['bytes'])}"
    )
    return "verify", {"problems": problems, **read}, text


if __name__ == "__main__":
    main()
