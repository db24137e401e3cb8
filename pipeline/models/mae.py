"""The masked autoencoder (He et al. 2022, arXiv 2111.06377): a ViT sees a quarter of the patches, a small decoder paints the rest.

Shapes: B batch, P input pixels a side, N = (P / patch)^2 patches, n of them seen, D width, E width of the decoder. Names are those of
`VisionTransformer`, which loads the encoder; the decoder's begin with `decoder_`.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from pydantic import Field, model_validator
from torch import nn

from pipeline.models.blocks import Block
from pipeline.models.model import Fp32Buffers, Model
from pipeline.models.options import Count, Options, Rate, check_heads
from pipeline.models.patches import PatchEmbed, patchify
from pipeline.models.positions import sincos_2d
from pipeline.models.vit import initialise


class MAEOptions(Options):
    """`mlp` is the hidden width, by default four times `width`, as it always is in the decoder. `mask` is the part that is not seen."""

    pixels: Count = 224
    patch: Count
    width: Count
    depth: Count
    heads: Count
    mlp: Count | None = None
    mask: Rate = 0.75
    decoder_width: Count = 512
    decoder_depth: Count = 8
    decoder_heads: Count = 16
    eps: float = Field(1e-6, gt=0)

    @model_validator(mode="after")
    def _fits(self) -> MAEOptions:
        check_heads(self.width, self.heads)
        check_heads(self.decoder_width, self.decoder_heads, "decoder_")
        if self.pixels % self.patch:
            raise ValueError(f"pixels: {self.pixels} is not a multiple of the patch, {self.patch} pixels")
        for name, width in (("width", self.width), ("decoder_width", self.decoder_width)):
            if width % 4:
                raise ValueError(f"{name}: {width} is not a multiple of 4, which the fixed 2-D positions need")
        if not self.seen:
            raise ValueError(f"mask: {self.mask} of {self.side**2} patches leaves none to see")
        if self.seen == self.side**2:
            raise ValueError(f"mask: {self.mask} of {self.side**2} patches hides none")
        return self

    @property
    def side(self) -> int:
        """Patches a side."""
        return self.pixels // self.patch

    @property
    def seen(self) -> int:
        """n, rounded down."""
        return int(self.side**2 * (1 - self.mask))


class MAE(Fp32Buffers, Model):
    """Positions are fixed, and kept in the state under the names that a ViT has for its learned ones."""

    options: MAEOptions
    pos_embed: torch.Tensor
    decoder_pos_embed: torch.Tensor
    unpenalised = frozenset({"cls_token", "mask_token"})
    fp32 = ("pos_embed", "decoder_pos_embed")  # they are saved, and 16 bits would round them

    def __init__(self, options: MAEOptions) -> None:
        super().__init__()
        self.options = o = options
        self.patch_embed = PatchEmbed(o.patch, o.width)
        self.cls_token = nn.Parameter(torch.empty(1, 1, o.width))
        self.register_buffer("pos_embed", sincos_2d(o.side, o.width, tokens=1))
        self.blocks = nn.ModuleList(Block(o.width, o.mlp or 4 * o.width, o.heads, eps=o.eps) for _ in range(o.depth))
        self.norm = nn.LayerNorm(o.width, eps=o.eps)
        self.decoder_embed = nn.Linear(o.width, o.decoder_width)
        self.mask_token = nn.Parameter(torch.empty(1, 1, o.decoder_width))
        self.register_buffer("decoder_pos_embed", sincos_2d(o.side, o.decoder_width, tokens=1))
        self.decoder_blocks = nn.ModuleList(
            Block(o.decoder_width, 4 * o.decoder_width, o.decoder_heads, eps=o.eps) for _ in range(o.decoder_depth)
        )
        self.decoder_norm = nn.LayerNorm(o.decoder_width, eps=o.eps)
        self.decoder_pred = nn.Linear(o.decoder_width, o.patch * o.patch * 3)
        self.apply(initialise)
        nn.init.xavier_uniform_(self.patch_embed.proj.weight.flatten(1))
        for token in (self.cls_token, self.mask_token):
            nn.init.normal_(token, std=0.02)

    def forward(self, images: torch.Tensor, noise: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Predict the patches that are not seen.

        Args:
            images: normalised, (B, 3, P, P).
            noise: (B, N) numbers; the patches with the n smallest are seen.

        Returns:
            Predictions of all patches' values in the order of `patchify`, (B, N, patch * patch * 3), and the mask (B, N) in fp32:
            1 where a patch was not seen, 0 where it was.
        """
        seen = noise.argsort(dim=1)[:, : self.options.seen]
        x = self.decoder_embed(self._encode(images, seen))
        b, patches = noise.shape
        tokens = self.mask_token.to(x.dtype).expand(b, patches, -1).scatter(1, _wide(seen, x), x[:, 1:])
        x = torch.cat([x[:, :1], tokens], dim=1) + self.decoder_pos_embed.to(x.dtype)
        for block in self.decoder_blocks:
            x = block(x)
        mask = torch.ones(b, patches, device=x.device).scatter(1, seen, 0.0)
        return self.decoder_pred(self.decoder_norm(x)[:, 1:]), mask

    def _encode(self, images: torch.Tensor, seen: torch.Tensor | None = None) -> torch.Tensor:
        """Class token and patches after the last norm, (B, 1 + n, D); all patches where `seen` (B, n) does not say which."""
        x = self.patch_embed(images)
        x = x + self.pos_embed[:, 1:].to(x.dtype)
        if seen is not None:
            x = x.gather(1, _wide(seen, x))
        token = (self.cls_token + self.pos_embed[:, :1]).to(x.dtype).expand(x.shape[0], -1, -1)
        x = torch.cat([token, x], dim=1)
        for block in self.blocks:
            x = block(x)
        return self.norm(x)

    def features(self, images: torch.Tensor) -> torch.Tensor:
        """Normalised images (B, 3, P, P), all patches seen, to (B, D): the class token after the last norm.

        The token that the paper's linear probes are trained on (appendix A.1), though nothing but the patches' need of it trains it.
        """
        return self._encode(images)[:, 0]

    def example(self, batch: int) -> tuple[torch.Tensor, ...]:
        p, weight = self.options.pixels, self.cls_token
        noise = torch.zeros(batch, self.options.side**2, device=weight.device)
        return torch.zeros(batch, 3, p, p, device=weight.device, dtype=weight.dtype), noise

    def activations(self) -> float:
        """As a ViT's, of the seen patches in the encoder and of all in the decoder."""
        o = self.options
        encoder = o.depth * (1 + o.seen) * (9 * o.width + 2 * (o.mlp or 4 * o.width))
        return float(encoder + o.decoder_depth * (1 + o.side**2) * 17 * o.decoder_width)

    def adapt(self, state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Fixed positions are those of this model's own grid."""
        return {**state, "pos_embed": self.pos_embed, "decoder_pos_embed": self.decoder_pos_embed}


def _wide(index: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """(B, n) to (B, n, width of `like`), for `gather` and `scatter`."""
    return index[..., None].expand(-1, -1, like.shape[2])


def targets(images: torch.Tensor, patch: int, normalise: bool = True) -> torch.Tensor:
    """What `MAE` should predict of normalised images (B, 3, P, P): (B, N, patch * patch * 3).

    With `normalise` each patch has mean 0 and variance 1 ("Reconstruction target" in section 3; the released code takes the unbiased
    variance plus 1e-6).
    """
    values = patchify(images, patch)
    if not normalise:
        return values
    variance, mean = torch.var_mean(values, dim=2, keepdim=True)
    return (values - mean) / (variance + 1e-6).sqrt()
