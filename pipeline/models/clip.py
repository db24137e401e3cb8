"""CLIP: an image tower and a text tower into one space (Radford et al. 2021, arXiv 2103.00020, section 2.3 and figure 3).

Shapes: B batch, P input pixels a side, L tokens of a caption, E embedding, D width of an image tower. Initialised as OpenAI's code does.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Annotated, Any, Literal

import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import nn

from pipeline.models.blocks import Block
from pipeline.models.clip_resnet import STRIDE, CLIPResNet, CLIPResNetOptions
from pipeline.models.model import Model
from pipeline.models.options import Count, Options
from pipeline.models.patches import PatchEmbed
from pipeline.models.positions import Convention, resize_positions
from pipeline.models.text import EPS, TextOptions, TextTower
from pipeline.models.vit import VisionTransformer, ViTOptions

Activation = Literal["quick-gelu", "gelu", "gelu-tanh"]


class CLIPViTOptions(ViTOptions):
    """An image tower: any option of a ViT, with CLIP's defaults. Pixels, classes (here E) and activation are those of the whole model."""

    kind: Literal["vit"]
    pixels: Count = Field(224, exclude=True)
    classes: int = Field(0, ge=0, exclude=True)
    activation: Activation = Field("quick-gelu", exclude=True)
    resize: Convention = "timm-hybrid"  # as open_clip resizes
    pre_norm: bool = True
    patch_bias: bool = False
    head_bias: bool = False
    eps: Annotated[float, Field(gt=0)] = EPS


Vision = Annotated[CLIPViTOptions | CLIPResNetOptions, Field(discriminator="kind")]


class PairOptions(Options):
    """What a model of images and captions is made of: `vision` is an image tower, a ViT or a ResNet, by its `kind`."""

    pixels: Count = 224
    activation: Activation = "quick-gelu"
    vision: Vision
    text: TextOptions
    vocabulary: Annotated[int, Field(gt=1)] = 49408
    context: Annotated[int, Field(gt=1)] = 77

    @model_validator(mode="before")
    @classmethod
    def _complete(cls, values: Any) -> Any:
        """Gives a ViT tower what the whole model says, so that it is checked with it."""
        vision = values.get("vision") if isinstance(values, dict) else None
        if not isinstance(vision, Mapping) or vision.get("kind") != "vit":
            return values
        shared = {
            "pixels": values.get("pixels", cls.model_fields["pixels"].default),
            "classes": values.get("embed", 0),
            "activation": values.get("activation", cls.model_fields["activation"].default),
        }
        for key, value in shared.items():
            if vision.get(key, value) != value:
                raise ValueError(f"vision.{key}: is not a tower's own, the whole model has it")
        return {**values, "vision": {**vision, **shared}}

    @model_validator(mode="after")
    def _towers(self) -> PairOptions:
        if isinstance(self.vision, CLIPResNetOptions):
            if self.pixels % STRIDE:
                raise ValueError(f"pixels: {self.pixels} is not a multiple of {STRIDE}, the stride of a ResNet tower")
        elif self.vision.masked or self.vision.distilled:
            raise ValueError("vision: an image tower has neither masked patches nor a distillation token")
        return self


class CLIPOptions(PairOptions):
    """`logit_scale` is the initial logarithm of the scale, 1 / 0.07; with `logit_bias` (SigLIP: -10) there is a learned bias too."""

    embed: Count
    logit_scale: float = math.log(1 / 0.07)
    logit_bias: float | None = None


