"""Hugging Face directories: ViT, DeiT, ViTMAE, CLIP and ImageGPT of `transformers`, by their config.json."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from pipeline.core.errors import CheckpointError
from pipeline.models.formats.files import Source
from pipeline.models.formats.hf_names import ACTIVATIONS, IGNORED, clip_rules, igpt_rules, mae_rules, split_igpt, vit_rules
from pipeline.models.formats.imported import NOTE, Normalisation, Plan, fixed_positions, normalisation, outputs, side_of
from pipeline.models.formats.keys import count

FAMILIES = ("vit", "deit", "vit_mae", "clip", "imagegpt")


def plan(source: Source, given: Mapping[str, Any]) -> Plan:
    """Raises CheckpointError where the config is of no family of ours, or asks for what ours has not."""
    config = _Config(source.config or {}, source.url)
    match kind := config.get("model_type", None):
        case "vit" | "deit":
            return _vit(source, config, kind)
        case "vit_mae":
            return _mae(source, config)
        case "clip":
            return _clip(source, config)
        case "imagegpt":
            return _igpt(source, config)
        case _:
            raise CheckpointError(f"{source.url}: is a {kind!r} of transformers, known are {', '.join(FAMILIES)}")


class _Config:
    """config.json, or a part of it; what it leaves out is the default of `transformers`, which the caller knows."""

    def __init__(self, values: Mapping[str, Any], url: str, where: str = "config.json") -> None:
        self.values, self.url, self.where = values, url, where

    def get(self, key: str, default: Any) -> Any:
        return self.values.get(key, default)

    def number(self, key: str, default: float) -> Any:
        value = self.get(key, default)
        if isinstance(value, (list, tuple)) and len(set(value)) == 1:
            value = value[0]  # sizes of both sides
        if not isinstance(value, (int, float)) or isinstance(value, bool):
            raise CheckpointError(f"{self.url}: {self.where} has {key}: {value!r}, a number is wanted")
        return value

    def part(self, key: str) -> _Config:
        return _Config(self.get(key, None) or {}, self.url, f"{self.where}, {key},")

    def require(self, **expected: Any) -> None:
        """Raises CheckpointError where the config says something else, that ours cannot do."""
        for key, value in expected.items():
            if self.get(key, value) != value:
                raise CheckpointError(f"{self.url}: {self.where} has {key}: {self.values[key]!r}, our models have {value!r} alone")

    def activation(self, default: str = "gelu") -> str:
        name = self.get("hidden_act", default)
        if name not in ACTIVATIONS:
            raise CheckpointError(f"{self.url}: {self.where} has hidden_act: {name!r}, known are {', '.join(ACTIVATIONS)}")
        return ACTIVATIONS[name]

    def transformer(self, hidden: int = 3072) -> dict[str, Any]:
        return {
            "width": self.number("hidden_size", 768),
            "depth": self.number("num_hidden_layers", 12),
            "heads": self.number("num_attention_heads", 12),
            "mlp": self.number("intermediate_size", hidden),
        }

    def labels(self) -> list[str] | None:
        """Unless they are the numbered ones that `transformers` makes up."""
        names = self.get("id2label", None)
        if not isinstance(names, dict) or all(re.fullmatch(r"LABEL_\d+", str(name)) for name in names.values()):
            return None
        return [str(name) for _, name in sorted(names.items(), key=lambda item: int(item[0]))]


def _vit(source: Source, config: _Config, kind: str) -> Plan:
    tensors = dict(source.tensors)
    config.require(num_channels=3, qkv_bias=True, pooler_act="tanh")
    prefix = f"{kind}." if any(name.startswith(f"{kind}.") for name in tensors) else ""
    distilled = kind == "deit"
    if distilled and "classifier.weight" in tensors:
        raise CheckpointError(f"{source.url}: is a DeiT whose distillation token has no head (DeiTForImageClassification), ours have one")
    head = "cls_classifier.weight" if distilled else "classifier.weight"
    if distilled and not prefix:  # a layer of transformers that no DeiT was trained with, and ours has not
        tensors = {name: t for name, t in tensors.items() if not name.startswith("pooler.")}
    options = {
        "pixels": config.number("image_size", 224),
        "classes": outputs(tensors, head, source.url),
        "patch": config.number("patch_size", 16),
        **config.transformer(),
        "pool": "token",
        "class_token": True,
        "positions": "learned",
        "eps": config.number("layer_norm_eps", 1e-12),
        "activation": config.activation(),
        "representation": outputs(tensors, f"{prefix}pooler.dense.weight", source.url) or None,
        "distilled": distilled,
    }
    fixed_positions(tensors, f"{prefix}embeddings.position_embeddings", options, config.values)
    assumed = {"resize": "hf", "dropout": config.number("hidden_dropout_prob", 0.0)}
    return Plan(
        f"Hugging Face {kind}", "vit", options, tensors, assumed, vit_rules(prefix, distilled), IGNORED,
        _normalisation(source), config.labels() if head in tensors else None,
    )  # fmt: skip


def _mae(source: Source, config: _Config) -> Plan:
    """ViTMAEForPreTraining, or ViTMAEModel, which has no decoder."""
    config.require(num_channels=3, qkv_bias=True, hidden_act="gelu")
    # transformers 5 saves other names than it published its checkpoints under, and reads both.
    tensors = {name.replace("decoder.decoder_encoder.layer.", "decoder.decoder_layers."): t for name, t in source.tensors.items()}
    options = {"pixels": config.number("image_size", 224), "patch": config.number("patch_size", 16), **config.transformer()}
    options["eps"] = config.number("layer_norm_eps", 1e-12)
    if not any(name.startswith("decoder.") for name in tensors):
        options |= {"classes": 0, "pool": "token", "class_token": True, "positions": "learned"}
        prefix = "vit." if any(name.startswith("vit.") for name in tensors) else ""
        return Plan(
            "Hugging Face vit_mae, encoder", "vit", options, tensors, {"resize": "hf"}, vit_rules(prefix), IGNORED, _normalisation(source)
        )
    width = config.number("decoder_hidden_size", 512)
    if config.number("decoder_intermediate_size", 2048) != 4 * width:
        raise CheckpointError(f"{source.url}: its decoder's hidden layers are not four times as wide as the decoder, ours are")
    options |= {
        "decoder_width": width,
        "decoder_depth": config.number("decoder_num_hidden_layers", 8),
        "decoder_heads": config.number("decoder_num_attention_heads", 16),
        "mask": config.number("mask_ratio", 0.75),
    }
    return Plan("Hugging Face vit_mae", "mae", options, tensors, {}, mae_rules(), IGNORED, _normalisation(source))


def _clip(source: Source, config: _Config) -> Plan:
    vision, text = config.part("vision_config"), config.part("text_config")
    for tower in (vision, text):
        tower.require(layer_norm_eps=1e-5)
    vision.require(num_channels=3)
    activation = vision.activation("quick_gelu")
    if text.activation("quick_gelu") != activation:
        raise CheckpointError(f"{source.url}: its towers have different activations, ours share one")
    context = text.number("max_position_embeddings", 77)
    written = {"hidden_size": 512, "num_attention_heads": 8, "intermediate_size": 2048, **text.values}
    options = {
        "pixels": vision.number("image_size", 224),
        "embed": config.number("projection_dim", 512),
        "activation": activation,
        "vision": {"kind": "vit", "patch": vision.number("patch_size", 32), **vision.transformer()},
        "text": {"kind": "transformer", **_Config(written, source.url).transformer()},
        "vocabulary": text.number("vocab_size", 49408),
        "context": context,
    }
    return Plan("Hugging Face clip", "clip", options, source.tensors, {}, clip_rules(), IGNORED, _normalisation(source))


def _igpt(source: Source, config: _Config) -> Plan:
    width, url = config.number("n_embd", 512), source.url
    config.require(
        activation_function="quick_gelu", layer_norm_epsilon=1e-5, scale_attn_weights=True, scale_attn_by_inverse_layer_idx=False,
        reorder_and_upcast_attn=False, add_cross_attention=False, tie_word_embeddings=False,
    )  # fmt: skip
    if config.get("n_inner", None) not in (None, 4 * width):
        raise CheckpointError(f"{url}: config.json has n_inner: {config.get('n_inner', None)}, ours is four times the width")
    tensors, biased = split_igpt(source.tensors, config.get(NOTE, {}).get("options", {}).get("bias", False))
    options = {
        "pixels": side_of(config.number("n_positions", 1024), url, "n_positions"),
        "colors": config.number("vocab_size", 513) - 1,
        "classes": outputs(tensors, "score.weight", url),
        "width": width,
        "depth": config.number("n_layer", count(tensors, "transformer.h.{i}.")),
        "heads": config.number("n_head", 8),
        "bias": biased,
    }
    return Plan(
        "Hugging Face imagegpt", "igpt", options, tensors, {}, igpt_rules(), IGNORED,
        classes=config.labels() if "score.weight" in tensors else None,
    )  # fmt: skip


def _normalisation(source: Source) -> Normalisation | tuple[None, None]:
    return normalisation(source.preprocessor, "image_mean", "image_std")
