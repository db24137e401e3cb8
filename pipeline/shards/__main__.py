"""python -m pipeline.shards adopt URL | show URL | verify URL | takedown URL LIST | duplicates URL | contamination URL AGAINST:
datasets by hand, without a config."""

from __future__ import annotations

import json
import os
from pathlib import Path

import click

from pipeline.core.cluster import connect_ray
from pipeline.core.command import exit_codes
from pipeline.core.errors import DataError
from pipeline.core.storage import Storage
from pipeline.core.units import format_bytes

_REMARKS = 20  # that are printed


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
def main() -> None:
    """Datasets of tar shards, by hand."""


_endpoint = click.option("--endpoint", envvar="AWS_ENDPOINT_URL", help="The endpoint of an S3-compatible store that URL is in.")


@main.command()
@click.argument("url")
@click.option("--split", default="train", show_default=True, help="Of all tars; `auto` reads it off each name: SPLIT-00000.tar.")
@click.option("--classes", type=click.Path(path_type=Path), help="A file of class names, one a line, in the order of their numbers.")
@click.option(
    "--column", "columns", multiple=True, metavar="NAME", help="Copy this number of each sample's json into the index (repeatable)."
)
@click.option("--workers", type=click.IntRange(min=1), help="Tars read at a time; by default one a core.")
@click.option(
    "--force",
    is_flag=True,
    help="Where a dataset is there already, index its tars anew: its versions, added columns and lists made of them go; takedowns stay.",
)
@_endpoint
def adopt(
    url: str, split: str, classes: Path | None, columns: tuple[str, ...], workers: int | None, force: bool, endpoint: str | None
) -> None:
    """Make a dataset of the tars at URL that img2dataset or others wrote, in place: nothing is copied."""
    with exit_codes():
        from pipeline.shards.adopt import Options, check
        from pipeline.shards.adopt import adopt as adopt_tars
        from pipeline.shards.statistics import keep_statistics

        directory = Storage(url, endpoint)
        options = Options(split, None if classes is None else _read_names(classes), tuple(dict.fromkeys(columns)))
        check(directory, options, force)  # what is refused is refused before Ray starts
        connect_ray(local="RAY_ADDRESS" not in os.environ)
        manifest, remarks = adopt_tars(directory, options, workers, force)
        splits = ", ".join(f"{name} {count:,}" for name, count in manifest.splits.items())
        width, height = manifest.smallest
        click.echo(f"{manifest.written:,} samples adopted ({splits}), {format_bytes(manifest.bytes)}, the smallest {width}x{height} pixels")
        for reason, count in manifest.dropped.items():
            click.echo(f"{count:,} left out: {reason}")
        if manifest.dropped:
            click.echo(f"named in {directory.url}/manifest.json: {len(manifest.dropped_samples):,} of them, under dropped_samples")
        keep_statistics(directory, manifest)
        for remark in [*remarks[:_REMARKS], *([f"and {len(remarks) - _REMARKS:,} more"] if len(remarks) > _REMARKS else [])]:
            click.echo(f"warning: {remark}")


@main.command()
@click.argument("url")
@click.option("--json", "as_json", is_flag=True, help="One JSON object instead of text.")
@_endpoint
def show(url: str, as_json: bool, endpoint: str | None) -> None:
    """Tell what the dataset at URL holds: what was read, written and dropped, how it is distributed, its versions and deny-lists."""
    with exit_codes():
        from pipeline.shards.show import describe, text_of

        found = describe(Storage(url, endpoint))
        click.echo(json.dumps(found, indent=1, ensure_ascii=False) if as_json else text_of(found))


@main.command()
@click.argument("url")
@click.option("--split", help="Only this one.")
@click.option("--workers", type=click.IntRange(min=1), default=8, show_default=True, help="Shards read at a time.")
@_endpoint
def verify(url: str, split: str | None, workers: int, endpoint: str | None) -> None:
    """Check every byte of the dataset at URL; what is wrong is printed, and ends with exit code 3."""
    with exit_codes():
        from pipeline.shards.manifest import ShardTable
        from pipeline.shards.verify import verify as find_problems

        directory, problems = Storage(url, endpoint), 0
        for problem in find_problems(directory, split, workers):
            problems += 1
            click.echo(str(problem))
        table = ShardTable(directory, split)
        if problems:
            raise DataError(f"data {directory.url}: {problems:,} problem{'s' * (problems > 1)} in {len(table):,} shards")
        click.echo(f"sound: {table.samples.sum():,} samples in {len(table):,} shards, {format_bytes(float(table.bytes.sum()))}")


