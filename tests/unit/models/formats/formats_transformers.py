"""Tiny models of `transformers` with random weights, and what they and ours make of the same input."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers
from formats_models import captions, images, randomise
from safetensors.torch import load_file

from pipeline.models.model import Model

TOWER = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 3, "intermediate_size": 40, "image_size": 12, "patch_size": 4}
TEXT = {
    "vocab_size": 50,
    "hidden_size": 16,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 7,
}
PIXELS = {"vocab_size": 9, "n_positions": 16, "n_embd": 16, "n_layer": 2, "n_head": 2}
KINDS = ["vit", "vit-pooler", "vit-bare", "deit", "mae", "clip", "igpt", "igpt-classifier"]


def theirs(kind: str, **changes: Any) -> Any:
    """A tiny model of `transformers` with random weights, as it would be published."""
    match kind:
        case "vit":
            labels = {"id2label": {0: "cat", 1: "dog", 2: "cow"}, "label2id": {"cat": 0, "dog": 1, "cow": 2}}
            config: Any = transformers.ViTConfig(**{**TOWER, **labels, **changes})
            model: Any = transformers.ViTForImageClassification(config)
        case "vit-pooler" | "vit-bare":
            config = transformers.ViTConfig(**TOWER, hidden_act="gelu_pytorch_tanh", pooler_output_size=20)
            model = transformers.ViTModel(config, add_pooling_layer=kind == "vit-pooler")
        case "deit":
            model = transformers.DeiTForImageClassificationWithTeacher(transformers.DeiTConfig(**TOWER, num_labels=5))
        case "mae":
            decoder = {
                "decoder_hidden_size": 16,
                "decoder_num_hidden_layers": 2,
                "decoder_num_attention_heads": 4,
                "decoder_intermediate_size": 64,
            }
            model = transformers.ViTMAEForPreTraining(transformers.ViTMAEConfig(**TOWER, **decoder))
        case "clip":
            text = {**TEXT, "bos_token_id": 0, "eos_token_id": 2, "pad_token_id": 1}
            model = transformers.CLIPModel(transformers.CLIPConfig(text_config=text, vision_config=TOWER, projection_dim=6))
        case "igpt":
            model = transformers.ImageGPTForCausalImageModeling(transformers.ImageGPTConfig(**{**PIXELS, **changes}))
        case _:
            model = transformers.ImageGPTForImageClassification(transformers.ImageGPTConfig(**PIXELS, num_labels=3))
    return randomise(model)


def outputs(kind: str, model: Any, ours: Model) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """What both make of the same input, in fp64."""
    model, own = model.double(), ours.double()
    x = images(12)
    with torch.no_grad():
        match kind:
            case "vit" | "deit":
                return [(own(x), model(x).logits)]
            case "vit-pooler":
                return [(own(x), model(x).pooler_output)]
            case "vit-bare":
                return [(own(x), model(x).last_hidden_state[:, 0])]
            case "mae":
                noise = torch.rand(2, 9, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
                return [(own(x, noise)[0], model(x, noise=noise).logits)]
            case "clip":
                tokens, both = captions(), model(input_ids=captions(), pixel_values=x)
                seen, read_, scale = own(x, tokens)
                return [(seen, both.image_embeds), (read_, both.text_embeds), (scale * seen @ read_.T, both.logits_per_image)]
            case _:
                tokens = torch.randint(0, 8, (2, 16), generator=torch.Generator().manual_seed(3))
                shifted = torch.cat([torch.full((2, 1), 8), tokens[:, :-1]], dim=1)  # the start of sequence is their last colour
                logits = model(input_ids=shifted).logits
                return [(own(tokens, classify=True)[1] if kind == "igpt-classifier" else own(tokens), logits)]


def saved(kind: str, path: Path, **options: Any) -> Any:
    model = theirs(kind)
    model.save_pretrained(path, **options)
    return model


def tensors(path: Path) -> dict[str, torch.Tensor]:
    """transformers 5 saves an MAE's decoder under other names than it published its checkpoints with, and reads both."""
    found = load_file(path / "model.safetensors")
    return {name.replace("decoder_encoder.layer.", "decoder_layers."): t for name, t in found.items()}
