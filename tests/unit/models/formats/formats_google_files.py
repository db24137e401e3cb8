"""Google's .npz files as vit_jax, big_vision and Big Transfer write them, made from states of ours; names written out by hand."""

from __future__ import annotations

import numpy as np
import torch

State = dict[str, torch.Tensor]
Arrays = dict[str, np.ndarray]


def vit_jax(state: State, depth: int, heads: int) -> Arrays:
    """github.com/google-research/vision_transformer, with hybrids, representation layer and head."""
    arrays: Arrays = {"Transformer/posembed_input/pos_embedding": state["pos_embed"].numpy(), "cls": state["cls_token"].numpy()}
    _conv(arrays, "embedding", state, "patch_embed.proj")
    for i in range(depth):
        block = f"Transformer/encoderblock_{i}"
        _norm(arrays, f"{block}/LayerNorm_0", state, f"blocks.{i}.norm1")
        _attention(arrays, f"{block}/MultiHeadDotProductAttention_1", state, f"blocks.{i}.attn", heads)
        _norm(arrays, f"{block}/LayerNorm_2", state, f"blocks.{i}.norm2")
        _dense(arrays, f"{block}/MlpBlock_3/Dense_0", state, f"blocks.{i}.mlp.fc1")
        _dense(arrays, f"{block}/MlpBlock_3/Dense_1", state, f"blocks.{i}.mlp.fc2")
    _norm(arrays, "Transformer/encoder_norm", state, "norm")
    for layer in ("pre_logits", "head"):
        if f"{layer}.weight" in state:
            _dense(arrays, layer, state, layer)
    return arrays


def hybrid(state: State, depth: int, heads: int, stem: tuple[int, ...]) -> Arrays:
    arrays, ours = vit_jax(state, depth, heads), "patch_embed.backbone"
    arrays["conv_root/kernel"] = _hwio(state[f"{ours}.stem.conv.weight"])
    _group(arrays, "gn_root", state, f"{ours}.stem.norm")
    for s, blocks in enumerate(stem):
        for b in range(blocks):
            there, here = f"block{s + 1}/unit{b + 1}", f"{ours}.stages.{s}.blocks.{b}"
            for n in (1, 2, 3):
                arrays[f"{there}/conv{n}/kernel"] = _hwio(state[f"{here}.conv{n}.weight"])
                _group(arrays, f"{there}/gn{n}", state, f"{here}.norm{n}")
            if b == 0:
                arrays[f"{there}/conv_proj/kernel"] = _hwio(state[f"{here}.downsample.conv.weight"])
                _group(arrays, f"{there}/gn_proj", state, f"{here}.downsample.norm")
    return arrays


def big_vision(state: State, depth: int, heads: int, *, scan: bool = False) -> Arrays:
    """github.com/google-research/big_vision: positions at the root and of patches alone, other numbers in names, MAP head."""
    arrays = vit_jax({"cls_token": torch.zeros(1), **state}, depth, heads)
    if "cls_token" not in state:
        del arrays["cls"]
    made = {}
    for name, array in arrays.items():
        name = name.replace("MultiHeadDotProductAttention_1", "MultiHeadDotProductAttention_0").replace("MlpBlock_3", "MlpBlock_0")
        made[f"params/{name.replace('LayerNorm_2', 'LayerNorm_1')}"] = array
    positions = made.pop("params/Transformer/posembed_input/pos_embedding")
    made["params/pos_embedding"] = positions[:, 1:] if "cls_token" in state else positions
    if "attn_pool.latent" in state:
        pool, mha = "params/MAPHead_0", "params/MAPHead_0/MultiHeadDotProductAttention_0"
        made[f"{pool}/probe"] = state["attn_pool.latent"].numpy()
        key, value = ({p: state[f"attn_pool.kv.{p}"].chunk(2)[i] for p in ("weight", "bias")} for i in (0, 1))
        query = {p: state[f"attn_pool.q.{p}"] for p in ("weight", "bias")}
        for name, part in (("query", query), ("key", key), ("value", value)):
            _project(made, f"{mha}/{name}", part["weight"], part["bias"], heads)
        _out(made, f"{mha}/out", state, "attn_pool.proj", heads)
        _norm(made, f"{pool}/LayerNorm_0", state, "attn_pool.norm")
        _dense(made, f"{pool}/MlpBlock_0/Dense_0", state, "attn_pool.mlp.fc1")
        _dense(made, f"{pool}/MlpBlock_0/Dense_1", state, "attn_pool.mlp.fc2")
    if scan:
        block = "params/Transformer/encoderblock"
        for name in [name for name in made if name.startswith(f"{block}_0/")]:
            rest = name.removeprefix(f"{block}_0")
            made[block + rest] = np.stack([made.pop(f"{block}_{i}{rest}") for i in range(depth)])
    return made


