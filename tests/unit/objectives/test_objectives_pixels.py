from __future__ import annotations

import math

import pytest
import torch

from pipeline.core.errors import ConfigError
from pipeline.models.igpt import IGPT
from pipeline.objectives import check_objective
from pipeline.objectives.pixels import draw_masked, masked_loss
from pipeline.stream.batches import MicroBatch
from tests.unit.objectives.small import CLASSES, COLORS, PALETTE, PIXELS, a_batch, gradients, log_softmax, set_up


def colours_of(batch: MicroBatch) -> torch.Tensor:
    """(b, P * P): the nearest colour of each pixel, row by row, by comparing with each."""
    x = batch.images.double().flatten(1, 2) / 127.5 - 1
    return (x[:, :, None] - PALETTE.colors.double()).square().sum(dim=3).argmin(dim=2)


@pytest.mark.parametrize(
    ("name", "arguments", "expected"),
    [
        ("next-pixel", {}, math.log(COLORS)),
        ("bert-pixels", {}, math.log(COLORS)),
        ("pixels-and-classes", {}, math.log(COLORS) + math.log(CLASSES)),
        ("pixels-and-classes", {"generative": "bert-pixels", "weight": 0.5}, 0.5 * math.log(COLORS) + math.log(CLASSES)),
    ],
)
def test_the_first_loss_is_that_of_a_uniform_guess(name: str, arguments: dict[str, object], expected: float) -> None:
    model, objective = set_up(name, arguments, fresh=True)
    torch.manual_seed(0)
    assert objective.loss(model, a_batch())[0].item() == pytest.approx(expected, rel=1e-6)


def test_next_pixel() -> None:
    """Equation 1 and 2: the mean of -log p(x_i | x_<i) over all pixels of all images."""
    model, objective = set_up("next-pixel")
    batch = a_batch((0, 1))
    tokens = colours_of(batch)
    total = 0.0
    for row in tokens:
        for place in range(PIXELS**2):
            seen = torch.cat([row[:place], torch.zeros(1, dtype=torch.int64)])  # nothing of what comes
            total -= log_softmax(model(seen[None])[0, place])[row[place]].item()
    loss, metrics = objective.loss(model, batch)
    assert loss.item() == pytest.approx(total / tokens.numel(), rel=1e-6) and metrics == {}
    loss.backward()
    assert all(gradients(model).values()), "everything learns, the start of the sequence too"
    assert objective.count(batch).item() == 2


def test_bert_pixels() -> None:
    """Equation 3, as a mean: -log p(x_i | x not in M) over the places in M."""
    model, objective = set_up("bert-pixels")
    batch = a_batch()
    torch.manual_seed(3)
    loss, _ = objective.loss(model, batch)
    torch.manual_seed(3)
    masked, tokens = draw_masked(colours_of(batch), 0.15), colours_of(batch)
    hidden = tokens.masked_fill(masked, 0)  # what is masked cannot tell
    logits = model(hidden, masked=masked)
    expected = 0.0
    for row in range(4):
        places = masked[row].nonzero().flatten().tolist()
        expected -= sum(log_softmax(logits[row, i])[tokens[row, i]].item() for i in places) / len(places) / 4
    assert loss.item() == pytest.approx(expected, rel=1e-6)
    assert objective.count(batch).item() == 4
    loss.backward()
    told = gradients(model)
    assert {name for name, reached in told.items() if not reached} == {"sos"}, "which begins a sequence that is predicted in its order"


def test_masks_follow_the_seed_alone() -> None:
    model, objective = set_up("bert-pixels", {"mask": 0.3})
    losses = []
    for seed in (7, 7, 8):
        torch.manual_seed(seed)
        losses.append(objective.loss(model, a_batch())[0].item())
    assert losses[0] == losses[1] != losses[2]


@pytest.mark.parametrize("probability", [0.15, 0.5])
def test_how_much_is_masked(probability: float) -> None:
    torch.manual_seed(0)
    share = draw_masked(torch.zeros(50, 1024, dtype=torch.int64), probability).float()
    assert share.mean().item() == pytest.approx(probability, abs=0.01)
    assert share.mean(dim=1).std().item() == pytest.approx(math.sqrt(probability * (1 - probability) / 1024), rel=0.3), "each on its own"


