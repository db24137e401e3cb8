"""python -m pipeline.evaluate score URL: score the samples of a dataset by hand, without a config."""

from __future__ import annotations

import os

import click

from pipeline.config.data import Bound
from pipeline.config.section import check_word
from pipeline.config.shard import Score
from pipeline.core.cluster import connect_ray
from pipeline.core.command import exit_codes
from pipeline.core.errors import ConfigError
from pipeline.core.storage import Storage


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
def main() -> None:
    """What models say of data."""


@main.command()
@click.argument("url")
@click.option("--column", required=True, help="The name of the column that every index gets.")
@click.option("--model", help="A CLIP, a run's URL or URL@step, or a published one: the cosine of image and caption.")
@click.option("--tokenizer", help="The tokens of a published one: a tokenizer.json, or OpenAI's bpe_simple_vocab_16e6.txt.gz.")
@click.option("--function", help="Instead: package.module.name of a function, called with a list of samples.")
@click.option("--min", "least", type=float, help="Samples below this, or without a number, go onto the deny-list of the column.")
@click.option("--max", "most", type=float, help="Likewise above this.")
@click.option("--gpus", type=click.FloatRange(0, 1), default=0.0, show_default=True, help="The share of a GPU that one task has.")
@click.option("--batch", type=click.IntRange(min=1), default=64, show_default=True, help="Samples at a time.")
@click.option("--workers", type=click.IntRange(min=1), help="Shards at a time; by default one a core.")
@click.option("--endpoint", envvar="AWS_ENDPOINT_URL", help="The endpoint of an S3-compatible store that URL is in.")
def score(
    url: str,
    column: str,
    model: str | None,
    tokenizer: str | None,
    function: str | None,
    least: float | None,
    most: float | None,
    gpus: float,
    batch: int,
    workers: int | None,
    endpoint: str | None,
) -> None:
    """Add a number for each sample to the indices of the dataset at URL. Without --min and --max the column's deny-list, if there is one,
    is removed."""
    with exit_codes():
        from pipeline.evaluate.scoring import check_scores, score_dataset
        from pipeline.shards.manifest import read_manifest

        if (model is None) == (function is None) or (tokenizer and function):
            raise ConfigError("score: give either --model, with --tokenizer where it is a published one, or --function")
        bound = None if least is None and most is None else Bound(min=least, max=most)
        wanted = Score(column=_word(column), model=model, tokenizer=tokenizer, function=function, gpus=gpus, batch=batch, keep=bound)
        directory = Storage(url, endpoint)
        read_manifest(directory)
        check_scores([wanted], endpoint, "score")  # what is refused is refused before Ray starts
        connect_ray(local="RAY_ADDRESS" not in os.environ)
        for name, value in score_dataset(directory, [wanted], workers, "score").items():
            click.echo(f"{name.rpartition('/')[2]:<8} {value:,.6g}")


def _word(column: str) -> str:
    try:
        return check_word(column)
    except ValueError as e:
        raise ConfigError(f"--column: {column!r} {e}") from e


if __name__ == "__main__":
    main()
