"""python -m pipeline.predict RUN IMAGE ..: classify image files with what a run has trained, by its head or zero-shot."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import click
import torch

from pipeline.checkpoint import ModelCard, find_model
from pipeline.config.shard import ShardImages
from pipeline.core.command import exit_codes
from pipeline.core.errors import ConfigError, DataError, ExitCode, TesseraError
from pipeline.core.storage import Storage
from pipeline.evaluate.features import device, load_model, logits_of, preprocess
from pipeline.evaluate.protocols import has_head
from pipeline.evaluate.tasks import TEMPLATES
from pipeline.evaluate.zeroshot import embed_classes, open_tower
from pipeline.models.registry import family_of
from pipeline.shards.images import Dropped, check_image
from pipeline.stream.decode import decode, evaluation_view


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


def open_classifier(
    card: ModelCard, state: dict[str, torch.Tensor], names: Sequence[str], templates: Sequence[str]
) -> tuple[Callable[[torch.Tensor], torch.Tensor], list[str]]:
    """(what gives logits (1, C) of a model's input, the C names): the model's own head; of a CLIP the captions that `templates` make of
    `names`, by default of the dataset's classes.

    Raises:
        ConfigError: the model does neither, or `names` are given to one with a head.
    """
    if family_of(card.model) == "clip":
        model, tokenizer = open_tower(card, state)
        chosen = list(names) or card.classes
        if not chosen:
            raise ConfigError(
                "--classes: is missing, and the model was trained on data without classes; name some, such as --classes cat,dog"
            )
        captions = embed_classes(model, tokenizer, chosen, templates or TEMPLATES)
        scale = model.logit_scale.detach().exp()
        return lambda images: scale * model.encode_image(images) @ captions.T, chosen
    if not has_head(card):
        raise ConfigError(f"{card.model} was trained with {card.objective!r} and has no head of classes; evaluate it, or fine-tune it")
    if names or templates:
        raise ConfigError(f"--classes: is for models of clip; {card.model} has a head of its own, of {len(card.classes)} classes")
    return logits_of(load_model(card, state)), card.classes


def classify(
    logits_of: Callable[[torch.Tensor], torch.Tensor], names: Sequence[str], card: ModelCard, view: torch.Tensor, top: int
) -> list[tuple[str, float]]:
    """The `top` likeliest (class, probability), the likeliest first."""
    with torch.inference_mode():
        logits = logits_of(preprocess(card)(view.unsqueeze(0).to(device())))[0]
    best = logits.double().softmax(dim=0).topk(min(top, len(names)))
    return [(names[i], p) for i, p in zip(best.indices.tolist(), best.values.tolist(), strict=True)]


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("run")
@click.argument("images", nargs=-1, required=True, metavar="IMAGE ..")
@click.option("--top", type=click.IntRange(min=1), default=3, show_default=True, help="How many classes to name.")
@click.option("--classes", help="Of a CLIP: what to tell apart, such as 'cat,dog'; by default the classes of its data.")
@click.option("--template", "templates", multiple=True, help="Of a CLIP: a caption with {} for the class; repeatable, the mean is used.")
@click.option("--step", type=click.IntRange(min=0), help="The checkpoint of this step; by default the newest.")
@click.option("--endpoint", envvar="AWS_ENDPOINT_URL", help="The endpoint of an S3-compatible store that RUN is in.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object a line.")
def main(
    run: str,
    images: tuple[str, ...],
    top: int,
    classes: str | None,
    templates: tuple[str, ...],
    step: int | None,
    endpoint: str | None,
    as_json: bool,
) -> None:
    """Classify IMAGE files with the model of RUN, a run's directory or URL: by its head, or a CLIP's by captions (zero-shot)."""
    with exit_codes():
        card, state = find_model(Storage(run, endpoint), step)
        names = [name.strip() for name in (classes or "").split(",") if name.strip()]
        if wrong := [template for template in templates if template.count("{}") != 1]:
            raise ConfigError(f"--template: {wrong[0]!r} should hold {{}} once, where the name of the class belongs")
        logits, names = open_classifier(card, state, names, templates)
    code = ExitCode.DONE
    for path in images:
        try:
            found = classify(logits, names, card, read_view(path, card.pixels), top)
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
