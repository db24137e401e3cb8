"""Our models as `transformers` loads them with from_pretrained: config.json, model.safetensors, preprocessor_config.json."""

from __future__ import annotations

from typing import Any

from pipeline.models.clip import CLIPOptions, CLIPViTOptions
from pipeline.models.formats.exported import Exported, Seen, family, note, refuse, require, vit_state
from pipeline.models.formats.files import HF_CONFIG, PREPROCESSOR, SAFETENSORS
from pipeline.models.formats.hf_names import ACTIVATION_NAMES, clip_rules, igpt_rules, join_igpt, mae_rules, vit_rules
from pipeline.models.formats.keys import write_state
from pipeline.models.formats.lazy import State
from pipeline.models.igpt import IGPTOptions
from pipeline.models.mae import MAEOptions
from pipeline.models.model import Model
from pipeline.models.options import Options
from pipeline.models.text import EPS
from pipeline.models.vit import ViTOptions

_TARGET = "hf"
_PROCESSORS = {"vit": "ViTImageProcessor", "vit_mae": "ViTImageProcessor", "deit": "DeiTImageProcessor", "clip": "CLIPImageProcessor"}


def export(model: Model, state: State, seen: Seen) -> Exported:
    """Raises ConfigError where `transformers` has no such model."""
    ours, name = state.tensors, family(model)
    match model.options:
        case ViTOptions() as o:
            kind, config = _vit(o)
            prefix = f"{kind}." if o.classes else ""
            tensors = write_state(vit_state(o, ours), vit_rules(prefix, o.distilled), _TARGET)
        case MAEOptions() as o:
            kind, config = "vit_mae", _mae(o)
            tensors = write_state(ours, mae_rules(), _TARGET)
        case CLIPOptions() as o:
            kind, config = "clip", _clip(o)
            tensors = write_state(ours, clip_rules(), _TARGET)
        case IGPTOptions() as o:
            kind, config = "imagegpt", _igpt(o)
            tensors = join_igpt(write_state(ours, igpt_rules(), _TARGET), o.depth, o.width)
            if o.classes:
                if state.get("classifier.bias").any():
                    raise refuse(_TARGET, "bias in iGPT's classifier", "one without, and this one is not zero")
                del tensors["score.bias"]
                if not state.get("head.weight").any():  # theirs has no head for colours
                    del tensors["lm_head.weight"]
        case _:
            raise refuse(_TARGET, name, "vit, mae, clip and igpt")
    labels = _labels(model.options, seen)
    return Exported(SAFETENSORS, tensors, {
        **_preprocessor(kind, model.options, seen),
        HF_CONFIG: {**config, **labels, "model_type": kind, "dtype": "float32", **note(name, model.options)},
    }, has_parts=True)  # fmt: skip


def _labels(options: Options, seen: Seen) -> dict[str, Any]:
    classes = getattr(options, "classes", 0)
    if not classes:
        return {}
    names = seen.classes if seen.classes and len(seen.classes) == classes else [f"LABEL_{i}" for i in range(classes)]
    return {"id2label": {str(i): n for i, n in enumerate(names)}, "label2id": {n: i for i, n in enumerate(names)}}


def _preprocessor(kind: str, options: Any, seen: Seen) -> dict[str, dict[str, Any]]:
    """Only where the normalisation is known; iGPT's colours are no normalisation."""
    if not (seen.mean and seen.std) or kind == "imagegpt":
        return {}
    side = options.pixels
    crop = {"do_center_crop": True, "crop_size": {"height": side, "width": side}} if kind in ("clip", "deit") else {}
    return {PREPROCESSOR: {
        "image_processor_type": _PROCESSORS[kind],
        "do_resize": True, "resample": 3, "do_rescale": True, "rescale_factor": 1 / 255, "do_normalize": True,
        "size": {"shortest_edge": side} if kind == "clip" else {"height": side, "width": side}, **crop,
        "image_mean": list(seen.mean), "image_std": list(seen.std),
    }}  # fmt: skip


def _transformer(o: Any) -> dict[str, Any]:
    return {
        "hidden_size": o.width,
        "num_hidden_layers": o.depth,
        "num_attention_heads": o.heads,
        "intermediate_size": o.mlp or 4 * o.width,
    }


