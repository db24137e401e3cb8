"""Names of Hugging Face's `transformers`, as they lie on disk (version 5 has others in memory).

`pipeline.models.formats.keys` says how rules are read. Prefixes differ between a bare model and one with a head.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from pipeline.models.formats.keys import ROW, TABLE, TRANSPOSED, Rule, Tensors, rule
from pipeline.models.formats.lazy import Lazy, join

ACTIVATIONS = {
    "gelu": "gelu", "gelu_new": "gelu-tanh", "gelu_pytorch_tanh": "gelu-tanh", "gelu_fast": "gelu-tanh", "quick_gelu": "quick-gelu",
}  # fmt: skip
ACTIVATION_NAMES = {"gelu": "gelu", "gelu-tanh": "gelu_pytorch_tanh", "quick-gelu": "quick_gelu"}
# Numbers that are no weights, which older versions saved.
IGNORED = (r".*\.position_ids", r".*\.attn\.(bias|masked_bias)")


def vit_rules(prefix: str, distilled: bool = False) -> list[Rule]:
    """ViT and DeiT; `prefix` is "vit.", "deit." or "" for a model without a head."""
    heads = ("cls_classifier", "distillation_classifier") if distilled else ("classifier", "")
    return [
        rule("cls_token", f"{prefix}embeddings.cls_token"),
        rule("dist_token", f"{prefix}embeddings.distillation_token"),
        rule("pos_embed", f"{prefix}embeddings.position_embeddings"),
        rule("patch_embed.proj.{p}", f"{prefix}embeddings.patch_embeddings.projection.{{p}}"),
        *_blocks("blocks", f"{prefix}encoder.layer"),
        rule("norm.{p}", f"{prefix}layernorm.{{p}}"),
        rule("pre_logits.{p}", f"{prefix}pooler.dense.{{p}}"),
        rule("head.{p}", f"{heads[0]}.{{p}}"),
        rule("head_dist.{p}", f"{heads[1]}.{{p}}"),
    ]


def mae_rules() -> list[Rule]:
    return [
        *(rule(name, f"decoder.{name}") for name in ("mask_token", "decoder_pos_embed")),
        *(rule(f"{name}.{{p}}", f"decoder.{name}.{{p}}") for name in ("decoder_embed", "decoder_norm", "decoder_pred")),
        *_blocks("decoder_blocks", "decoder.decoder_layers"),
        *vit_rules("vit."),
    ]


def _blocks(ours: str, theirs: str) -> list[Rule]:
    ours, theirs = f"{ours}.{{i}}", f"{theirs}.{{i}}"
    inner = f"{theirs}.attention.attention"
    return [
        rule(f"{ours}.norm1.{{p}}", f"{theirs}.layernorm_before.{{p}}"),
        rule(f"{ours}.attn.qkv.{{p}}", f"{inner}.query.{{p}}", f"{inner}.key.{{p}}", f"{inner}.value.{{p}}"),
        rule(f"{ours}.attn.proj.{{p}}", f"{theirs}.attention.output.dense.{{p}}"),
        rule(f"{ours}.norm2.{{p}}", f"{theirs}.layernorm_after.{{p}}"),
        rule(f"{ours}.mlp.fc1.{{p}}", f"{theirs}.intermediate.dense.{{p}}"),
        rule(f"{ours}.mlp.fc2.{{p}}", f"{theirs}.output.dense.{{p}}"),
    ]


def clip_rules() -> list[Rule]:
    vision, text = "vision_model", "text_model"
    return [
        rule("logit_scale", "logit_scale"),
        rule("visual.cls_token", f"{vision}.embeddings.class_embedding", change=ROW),
        rule("visual.pos_embed", f"{vision}.embeddings.position_embedding.weight", change=TABLE),
        rule("visual.patch_embed.proj.weight", f"{vision}.embeddings.patch_embedding.weight"),
        rule("visual.norm_pre.{p}", f"{vision}.pre_layrnorm.{{p}}"),
        *_clip_blocks("visual", vision),
        rule("visual.norm.{p}", f"{vision}.post_layernorm.{{p}}"),
        rule("visual.head.weight", "visual_projection.weight"),
        rule("text.token_embed.weight", f"{text}.embeddings.token_embedding.weight"),
        rule("text.pos_embed", f"{text}.embeddings.position_embedding.weight"),
        *_clip_blocks("text", text),
        rule("text.norm.{p}", f"{text}.final_layer_norm.{{p}}"),
        rule("text.proj.weight", "text_projection.weight"),
    ]


def _clip_blocks(ours: str, theirs: str) -> list[Rule]:
    ours, theirs = f"{ours}.blocks.{{i}}", f"{theirs}.encoder.layers.{{i}}"
    return [
        rule(f"{ours}.norm1.{{p}}", f"{theirs}.layer_norm1.{{p}}"),
        rule(f"{ours}.attn.qkv.{{p}}", *(f"{theirs}.self_attn.{part}_proj.{{p}}" for part in "qkv")),
        rule(f"{ours}.attn.proj.{{p}}", f"{theirs}.self_attn.out_proj.{{p}}"),
        rule(f"{ours}.norm2.{{p}}", f"{theirs}.layer_norm2.{{p}}"),
        *(rule(f"{ours}.mlp.{layer}.{{p}}", f"{theirs}.mlp.{layer}.{{p}}") for layer in ("fc1", "fc2")),
    ]


def igpt_rules() -> list[Rule]:
    """Weights of their layers are (in, out). `sos` stands for the last row of `wte`, see `split_igpt`."""
    ours, theirs = "blocks.{i}", "transformer.h.{i}"
    return [
        rule("wte.weight", "transformer.wte.weight"),
        rule("sos", "transformer.sos"),
        rule("wpe.weight", "transformer.wpe.weight"),
        rule(f"{ours}.norm1.weight", f"{theirs}.ln_1.weight"),
        rule(f"{ours}.norm2.weight", f"{theirs}.ln_2.weight"),
        *(
            rule(f"{ours}.{layer}.{part}", f"{theirs}.{name}.{part}", **({"change": TRANSPOSED} if part == "weight" else {}))
            for layer, name in (
                ("attn.qkv", "attn.c_attn"),
                ("attn.proj", "attn.c_proj"),
                ("mlp.fc1", "mlp.c_fc"),
                ("mlp.fc2", "mlp.c_proj"),
            )
            for part in ("weight", "bias")
        ),
        rule("norm.weight", "transformer.ln_f.weight"),
        rule("head.weight", "lm_head.weight"),
        rule("classifier.weight", "score.weight"),
        rule("classifier.bias", "score.bias"),
    ]


def split_igpt(tensors: Tensors, keep_biases: bool) -> tuple[Tensors, bool]:
    """Without the start of sequence in the table of colours, and unless they are to be kept without biases if all are zero, as OpenAI's
    models have none; whether they stayed. A classifier's file has no bias of it and no head for colours, which begin at zero."""
    found = dict(tensors)
    table = "transformer.wte.weight"
    if table in found and found[table].ndim == 2:
        found["transformer.sos"], found[table] = found[table][-1], found[table][:-1]
    biases = [name for name in found if name.startswith("transformer.h.") and name.endswith(("c_attn.bias", "c_proj.bias", "c_fc.bias"))]
    biased = keep_biases or any(bool(found[name].any()) for name in biases)
    if not biased:
        found = {name: t for name, t in found.items() if name not in biases}
    if "score.weight" in found and found["score.weight"].ndim == 2 and table in found:
        found.setdefault("score.bias", torch.zeros(found["score.weight"].shape[0]))
        found.setdefault("lm_head.weight", torch.zeros(found[table].shape))
    return found, biased


def join_igpt(tensors: Mapping[str, Lazy], depth: int, width: int) -> dict[str, Lazy]:
    """The other way. Biases are written as zeros where there are none."""
    found = dict(tensors)
    table = "transformer.wte.weight"
    found[table] = join(found[table], found.pop("transformer.sos"), lambda colors, sos: torch.cat([colors, sos[None]]))
    for i in range(depth):
        for name, size in (("attn.c_attn", 3), ("attn.c_proj", 1), ("mlp.c_fc", 4), ("mlp.c_proj", 1)):
            found.setdefault(f"transformer.h.{i}.{name}.bias", Lazy.of(torch.zeros(size * width)))
    return found
