"""Predicting captions: the transformer language model of CLIP's efficiency figure (Radford et al. 2021, arXiv 2103.00020, figure 2).

As section 2.3 describes it, after VirTex (Desai and Johnson 2021, arXiv 2006.06666, section 3): an image tower, and a causal decoder
with CLIP's text transformer's size that looks at the image's tokens.

Shapes: B batch, P input pixels a side, L tokens of a caption, N tokens of an image, D their width, W width of the decoder, h its heads,
V vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from pydantic import model_validator
from torch import nn

from pipeline.models.blocks import Attention, Mlp
from pipeline.models.clip import PairOptions, adapt_towers, example_pair, image_tower
from pipeline.models.clip_resnet import CLIPResNet
from pipeline.models.model import Model
from pipeline.models.text import EPS, TextOptions, initialise_layers


class CaptionOptions(PairOptions):
    """`vision` and `text` as CLIP's; the text is always a transformer."""

    @model_validator(mode="after")
    def _decodes(self) -> CaptionOptions:
        if self.text.kind != "transformer":
            raise ValueError("text.kind: captions are predicted by a transformer (a bag of words is predicted by a classifier)")
        return self


class CrossAttention(nn.Module):
    """Tokens (B, L, W) look at those of the image (B, N, W): (B, L, W)."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.q = nn.Linear(width, width)
        self.kv = nn.Linear(width, 2 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x: torch.Tensor, image: torch.Tensor) -> torch.Tensor:
        q, k, v = (y.unflatten(2, (self.heads, -1)).transpose(1, 2) for y in (self.q(x), *self.kv(image).chunk(2, dim=-1)))
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class DecoderBlock(nn.Module):
    """The pre-norm block with a third branch: z' = MSA(LN(z)) + z; z'' = cross(LN(z'), image) + z'; z''' = MLP(LN(z'')) + z''."""

    def __init__(self, options: TextOptions, activation: str) -> None:
        super().__init__()
        width, heads = options.width, options.head_count
        self.norm1 = nn.LayerNorm(width, eps=EPS)
        self.attn = Attention(width, heads, causal=True)
        self.norm_cross = nn.LayerNorm(width, eps=EPS)
        self.cross = CrossAttention(width, heads)
        self.norm2 = nn.LayerNorm(width, eps=EPS)
        self.mlp = Mlp(width, options.hidden, activation=activation)

    def forward(self, x: torch.Tensor, image: torch.Tensor) -> torch.Tensor:
        x = x + self.attn(self.norm1(x))
        x = x + self.cross(self.norm_cross(x), image)
        return x + self.mlp(self.norm2(x))


class TiedEmbedding(nn.Module):
    """One table (V, W) for both ends: integers (B, L) to their rows (B, L, W), hidden states (B, L, W) to logits (B, L, V)."""

    def __init__(self, vocabulary: int, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(vocabulary, width))
        nn.init.normal_(self.weight, std=0.02)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, self.weight) if x.is_floating_point() else F.embedding(x, self.weight)


class TextDecoder(nn.Module):
    """Tokens (B, L) and the image's (B, N, D) to logits (B, L, V) of the token that comes next at each place.

    The embedding is tied with the head, as VirTex's is: only so are 12 layers of width 512 the 63 million parameters that
    section 2.3 names, to which the cross-attention comes.
    """

    def __init__(self, options: TextOptions, *, vocabulary: int, context: int, visual: int, activation: str) -> None:
        super().__init__()
        width, depth = options.width, options.depth
        self.token_embed = TiedEmbedding(vocabulary, width)
        self.pos_embed = nn.Parameter(torch.empty(context, width))
        nn.init.normal_(self.pos_embed, std=0.01)
        self.visual_proj = nn.Linear(visual, width)
        nn.init.normal_(self.visual_proj.weight, std=visual**-0.5)
        nn.init.zeros_(self.visual_proj.bias)
        self.blocks = nn.ModuleList(DecoderBlock(options, activation) for _ in range(depth))
        initialise_layers(self.blocks, width, depth)
        for module in self.blocks.modules():
            if isinstance(module, CrossAttention):
                for layer, std in ((module.q, 1.0), (module.kv, 1.0), (module.proj, (2 * depth) ** -0.5)):
                    nn.init.normal_(layer.weight, std=std * width**-0.5)
                    nn.init.zeros_(layer.bias)
        self.norm = nn.LayerNorm(width, eps=EPS)

    def forward(self, image: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        x = self.token_embed(tokens) + self.pos_embed[: tokens.shape[1]]
        image = self.visual_proj(image)
        for block in self.blocks:
            x = block(x, image)
        return self.token_embed(self.norm(x))


class Captioner(Model):
    """An image tower, and a decoder of captions."""

    options: CaptionOptions
    unpenalised = frozenset({"visual.cls_token"})  # as CLIP's

    def __init__(self, options: CaptionOptions) -> None:
        super().__init__()
        self.options = o = options
        self.visual = image_tower(o, 0)
        width = self.visual.options.channels if isinstance(self.visual, CLIPResNet) else self.visual.options.width
        self.text = TextDecoder(o.text, vocabulary=o.vocabulary, context=o.context, visual=width, activation=o.activation)

    def forward(self, images: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        """Normalised images (B, 3, P, P) and tokens (B, L), L at most the context, to logits (B, L, V): at each place those of the
        token after it."""
        return self.text(self._look(images), tokens)

    def _look(self, images: torch.Tensor) -> torch.Tensor:
        """(B, N, D): a ViT's tokens after its last norm, class token included, or the places of a ResNet's last map."""
        return self.visual(images) if isinstance(self.visual, CLIPResNet) else self.visual(images, tokens=True)

    def features(self, images: torch.Tensor) -> torch.Tensor:
        """The mean of what the decoder looks at, (B, D): all of it is trained, and nothing alone stands for the image."""
        return self._look(images).mean(dim=1)

    def example(self, batch: int) -> tuple[torch.Tensor, ...]:
        return example_pair(self.options, self.text.norm.weight, batch)

    def activations(self) -> float:
        """A block of the decoder keeps 6 W a token more than a ViT's, see there, and 2 W a token of the image."""
        o = self.options
        image = (o.pixels // 32) ** 2 if isinstance(self.visual, CLIPResNet) else self.visual.options.side**2
        decoder = o.text.depth * o.text.width * (23.0 * o.context + 2 * image)
        return self.visual.activations() + decoder + o.context * o.vocabulary

    def adapt(self, state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """As CLIP's."""
        return adapt_towers(self, state)
