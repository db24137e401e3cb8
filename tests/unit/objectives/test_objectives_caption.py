from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from pipeline.stream.batches import filler
from tests.unit.objectives.small import EOT, LENGTH, PIXELS, SOT, VOCABULARY, a_batch, as_input, gradients, log_softmax, set_up

WORDS = [[3, 0, 3], [], [7, 1, 2, 9, 5], [4]]  # 0 is a word, and fills up as well


def test_captions_first_loss() -> None:
    """The embedding is also the head, its rows are short: near a uniform guess."""
    model, objective = set_up("caption", fresh=True)
    assert objective.loss(model, a_batch())[0].item() == pytest.approx(math.log(VOCABULARY), rel=0.05)


def test_caption() -> None:
    """-log p(word | image, words before it), [EOT] included, the mean over all of the batch's."""
    model, objective = set_up("caption")
    batch = a_batch(captions=WORDS)
    losses, hits = [], []
    for b, words in enumerate(WORDS):
        row = [SOT, *words, EOT]
        for place in range(1, len(row)):
            logits = model(as_input(batch)[b : b + 1], torch.tensor([row[:place]]))[0, -1]  # nothing of what comes
            losses.append(-log_softmax(logits)[row[place]].item())
            hits.append(int(logits.argmax()) == row[place])
    loss, metrics = objective.loss(model, batch)
    assert loss.item() == pytest.approx(sum(losses) / len(losses), rel=1e-6)
    assert metrics["top1"].item() == pytest.approx(sum(hits) / len(hits))
    assert objective.count(batch).item() == len(losses) == 13
    loss.backward()
    reached = gradients(model)
    assert all(reached.values()), reached


def test_what_follows_the_end_of_a_caption_is_nothing() -> None:
    model, objective = set_up("caption")
    batch = a_batch(captions=WORDS)
    assert batch.tokens is not None
    noise = torch.randint(0, SOT, batch.tokens.shape, generator=torch.Generator().manual_seed(0))
    after = torch.arange(LENGTH) > batch.tokens.argmax(dim=1, keepdim=True)
    other = replace(batch, tokens=torch.where(after, noise, batch.tokens))
    assert not torch.equal(batch.tokens, other.tokens)
    assert objective.loss(model, other)[0].item() == objective.loss(model, batch)[0].item()
    assert objective.count(other).item() == 13


@pytest.mark.parametrize("name", ["caption", "bag-of-words"])
def test_a_filler_teaches_nothing(name: str) -> None:
    model, objective = set_up(name)
    batch = filler(2, PIXELS, LENGTH)
    loss, metrics = objective.loss(model, batch)
    loss.backward()
    assert loss.item() == 0 and metrics["top1"].item() == 0 and objective.count(batch).item() == 0
    assert not any(gradients(model).values())


def test_bag_of_words_first_loss() -> None:
    model, objective = set_up("bag-of-words", fresh=True)
    assert objective.loss(model, a_batch())[0].item() == pytest.approx(math.log(VOCABULARY), rel=1e-6)


def test_bag_of_words() -> None:
    """Each of the k different words of a caption is 1 / k of its target; neither marks nor padding, and no caption without words."""
    model, objective = set_up("bag-of-words")
    batch = a_batch(captions=WORDS)
    logits = model(as_input(batch))
    losses, hits = [], []
    for b, words in enumerate(WORDS):
        if words:
            log_p = log_softmax(logits[b])
            losses.append(-sum(log_p[word].item() for word in set(words)) / len(set(words)))
            hits.append(int(logits[b].argmax()) in words)
    loss, metrics = objective.loss(model, batch)
    assert loss.item() == pytest.approx(sum(losses) / 3, rel=1e-6) and metrics["top1"].item() == pytest.approx(sum(hits) / 3)
    assert objective.count(batch).item() == 3
    loss.backward()
    assert all(gradients(model).values())


def test_a_full_bag() -> None:
    """A caption as long as there is room, without padding."""
    model, objective = set_up("bag-of-words")
    batch = a_batch((0,), captions=[[9, 8, 9, 7, 6]])
    log_p = log_softmax(model(as_input(batch))[0])
    assert objective.loss(model, batch)[0].item() == pytest.approx(-sum(log_p[w].item() for w in (6, 7, 8, 9)) / 4, rel=1e-6)
