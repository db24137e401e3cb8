"""Our CLIPs as open_clip loads them, `open_clip.create_model("local-dir:<directory>")`: open_clip_config.json and safetensors."""

from __future__ import annotations

from typing import Any

from pipeline.models.clip import CLIPOptions, CLIPViTOptions
from pipeline.models.formats.exported import Exported, Seen, family, note, refuse, require
from pipeline.models.formats.files import OPEN_CLIP_CONFIG, OPEN_CLIP_SAFETENSORS
from pipeline.models.formats.hf_export import plain_tower
from pipeline.models.formats.keys import write_state
from pipeline.models.formats.lazy import State
from pipeline.models.formats.open_clip import rules
from pipeline.models.formats.timm_export import ratio
from pipeline.models.model import Model

_TARGET = "open_clip"


def export(model: Model, state: State, seen: Seen) -> Exported:
    """Raises ConfigError where open_clip has no such model."""
    o = model.options
    if not isinstance(o, CLIPOptions):
        raise refuse(_TARGET, family(model), "clip alone")
    require(_TARGET, o.text, "text.", kind="transformer")
    resnet = not isinstance(o.vision, CLIPViTOptions)
    tower: dict[str, Any] = {"image_size": o.pixels, "width": o.vision.width}
    if isinstance(o.vision, CLIPViTOptions):
        plain_tower(_TARGET, o.vision, "layer_scale")
        tower |= {"layers": o.vision.depth, "patch_size": o.vision.patch, "head_width": o.vision.width // o.vision.heads}
        tower |= {"mlp_ratio": ratio(o.vision.width, o.vision.mlp or 4 * o.vision.width)}
        tower |= {"ls_init_value": o.vision.layer_scale} if o.vision.layer_scale else {}
    else:
        tower |= {"layers": list(o.vision.depths), "patch_size": None}
    tanh = {"act_kwargs": {"approximate": "tanh"}} if o.activation == "gelu-tanh" else {}
    config = {
        "embed_dim": o.embed,
        "quick_gelu": o.activation == "quick-gelu",
        "vision_cfg": {**tower, **tanh},
        "text_cfg": {
            "context_length": o.context, "vocab_size": o.vocabulary, "width": o.text.width, "heads": o.text.head_count,
            "layers": o.text.depth, "mlp_ratio": ratio(o.text.width, o.text.hidden), **tanh,
        },
    }  # fmt: skip
    if o.logit_bias is not None:
        config["init_logit_bias"] = o.logit_bias
    shown = {"mean": list(seen.mean), "std": list(seen.std), "size": [o.pixels, o.pixels]} if seen.mean and seen.std else {}
    written = {"model_cfg": config, "preprocess_cfg": shown, **note("clip", o)}
    return Exported(OPEN_CLIP_SAFETENSORS, write_state(state.tensors, rules(resnet), _TARGET), {OPEN_CLIP_CONFIG: written})
