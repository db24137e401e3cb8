"""Sampling with a cache is what recomputing gives; tokens follow the distribution; grids are pictures."""

from __future__ import annotations

import io

import numpy as np
import pytest
import torch
from PIL import Image

from pipeline.models import create
from pipeline.models.igpt import IGPT
from pipeline.models.sampling import BORDER_COLOR, complete, grid, next_logits, sample

TINY = {"width": 12, "depth": 2, "heads": 2, "pixels": 4, "colors": 6}


def tiny(**options: object) -> IGPT:
    """In fp64, with random weights everywhere."""
    model = create("igpt", seed=0, **{**TINY, **options}).double()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn(p.shape, generator=generator, dtype=p.dtype) * 0.6)
    return model


@pytest.mark.parametrize("given", [0, 1, 7, 16])
def test_cached_and_recomputed_logits_agree(given: int) -> None:
    """And both are those that training sees."""
    model = tiny(bias=True, dropout=0.3).train()
    tokens = torch.randint(6, (3, 16), generator=torch.Generator().manual_seed(2))
    cached = list(next_logits(model, tokens, given))
    again = list(next_logits(model, tokens, given, recompute=True))
    whole = model.eval()(tokens)
    assert len(cached) == len(again) == 16 - given
    for n, (a, b) in enumerate(zip(cached, again, strict=True), start=given):
        assert (a - b).abs().max() < 1e-10 and (a - whole[:, n]).abs().max() < 1e-10


def test_the_same_seed_gives_the_same_images() -> None:
    model = tiny()
    first = sample(model, 5, seed=3)
    torch.rand(7)
    assert first.shape == (5, 16) and first.dtype == torch.int64 and first.min() >= 0 and first.max() < 6
    assert torch.equal(first, sample(model, 5, seed=3))
    assert torch.equal(first, sample(model, 5, seed=3, recompute=True))
    assert not torch.equal(first, sample(model, 5, seed=4))
    assert not first.is_inference()


def test_tokens_come_as_often_as_the_model_says() -> None:
    """The first and, after it, the second token of 20,000 images: 5 standard errors; at temperature 2 with the 3 likeliest as well."""
    model, count = tiny(pixels=2), 20_000
    for how, temperature, top_k in (({}, 1.0, 6), ({"temperature": 2.0, "top_k": 3}, 2.0, 3)):
        tokens = sample(model, count, seed=1, **how)
        for seen in (tokens[:, :0], tokens[tokens[:, 0] == tokens[0, 0]][:, :1]):
            p = (model.advance(seen[:1])[0] / temperature).softmax(-1)
            p = torch.where(p >= p.topk(top_k).values[-1], p, 0)
            p = (p / p.sum()).detach()
            place, among = seen.shape[1], tokens[: count if seen.shape[1] == 0 else None]
            if place:
                among = tokens[tokens[:, 0] == tokens[0, 0]]
            found = torch.bincount(among[:, place], minlength=6) / len(among)
            assert ((found - p).abs() <= 5 * (p * (1 - p) / len(among)).sqrt()).all()


def test_the_likeliest() -> None:
    model = tiny()
    tokens = sample(model, 2, top_k=1, seed=8)
    assert torch.equal(tokens, model.eval()(tokens).argmax(-1))
    assert torch.equal(tokens, sample(model, 2, top_k=1, seed=9))
    assert torch.equal(tokens, sample(model, 2, temperature=1e-6, seed=9))


@pytest.mark.parametrize("top_k", [1, 3])
def test_no_more_colors_than_asked_for_where_all_are_as_likely(top_k: int) -> None:
    """As with a new model, whose head is zero."""
    model = create("igpt", seed=0, **TINY)
    assert isinstance(model, IGPT) and not model.head.weight.any()
    assert len(sample(model, 50, top_k=top_k).unique()) == top_k


def test_completes_the_lower_half() -> None:
    model, told = tiny(), []
    images = torch.randint(6, (4, 16), generator=torch.Generator().manual_seed(5))
    done = complete(model, images, 2, seed=1, progress=lambda n, of: told.append((n, of)))
    assert torch.equal(done[:, :8], images[:, :8]) and not torch.equal(done[:, 8:], images[:, 8:])
    assert torch.equal(done, sample(model, 4, prompt=images[:, :8], seed=1, recompute=True))
    assert told == [(n, 16) for n in range(9, 17)]
    assert torch.equal(complete(model, images, 4), images)


def test_leaves_the_mode_as_it_was() -> None:
    model = tiny(dropout=0.5).train()
    sample(model, 1)
    assert model.training
    model.eval()
    sample(model, 1)
    assert not model.training


def test_wrong_arguments_are_named() -> None:
    model = tiny()
    for how, what in (
        ({"temperature": 0.0}, "temperature"),
        ({"top_k": 7}, "top_k"),
        ({"top_k": 0}, "top_k"),
        ({"prompt": torch.zeros(3, 4, dtype=torch.int64)}, "prompt"),
        ({"prompt": torch.zeros(2, 17, dtype=torch.int64)}, "prompt"),
    ):
        with pytest.raises(ValueError, match=f"^{what}: "):
            sample(model, 2, **how)
    with pytest.raises(ValueError, match="BERT"):
        sample(tiny(masked=True), 2)


@pytest.mark.parametrize(("height", "width", "times"), [(8, 8, 16), (50, 60, 3), (130, 100, 1)])
def test_a_grid_shows_every_picture(height: int, width: int, times: int) -> None:
    pictures = np.random.default_rng(0).integers(0, 255, (5, height, width, 3), dtype=np.uint8)
    sheet = np.asarray(Image.open(io.BytesIO(grid(pictures, 3))))
    down, right = height * times + 2, width * times + 2
    assert sheet.shape == (2 * down + 2, 3 * right + 2, 3)
    for n, picture in enumerate(pictures):
        top, left = n // 3 * down + 2, n % 3 * right + 2
        assert np.array_equal(sheet[top : top + height * times : times, left : left + width * times : times], picture)
        assert np.array_equal(sheet[top + times - 1 : top + height * times : times, left : left + width * times : times], picture)
    assert (
        (sheet[:2] == BORDER_COLOR).all()
        and (sheet[:, right : right + 2] == BORDER_COLOR).all()
        and (sheet[down + 2 :, 2 * right + 2 :] == BORDER_COLOR).all()
    )
    assert Image.open(io.BytesIO(grid(torch.from_numpy(pictures[:1]), 3))).size == (right + 2, down + 2)