@main.command()
@click.argument("url")
@click.argument("lists", metavar="LIST..", nargs=-1, required=True)
@click.option("--workers", type=click.IntRange(min=1), help="Shards read at a time; by default one a core.")
@_endpoint
def takedown(url: str, lists: tuple[str, ...], workers: int | None, endpoint: str | None) -> None:
    """Deny the samples of the dataset at URL that LIST names, instead of those that another list denied before.

    LIST is a file, at a path or URL: of keys, URLs of images (or their paths in the source) or sha256, one a line; or Parquet with columns
    `key`, `url`, `sha256`, any of them. The shards stay as they are.
    """
    with exit_codes():
        from pipeline.shards.manifest import read_manifest
        from pipeline.shards.takedown import check_lists, take_down

        directory = Storage(url, endpoint)
        read_manifest(directory)
        check_lists(lists, endpoint, "takedown")  # what is refused is refused before Ray starts
        connect_ray(local="RAY_ADDRESS" not in os.environ)
        take_down(directory, lists, workers, "takedown")


_near = click.option(
    "--near", type=click.IntRange(0, 16), metavar="BITS", help="Of 64 bits of perceptual hashes, in which they differ at most."
)
_workers = click.option("--workers", type=click.IntRange(min=1), help="Tasks at a time; by default one a core.")


@main.command()
@click.argument("url")
@_near
@_workers
@_endpoint
def duplicates(url: str, near: int | None, workers: int | None, endpoint: str | None) -> None:
    """Deny all but one of equal images in the dataset at URL, and with --near all but one of nearly equal ones.

    What loaders then leave out is named in deny/duplicates.parquet; the shards stay as they are. Splits for evaluation keep their images
    against those whose names begin with "train"; otherwise the first one stays.
    """
    with exit_codes():
        from pipeline.config.shard import Duplicates
        from pipeline.shards.duplicates.find import find_duplicates
        from pipeline.shards.duplicates.hashes import ensure_hashes
        from pipeline.shards.manifest import read_manifest

        directory = Storage(url, endpoint)
        read_manifest(directory)  # what is refused is refused before Ray starts
        connect_ray(local="RAY_ADDRESS" not in os.environ)
        if near is not None:
            ensure_hashes(directory, workers)
        found = find_duplicates(directory, Duplicates(near=near), workers)
        click.echo(f"{found['images']:,} images")
        _tell_denied(found["denied"])


@main.command()
@click.argument("url")
@click.argument("against", metavar="AGAINST_URL..", nargs=-1, required=True)
@click.option("--split", help="Of the evaluation sets; default: all.")
@_near
@_workers
@_endpoint
def contamination(
    url: str, against: tuple[str, ...], split: str | None, near: int | None, workers: int | None, endpoint: str | None
) -> None:
    """Deny the images of the dataset at URL that are also in the evaluation sets AGAINST_URL, and with --near those nearly equal to theirs.

    What loaders then leave out is named in deny/contamination.parquet, in place of what was found before; contamination.json has the
    counts by set and split. Nothing is written to the sets.
    """
    with exit_codes():
        from pipeline.config.shard import Contamination
        from pipeline.shards.duplicates.contamination import find_contamination
        from pipeline.shards.duplicates.hashes import ensure_hashes
        from pipeline.shards.duplicates.stage import check_sets
        from pipeline.shards.manifest import read_manifest

        directory, sets = Storage(url, endpoint), [Contamination(url=u, split=split, near=near) for u in against]
        read_manifest(directory)  # what is refused is refused before Ray starts
        check_sets(sets, endpoint, "AGAINST_URL {}")
        connect_ray(local="RAY_ADDRESS" not in os.environ)
        if near is not None:
            ensure_hashes(directory, workers)
        for audit in find_contamination(directory, sets, workers)["sets"]:
            click.echo(audit["url"])
            for name, counts in audit["images"].items():
                click.echo(f"  {name}: of {counts['images']:,} images {counts['exact']:,} are here too, and {counts['near']:,} nearly")
            _tell_denied(audit["denied"])


def _tell_denied(denied: dict[str, dict[str, int]]) -> None:
    for split, counts in denied.items():
        click.echo(f"  denied of {split}: {counts['exact']:,} equal files, {counts['near']:,} near")


def _read_names(path: Path) -> tuple[str, ...]:
    try:
        names = path.read_text("utf-8").rstrip().splitlines()
    except (OSError, UnicodeDecodeError) as e:
        raise DataError(f"--classes {path}: cannot be read ({e})") from e
    if not names or not all(name.strip() for name in names):
        line = next((n for n, name in enumerate(names, 1) if not name.strip()), 1)
        raise DataError(f"--classes {path}: line {line} is empty, each line is the name of one class")
    return tuple(name.strip() for name in names)


if __name__ == "__main__":
    main()
