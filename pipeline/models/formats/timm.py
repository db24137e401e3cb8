"""timm's names, which are ours: Vision Transformers, DeiT, hybrids, BiT and ResNets; so also DeiT's and MAE's own files, and torchvision's.

A file says how wide and deep the model is. What it leaves open, heads first of all, comes from timm's config.json where there is one,
otherwise from the published sizes.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch

from pipeline.core.errors import CheckpointError
from pipeline.models.formats.files import Source
from pipeline.models.formats.imported import IMAGENET, Plan, fixed_positions, normalisation, outputs, side_of, wanted
from pipeline.models.formats.keys import Tensors, count
from pipeline.models.sizes import VIT

_HEADS = {width: heads for width, _, _, heads in VIT.values()}
_ACTIVATIONS = {"gelu": "gelu", "gelu_tanh": "gelu-tanh", "quick_gelu": "quick-gelu"}
_STEM = "patch_embed.backbone."


def recognises(names: Mapping[str, Any]) -> bool:
    return any(name in names for name in ("patch_embed.proj.weight", "stem.conv.weight", "layer1.0.conv1.weight"))


def plan(source: Source, given: Mapping[str, Any]) -> Plan:
    """Raises CheckpointError where the file is of none of the families, or does not say how many heads there are."""
    config = source.config or {}
    what = "timm" if config else "timm's names"
    if "patch_embed.proj.weight" in source.tensors:
        if "decoder_embed.weight" in source.tensors:
            return _mae(source, given)
        return _vit(source, config, given, what)
    kind, options, renamed = _convnet(source)
    pixels = _pretrained(config).get("input_size", [3, 224, 224])[-1]
    assumed: dict[str, Any] = {"pixels": pixels} | ({"numerics": "timm"} if kind == "bit" else {})
    shown = normalisation(_pretrained(config)) if config else (IMAGENET if kind == "resnet" else (None, None))
    return Plan(what, kind, options, renamed, assumed, normalisation=shown, classes=_labels(config))


def vit_options(tensors: Mapping[str, torch.Tensor], url: str, given: Mapping[str, Any]) -> dict[str, Any]:
    """What the shapes of a Vision Transformer under timm's names say; pixels are not known without learned positions."""
    projection = wanted(tensors, "patch_embed.proj.weight", url, 4)
    width, stages = projection.shape[0], count(tensors, _STEM + "stages.{i}.")
    stem = tuple(count(tensors, f"{_STEM}stages.{s}.blocks.{{i}}.") for s in range(stages))
    patch = projection.shape[-1] * (4 * 2 ** (stages - 1) if stages else 1)
    tokens = ("cls_token" in tensors) + ("dist_token" in tensors)
    rows = wanted(tensors, "pos_embed", url, 3).shape[1]
    pool = "map" if "attn_pool.latent" in tensors else "gap" if "fc_norm.weight" in tensors or "cls_token" not in tensors else "token"
    options = {
        "pixels": side_of(rows - tokens, url, "pos_embed") * patch,
        "classes": outputs(tensors, "head.weight", url),
        "patch": patch,
        "width": width,
        "depth": count(tensors, "blocks.{i}."),
        "heads": _heads(width, url, given),
        "mlp": wanted(tensors, "blocks.0.mlp.fc1.weight", url, 2).shape[0],
        "pool": pool,
        "class_token": "cls_token" in tensors,
        "positions": "learned",
        "qk_norm": "blocks.0.attn.q_norm.weight" in tensors,
        "representation": outputs(tensors, "pre_logits.weight", url) or None,
        "pre_norm": "norm_pre.weight" in tensors,
        "fc_norm": "fc_norm.weight" in tensors,
        "patch_bias": "patch_embed.proj.bias" in tensors,
        "distilled": "dist_token" in tensors,
        "stem": stem or None,
    }
    if options["classes"]:
        options["head_bias"] = "head.bias" in tensors
    return options


def layer_scale(tensors: Mapping[str, Any]) -> dict[str, Any]:
    """Whether there is one the file says, but not which value it began with."""
    return {"layer_scale": 1e-5} if "blocks.0.ls1.gamma" in tensors else {}