class CLIP(Model):
    """Embeddings of images and captions, each of length 1."""

    options: CLIPOptions
    # The paper decays all weights but gains and biases (section 2.5): positions too. OpenAI's class token has one dimension.
    unpenalised = frozenset({"cls_token", "attn_pool.latent", "logit_scale", "logit_bias"})
    limits = {"logit_scale": (0.0, math.log(100))}  # section 2.5: logits are not scaled by more than 100

    def __init__(self, options: CLIPOptions) -> None:
        super().__init__()
        self.options = o = options
        self.visual = image_tower(o, o.embed)
        self.text = TextTower(o.text, vocabulary=o.vocabulary, context=o.context, embed=o.embed, activation=o.activation)
        self.logit_scale = nn.Parameter(torch.tensor(o.logit_scale))
        self.logit_bias = None if o.logit_bias is None else nn.Parameter(torch.tensor(o.logit_bias))

    def forward(self, images: torch.Tensor | None = None, tokens: torch.Tensor | None = None) -> tuple[torch.Tensor | None, ...]:
        """Normalised images (B, 3, P, P) and tokens (B, L), either of which may be left out, to (images' embeddings (B, E) or None,
        captions' (B, E) or None, scale (), already exponentiated), and the bias () where there is one; in fp32 where the model is in
        16 bits. Logits of all pairs are scale x images @ captions.T + bias."""
        seen = None if images is None else _direction(self.visual(images))
        read = None if tokens is None else _direction(self.text(tokens))
        scale = _at_least_fp32(self.logit_scale).exp().reshape(())  # DeepSpeed gives scalars a dimension
        return (seen, read, scale) if self.logit_bias is None else (seen, read, scale, _at_least_fp32(self.logit_bias).reshape(()))

    def encode_image(self, images: torch.Tensor) -> torch.Tensor:
        """Normalised images (B, 3, P, P) to embeddings (B, E) of length 1."""
        embeddings = self(images)[0]
        assert embeddings is not None
        return embeddings

    def encode_text(self, tokens: torch.Tensor) -> torch.Tensor:
        """Tokens (B, L), L at most the context, to embeddings (B, E) of length 1."""
        embeddings = self(tokens=tokens)[1]
        assert embeddings is not None
        return embeddings

    def features(self, images: torch.Tensor) -> torch.Tensor:
        """What the paper's linear probes see (section 3.2): a ViT's features before the projection, (B, D); of a ResNet what the
        attention pool gives, (B, E), whose own output is the projection."""
        return self.visual.features(images)

    def example(self, batch: int) -> tuple[torch.Tensor, ...]:
        return example_pair(self.options, self.logit_scale, batch)

    def activations(self) -> float:
        return self.visual.activations() + self.text.activations()

    def adapt(self, state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Image positions on another grid are interpolated as `vision.resize` says (a ResNet's as open_clip's ViTs), a longer context
        is cut. Projections of another shape stay, for the caller to see: a zero one would embed nothing."""
        return adapt_towers(self, state)


def image_tower(options: PairOptions, embed: int) -> VisionTransformer | CLIPResNet:
    """The tower of `options.vision`, with CLIP's initialisation; `embed` 0 leaves the projection out, and a ResNet's attention pool."""
    if isinstance(options.vision, CLIPResNetOptions):
        return CLIPResNet(options.vision, pixels=options.pixels, embed=embed)
    tower = VisionTransformer(options.vision)
    # OpenAI's code leaves layers as torch makes them (attention: nn.MultiheadAttention), and scales its own parameters by the width.
    for module in tower.modules():
        if isinstance(module, Block):
            for layer in (module.attn.proj, module.mlp.fc1, module.mlp.fc2):
                layer.reset_parameters()
            nn.init.xavier_uniform_(module.attn.qkv.weight)
            nn.init.zeros_(module.attn.qkv.bias)
            nn.init.zeros_(module.attn.proj.bias)
    if isinstance(tower.patch_embed, PatchEmbed):
        tower.patch_embed.proj.reset_parameters()
    std = options.vision.width**-0.5
    for name, parameter in tower.named_parameters():
        if name in ("cls_token", "pos_embed", "head.weight"):
            nn.init.normal_(parameter, std=std)
    return tower


def example_pair(options: PairOptions, like: torch.Tensor, batch: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Images and tokens without meaning, on the device of `like`, the images in its type."""
    images = torch.zeros(batch, 3, options.pixels, options.pixels, device=like.device, dtype=like.dtype)
    return images, torch.zeros(batch, options.context, device=like.device, dtype=torch.long)


def adapt_towers(model: Model, state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """`Model.adapt` of a model with an image tower `visual` and positions `text.pos_embed`."""
    fitted = dict(state)
    options: PairOptions = model.options
    pool, positions = "visual.attnpool.positional_embedding", "text.pos_embed"
    if isinstance(model.visual, VisionTransformer):
        own = {name: fitted.pop(name) for name in list(fitted) if name.startswith("visual.")}
        adapted = model.visual.adapt({name.removeprefix("visual."): tensor for name, tensor in own.items()})
        fitted |= {f"visual.{name}": tensor for name, tensor in adapted.items() if not name.startswith("head.")}
        fitted |= {name: tensor for name, tensor in own.items() if name.startswith("visual.head.")}
    elif pool in fitted:
        fitted[pool] = resize_positions(fitted[pool][None], options.pixels // STRIDE, "timm-hybrid")[0]
    if positions in fitted:
        fitted[positions] = fitted[positions][: options.context]
    return fitted


def _at_least_fp32(x: torch.Tensor) -> torch.Tensor:
    return x.float() if x.dtype in (torch.bfloat16, torch.float16) else x


def _direction(x: torch.Tensor) -> torch.Tensor:
    """(B, E) of length 1, in fp32 or more: at a scale of 100, what 16 bits round off the length moves logits by 0.3."""
    return F.normalize(_at_least_fp32(x), dim=-1)
