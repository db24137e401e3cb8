"""CLIP's text encoder (Radford et al. 2021, arXiv 2103.00020, section 2.4), and the bag of words of its efficiency figure (figure 2).

Shapes: B batch, L tokens of a caption (at most the context), W width, E embedding, V vocabulary. A caption is [SOT], its words, [EOT],
then padding of any value not above [EOT], which is the largest token.
"""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import model_validator
from torch import nn

from pipeline.models.blocks import Attention, Block, Mlp
from pipeline.models.options import Count, Options, check_heads

EPS = 1e-5  # of CLIP's norms, torch's default


class TextOptions(Options):
    """`mlp` is the hidden width, by default four times `width`; `heads` by default as many as give 64 channels each.

    A bag of words has a width alone; the rest then counts for nothing, so that any published size can be given one.
    """

    kind: Literal["transformer", "bag-of-words"] = "transformer"
    width: Count
    depth: Count = 12
    heads: Count | None = None
    mlp: Count | None = None

    @model_validator(mode="after")
    def _fits(self) -> TextOptions:
        if self.kind == "transformer":
            check_heads(self.width, self.head_count)
        return self

    @property
    def head_count(self) -> int:
        return self.heads or max(1, self.width // 64)

    @property
    def hidden(self) -> int:
        return self.mlp or 4 * self.width


class TextTower(nn.Module):
    """Captions to embeddings, (B, L) -> (B, E).

    The transformer is causal, so that what stands at [EOT] has seen the whole caption and no padding; that is normalised and projected.

    The bag of words is the projected mean of the token embeddings between the marks. [SOT] and [EOT] are left out: being in each
    caption they would only tell its length. Padding is left out by its place, not its value, for 0 is also the token of "!". A caption
    without words is the zero vector.
    """

    def __init__(self, options: TextOptions, *, vocabulary: int, context: int, embed: int, activation: str) -> None:
        super().__init__()
        self.options = o = options
        self.context = context
        self.token_embed = nn.Embedding(vocabulary, o.width)
        nn.init.normal_(self.token_embed.weight, std=0.02)
        if o.kind == "transformer":
            self.pos_embed = nn.Parameter(torch.empty(context, o.width))
            nn.init.normal_(self.pos_embed, std=0.01)
            self.blocks = nn.ModuleList(
                Block(o.width, o.hidden, o.head_count, eps=EPS, activation=activation, causal=True) for _ in range(o.depth)
            )
            initialise_layers(self.blocks, o.width, o.depth)
            self.norm = nn.LayerNorm(o.width, eps=EPS)
        self.proj = nn.Linear(o.width, embed, bias=False)
        nn.init.normal_(self.proj.weight, std=o.width**-0.5)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """Tokens (B, L), L at most the context, to embeddings (B, E)."""
        x, end = self.token_embed(tokens), tokens.argmax(dim=-1)
        if self.options.kind == "bag-of-words":
            place = torch.arange(tokens.shape[1], device=tokens.device)
            word = ((place > 0) & (place < end[:, None])).to(x.dtype)
            mean = torch.einsum("bl,blw->bw", word, x) / word.sum(dim=1, keepdim=True).clamp(min=1)
            return self.proj(mean)
        x = x + self.pos_embed[: tokens.shape[1]]
        for block in self.blocks:
            x = block(x)
        return self.proj(self.norm(x[torch.arange(len(x), device=x.device), end]))

    def activations(self) -> float:
        """As a ViT's, see there; a bag of words keeps what it looked up."""
        o = self.options
        return (17.0 * o.depth if o.kind == "transformer" else 1.0) * self.context * o.width


def initialise_layers(blocks: nn.ModuleList, width: int, depth: int) -> None:
    """OpenAI's initialisation of a transformer's attention and MLPs: normal, scaled by the width, and what adds to the residual stream
    by the depth. The biases of attention are zero, those of the MLPs stay torch's, as in their code.
    """
    into, out = width**-0.5, width**-0.5 * (2 * depth) ** -0.5
    for layer in blocks.modules():
        if isinstance(layer, Attention):
            nn.init.normal_(layer.qkv.weight, std=into)
            nn.init.normal_(layer.proj.weight, std=out)
            nn.init.zeros_(layer.qkv.bias)
            nn.init.zeros_(layer.proj.bias)
        elif isinstance(layer, Mlp):
            nn.init.normal_(layer.fc1.weight, std=(2 * width) ** -0.5)
            nn.init.normal_(layer.fc2.weight, std=out)
