"""Zero-shot classification as CLIP does it (arXiv 2103.00020, section 3.1): the class whose captions are nearest to the image.

Shapes: C classes, T templates, E embedding, N test images.
"""

from __future__ import annotations

import time
from collections.abc import Sequence

import torch

from pipeline.checkpoint import ModelCard
from pipeline.core.errors import CheckpointError
from pipeline.evaluate.features import BATCH, device, extract, load_model
from pipeline.evaluate.results import Result, make_result, predictions
from pipeline.evaluate.supervised import softmax
from pipeline.evaluate.tasks import Task
from pipeline.models.clip import CLIP
from pipeline.objectives.scores import mean_captions
from pipeline.stream.text import Tokenizer


def open_tower(card: ModelCard, state: dict[str, torch.Tensor]) -> tuple[CLIP, Tokenizer]:
    """The model and its tokenizer.

    Raises:
        CheckpointError: it is no CLIP, or comes without a tokenizer.
    """
    model, tokenizer = load_model(card, state), card.open_tokenizer()
    if not isinstance(model, CLIP):
        raise CheckpointError(f"{card.model} knows no captions; zero-shot is for models of clip")
    if tokenizer is None:
        raise CheckpointError(f"{card.model} comes without its tokenizer; zero-shot needs one")
    return model, tokenizer


def embed_classes(model: CLIP, tokenizer: Tokenizer, names: Sequence[str], templates: Sequence[str]) -> torch.Tensor:
    """(C, E), of length 1: the mean of a class's T captions, each of length 1, made as long again."""
    captions = [template.replace("{}", name) for name in names for template in templates]
    pieces = []
    with torch.inference_mode():
        for start in range(0, len(captions), BATCH):
            tokens = tokenizer(captions[start : start + BATCH], model.options.context)
            pieces.append(model.encode_text(tokens.to(device())).float())
    return mean_captions(torch.cat(pieces), len(names))


def evaluate_zeroshot(card: ModelCard, state: dict[str, torch.Tensor], task: Task, fingerprint: str) -> Result:
    """Top-1 by the largest cosine; `details["predictions"]` as of the model's own head, probabilities by the model's own scale."""
    start = time.perf_counter()
    model, tokenizer = open_tower(card, state)
    names = task.names or task.classes
    classes = embed_classes(model, tokenizer, names, task.templates).cpu().numpy()
    found = extract(model.encode_image, card, task.open(task.test))
    probabilities = softmax(float(model.logit_scale.detach().exp()) * found.values @ classes.T)
    correct = int((probabilities.argmax(axis=1) == found.labels).sum())
    details = {
        "data": task.url,
        "split": task.test,
        "templates": list(task.templates),
        "names": names,
        "predictions": predictions(found, probabilities),
    }
    seconds = time.perf_counter() - start
    return make_result("zero-shot", task, [correct], len(found.labels), seconds=seconds, fingerprint=fingerprint, details=details)
