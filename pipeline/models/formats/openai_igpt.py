"""OpenAI's iGPT checkpoints, as its TensorFlow code saved them (github.com/openai/image-gpt, src/model.py)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from pipeline.models.formats.files import Source
from pipeline.models.formats.imported import Plan, outputs, side_of, wanted
from pipeline.models.formats.keys import Change, Rule, count, rule

# Of the optimiser and the loop, not of the model.
IGNORED = (r"(?!model/).*", r".*/(adam_[mv]|Adam(_\d)?)")
_OUT_IN = Change(lambda t: t.flatten(0, 1))  # q, k and v are (heads, channels a head, in)
_IN_OUT = Change(lambda t: t.flatten(0, -2).t())  # (heads, channels a head, out), or (in, out)


def recognises(names: Mapping[str, Any]) -> bool:
    return "model/wte" in names


def plan(source: Source, given: Mapping[str, Any]) -> Plan:
    tensors, url = dict(source.tensors), source.url
    colors, width = wanted(tensors, "model/wte", url, 2).shape
    masked = "model/sos" not in tensors
    if masked:  # the BERT objective has no start of sequence
        tensors["model/sos"] = torch.zeros(width)
    classes = outputs(tensors, "model/clf/wclf", url)
    if classes:  # theirs has no bias
        tensors["model/clf/bias"] = torch.zeros(classes)
    options = {
        "pixels": side_of(wanted(tensors, "model/wpe", url, 2).shape[0], url, "model/wpe"),
        "colors": colors,
        "classes": classes,
        "width": width,
        "depth": count(tensors, "model/h{i}/"),
        "heads": wanted(tensors, "model/h0/attn/q_proj", url, 3).shape[0],
        "masked": masked,
        "bias": False,
    }
    return Plan("OpenAI iGPT (TensorFlow)", "igpt", options, tensors, {}, _rules(), IGNORED)


def _rules() -> list[Rule]:
    ours, theirs = "blocks.{i}", "model/h{i}"
    return [
        *(rule(f"{name}.weight", f"model/{name}") for name in ("wte", "wpe")),
        rule("sos", "model/sos"),
        rule(f"{ours}.norm1.weight", f"{theirs}/ln_1/g"),
        rule(f"{ours}.attn.qkv.weight", *(f"{theirs}/attn/{part}_proj" for part in "qkv"), change=_OUT_IN),
        rule(f"{ours}.attn.proj.weight", f"{theirs}/attn/c_proj", change=_IN_OUT),
        rule(f"{ours}.norm2.weight", f"{theirs}/ln_2/g"),
        rule(f"{ours}.mlp.fc1.weight", f"{theirs}/mlp/c_fc/w", change=_IN_OUT),
        rule(f"{ours}.mlp.fc2.weight", f"{theirs}/mlp/c_proj/w", change=_IN_OUT),
        rule("norm.weight", "model/ln_f/g"),
        rule("head.weight", "model/wtet"),
        rule("classifier.weight", "model/clf/wclf"),
        rule("classifier.bias", "model/clf/bias"),
    ]
