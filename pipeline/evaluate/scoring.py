"""Scores of a dataset's samples: the cosine of image and caption by a CLIP model, or what a user's function says.

Shapes: N samples, P the model's input, E its embedding.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import pyarrow as pa
import torch

from pipeline.checkpoint import ModelCard
from pipeline.checkpoint.model import find_start_card, open_model
from pipeline.config import fingerprint
from pipeline.config.shard import Score
from pipeline.core.errors import ConfigError
from pipeline.core.progress import say
from pipeline.core.storage import Storage
from pipeline.evaluate.features import device, full_fp32, preprocess
from pipeline.evaluate.subject import with_tokenizer
from pipeline.evaluate.wanted import hash_weights
from pipeline.evaluate.zeroshot import open_tower
from pipeline.models.clip import CLIP
from pipeline.models.registry import check_model, family_of
from pipeline.shards.columns import Columns, add_columns
from pipeline.shards.rows import Row
from pipeline.shards.scores import check_columns, check_function, deny_by_score, function_columns
from pipeline.stream.batches import empty_images
from pipeline.stream.decode import evaluation_view_of
from pipeline.stream.text import Tokenizer

_WHERE = "shard.scores"
_DIGITS = 6  # kept behind the point: other batches, and other machines, round the rest differently
_at_hand: dict[str, tuple[CLIP, Tokenizer]] = {}  # the model of this process, by fingerprint


@dataclass(frozen=True)
class Similarity:
    """The cosine of image and caption, as CLIP filters web-scale data (arXiv 2111.02114, section 2): images in the model's evaluation view,
    captions by its own tokenizer, in fp32, of a GPU as of a CPU. A sample without a caption, or whose image cannot be decoded, has none.

    Rounded to 1e-6. Rows do not meet in the model, so other batches change a value by rounding alone (under 1e-6 in fp32 on one machine).
    """

    card: ModelCard
    weights: dict[str, np.ndarray] = field(repr=False)
    fingerprint: str

    def __call__(self, rows: list[Row]) -> list[list[float | None]]:
        model, tokenizer = self._open()
        images, scores, shown = empty_images(len(rows), self.card.pixels), list[float | None]([None] * len(rows)), list[int]()
        for place, row in enumerate(rows):
            if row.text is None or not row.text.strip() or row.image is None:
                continue
            try:
                evaluation_view_of(row.image, self.card.pixels, images[len(shown)])
            except ValueError:
                continue
            shown.append(place)
        if shown:
            with torch.inference_mode(), full_fp32():
                seen = model.encode_image(preprocess(self.card)(images[: len(shown)].to(device())))
                tokens = tokenizer([rows[place].text or "" for place in shown], model.options.context)
                cosines = (seen * model.encode_text(tokens.to(device()))).sum(dim=1).double().cpu()
            for place, cosine in zip(shown, cosines.tolist(), strict=True):
                scores[place] = round(cosine, _DIGITS)
        return [scores]

    def _open(self) -> tuple[CLIP, Tokenizer]:
        """Made once a process, and kept for the shards to come."""
        if self.fingerprint not in _at_hand:
            _at_hand.clear()
            state = {name: torch.from_numpy(array.copy()) for name, array in self.weights.items()}  # Ray's arrays are read-only
            _at_hand[self.fingerprint] = open_tower(self.card, state)
        return _at_hand[self.fingerprint]


def score_columns(score: Score, endpoint: str | None, where: str) -> Columns:
    """The column of a score, ready to be added.

    Raises:
        ConfigError: there is no such function, or the model is no CLIP, or has no tokenizer. CheckpointError: there is no such model.
    """
    if score.model is None:
        return function_columns(score, where)
    card, state = open_model(score.model, endpoint, f"{where}.model")
    card = _equip(card, score, endpoint, where)
    weights = {name: tensor.numpy() for name, tensor in state.items()}
    made_of = {
        "similarity": 2,  # counts changes of how it is worked out
        "weights": hash_weights(weights),
        "tokenizer": card.tokenizer,
        "preprocessing": [card.pixels, card.mean, card.std],
    }
    named = fingerprint(made_of)
    return Columns(
        {score.column: pa.float64()}, named, Similarity(card, weights, named), frozenset({"image", "txt"}), score.batch, score.gpus
    )


def check_scores(scores: Sequence[Score], endpoint: str | None, where: str = _WHERE) -> None:
    """Preflight of `shard.scores`; of a run's checkpoint the card alone is read.

    Raises:
        CheckpointError: a model is missing or damaged. ConfigError: as `score_columns`; or a column that is taken.
    """
    check_columns(scores, where)
    for n, score in enumerate(scores):
        if score.model is None:
            check_function(score, f"{where}.{n}")
            continue
        path = f"{where}.{n}.model"
        _equip(find_start_card(score.model, endpoint, path) or open_model(score.model, endpoint, path)[0], score, endpoint, f"{where}.{n}")


def score_dataset(directory: Storage, scores: Sequence[Score], workers: int | None = None, where: str = _WHERE) -> dict[str, float]:
    """Add the columns of `scores` to the dataset at `directory`, and publish the deny-list of each that has `keep`. Needs a Ray that is
    initialised; may be interrupted and repeated. Returns metrics: `shard/score/<column>/mean`, `min`, `max`, `missing`, `denied`.

    Raises:
        ConfigError, CheckpointError: as `score_columns`. DataError, StorageError: some shards failed; they are named.
    """
    metrics: dict[str, float] = {}
    for n, score in enumerate(scores):
        path = f"{where}.{n}"
        about = add_columns(directory, score_columns(score, directory.endpoint, path), workers, "score")[score.column]
        denied = deny_by_score(directory, score.column, score.keep, workers, path)
        missing = about["rows"] - about["values"]
        found = {name: about[name] for name in ("mean", "min", "max") if about[name] is not None} | {"missing": missing, "denied": denied}
        metrics |= {f"shard/score/{score.column}/{name}": float(value) for name, value in found.items()}
        mean = f"mean {about['mean']:.4g} of {about['values']:,} samples" if about["values"] else "no sample has one"
        lacking = f", {missing:,} have none" if missing and about["values"] else ""
        say(f"score        {score.column}: {mean}{lacking}" + (f"; {denied:,} denied" if score.keep else ""))
    return metrics


def _equip(card: ModelCard, score: Score, endpoint: str | None, where: str) -> ModelCard:
    """With its tokenizer; raises where the model cannot score."""
    if family_of(card.model) != "clip":
        raise ConfigError(f"{where}.model: {score.model} is a model {card.model!r}, and only those of clip know how near a caption is")
    options = check_model(card.model, card.options, f"{where}.model").model_dump(mode="json")
    card = replace(card, options=options)
    return with_tokenizer(card, score.tokenizer, endpoint, f"{where}.tokenizer", str(score.model), is_needed=True)
