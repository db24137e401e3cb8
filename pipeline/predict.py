"""python -m pipeline.predict RUN IMAGE ..: classify image files with what a run has trained."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import click
import torch

from pipeline.checkpoint import ModelCard, find_model
from pipeline.config.schema import ShardImages
from pipeline.core.errors import DataError, ExitCode, TesseraError
from pipeline.core.storage import Storage
from pipeline.evaluate.features import device, load_model
from pipeline.models.vit import VisionTransformer
from pipeline.shards.images import Dropped, check_image
from pipeline.stream.decode import decode, evaluation_view, normalize


def read_view(path: str, pixels: int) -> torch.Tensor:
    """The image file at `path` as the model sees it: upright, RGB, uint8 (P, P, 3); as sharding and evaluation do it.

    Raises:
        DataError: it cannot be read, or is no image.
    """
    try:
        data = Path(path).read_bytes()
    except FileNotFoundError:
        raise DataError(f"{path}: there is no such file") from None
    except OSError as e:
        raise DataError(f"{path}: cannot be read ({e.strerror})") from e
    checked = check_image(data, ShardImages())
    if isinstance(checked, Dropped):
        raise DataError(f"{path}: this image cannot be used, it is {checked.reason.replace('-', ' ')} ({checked.detail})")
    return evaluation_view(decode(checked.data), pixels)


def classify(model: VisionTransformer, card: ModelCard, view: torch.Tensor, top: int) -> list[tuple[str, float]]:
    """The `top` likeliest (class, probability), the likeliest first."""
    with torch.inference_mode():
        logits = model(normalize(view.unsqueeze(0).to(device()), card.mean, card.std))[0]
    best = logits.double().softmax(dim=0).topk(min(top, len(card.classes)))
    return [(card.classes[i], p) for i, p in zip(best.indices.tolist(), best.values.tolist(), strict=True)]


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("run")
@click.argument("images", nargs=-1, required=True, metavar="IMAGE ..")
@click.option("--top", type=click.IntRange(min=1), default=3, show_default=True, help="How many classes to name.")
@click.option("--step", type=click.IntRange(min=0), help="The checkpoint of this step; by default the newest.")
@click.option("--endpoint", envvar="AWS_ENDPOINT_URL", help="The endpoint of an S3-compatible store that RUN is in.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object a line.")
def main(run: str, images: tuple[str, ...], top: int, step: int | None, endpoint: str | None, as_json: bool) -> None:
    """Classify IMAGE files with the model of RUN, a run's directory or URL."""
    try:
        card, state = find_model(Storage(run, endpoint), step)
        model = load_model(card, state)
    except TesseraError as e:
        click.echo(f"error: {e}", err=True)
        sys.exit(e.exit_code)
    code = ExitCode.DONE
    for path in images:
        try:
            found = classify(model, card, read_view(path, card.pixels), top)
        except TesseraError as e:
            click.echo(f"error: {e}", err=True)
            code = e.exit_code
            continue
        if as_json:
            click.echo(json.dumps({"image": path, "step": card.step, "classes": [{"class": c, "probability": p} for c, p in found]}))
        else:
            (name, probability), *others = found
            rest = "".join(f"   {c} {100 * p:.1f}%" for c, p in others)
            click.echo(f"{path}   {name} {100 * probability:.1f}%{'   |' + rest if rest else ''}")
    sys.exit(code)


if __name__ == "__main__":
    main()
