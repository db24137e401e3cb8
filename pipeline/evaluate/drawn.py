"""Pictures that a model of pixels draws: test images whose lower half it completes, and some from nothing.

`<run>/evaluation/completions.png` and `samples.png`, for people to look at, and `pictures.json`, which says what they are and is
written last. Chen et al. 2020, figures 4 to 6, show such pictures.
"""

from __future__ import annotations

import json
from typing import Unpack

import numpy as np
import torch

from pipeline.checkpoint import ModelCard
from pipeline.core.errors import CheckpointError
from pipeline.core.progress import Progress
from pipeline.core.storage import Storage
from pipeline.evaluate.features import device, labelled, load_model
from pipeline.evaluate.results import DIRECTORY
from pipeline.evaluate.tasks import Task
from pipeline.models.igpt import IGPT
from pipeline.models.sampling import How, complete, grid, sample
from pipeline.stream.batches import evaluation_batches
from pipeline.stream.palette import Palette

COMPLETIONS, SAMPLES, ABOUT = (f"{DIRECTORY}/{name}" for name in ("completions.png", "samples.png", "pictures.json"))
TRIES = 3  # completions of an image
COLUMNS = 2 + TRIES  # the image, what is given of it, the completions
BLANK = (200, 214, 232)  # what is not given: a pale blue, which tells it from grey pixels
_BATCH = 64


def open_drawer(card: ModelCard, state: dict[str, torch.Tensor]) -> tuple[IGPT, Palette]:
    """The model and its colours.

    Raises:
        CheckpointError: it draws no pixels, or comes without a palette.
    """
    model, palette = load_model(card, state), card.open_palette()
    if not isinstance(model, IGPT):
        raise CheckpointError(f"{card.model} draws no pixels; samples are of models of igpt")
    if model.options.masked:
        raise CheckpointError(f"{card.model} is trained with the BERT objective, which has no order to draw pixels in")
    if palette is None:
        raise CheckpointError(f"{card.model} comes without its palette")
    return model, palette


def draw(model: IGPT, palette: Palette, count: int, *, given: torch.Tensor | None = None, **how: Unpack[How]) -> torch.Tensor:
    """uint8 (count, P, P, 3), drawn from nothing; or with `given`, uint8 (count, P, P, 3), its upper half and a new lower one."""
    pixels, batches = model.options.pixels, range(0, count, _BATCH)
    keep = pixels // 2 if given is not None else 0
    pieces = []
    with Progress("draw", len(batches) * (pixels - keep) * pixels, "pixels") as progress:

        def tell(done: int, whole: int) -> None:
            progress.update(1)

        for n, start in enumerate(batches):
            own: How = {**how, "seed": how.get("seed", 0) + n}
            if given is None:
                tokens = sample(model, min(_BATCH, count - start), progress=tell, **own)
            else:
                tokens = complete(model, palette.encode(given[start : start + _BATCH].to(device())), keep, progress=tell, **own)
            pieces.append(palette.decode(tokens, pixels, pixels).cpu())
    return torch.cat(pieces)


def completed(model: IGPT, palette: Palette, images: torch.Tensor, *, tries: int, **how: Unpack[How]) -> torch.Tensor:
    """Images uint8 (B, P, P, 3) to uint8 (B (2 + tries), P, P, 3): of each itself, its upper half, and its completions."""
    half = images.shape[1] // 2
    upper = palette.decode(palette.encode(images), images.shape[1], images.shape[2])
    upper[:, half:] = torch.tensor(BLANK, dtype=torch.uint8)
    drawn = draw(model, palette, len(images) * tries, given=images.repeat_interleave(tries, dim=0), **how)
    return torch.cat([images[:, None], upper[:, None], drawn.view(len(images), tries, *images.shape[1:])], dim=1).flatten(0, 1)


def draw_pictures(card: ModelCard, state: dict[str, torch.Tensor], task: Task, count: int, seed: int) -> dict[str, bytes]:
    """The two PNGs by path: `count` test images, evenly over the split, completed; and `count` rows of samples as wide."""
    model, palette = open_drawer(card, state)
    test = task.open(task.test)
    numbers = labelled(test)
    chosen = numbers[np.linspace(0, len(numbers) - 1, min(count, len(numbers))).astype(int)].tolist()
    images = torch.cat([piece.images for piece in evaluation_batches(test, card.pixels, _BATCH, workers=1, numbers=chosen)])
    return {
        COMPLETIONS: grid(completed(model, palette, images, tries=TRIES, seed=seed), COLUMNS),
        SAMPLES: grid(draw(model, palette, count * COLUMNS, seed=seed), COLUMNS),
    }


def write_pictures(run: Storage, pictures: dict[str, bytes], fingerprint: str, task: Task, count: int) -> None:
    for path, data in pictures.items():
        run.write(path, data)
    about = {"fingerprint": fingerprint, "suite": task.name, "split": task.test, "completions": count, "tries": TRIES, "temperature": 1.0}
    run.write(ABOUT, (json.dumps(about) + "\n").encode())


def pictures_fingerprint(run: Storage) -> str | None:
    """Of the pictures that are there."""
    try:
        return json.loads(run.read(ABOUT))["fingerprint"]
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        return None
