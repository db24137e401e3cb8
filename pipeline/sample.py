"""python -m pipeline.sample RUN OUT.png: images that a run's model of pixels draws, from nothing or from the upper half of others."""

from __future__ import annotations

import click
import torch

from pipeline.checkpoint import find_model
from pipeline.core.command import exit_codes
from pipeline.core.errors import UserError
from pipeline.core.files import split_file
from pipeline.core.storage import Storage
from pipeline.evaluate.drawn import completed, draw, open_drawer
from pipeline.models.sampling import grid
from pipeline.predict import read_view


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("run")
@click.argument("out", metavar="OUT.png")
@click.option("--count", type=click.IntRange(min=1), help="How many images, or completions of each.  [default: 16, or 3]")
@click.option(
    "--complete", "images", multiple=True, metavar="IMAGE", help="Complete this image file, of which the upper half is given; repeatable."
)
@click.option("--temperature", type=click.FloatRange(min=0, min_open=True), default=1.0, show_default=True)
@click.option("--top-k", type=click.IntRange(min=1), help="Only so many of the likeliest colours can come.")
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True)
@click.option("--columns", type=click.IntRange(min=1), default=8, show_default=True, help="Images a row, where none is completed.")
@click.option("--step", type=click.IntRange(min=0), help="The checkpoint of this step; by default the newest.")
@click.option("--endpoint", envvar="AWS_ENDPOINT_URL", help="The endpoint of the S3-compatible store that RUN is in.")
def main(
    run: str,
    out: str,
    count: int | None,
    images: tuple[str, ...],
    temperature: float,
    top_k: int | None,
    seed: int,
    columns: int,
    step: int | None,
    endpoint: str | None,
) -> None:
    """Draw images with the iGPT of RUN, a run's directory or URL, and write them to OUT.png as a grid. With --complete a row is an
    image, what was given of it, and its completions."""
    with exit_codes():
        directory, name = split_file(out, endpoint)
        directory.check_writable()
        card, state = find_model(Storage(run, endpoint), step)
        model, palette = open_drawer(card, state)
        if top_k is not None and top_k > palette.size:
            raise UserError(f"--top-k: {top_k} is more than the colours of the model (allowed: 1 to {palette.size})")
        if images:
            tries = count or 3
            views = torch.stack([read_view(path, card.pixels) for path in images])
            pictures = completed(model, palette, views, tries=tries, temperature=temperature, top_k=top_k, seed=seed)
            columns = 2 + tries
        else:
            pictures = draw(model, palette, count or 16, temperature=temperature, top_k=top_k, seed=seed)
        directory.write(name, grid(pictures, columns))
        click.echo(f"{directory.url}/{name}")


if __name__ == "__main__":
    main()
