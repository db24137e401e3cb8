"""The same architectures as other projects build them: timm, transformers, open_clip, each where it is installed."""

from __future__ import annotations

import importlib.util
from typing import Any

import torch
from torch import nn

PEERS = ("timm", "transformers", "open_clip")


def installed(peer: str) -> bool:
    return importlib.util.find_spec(peer) is not None


def make(peer: str, name: str, options: Any, device: torch.device) -> nn.Module:
    """The model `name` of `peer`, in the shape that `options` (of our model) say, randomly initialised, in fp32."""
    with torch.device(device):
        return {"timm": _timm, "transformers": _transformers, "open_clip": _open_clip}[peer](name, options).to(device)


def _timm(name: str, o: Any) -> nn.Module:
    import timm

    model: nn.Module = timm.create_model(
        name, img_size=o.pixels, patch_size=o.patch, num_classes=o.classes, embed_dim=o.width, depth=o.depth, num_heads=o.heads,
        mlp_ratio=o.mlp / o.width,
    )  # fmt: skip
    return model


def _transformers(name: str, o: Any) -> nn.Module:
    import transformers as t

    plain: dict[str, Any] = {"attn_implementation": "sdpa"}
    model: nn.Module
    if name == "vit":
        config = t.ViTConfig(
            hidden_size=o.width, num_hidden_layers=o.depth, num_attention_heads=o.heads, intermediate_size=o.mlp, image_size=o.pixels,
            patch_size=o.patch, num_labels=o.classes, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, **plain,
        )  # fmt: skip
        model = t.ViTForImageClassification(config)
    elif name == "clip":
        activation = "quick_gelu" if o.activation == "quick-gelu" else "gelu"
        vision = {
            "hidden_size": o.vision.width, "intermediate_size": o.vision.mlp, "num_hidden_layers": o.vision.depth,
            "num_attention_heads": o.vision.heads, "image_size": o.pixels, "patch_size": o.vision.patch, "hidden_act": activation,
        }  # fmt: skip
        text = {
            "hidden_size": o.text.width, "intermediate_size": 4 * o.text.width, "num_hidden_layers": o.text.depth,
            "num_attention_heads": o.text.heads, "vocab_size": o.vocabulary, "max_position_embeddings": o.context,
            "hidden_act": activation, "eos_token_id": o.vocabulary - 1, "bos_token_id": o.vocabulary - 2, "pad_token_id": 0,
        }  # fmt: skip
        model = t.CLIPModel(t.CLIPConfig(text_config=text, vision_config=vision, projection_dim=o.embed, **plain))
    else:
        config = t.ImageGPTConfig(
            vocab_size=o.colors + 1, n_positions=o.pixels**2, n_embd=o.width, n_layer=o.depth, n_head=o.heads, resid_pdrop=0, embd_pdrop=0,
            attn_pdrop=0, use_cache=False,
        )  # fmt: skip
        model = t.ImageGPTForCausalImageModeling(config)
    return model


def _open_clip(name: str, o: Any) -> nn.Module:
    from open_clip.model import CLIP

    vision = {
        "image_size": o.pixels, "patch_size": o.vision.patch, "width": o.vision.width, "layers": o.vision.depth,
        "head_width": o.vision.width // o.vision.heads, "mlp_ratio": o.vision.mlp / o.vision.width,
    }  # fmt: skip
    text = {
        "context_length": o.context, "vocab_size": o.vocabulary, "width": o.text.width, "heads": o.text.heads, "layers": o.text.depth,
    }  # fmt: skip
    return CLIP(o.embed, vision, text, quick_gelu=o.activation == "quick-gelu")
