"""Images from an iGPT: drawn from nothing, or completed (Chen et al. 2020, figures 4 to 6 show such samples).

Shapes: B images, N = P^2 tokens of a whole image, n of a prompt, K colours; H, W pixels of a picture.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator
from typing import TypedDict, Unpack

import numpy as np
import torch
from PIL import Image

from pipeline.models.blocks import KeyValues
from pipeline.models.igpt import IGPT

TILE = 128  # pixels that a side of a tiny picture is enlarged to, at least
BORDER, BORDER_COLOR = 2, 208  # grey: white paper has an edge too


class How(TypedDict, total=False):
    """The arguments of `sample` that say how a token is drawn."""

    temperature: float
    top_k: int | None
    seed: int


def sample(
    model: IGPT,
    count: int,
    *,
    temperature: float = 1.0,
    top_k: int | None = None,
    prompt: torch.Tensor | None = None,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
    recompute: bool = False,
) -> torch.Tensor:
    """`count` images drawn token by token, as int64 tokens (count, N) on the model's device, the first n those of `prompt` (count, n).

    The logits are divided by `temperature`; with `top_k` only as many of the likeliest colours can come (1: always the likeliest).
    Every token is looked at once: keys and values are kept, 2 N x depth x width numbers an image. `recompute` looks at all tokens again
    for each new one, to check and to measure against. The same seed gives the same images on the same device, whatever was drawn before.
    `progress(done, N)` is told each token.

    Raises:
        ValueError: a model trained with the BERT objective, which cannot be sampled from; arguments out of range.
    """
    length, colors = model.options.pixels**2, model.options.colors
    if model.options.masked:
        raise ValueError("a model trained with the BERT objective has no order to sample in")
    if temperature <= 0:
        raise ValueError(f"temperature: {temperature} should be above 0 (top_k=1 always takes the likeliest)")
    if top_k is not None and not 1 <= top_k <= colors:
        raise ValueError(f"top_k: {top_k} should be from 1 to {colors}, the colours of the model")
    given = 0 if prompt is None else prompt.shape[1]
    if prompt is not None and (len(prompt) != count or given > length):
        raise ValueError(f"prompt: of shape {tuple(prompt.shape)}, should be ({count}, up to {length})")
    device = model.sos.device
    generator = torch.Generator(device).manual_seed(seed)
    tokens = torch.empty(count, length, dtype=torch.int64, device=device)
    if prompt is not None:
        tokens[:, :given] = prompt
    for n, logits in enumerate(next_logits(model, tokens, given, recompute=recompute), start=given):
        tokens[:, n] = _draw(logits, temperature, top_k, generator)
        if progress is not None:
            progress(n + 1, length)
    return tokens


@torch.inference_mode()
def next_logits(model: IGPT, tokens: torch.Tensor, start: int, *, recompute: bool = False) -> Iterator[torch.Tensor]:
    """Logits (B, K) of the tokens at `start`, `start` + 1, .. of `tokens` (B, N), in turn. Before it asks for the next, the caller has
    written the token it was given the logits of. Without dropout; the model's mode is as before at the end.
    """
    batch, length = tokens.shape
    caches = None
    if not recompute:
        o = model.options
        caches = [KeyValues(batch, o.heads, length, o.width, tokens.device, model.head.weight.dtype) for _ in range(o.depth)]
    training = model.training
    model.eval()
    try:
        for n in range(start, length):
            seen = n - 1 if caches and n > start else 0
            yield model.advance(tokens[:, seen:n], caches)
    finally:
        model.train(training)


def complete(
    model: IGPT, tokens: torch.Tensor, keep: int, *, progress: Callable[[int, int], None] | None = None, **how: Unpack[How]
) -> torch.Tensor:
    """The images (B, N) again, all rows after the first `keep` drawn anew; `how` and `progress` as `sample` takes them."""
    return sample(model, len(tokens), prompt=tokens[:, : keep * model.options.pixels], progress=progress, **how)


def _draw(logits: torch.Tensor, temperature: float, top_k: int | None, generator: torch.Generator) -> torch.Tensor:
    """One token (B,) of each row of logits (B, K). The largest of p / Exp(1) falls on a token with probability p, and nothing has to
    come back from the device for it."""
    logits = logits.float() / temperature
    if top_k is not None:
        kept = logits.topk(top_k)  # by place: a colour as likely as the last of these is out
        logits = torch.full_like(logits, -torch.inf).scatter(1, kept.indices, kept.values)
    noise = torch.empty_like(logits).exponential_(generator=generator)
    return (logits.softmax(dim=-1) / noise).argmax(dim=-1)


def grid(images: np.ndarray | torch.Tensor, columns: int) -> bytes:
    """Pictures (B, H, W, 3), uint8, as one PNG, `columns` a row, with a thin grey border around each; tiny ones are enlarged by a whole
    factor, without smoothing."""
    pictures = torch.as_tensor(images).cpu()
    count, height, width, _ = pictures.shape
    times = max(1, -(-TILE // max(height, width)))
    pictures = pictures.repeat_interleave(times, dim=1).repeat_interleave(times, dim=2)
    rows, columns = -(-count // columns), min(columns, count)
    down, right = height * times + BORDER, width * times + BORDER
    sheet = torch.full((rows * down + BORDER, columns * right + BORDER, 3), BORDER_COLOR, dtype=torch.uint8)
    for n, picture in enumerate(pictures):
        top, left = n // columns * down + BORDER, n % columns * right + BORDER
        sheet[top : top + height * times, left : left + width * times] = picture
    Image.fromarray(sheet.numpy()).save(png := io.BytesIO(), "PNG", optimize=True)
    return png.getvalue()