def _vit(source: Source, config: dict[str, Any], given: Mapping[str, Any], what: str) -> Plan:
    tensors = _renamed(source.tensors)
    arguments, architecture = config.get("model_args", {}), str(config.get("architecture", ""))
    pretrained = _pretrained(config)
    if "num_heads" in arguments:
        given = {"heads": arguments["num_heads"], **given}
    tokens = ("cls_token" in tensors) + ("dist_token" in tensors)
    rows = wanted(tensors, "pos_embed", source.url, 3).shape[1]
    if tokens and _square(rows) and not _square(rows - tokens):
        # timm's no_embed_class: the tokens have no positions, which is as if theirs were zero.
        tensors["pos_embed"] = torch.nn.functional.pad(tensors["pos_embed"], (0, 0, tokens, 0))
    options = vit_options(tensors, source.url, given)
    fixed_positions(tensors, "pos_embed", options, config)
    pooled = arguments.get("global_pool") or config.get("global_pool") or pretrained.get("global_pool")
    if pooled == "avg" and options["pool"] == "token":
        options["pool"] = "gap"
    if "act_layer" in arguments or "quickgelu" in architecture:
        named = arguments.get("act_layer", "quick_gelu")
        if named not in _ACTIVATIONS:
            raise CheckpointError(f"{source.url}: its activation is {named!r}, known are {', '.join(_ACTIVATIONS)}")
        options["activation"] = _ACTIVATIONS[named]
    assumed = {"eps": 1e-5 if options["pre_norm"] else 1e-6, "resize": "hf" if source.wrapper == "model" else "timm-hybrid"}
    assumed |= layer_scale(tensors) | {"numerics": "timm"}
    if assumed.get("layer_scale") and arguments.get("init_values"):
        assumed["layer_scale"] = arguments["init_values"]
    shown = normalisation(pretrained) if config else IMAGENET if source.wrapper == "model" else (None, None)
    return Plan(what, "vit", options, tensors, assumed, normalisation=shown, classes=_labels(config))


def _mae(source: Source, given: Mapping[str, Any]) -> Plan:
    """MAE's own files with a decoder; without one they are Vision Transformers without a head."""
    encoder = {name: t for name, t in source.tensors.items() if not name.startswith(("decoder_", "mask_token"))}
    read = vit_options(encoder, source.url, given)
    options = {key: read[key] for key in ("pixels", "patch", "width", "depth", "heads", "mlp")}
    decoder = outputs(source.tensors, "decoder_embed.weight", source.url)
    options |= {"decoder_width": decoder, "decoder_depth": count(source.tensors, "decoder_blocks.{i}.")}
    return Plan("MAE's names", "mae", options, source.tensors, {"decoder_heads": 16, "eps": 1e-6}, normalisation=IMAGENET)


def _convnet(source: Source) -> tuple[str, dict[str, Any], Tensors]:
    tensors, url = source.tensors, source.url
    bit = "stem.conv.weight" in tensors
    stage, block = ("stages.{i}.", "stages.{}.blocks.{{i}}.") if bit else ("layer{i}.", "layer{}.{{i}}.")
    numbers = range(0, count(tensors, stage)) if bit else range(1, count(tensors, stage) + 1)
    depths = tuple(count(tensors, block.format(n)) for n in numbers)
    options: dict[str, Any] = {
        "depths": depths,
        "classes": outputs(tensors, "head.fc.weight", url, 4) if bit else outputs(tensors, "fc.weight", url),
    }
    first = wanted(tensors, "stem.conv.weight" if bit else "conv1.weight", url, 4).shape[0]
    if bit and first % 64:
        raise CheckpointError(f"{url}: its first convolution has {first} channels, a BiT's are a multiple of 64")
    options |= {"factor": first // 64} if bit else {"width": first}
    return "bit" if bit else "resnet", options, tensors


def _renamed(tensors: Tensors) -> Tensors:
    """Names of older timm; its representation layer was a module with one member."""
    return {name.replace("pre_logits.fc.", "pre_logits."): t for name, t in tensors.items()}


def _heads(width: int, url: str, given: Mapping[str, Any]) -> int:
    heads = given.get("heads") or _HEADS.get(width) or (width // 64 if width % 64 == 0 else None)
    if heads is None:
        raise CheckpointError(f"{url}: says nowhere how many heads its {width} channels are split into, give heads")
    return int(heads)


def _pretrained(config: Mapping[str, Any]) -> Mapping[str, Any]:
    return config.get("pretrained_cfg") or {}


def _labels(config: Mapping[str, Any]) -> list[str] | None:
    names = config.get("label_names")
    return [str(name) for name in names] if isinstance(names, list) else None


def _square(rows: int) -> bool:
    return rows >= 0 and math.isqrt(rows) ** 2 == rows
