"""Fine-tuning as the ViT paper does it (arXiv 2010.11929, section 3.2 and table 4).

SGD with momentum .9, cosine decay to 0 after a linear warm-up, no weight decay, gradients clipped at norm 1, the head
zero-initialised, the resolution higher and the position embeddings interpolated. All weights are trained. The training
view is that of pre-training, at the new resolution. In fp32 on a CPU, in bf16 with fp32 weights on a GPU.

Of a CLIP the image tower is tuned, of an MAE the encoder. A model of pixels is tuned by the joint loss of Chen et al. 2020
(section 2.3), and at its own resolution: twice as many pixels a side make a sequence of four times the length.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from pipeline.checkpoint import ModelCard, adapt_weights
from pipeline.config.evaluate import FineTune
from pipeline.config.inputs import Image
from pipeline.core.errors import Diverged
from pipeline.core.progress import Progress
from pipeline.evaluate.features import device, extract, labelled, logits_of
from pipeline.evaluate.probe import held_out
from pipeline.evaluate.tasks import Task
from pipeline.models import Model
from pipeline.models.registry import as_classifier, family_of
from pipeline.objectives import Inputs, Objective, build_objective
from pipeline.stream import Dataset, Stream
from pipeline.stream.ledger import Ledger
from pipeline.stream.mixture import Mixture
from pipeline.stream.order import Order
from pipeline.train.schedule import factor

MOMENTUM = 0.9
CLIP = 1.0
_LOOK_EVERY = 10  # steps between looks at the loss


@dataclass(frozen=True)
class Settings:
    """`image` is the training view, whose `pixels` is the new resolution; `limit` the most images in one pass."""

    image: Image
    steps: int
    batch: int
    warmup: int
    limit: int

    @staticmethod
    def of(how: FineTune, image: Image, pixels: int, micro_batch: int) -> Settings:
        """From the config: `image` and `micro_batch` are those of pre-training; a pass holds as many patches as there."""
        limit = max(1, micro_batch * image.pixels**2 // pixels**2)
        view = image.model_copy(update={"pixels": pixels, "enlarge": True})
        return Settings(view, how.steps, how.batch, how.warmup, limit)


@dataclass(frozen=True)
class Outcome:
    """`correct` of `n` images; `loss` is the last training loss seen."""

    lr: float
    correct: int
    n: int
    loss: float
    seconds: float
    diverged: bool = False

    @property
    def top1(self) -> float:
        return self.correct / self.n


class Part(Order):
    """The order of some samples of a dataset: a permutation of `numbers` an epoch."""

    def __init__(self, dataset: Dataset, numbers: np.ndarray, seed: int) -> None:
        super().__init__(np.array([len(numbers)]), dataset.view, seed)
        self.numbers = numbers

    def at(self, positions: np.ndarray) -> np.ndarray:
        return self.numbers[super().at(positions)]


def sweep_lr(card: ModelCard, state: dict[str, torch.Tensor], task: Task, settings: Settings, lr: float, seed: int) -> Outcome:
    """Train on nine tenths of the training split, score on the tenth held out. A rate that diverges scores none."""
    train = task.open(task.train)
    numbers = labelled(train)
    inner, outer = held_out(len(numbers), seed)
    try:
        return _train_and_score(card, state, task, settings, lr, seed, train, numbers[inner], train, numbers[outer], f"lr {lr:g}")
    except Diverged:
        return Outcome(lr, 0, len(outer), math.nan, 0.0, diverged=True)


def fine_tune(card: ModelCard, state: dict[str, torch.Tensor], task: Task, settings: Settings, lr: float, seed: int) -> Outcome:
    """Train on all of the training split, score on the test split.

    Raises:
        Diverged: the loss is no longer a number.
    """
    train, test = task.open(task.train), task.open(task.test)
    return _train_and_score(card, state, task, settings, lr, seed, train, labelled(train), test, labelled(test), f"seed {seed}")


def choose_lr(outcomes: Sequence[Outcome]) -> float:
    """The rate with the best held-out score; the lower one of a tie."""
    return max(outcomes, key=lambda o: (not o.diverged, o.correct, -o.lr)).lr


def describe(swept: Sequence[Outcome], tuned: Sequence[Outcome]) -> dict[str, Any]:
    """For a result's details: the chosen rate, how the others did, the last training losses of the seeds."""
    sweep = [{"lr": o.lr, "held_out_top1": o.top1, "diverged": o.diverged} for o in sorted(swept, key=lambda o: o.lr)]
    return {"lr": tuned[0].lr, "sweep": sweep, "losses": [o.loss for o in tuned]}