def test_only_masked_places_count() -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(2, 6, COLORS, generator=generator).requires_grad_()
    tokens = torch.randint(0, COLORS, (2, 6), generator=generator)
    masked = torch.tensor([[True, False, False, True, False, False], [False, False, True, False, False, False]])
    loss = masked_loss(logits, tokens, masked)
    by_image = [[-log_softmax(logits[b, i])[tokens[b, i]].item() for i in range(6) if masked[b, i]] for b in range(2)]
    assert loss.item() == pytest.approx((sum(by_image[0]) / 2 + by_image[1][0]) / 2, rel=1e-6), "a mean an image, whatever it has masked"
    loss.backward()
    assert logits.grad is not None
    assert torch.equal(logits.grad.any(dim=2), masked)
    with torch.no_grad():
        other = torch.where(masked[:, :, None], logits, 1e4)
        assert masked_loss(other, tokens, masked).item() == loss.item()


def test_an_image_of_which_nothing_is_masked_counts_nothing() -> None:
    logits, tokens = torch.zeros(2, 3, COLORS, requires_grad=True), torch.zeros(2, 3, dtype=torch.int64)
    masked = torch.tensor([[True, True, False], [False, False, False]])
    assert masked_loss(logits, tokens, masked).item() == pytest.approx(math.log(COLORS) / 2)
    none = masked_loss(logits, tokens, torch.zeros(2, 3, dtype=torch.bool))
    none.backward()
    assert none.item() == 0 and logits.grad is not None and not logits.grad.any()


@pytest.mark.parametrize(
    ("name", "arguments", "masked"),
    [
        ("next-pixel", {}, False),
        ("bert-pixels", {}, True),
        ("pixels-and-classes", {}, False),
        ("pixels-and-classes", {"generative": "bert-pixels"}, True),
    ],
)
def test_the_model_is_told_what_it_is_trained_for(name: str, arguments: dict[str, object], masked: bool) -> None:
    """Features, sampling and fine-tuning depend on it, and a checkpoint's card keeps it."""
    model, _ = set_up(name, arguments)
    assert isinstance(model, IGPT) and model.options.masked == masked and model.options.colors == COLORS


@pytest.mark.parametrize("generative", ["next-pixel", "bert-pixels"])
def test_pixels_and_classes(generative: str) -> None:
    """Section 2.3: L_gen + L_clf of one pass; an image without a label counts in L_gen alone."""
    model, objective = set_up("pixels-and-classes", {"generative": generative, "weight": 0.25, "smoothing": 0.1})
    batch = a_batch((2, -1, 0, 4))
    tokens = colours_of(batch)
    torch.manual_seed(1)
    loss, metrics = objective.loss(model, batch)
    torch.manual_seed(1)
    masked = draw_masked(tokens, 0.15) if generative == "bert-pixels" else None
    pixels, classes = model(tokens, masked=masked, classify=True)
    weights = torch.full(tokens.shape, 1 / tokens.numel()) if masked is None else masked / masked.sum(dim=1, keepdim=True) / len(tokens)
    of_pixels = -(log_softmax(pixels).gather(2, tokens[..., None])[..., 0] * weights).sum().item()
    of_classes = 0.0
    for row, label in ((0, 2), (2, 0), (3, 4)):
        log_p = log_softmax(classes[row])
        of_classes -= (0.9 * log_p[label] + 0.1 * log_p.mean()).item() / 3
    assert loss.item() == pytest.approx(0.25 * of_pixels + of_classes, rel=1e-6)
    assert metrics["generative"].item() == pytest.approx(of_pixels, rel=1e-6)
    assert metrics["classes"].item() == pytest.approx(of_classes, rel=1e-6)
    guesses = [int(classes[row].argmax()) == label for row, label in ((0, 2), (2, 0), (3, 4))]
    assert metrics["top1"].item() == pytest.approx(sum(guesses) / 3)
    assert objective.count(batch).item() == 4
    loss.backward()
    assert {name for name, reached in gradients(model).items() if not reached} == ({"sos"} if masked is not None else set())


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("bert-pixels", {"mask": 0}, "pretrain.objective.mask: 0 should be greater than 0"),
        ("bert-pixels", {"mask": True}, "pretrain.objective.mask: True should be a number"),
        ("next-pixel", {"mask": 0.15}, r"pretrain.objective.mask: no such key \(allowed: name\)"),
        ("pixels-and-classes", {"generative": "pixels"}, "pretrain.objective.generative: 'pixels' should be 'next-pixel' or 'bert-pixels'"),
        ("pixels-and-classes", {"weight": -1}, "pretrain.objective.weight: -1 should be greater than or equal to 0"),
    ],
)
def test_bad_arguments(name: str, arguments: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        check_objective(name, arguments)