def big_transfer(state: State, depths: tuple[int, ...]) -> Arrays:
    """github.com/google-research/big_transfer, bit_pytorch's input."""
    arrays: Arrays = {"resnet/root_block/standardized_conv2d/kernel": _hwio(state["stem.conv.weight"])}
    for s, blocks in enumerate(depths):
        for b in range(blocks):
            there, here = f"resnet/block{s + 1}/unit{b + 1:02d}", f"stages.{s}.blocks.{b}"
            for n, letter in ((1, "a"), (2, "b"), (3, "c")):
                arrays[f"{there}/{letter}/standardized_conv2d/kernel"] = _hwio(state[f"{here}.conv{n}.weight"])
                arrays[f"{there}/{letter}/group_norm/gamma"] = state[f"{here}.norm{n}.weight"].numpy()
                arrays[f"{there}/{letter}/group_norm/beta"] = state[f"{here}.norm{n}.bias"].numpy()
            if b == 0:
                arrays[f"{there}/a/proj/standardized_conv2d/kernel"] = _hwio(state[f"{here}.downsample.conv.weight"])
    arrays["resnet/group_norm/gamma"], arrays["resnet/group_norm/beta"] = state["norm.weight"].numpy(), state["norm.bias"].numpy()
    arrays["resnet/head/conv2d/kernel"] = _hwio(state["head.fc.weight"])
    arrays["resnet/head/conv2d/bias"] = state["head.fc.bias"].numpy()
    return arrays


def _hwio(weight: torch.Tensor) -> np.ndarray:
    return weight.permute(2, 3, 1, 0).numpy()


def _conv(arrays: Arrays, name: str, state: State, ours: str) -> None:
    arrays[f"{name}/kernel"], arrays[f"{name}/bias"] = _hwio(state[f"{ours}.weight"]), state[f"{ours}.bias"].numpy()


def _dense(arrays: Arrays, name: str, state: State, ours: str) -> None:
    arrays[f"{name}/kernel"], arrays[f"{name}/bias"] = state[f"{ours}.weight"].T.numpy(), state[f"{ours}.bias"].numpy()


def _norm(arrays: Arrays, name: str, state: State, ours: str) -> None:
    arrays[f"{name}/scale"], arrays[f"{name}/bias"] = state[f"{ours}.weight"].numpy(), state[f"{ours}.bias"].numpy()


def _group(arrays: Arrays, name: str, state: State, ours: str) -> None:
    for part, key in (("scale", "weight"), ("bias", "bias")):
        arrays[f"{name}/{part}"] = state[f"{ours}.{key}"].numpy().reshape(1, 1, 1, -1)


def _project(arrays: Arrays, name: str, weight: torch.Tensor, bias: torch.Tensor, heads: int) -> None:
    """y[h, d] = sum over i of x[i] kernel[i, h, d]."""
    arrays[f"{name}/kernel"] = weight.T.reshape(weight.shape[1], heads, -1).numpy()
    arrays[f"{name}/bias"] = bias.reshape(heads, -1).numpy()


def _out(arrays: Arrays, name: str, state: State, ours: str, heads: int) -> None:
    weight = state[f"{ours}.weight"]
    arrays[f"{name}/kernel"], arrays[f"{name}/bias"] = weight.T.reshape(heads, -1, weight.shape[0]).numpy(), state[f"{ours}.bias"].numpy()


def _attention(arrays: Arrays, name: str, state: State, ours: str, heads: int) -> None:
    weights, biases = state[f"{ours}.qkv.weight"].chunk(3), state[f"{ours}.qkv.bias"].chunk(3)
    for part, weight, bias in zip(("query", "key", "value"), weights, biases, strict=True):
        _project(arrays, f"{name}/{part}", weight, bias, heads)
    _out(arrays, f"{name}/out", state, f"{ours}.proj", heads)
