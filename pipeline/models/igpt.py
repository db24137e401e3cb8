"""iGPT: a GPT over the pixels of a small image, in raster order (Chen et al. 2020, "Generative Pretraining from Pixels").

Shapes: B batch, P pixels a side, N tokens (P^2 of a whole image), K colours of the palette, D width, C classes. h^l is what block l sees,
n^l is block l's first norm of it; h^L and n^L belong to the last norm. Initialised as OpenAI's code does.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import cast

import torch
from pydantic import Field, model_validator
from torch import nn

from pipeline.models.blocks import Block, KeyValues
from pipeline.models.fused import RMSNorm
from pipeline.models.model import Model
from pipeline.models.options import Count, Options, Rate, check_heads
from pipeline.models.positions import resize_positions

RMS_NORM_EPS = 1e-5


class IGPTOptions(Options):
    """`masked`: trained with the BERT objective, so every token sees all others; otherwise those before it. `classes` 0 leaves the
    classifier out. `bias` gives the linear layers one, which OpenAI's have not and those of `transformers` have."""

    pixels: Count = 32
    colors: Count = 512
    classes: int = Field(0, ge=0)
    width: Count
    depth: Count
    heads: Count
    masked: bool = False
    bias: bool = False
    dropout: Rate = 0.0

    @model_validator(mode="after")
    def _fits(self) -> IGPTOptions:
        check_heads(self.width, self.heads)
        return self


