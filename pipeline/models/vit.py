"""The Vision Transformer (Dosovitskiy et al. 2021, arXiv 2010.11929, section 3.1), and what was made of it: DeiT (arXiv 2012.12877),
the towers of CLIP, Scaling ViT's pooling (arXiv 2106.04560), hybrids, masked patch prediction.

Shapes: B batch, P input pixels a side, S = P / patch, N = S^2 patches, K tokens before them (class, distillation), D width, C classes.
Parameter names are timm's, so that weights travel. Initialised as Google's Flax code does.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import torch
from pydantic import Field, model_validator
from torch import nn

from pipeline.models.adapt import adapt_vit
from pipeline.models.blocks import Block, drop_path_rates
from pipeline.models.convnet import Depths
from pipeline.models.hybrid import Authors, HybridEmbed, lecun_normal_, stem_stride
from pipeline.models.model import Model
from pipeline.models.options import Count, Options, Rate, check_heads
from pipeline.models.patches import PatchEmbed
from pipeline.models.pooling import AttentionPool
from pipeline.models.positions import Convention, RelativePositions, join_axes, sincos_2d

MASK_COLORS = 512  # 3 bits a channel (arXiv 2010.11929, appendix B.1.2)


class ViTOptions(Options):
    """One Vision Transformer.

    `mlp` is the hidden width, by default four times `width`. `classes` 0 leaves the head out. `class_token` by default exists where
    `pool` is `token`. `positions_at`: once after the `stem`, before every block (`layers`, each its own), or the same ones before
    every block (`shared`). `resize` is the convention by which `adapt` interpolates learned positions. `representation` is the width
    of a layer with tanh before the head, `fc_norm` normalises after the pooling instead of before, `pre_norm` before the first block
    (CLIP). `masked` adds a mask token and a head for mean colours, `distilled` DeiT's second token and head. `stem` are the depths
    of a ResNet's stages before the Transformer, whose small constants are those of `numerics`; `patch` is then that of the whole.
    """

    pixels: Count = 224
    classes: int = Field(1000, ge=0)
    patch: Count
    width: Count
    depth: Count
    heads: Count
    mlp: Count | None = None
    pool: Literal["token", "gap", "map"] = "token"
    class_token: bool | None = None
    positions: Literal["none", "learned", "learned-2d", "relative", "sincos-2d"] = "learned"
    positions_at: Literal["stem", "layers", "shared"] = "stem"
    resize: Convention = "google"
    dropout: Rate = 0.0
    drop_path: Rate = 0.0
    qk_norm: bool = False
    layer_scale: float | None = Field(None, gt=0)
    representation: Count | None = None
    pre_norm: bool = False
    fc_norm: bool = False
    activation: Literal["gelu", "gelu-tanh", "quick-gelu"] = "gelu"
    eps: float = Field(1e-6, gt=0)  # Flax's default, which Google's ViT uses
    patch_bias: bool = True
    head_bias: bool = True
    head_bias_init: float = 0.0
    masked: bool = False
    distilled: bool = False
    stem: Depths | None = None
    numerics: Authors = "google"

    @model_validator(mode="after")
    def _fits(self) -> ViTOptions:
        check_heads(self.width, self.heads)
        if self.pixels % self.patch:
            raise ValueError(f"pixels: {self.pixels} is not a multiple of the patch, {self.patch} pixels")
        stride = stem_stride(self.stem) if self.stem else 1
        for refused, sentence in (
            (self.patch % stride > 0, f"patch: {self.patch} is not a multiple of the stem's stride, {stride} pixels"),
            (self.stem is not None and not self.patch_bias, "patch_bias: a hybrid's embedding has one"),
            (self.pool == "token" and self.class_token is False, "class_token: pool token needs one"),
            (self.pool == "map" and self.class_token is True, "class_token: pool map looks at the patches alone, leave it out"),
            (self.distilled and self.pool != "token", "distilled: needs pool token, for it adds a second one"),
            (self.distilled and self.representation is not None, "distilled: has two heads of its own and no representation layer"),
            (self.distilled and self.masked, "distilled: does not go together with masked patch prediction"),
            (self.fc_norm and (self.distilled or self.masked), "fc_norm: leaves the tokens without a norm that distilled and masked need"),
            (self.positions == "learned-2d" and self.width % 2 > 0, f"width: {self.width} is odd, learned-2d splits it in halves"),
            (self.positions == "sincos-2d" and self.width % 4 > 0, f"width: {self.width} is not a multiple of 4, which sincos-2d needs"),
            (self.positions_at != "stem" and self.positions == "none", "positions_at: there are no positions to add"),
            (self.positions_at != "stem" and self.positions == "relative", "positions_at: relative positions are in every block already"),
            (self.positions_at == "layers" and self.positions == "sincos-2d", "positions_at: fixed ones are the same everywhere, shared"),
            (self.head_bias_init != 0 and not self.head_bias, "head_bias_init: the head has no bias"),
        ):  # fmt: skip
            if refused:
                raise ValueError(sentence)
        return self

    @property
    def side(self) -> int:
        """S."""
        return self.pixels // self.patch

    @property
    def tokens(self) -> int:
        """K."""
        class_token = self.pool == "token" if self.class_token is None else self.class_token
        return class_token + self.distilled


class VisionTransformer(Model):
    """`forward` gives logits; what else training needs of a ViT are its modes."""

    options: ViTOptions
    unpenalised = frozenset(
        {"cls_token", "dist_token", "mask_token", "pos_embed", "pos_embed_x", "pos_embed_y", "attn.relative.weight", "attn_pool.latent"}
    )
    head_names = frozenset({"head.weight", "head.bias", "head_dist.weight", "head_dist.bias"})

    def __init__(self, options: ViTOptions) -> None:
        super().__init__()
        self.options = o = options
        self.patch_embed = HybridEmbed(o.stem, o.patch, o.width, o.numerics) if o.stem else PatchEmbed(o.patch, o.width, o.patch_bias)
        for name in ("cls_token", "dist_token")[: o.tokens]:
            self.register_parameter(name, nn.Parameter(torch.zeros(1, 1, o.width)))
        if o.masked:
            self.mask_token = nn.Parameter(torch.zeros(1, 1, o.width))
        self._add_positions()
        self.pos_drop = nn.Dropout(o.dropout)
        self.norm_pre = nn.LayerNorm(o.width, eps=o.eps) if o.pre_norm else nn.Identity()
        hidden = o.mlp or 4 * o.width
        blocks = [
            Block(
                o.width, hidden, o.heads, eps=o.eps, activation=o.activation, qk_norm=o.qk_norm, layer_scale=o.layer_scale,
                dropout=o.dropout, drop_path=rate,
            )
            for rate in drop_path_rates(o.drop_path, o.depth)
        ]  # fmt: skip
        if o.positions == "relative":
            for block in blocks:
                block.attn.relative = RelativePositions(o.side**2, o.width, o.heads, o.tokens)
        self.blocks = nn.ModuleList(blocks)
        self.norm = nn.Identity() if o.fc_norm else nn.LayerNorm(o.width, eps=o.eps)
        if o.pool == "map":
            self.attn_pool = AttentionPool(o.width, hidden, o.heads, eps=o.eps, activation=o.activation)
        self.fc_norm = nn.LayerNorm(o.width, eps=o.eps) if o.fc_norm else nn.Identity()
        if o.representation:
            self.pre_logits = nn.Linear(o.width, o.representation)
        self.head = nn.Linear(o.representation or o.width, o.classes, bias=o.head_bias) if o.classes else nn.Identity()
        if o.distilled:
            self.head_dist = nn.Linear(o.width, o.classes, bias=o.head_bias) if o.classes else nn.Identity()
        if o.masked:
            self.mask_head = nn.Linear(o.width, MASK_COLORS)
        self._initialise()

    def _add_positions(self) -> None:
        o = self.options
        layers = o.depth if o.positions_at == "layers" else 1
        if o.positions == "learned":
            self.pos_embed = nn.Parameter(torch.zeros(layers, o.tokens + o.side**2, o.width))
        elif o.positions == "learned-2d":
            self.pos_embed_x = nn.Parameter(torch.zeros(layers, o.side, o.width // 2))
            self.pos_embed_y = nn.Parameter(torch.zeros(layers, o.side, o.width // 2))
        elif o.positions == "sincos-2d":
            self.register_buffer("pos_embed", sincos_2d(o.side, o.width, o.tokens), persistent=False)

    def _initialise(self) -> None:
        self.apply(initialise)
        for name, parameter in self.named_parameters(recurse=False):
            if name != "cls_token":
                nn.init.trunc_normal_(parameter, std=0.02) if name == "dist_token" else nn.init.normal_(parameter, std=0.02)
        for name in ("head", "head_dist", "mask_head"):
            head = getattr(self, name, None)
            if isinstance(head, nn.Linear):
                nn.init.zeros_(head.weight)
                if head.bias is not None:
                    nn.init.constant_(head.bias, 0.0 if name == "mask_head" else self.options.head_bias_init)
        if self.options.representation:
            lecun_normal_(self.pre_logits.weight)

    def encode(self, images: torch.Tensor, corruption: torch.Tensor | None = None) -> torch.Tensor:
        """Normalised images (B, 3, P, P) to tokens after the last norm, (B, K + N, D)."""
        o = self.options
        x = self.patch_embed(images)
        if corruption is not None:
            x = self._corrupt(x, corruption)
        before = [getattr(self, name).expand(x.shape[0], -1, -1).to(x.dtype) for name in ("cls_token", "dist_token")[: o.tokens]]
        x = torch.cat([*before, x], dim=1) if before else x
        positions = self._positions()
        if positions is not None and o.positions_at == "stem":
            x = x + positions
        x = self.norm_pre(self.pos_drop(x))
        inner = None if positions is None or o.positions_at == "stem" else positions.expand(o.depth, -1, -1).unbind()
        for i, block in enumerate(self.blocks):
            x = block(x if inner is None else x + inner[i])
        return self.norm(x)

    def _positions(self) -> torch.Tensor | None:
        """(1 or layers, K + N, D)."""
        if self.options.positions == "learned-2d":
            return join_axes(self.pos_embed_x, self.pos_embed_y, self.options.tokens)
        return self.pos_embed if self.options.positions in ("learned", "sincos-2d") else None

    def _corrupt(self, patches: torch.Tensor, corruption: torch.Tensor) -> torch.Tensor:
        assert self.options.masked, "the model was made without a mask token"
        own = torch.arange(corruption.shape[1], device=corruption.device)
        source = torch.where(corruption >= 0, corruption, own)
        patches = patches.gather(1, source[..., None].expand_as(patches))
        return torch.where((corruption == -2)[..., None], self.mask_token.to(patches.dtype), patches)

    def _pool(self, x: torch.Tensor) -> torch.Tensor:
        match self.options.pool:
            case "map":
                x = self.attn_pool(x)
            case "gap":
                x = x[:, self.options.tokens :].mean(dim=1)
            case _:
                x = x[:, 0]
        x = self.fc_norm(x)
        return torch.tanh(self.pre_logits(x)) if self.options.representation else x

    def features(self, images: torch.Tensor) -> torch.Tensor:
        """Normalised images (B, 3, P, P) to what the head sees, (B, D or the representation's width).

        DeiT has two heads, each with its token; these are averaged as their logits are, so that a probe of the usual width sees both.
        """
        x = self.encode(images)
        return x[:, :2].mean(dim=1) if self.options.distilled else self._pool(x)

    def forward(
        self, images: torch.Tensor, *, corruption: torch.Tensor | None = None, heads: bool = False, tokens: bool = False
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        """Normalised images (B, 3, P, P) to logits (B, C); of a distilled model the mean of both heads' (arXiv 2012.12877, section 5.2).

        Args:
            corruption: (B, N) integers, what masked patch prediction does to each patch's embedding: -1 keeps it, -2 puts the mask
                token there, j >= 0 that of patch j of the same image. The result is then logits of the patches' mean colours, (B, N, 512).
            heads: of a distilled model, the logits of (class token, distillation token) instead of their mean.
            tokens: all tokens after the last norm, (B, K + N, D), instead of logits.
        """
        x = self.encode(images, corruption)
        if tokens:
            return x
        if corruption is not None:
            return self.mask_head(x[:, self.options.tokens :])
        if not self.options.distilled:
            return self.head(self._pool(x))
        both = self.head(x[:, 0]), self.head_dist(x[:, 1])
        return both if heads else (both[0] + both[1]) / 2

    def example(self, batch: int) -> tuple[torch.Tensor, ...]:
        p, weight = self.options.pixels, next(self.parameters())
        return (torch.zeros(batch, 3, p, p, device=weight.device, dtype=weight.dtype),)

    def activations(self) -> float:
        """(9 D + 2 M) numbers a token and layer (arXiv 2205.05198, equation 1 in numbers instead of bytes, without attention's N x N
        matrix; M is the hidden width), more with layer scale, normalised queries and keys, and relative attention's logits."""
        o = self.options
        n = o.tokens + o.side**2
        a_token = 9 * o.width + 2 * (o.mlp or 4 * o.width) + 2 * o.width * ((o.layer_scale is not None) + o.qk_norm)
        relative = o.heads * n * n if o.positions == "relative" else 0
        stem = self.patch_embed.activations(o.pixels) if isinstance(self.patch_embed, HybridEmbed) else 0.0
        return stem + o.depth * (n * a_token + relative)

    def adapt(self, state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        o = self.options
        return adapt_vit(state, self.state_dict(), side=o.side, tokens=o.tokens, convention=o.resize)


def initialise(module: nn.Module) -> None:
    """As Google's Flax code does: xavier-uniform, MLP biases of 1e-6, others zero. For `Module.apply`, which begins at the leaves."""
    if isinstance(module, nn.Linear):
        nn.init.xavier_uniform_(module.weight)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
    if isinstance(module, (Block, AttentionPool)):
        joined, parts = (module.attn.qkv, 3) if isinstance(module, Block) else (module.kv, 2)
        for kernel in joined.weight.chunk(parts):  # kernels of their own in Flax
            nn.init.xavier_uniform_(kernel)
        for layer in (module.mlp.fc1, module.mlp.fc2):
            nn.init.normal_(layer.bias, std=1e-6)