def _vit(o: ViTOptions) -> tuple[str, dict[str, Any]]:
    require(_TARGET, o, pool="token", positions_at="stem", qk_norm=False, layer_scale=None, pre_norm=False, fc_norm=False, patch_bias=True)
    require(_TARGET, o, masked=False, stem=None)
    if o.positions not in ("learned", "sincos-2d"):
        raise refuse(_TARGET, f"positions {o.positions}", "learned ones, or fixed ones written out")
    if o.classes:
        require(_TARGET, o, representation=None, head_bias=True)
    if o.distilled:
        kind, architecture = "deit", "DeiTForImageClassificationWithTeacher" if o.classes else "DeiTModel"
    else:
        kind, architecture = "vit", "ViTForImageClassification" if o.classes else "ViTModel"
    config = {
        "architectures": [architecture],
        **_transformer(o),
        "image_size": o.pixels,
        "patch_size": o.patch,
        "num_channels": 3,
        "hidden_act": ACTIVATION_NAMES[o.activation],
        "hidden_dropout_prob": o.dropout,
        "attention_probs_dropout_prob": 0.0,
        "layer_norm_eps": o.eps,
        "qkv_bias": True,
    }
    return kind, config | ({"pooler_output_size": o.representation, "pooler_act": "tanh"} if o.representation else {})


def _mae(o: MAEOptions) -> dict[str, Any]:
    return {
        "architectures": ["ViTMAEForPreTraining"],
        **_transformer(o),
        "image_size": o.pixels,
        "patch_size": o.patch,
        "num_channels": 3,
        "hidden_act": "gelu",
        "layer_norm_eps": o.eps,
        "qkv_bias": True,
        "decoder_hidden_size": o.decoder_width,
        "decoder_num_hidden_layers": o.decoder_depth,
        "decoder_num_attention_heads": o.decoder_heads,
        "decoder_intermediate_size": 4 * o.decoder_width,
        "mask_ratio": o.mask,
        "norm_pix_loss": True,
    }


def plain_tower(target: str, o: CLIPViTOptions, *free: str) -> None:
    """Raises ConfigError unless an image tower is one of OpenAI's kind; what is `free` may differ."""
    usual = CLIPViTOptions(kind="vit", width=o.width, depth=o.depth, heads=o.heads, patch=o.patch, pixels=o.pixels)
    fixed = {
        "pool",
        "positions",
        "positions_at",
        "qk_norm",
        "layer_scale",
        "representation",
        "pre_norm",
        "fc_norm",
        "patch_bias",
        "head_bias",
        "stem",
    }
    require(target, o, "vision.", tokens=1, eps=EPS, **{key: getattr(usual, key) for key in sorted(fixed.difference(free))})


def _clip(o: CLIPOptions) -> dict[str, Any]:
    require(_TARGET, o, logit_bias=None)
    require(_TARGET, o.text, "text.", kind="transformer")
    if not isinstance(o.vision, CLIPViTOptions):
        raise refuse(_TARGET, "CLIP with a ResNet", "ViT towers; open_clip has ResNets")
    plain_tower(_TARGET, o.vision)
    shared = {"hidden_act": ACTIVATION_NAMES[o.activation], "layer_norm_eps": EPS, "projection_dim": o.embed}
    text = {
        "hidden_size": o.text.width, "num_hidden_layers": o.text.depth, "num_attention_heads": o.text.head_count,
        "intermediate_size": o.text.hidden, "vocab_size": o.vocabulary, "max_position_embeddings": o.context,
        # With 2 transformers takes the place of the largest token, as OpenAI does, whatever the vocabulary.
        "bos_token_id": 0, "eos_token_id": 2, "pad_token_id": 1,
    }  # fmt: skip
    vision = {**_transformer(o.vision), "image_size": o.pixels, "patch_size": o.vision.patch, "num_channels": 3}
    return {
        "architectures": ["CLIPModel"],
        "projection_dim": o.embed,
        "logit_scale_init_value": o.logit_scale,
        "text_config": {**text, **shared, "model_type": "clip_text_model"},
        "vision_config": {**vision, **shared, "model_type": "clip_vision_model"},
    }


def _igpt(o: IGPTOptions) -> dict[str, Any]:
    require(_TARGET, o, masked=False)
    return {
        "architectures": ["ImageGPTForImageClassification" if o.classes else "ImageGPTForCausalImageModeling"],
        "vocab_size": o.colors + 1,
        "n_positions": o.pixels**2,
        "n_embd": o.width,
        "n_layer": o.depth,
        "n_head": o.heads,
        "n_inner": None,
        "activation_function": "quick_gelu",
        "layer_norm_epsilon": 1e-5,
        "resid_pdrop": o.dropout,
        "embd_pdrop": o.dropout,
        "attn_pdrop": 0.0,
        "scale_attn_weights": True,
        "scale_attn_by_inverse_layer_idx": False,
        "reorder_and_upcast_attn": False,
        "tie_word_embeddings": False,
    }