class IGPT(Model):
    """Autoregressive (section 2.1, equation 1) or BERT (equation 2)."""

    options: IGPTOptions
    unpenalised = frozenset({"wte.weight", "wpe.weight", "sos"})
    head_names = frozenset({"classifier.weight", "classifier.bias"})

    def __init__(self, options: IGPTOptions) -> None:
        super().__init__()
        self.options = o = options
        self.wte = nn.Embedding(o.colors, o.width)
        self.wpe = nn.Embedding(o.pixels * o.pixels, o.width)
        self.sos = nn.Parameter(torch.empty(o.width))
        self.drop = nn.Dropout(o.dropout)
        self.blocks = nn.ModuleList(
            Block(
                o.width,
                4 * o.width,
                o.heads,
                norm="rms",
                eps=RMS_NORM_EPS,
                activation="quick-gelu",
                bias=o.bias,
                causal=True,
                dropout=o.dropout,
            )
            for _ in range(o.depth)
        )
        self.norm = RMSNorm(o.width, eps=RMS_NORM_EPS)
        self.head = nn.Linear(o.width, o.colors, bias=False)
        if o.classes:
            self.classifier = nn.Linear(o.width, o.classes)
        self._initialise()

    def _initialise(self) -> None:
        for name, parameter in self.named_parameters():
            if name.endswith("bias") or name.startswith(("head.", "classifier.")):
                nn.init.zeros_(parameter)
        for table, std in ((self.wte.weight, 0.02), (self.wpe.weight, 0.01), (self.sos, 0.02)):
            nn.init.normal_(table, std=std)
        for block in cast("list[Block]", self.blocks):
            nn.init.normal_(block.attn.qkv.weight, std=self.options.width**-0.5)
            nn.init.normal_(block.attn.proj.weight, std=(self.options.width * self.options.depth) ** -0.5)
            nn.init.normal_(block.mlp.fc1.weight, std=0.02)
            nn.init.normal_(block.mlp.fc2.weight, std=0.02)

    def forward(
        self, tokens: torch.Tensor, *, masked: torch.Tensor | None = None, classify: bool = False
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        """Tokens (B, N) to logits (B, N, K) of those tokens; N may be less than P^2, the image then ends early.

        Autoregressive: logits i are made of tokens before i. With `masked` (B, N), boolean: logits i are made of all tokens that are not
        masked (equation 2; their embeddings are zeroed, their positions stay).

        `classify` gives (logits, class logits (B, C)), from the mean of n^L over the sequence (section 2.3), in one pass, as the joint
        loss wants it. So the class logits see what generation sees: all but the last pixel, which only ever is a target and which no
        position was trained to take in, or what is not masked. OpenAI's code does the same.
        """
        x = self._embed(tokens, masked)
        for block in self.blocks:
            x = block(x, causal=self._causal(masked))
        x = self.norm(x)
        logits = self.head(x)
        return (logits, self.classifier(x.mean(dim=1))) if classify else logits

    def features(self, tokens: torch.Tensor, layer: int | None = None) -> torch.Tensor:
        """Whole images (B, N) to the mean of n^l over the sequence (B, D), l = 0 .. depth (section 2.4); the middle one by default, near
        which the best one lies (figure 2).

        The sequence is that of training: [sos, x_0 .. x_(N-2)], or all pixels of a model trained with the BERT objective, none masked.
        """
        return self._features(tokens, [self.options.depth // 2 if layer is None else layer])[0]

    def layers(self, tokens: torch.Tensor) -> list[torch.Tensor]:
        """`features` of every layer 0 .. depth, from one pass."""
        return self._features(tokens, range(self.options.depth + 1))

    def _features(self, tokens: torch.Tensor, layers: Sequence[int]) -> list[torch.Tensor]:
        norms = [*(block.norm1 for block in cast("list[Block]", self.blocks)), self.norm]
        x, found = self._embed(tokens, None), []
        for layer in range(max(layers) + 1):
            if layer in layers:
                found.append(norms[layer](x).mean(dim=1))
            if layer < max(layers):
                x = self.blocks[layer](x, causal=self._causal(None))
        return found

    def advance(self, tokens: torch.Tensor, caches: Sequence[KeyValues] | None = None) -> torch.Tensor:
        """Logits (B, K) of the pixel that comes next, for sampling.

        Without `caches`, `tokens` (B, n) are all pixels so far, n >= 0. With them (one a block) they are those since the last call; a
        first call may bring many, a later one brings one.
        """
        start = caches[0].length if caches else 0
        x = self.wte(tokens)
        if start == 0:
            x = torch.cat([self._starts(x), x], dim=1)
        x = x + self._positions(start, x)
        for n, block in enumerate(self.blocks):
            x = block(x, cache=caches[n] if caches else None)
        return self.head(self.norm(x[:, -1]))

    def _embed(self, tokens: torch.Tensor, masked: torch.Tensor | None) -> torch.Tensor:
        """h^0 (B, N, D)."""
        x = self.wte(tokens)
        if masked is not None:
            x = x.masked_fill(masked.unsqueeze(-1), 0.0)
        elif not self.options.masked:
            x = torch.cat([self._starts(x), x[:, :-1]], dim=1)
        return self.drop(x + self._positions(0, x))

    def _starts(self, x: torch.Tensor) -> torch.Tensor:
        return self.sos.to(x.dtype).expand(x.shape[0], 1, -1)

    def _positions(self, start: int, x: torch.Tensor) -> torch.Tensor:
        return self.wpe(torch.arange(start, start + x.shape[1], device=x.device))

    def _causal(self, masked: torch.Tensor | None) -> bool:
        return masked is None and not self.options.masked

    def example(self, batch: int) -> tuple[torch.Tensor, ...]:
        return (torch.zeros(batch, self.options.pixels**2, dtype=torch.int64, device=self.sos.device),)

    def activations(self) -> float:
        """16 N D a layer: two norms' inputs and outputs, q, k, v and their mix, the MLP before and after its activation; the logits and
        their softmax."""
        o = self.options
        return o.pixels**2 * (16.0 * o.width * o.depth + 2.0 * o.colors)

    def adapt(self, state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Positions are interpolated linearly on the square grid, its corners kept; the colours must be as many."""
        fitted, wanted = dict(state), self.state_dict()
        if "wpe.weight" in fitted:
            fitted["wpe.weight"] = resize_positions(fitted["wpe.weight"].unsqueeze(0), self.options.pixels)[0]
        for name in ("classifier.weight", "classifier.bias"):
            if name not in wanted:
                fitted.pop(name, None)
            elif name not in fitted or fitted[name].shape != wanted[name].shape:
                fitted[name] = torch.zeros_like(wanted[name])
        return fitted