def prepare(card: ModelCard, state: dict[str, torch.Tensor], pixels: int, classes: int) -> Model:
    """A classifier with the card's weights, at `pixels` a side: positions interpolated, the head zero.

    Raises:
        CheckpointError: the weights are of another model.
    """
    model = as_classifier(card.model, card.options, pixels=pixels, classes=classes)
    body = {name: tensor for name, tensor in state.items() if name not in model.head_names}
    model.load_state_dict(adapt_weights(card, body, model, "evaluate.fine_tune"))
    return model.to(device())


def prepare_objective(card: ModelCard) -> Objective:
    """Cross-entropy; for models of pixels beside the generative loss (Chen et al. 2020, section 2.3)."""
    inputs = Inputs(card.mean, card.std, palette=card.open_palette())
    if family_of(card.model) != "igpt":
        return build_objective("classify", {}, inputs)
    generative = "bert-pixels" if card.options.get("masked") else "next-pixel"
    return build_objective("pixels-and-classes", {"generative": generative}, inputs)


def learning_rate(lr: float, step: int, settings: Settings) -> float:
    """At `step`, from 0: linear over the warm-up, then a cosine that ends at 0."""
    return lr * factor("cosine", step, settings.steps, settings.warmup)


def pass_size(batch: int, limit: int) -> int:
    """The largest divisor of `batch` that is at most `limit`."""
    return next(n for n in range(min(batch, limit), 0, -1) if batch % n == 0)


def _train_and_score(
    card: ModelCard,
    state: dict[str, torch.Tensor],
    task: Task,
    settings: Settings,
    lr: float,
    seed: int,
    train: Dataset,
    learn: np.ndarray,
    test: Dataset,
    score: np.ndarray,
    label: str,
) -> Outcome:
    start = time.perf_counter()
    model = prepare(card, state, settings.image.pixels, len(task.classes))
    stream = Stream(
        [train],
        Mixture([Part(train, learn, seed)], [1.0], settings.image.repeats),
        settings.image,
        seed=seed,
        global_batch=settings.batch,
        micro_batch=pass_size(settings.batch, settings.limit),
        workers=1,
        ledger=Ledger(limit=0.0),  # a score is of a model that saw all of them
    )
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        torch.manual_seed(seed)  # dropout
        loss = _train(model, prepare_objective(card), stream, settings, lr, label)
    logits = extract(logits_of(model.eval()), card, test, score, pixels=settings.image.pixels, batch=settings.limit)
    correct = int((logits.values.argmax(axis=1) == logits.labels).sum())
    return Outcome(lr, correct, len(score), loss, time.perf_counter() - start)


def _train(model: Model, objective: Objective, stream: Stream, settings: Settings, lr: float, label: str) -> float:
    """`settings.steps` steps in place; the last loss."""
    model.train()
    optimizer = torch.optim.SGD(model.parameters(), lr=lr, momentum=MOMENTUM, weight_decay=0.0)
    pieces, where, last = iter(stream), device(), math.nan
    with Progress(label, settings.steps, "steps") as progress:
        for step in range(settings.steps):
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(lr, step, settings)
            total = torch.zeros((), device=where)
            for _ in range(stream.rounds):
                piece = next(pieces)
                with torch.autocast(where.type, torch.bfloat16, enabled=where.type == "cuda"):
                    loss = objective.loss(model, piece.to(where))[0] / stream.rounds
                loss.backward()
                total += loss.detach()
            torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            if step % _LOOK_EVERY == 0 or step == settings.steps - 1:
                last = float(total)
                if not math.isfinite(last):
                    raise Diverged(f"evaluate.fine_tune.lr: at {lr:g} the loss is {last} at step {step}; choose a lower rate")
            progress.update(1, f"loss {last:.3f}")
    return last
