"""Our models as timm loads them: `timm.create_model("local-dir:<directory>")`. Names are the same; config.json says how to build the model.

timm builds its ViTs with a LayerNorm eps of 1e-6, CLIP's with 1e-5; one that is smaller is taken for 1e-6.
"""

from __future__ import annotations

from typing import Any

from pipeline.models.bit import BiTOptions
from pipeline.models.formats.exported import Exported, Seen, encoder, family, note, refuse, require, vit_state
from pipeline.models.formats.files import HF_CONFIG, SAFETENSORS
from pipeline.models.formats.keys import SAME_NAMES, write_state
from pipeline.models.formats.lazy import State
from pipeline.models.hybrid import stem_stride
from pipeline.models.mae import MAEOptions
from pipeline.models.model import Model
from pipeline.models.options import Options
from pipeline.models.resnet import ResNetOptions
from pipeline.models.sizes import HYBRID, RESNET
from pipeline.models.vit import ViTOptions

_TARGET = "timm"
_POOLS = {"token": "token", "gap": "avg", "map": "map"}
_ACTIVATIONS = {"gelu": "gelu", "gelu-tanh": "gelu_tanh", "quick-gelu": "quick_gelu"}
_HYBRIDS = {HYBRID[16]: "vit_base_r50_s16_224", HYBRID[32]: "vit_large_r50_s32_224"}
_BITS = ("resnetv2_50x1_bit", "resnetv2_50x3_bit", "resnetv2_101x1_bit", "resnetv2_101x3_bit", "resnetv2_152x2_bit", "resnetv2_152x4_bit")


def export(model: Model, state: State, seen: Seen) -> Exported:
    """Of an MAE the encoder.

    Raises:
        ConfigError: timm has no such model.
    """
    name, options, ours = family(model), model.options, state.tensors
    if isinstance(options, MAEOptions):
        options, ours = encoder(options, ours)
        name = "vit"
    match options:
        case ViTOptions():
            architecture, arguments = _vit(options)
            ours = vit_state(options, ours)
            width, pool, first = (
                options.width,
                _POOLS[options.pool],
                "patch_embed.backbone.stem.conv" if options.stem else "patch_embed.proj",
            )
            head: Any = ("head", "head_dist") if options.distilled else "head"
        case BiTOptions():
            sizes = {f"resnetv2_{size}x{options.factor}_bit": depths for size, depths in RESNET.items()}
            architecture = next((a for a, depths in sizes.items() if depths == options.depths and a in _BITS), "")
            if not architecture:
                raise refuse(_TARGET, f"BiT of depths {options.depths} and factor {options.factor}", "the published ones alone")
            arguments, width, pool, first, head = {}, 2048 * options.factor, "avg", "stem.conv", "head.fc"
        case ResNetOptions():
            require(_TARGET, options, width=64)
            architecture, arguments = "resnet50", {"layers": list(options.depths)}
            width, pool, first, head = 512 * 2 ** (len(options.depths) - 2), "avg", "conv1", "fc"
            if len(options.depths) != 4:
                raise refuse(_TARGET, f"ResNet of {len(options.depths)} stages", "four")
        case _:
            raise refuse(_TARGET, name, "vit, mae's encoder, bit and resnet; open_clip is the format for clip")
    return Exported(SAFETENSORS, write_state(ours, SAME_NAMES, _TARGET), {HF_CONFIG: _config(
        {"architecture": architecture, "num_features": width, "global_pool": pool, "model_args": arguments},
        {"first_conv": first, "classifier": head}, name, options, seen,
    )})  # fmt: skip


def _config(top: dict[str, Any], pretrained: dict[str, Any], name: str, options: Options, seen: Seen) -> dict[str, Any]:
    sizes = options.model_dump()
    pretrained |= {"num_classes": sizes["classes"], "input_size": [3, sizes["pixels"], sizes["pixels"]], "fixed_input_size": name == "vit"}
    if seen.mean and seen.std:
        pretrained |= {"mean": list(seen.mean), "std": list(seen.std)}
    labels = {"label_names": seen.classes} if seen.classes else {}
    return {**top, "num_classes": sizes["classes"], **labels, "pretrained_cfg": pretrained, **note(name, options)}


def _vit(o: ViTOptions) -> tuple[str, dict[str, Any]]:
    """timm's name of a model, and what to build it with instead of its own sizes."""
    require(_TARGET, o, positions_at="stem", representation=None, masked=False)
    if o.positions not in ("learned", "sincos-2d"):
        raise refuse(_TARGET, f"positions {o.positions}", "learned ones, or fixed ones written out")
    if o.stem is None:
        require(_TARGET, o, patch_bias=not o.pre_norm)
    if o.classes:
        require(_TARGET, o, head_bias=True)
    plain = not (o.distilled or o.stem)
    if o.eps > 1e-6 and not (o.eps == 1e-5 and plain):
        raise refuse(_TARGET, f"eps of {o.eps:g} for this model", "1e-6, and 1e-5 for CLIP's towers")
    if o.stem is not None and o.stem not in _HYBRIDS:
        raise refuse(_TARGET, f"stem {o.stem}", " and ".join(str(stem) for stem in _HYBRIDS))
    if o.distilled:
        architecture = "deit_base_distilled_patch16_224"
    elif o.stem:
        architecture = _HYBRIDS[o.stem]
    else:
        architecture = "vit_base_patch16_clip_224" if o.eps == 1e-5 else "vit_base_patch16_224"
    arguments = {
        "img_size": o.pixels,
        "patch_size": o.patch // stem_stride(o.stem) if o.stem else o.patch,
        "embed_dim": o.width,
        "depth": o.depth,
        "num_heads": o.heads,
        "mlp_ratio": ratio(o.width, o.mlp or 4 * o.width),
        "qk_norm": o.qk_norm,
        "init_values": o.layer_scale,
        "pre_norm": o.pre_norm,
        "act_layer": _ACTIVATIONS[o.activation],
    }
    if not o.distilled:
        arguments |= {"class_token": o.tokens > 0, "global_pool": _POOLS[o.pool], "fc_norm": o.fc_norm}
    return architecture, {key: value for key, value in arguments.items() if value is not None}


def ratio(width: int, hidden: int) -> float:
    """What timm and open_clip multiply a width with, and round down, to get the hidden one."""
    return hidden / width if int(width * (hidden / width)) == hidden else (hidden + 0.5) / width
