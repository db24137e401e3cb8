"""CLIP under OpenAI's names, which open_clip shares: OpenAI's TorchScript archives, plain state dicts, open_clip's files.

The names do not say which activation a model was trained with, and results are wrong by a little with the other one: OpenAI's archives
have quick GELU; open_clip's config says it; of anything else the person has to.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pipeline.core.errors import CheckpointError
from pipeline.models.formats.files import Source
from pipeline.models.formats.imported import CLIP, Plan, normalisation, side_of, wanted
from pipeline.models.formats.keys import ROW, TABLE, TRANSPOSED, Rule, Tensors, count, rule, strip_prefix

# Numbers about the model that OpenAI's archives hold as tensors.
IGNORED = ("input_resolution", "context_length", "vocab_size", "attn_mask")
_HEAD = 64  # channels, in every model of OpenAI


def recognises(names: Mapping[str, Any]) -> bool:
    return "visual.conv1.weight" in names or any(name.startswith("visual.trunk.") for name in names)


def rules(resnet: bool) -> list[Rule]:
    vision = [rule("visual.{name}", "visual.{name}")] if resnet else [
        rule("visual.cls_token", "visual.class_embedding", change=ROW),
        rule("visual.pos_embed", "visual.positional_embedding", change=TABLE),
        rule("visual.patch_embed.proj.weight", "visual.conv1.weight"),
        rule("visual.norm_pre.{p}", "visual.ln_pre.{p}"),
        *_blocks("visual.blocks", "visual.transformer.resblocks"),
        rule("visual.norm.{p}", "visual.ln_post.{p}"),
        rule("visual.head.weight", "visual.proj", change=TRANSPOSED),
    ]  # fmt: skip
    return [
        *vision,
        rule("text.token_embed.weight", "token_embedding.weight"),
        rule("text.pos_embed", "positional_embedding"),
        *_blocks("text.blocks", "transformer.resblocks"),
        rule("text.norm.{p}", "ln_final.{p}"),
        rule("text.proj.weight", "text_projection", change=TRANSPOSED),
        rule("logit_scale", "logit_scale"),
        rule("logit_bias", "logit_bias"),
    ]


def _blocks(ours: str, theirs: str) -> list[Rule]:
    ours, theirs = f"{ours}.{{i}}", f"{theirs}.{{i}}"
    return [
        rule(f"{ours}.norm1.{{p}}", f"{theirs}.ln_1.{{p}}"),
        rule(f"{ours}.attn.qkv.{{p}}", f"{theirs}.attn.in_proj_{{p}}"),
        rule(f"{ours}.attn.proj.{{p}}", f"{theirs}.attn.out_proj.{{p}}"),
        rule(f"{ours}.ls1.gamma", f"{theirs}.ls_1.gamma"),
        rule(f"{ours}.norm2.{{p}}", f"{theirs}.ln_2.{{p}}"),
        rule(f"{ours}.mlp.fc1.{{p}}", f"{theirs}.mlp.c_fc.{{p}}"),
        rule(f"{ours}.mlp.fc2.{{p}}", f"{theirs}.mlp.c_proj.{{p}}"),
        rule(f"{ours}.ls2.gamma", f"{theirs}.ls_2.gamma"),
    ]


def plan(source: Source, given: Mapping[str, Any]) -> Plan:
    """Raises CheckpointError where a tower is of another kind than OpenAI's, or nothing says which activation."""
    tensors, url = _together(source), source.url
    config = (source.open_clip or {}).get("model_cfg", {})
    vision, text = config.get("vision_cfg", {}), config.get("text_cfg", {})
    _check(vision, text, url)
    resnet = "visual.layer1.0.conv1.weight" in tensors
    context, width = wanted(tensors, "positional_embedding", url, 2).shape
    options: dict[str, Any] = {
        "embed": wanted(tensors, "text_projection", url, 2).shape[1],
        "activation": _activation(source, config, given),
        "text": {
            "kind": "transformer",
            "width": width,
            "depth": count(tensors, "transformer.resblocks.{i}."),
            "heads": text.get("heads", max(1, width // _HEAD)),
            "mlp": wanted(tensors, "transformer.resblocks.0.mlp.c_fc.weight", url, 2).shape[0],
        },
        "vocabulary": wanted(tensors, "token_embedding.weight", url, 2).shape[0],
        "context": context,
    }
    options |= _resnet(tensors, url) if resnet else _vit(tensors, vision, url)
    assumed = {"logit_bias": config.get("init_logit_bias") or -10.0} if "logit_bias" in tensors else {}
    shown = (source.open_clip or {}).get("preprocess_cfg", {})
    what = "open_clip" if source.open_clip else "OpenAI CLIP" if source.kind == "torchscript" else "OpenAI CLIP's names"
    return Plan(what, "clip", options, tensors, assumed, rules(resnet), IGNORED, normalisation(shown) if normalisation(shown)[0] else CLIP)


def _together(source: Source) -> Tensors:
    """open_clip's models with a text tower of its own name keep it under `text.`"""
    tensors = source.tensors
    if any(name.startswith("visual.trunk.") for name in tensors) or any(
        name.startswith("text.transformer.embeddings.") for name in tensors
    ):
        raise CheckpointError(f"{source.url}: has a tower of timm's or of transformers inside open_clip's names, only its own are read")
    inner = strip_prefix(tensors, "text.")
    return {**{name: t for name, t in tensors.items() if not name.startswith("text.")}, **inner} if inner else dict(tensors)


def _vit(tensors: Tensors, vision: Mapping[str, Any], url: str) -> dict[str, Any]:
    projection = wanted(tensors, "visual.conv1.weight", url, 4)
    width, patch = projection.shape[0], projection.shape[-1]
    side = side_of(wanted(tensors, "visual.positional_embedding", url, 2).shape[0] - 1, url, "visual.positional_embedding")
    tower = {
        "kind": "vit",
        "patch": patch,
        "width": width,
        "depth": count(tensors, "visual.transformer.resblocks.{i}."),
        "heads": max(1, width // vision.get("head_width", _HEAD)),
        "mlp": wanted(tensors, "visual.transformer.resblocks.0.mlp.c_fc.weight", url, 2).shape[0],
    }
    if "visual.transformer.resblocks.0.ls_1.gamma" in tensors:
        tower["layer_scale"] = vision.get("ls_init_value") or 1e-5
    return {"pixels": side * patch, "vision": tower}


def _resnet(tensors: Tensors, url: str) -> dict[str, Any]:
    places = wanted(tensors, "visual.attnpool.positional_embedding", url, 2).shape[0] - 1
    depths = tuple(count(tensors, f"visual.layer{n}.{{i}}.") for n in range(1, 5))
    width = wanted(tensors, "visual.layer1.0.conv1.weight", url, 4).shape[0]
    return {
        "pixels": 32 * side_of(places, url, "visual.attnpool.positional_embedding"),
        "vision": {"kind": "resnet", "depths": depths, "width": width},
    }


def _activation(source: Source, config: Mapping[str, Any], given: Mapping[str, Any]) -> str:
    if "activation" in given:
        return str(given["activation"])
    if config:
        tanh = [config.get(tower, {}).get("act_kwargs", {}).get("approximate") == "tanh" for tower in ("vision_cfg", "text_cfg")]
        return "quick-gelu" if config.get("quick_gelu") else "gelu-tanh" if all(tanh) else "gelu"
    if source.kind == "torchscript" or "input_resolution" in source.tensors:  # nobody else saved these
        return "quick-gelu"
    raise CheckpointError(
        f"{source.url}: does not say which activation it was trained with; give activation=quick-gelu for OpenAI's weights, "
        "activation=gelu for others (LAION, DataComp), or put its open_clip_config.json beside it"
    )


def _check(vision: Mapping[str, Any], text: Mapping[str, Any], url: str) -> None:
    """Raises CheckpointError where open_clip's config asks for what our towers have not."""
    usual: dict[str, Any] = {
        "pool_type": "tok", "attentional_pool": False, "no_ln_pre": False, "pos_embed_type": "learnable", "final_ln_after_pool": False,
        "output_tokens": False, "input_patchnorm": False,
    }  # fmt: skip
    usual_text: dict[str, Any] = {
        "pool_type": "argmax",
        "no_causal_mask": False,
        "embed_cls": False,
        "proj_bias": False,
        "proj_type": "linear",
    }
    for where, config, expected in (("vision_cfg", vision, usual), ("text_cfg", text, usual_text)):
        for key, value in expected.items():
            if config.get(key, value) != value:
                raise CheckpointError(f"{url}: open_clip_config.json, {where}, has {key}: {config[key]!r}, our towers have {value!r} alone")
