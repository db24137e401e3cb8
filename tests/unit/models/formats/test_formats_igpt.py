"""OpenAI's iGPT checkpoints: files that a writer of TensorFlow's format makes here, from its description and not from our reader."""

from __future__ import annotations

import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from formats_models import IGPT, assert_same_state, make
from torch.nn import functional

from pipeline.core.errors import CheckpointError
from pipeline.models.formats import load, read
from pipeline.models.formats.tensorbundle import crc32c, read_bundle

Arrays = dict[str, np.ndarray]
TYPES = {"float32": 1, "float64": 2, "int32": 3, "uint8": 4, "int64": 9, "float16": 19}


def checksum(data: bytes) -> bytes:
    """CRC-32C, a bit at a time, masked as LevelDB masks it."""
    crc = 0xFFFFFFFF
    for byte in data:
        crc ^= byte
        for _ in range(8):
            crc = crc >> 1 ^ (0x82F63B78 if crc & 1 else 0)
    crc ^= 0xFFFFFFFF
    return struct.pack("<I", ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF)


def varint(value: int) -> bytes:
    out = b""
    while value > 127:
        out, value = out + bytes([value & 127 | 128]), value >> 7
    return out + bytes([value])


def message(*fields: tuple[int, int | bytes]) -> bytes:
    """A protocol buffer of varints and byte strings; field 6 of an entry is a fixed 32."""
    out = b""
    for number, value in fields:
        if isinstance(value, int):
            out += varint(number << 3) + varint(value)
        elif number == 6:
            out += varint(number << 3 | 5) + value
        else:
            out += varint(number << 3 | 2) + varint(len(value)) + value
    return out


def block(pairs: list[tuple[bytes, bytes]], restart_every: int) -> bytes:
    """Keys share what they have in common with the one before, but for those at restarts."""
    out, restarts, before = b"", [], b""
    for n, (key, value) in enumerate(pairs):
        shared = 0
        if n % restart_every == 0:
            restarts.append(len(out))
        else:
            while shared < min(len(key), len(before)) and key[shared] == before[shared]:
                shared += 1
        out += varint(shared) + varint(len(key) - shared) + varint(len(value)) + key[shared:] + value
        before = key
    return out + struct.pack(f"<{len(restarts) + 1}I", *restarts, len(restarts))


def write_checkpoint(prefix: Path, arrays: Arrays, shards: int = 1, per_block: int = 7) -> None:
    data, pairs = [b""] * shards, [(b"", message((1, shards), (3, message((1, 1)))))]
    for n, name in enumerate(sorted(arrays)):
        array, shard = arrays[name], n % shards
        shape = message(*((2, message((1, size))) for size in array.shape))
        place = ((3, shard), (4, len(data[shard]))) if shard else ((4, len(data[shard])),)  # zeros are left out
        raw = array.tobytes()
        pairs.append((name.encode(), message((1, TYPES[array.dtype.name]), (2, shape), *place, (5, len(raw)), (6, checksum(raw)))))
        data[shard] += raw
    table, index = b"", []
    for start in range(0, len(pairs), per_block):
        part = pairs[start : start + per_block]
        handle, table = _add(table, block(part, 4))
        index.append((part[-1][0], handle))
    meta, table = _add(table, block([], 1))
    top, table = _add(table, block(index, 1))
    table += (meta + top).ljust(40, b"\0") + struct.pack("<Q", 0xDB4775248B80FB57)
    Path(f"{prefix}.index").write_bytes(table)
    for n, part_data in enumerate(data):
        Path(f"{prefix}.data-{n:05d}-of-{shards:05d}").write_bytes(part_data)
    Path(f"{prefix}.meta").write_bytes(b"the graph, which nobody needs")


def _add(table: bytes, content: bytes) -> tuple[bytes, bytes]:
    return varint(len(table)) + varint(len(content)), table + content + b"\0" + checksum(content + b"\0")


def openai(state: dict[str, torch.Tensor], heads: int, depth: int) -> Arrays:
    """The variables of image-gpt's src/model.py."""
    arrays = {
        "model/wte": state["wte.weight"],
        "model/wpe": state["wpe.weight"],
        "model/sos": state["sos"],
        "model/wtet": state["head.weight"],
    }
    arrays["model/ln_f/g"] = state["norm.weight"]
    for i in range(depth):
        there, here = f"model/h{i}", f"blocks.{i}"
        width = state["sos"].shape[0]
        for name, part in zip("qkv", state[f"{here}.attn.qkv.weight"].chunk(3), strict=True):
            arrays[f"{there}/attn/{name}_proj"] = part.reshape(heads, width // heads, width)
        arrays[f"{there}/attn/c_proj"] = state[f"{here}.attn.proj.weight"].T.reshape(heads, width // heads, width)
        arrays[f"{there}/ln_1/g"], arrays[f"{there}/ln_2/g"] = state[f"{here}.norm1.weight"], state[f"{here}.norm2.weight"]
        arrays[f"{there}/mlp/c_fc/w"], arrays[f"{there}/mlp/c_proj/w"] = (
            state[f"{here}.mlp.fc1.weight"].T,
            state[f"{here}.mlp.fc2.weight"].T,
        )
    return {name: np.ascontiguousarray(t.numpy()) for name, t in arrays.items()}


def reference(arrays: Arrays, tokens: torch.Tensor) -> torch.Tensor:
    """src/model.py in fp64, einsum for einsum."""
    w = {name.removeprefix("model/"): torch.from_numpy(a).double() for name, a in arrays.items()}

    def norm(x: torch.Tensor, name: str) -> torch.Tensor:
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-5) * w[f"{name}/g"]

    h = torch.cat([w["sos"].expand(len(tokens), 1, -1), w["wte"][tokens][:, :-1]], 1) + w["wpe"]
    for i in range(sum(name.endswith("ln_1/g") for name in w)):
        x = norm(h, f"h{i}/ln_1")
        q, k, v = (torch.einsum("bsf,hef->bhse", x, w[f"h{i}/attn/{part}_proj"]) for part in "qkv")
        weights = q @ k.transpose(2, 3) * v.shape[-1] ** -0.5 + torch.full((q.shape[2],) * 2, -torch.inf).triu(1)
        h = h + torch.einsum("bhse,hef->bsf", weights.softmax(-1) @ v, w[f"h{i}/attn/c_proj"])
        x = norm(h, f"h{i}/ln_2") @ w[f"h{i}/mlp/c_fc/w"]
        h = h + functional.silu(1.702 * x) / 1.702 @ w[f"h{i}/mlp/c_proj/w"]
    return norm(h, "ln_f") @ w["wtet"].T


@pytest.mark.parametrize("ending", ["", ".index", ".meta", ".data-00000-of-00002", "directory"])
def test_reads(ending: str, tmp_path: Path) -> None:
    model = make("igpt", IGPT)
    arrays = openai(dict(model.state_dict()), heads=2, depth=2)
    others = {"global_step": np.array(1000, np.int64), "beta1_power": np.array(0.9, np.float32), "model/wte/Adam": arrays["model/wte"]}
    write_checkpoint(tmp_path / "model.ckpt-1000", {**arrays, **others}, shards=2)
    url = str(tmp_path) if ending == "directory" else f"{tmp_path}/model.ckpt-1000{ending}"
    found = read(url)
    assert found.options == model.options.model_dump(mode="json") and found.format == "OpenAI iGPT (TensorFlow)"
    assert_same_state(found.state, dict(model.state_dict()))
    tokens = torch.randint(0, 8, (2, 16), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        ours, expected = load(url).double()(tokens), reference(arrays, tokens)
    assert float((ours - expected).abs().max() / expected.abs().max()) < 1e-12


def test_bert_and_fine_tuned(tmp_path: Path) -> None:
    """The BERT objective has no start of sequence; OpenAI's classifier no bias."""
    arrays = openai(dict(make("igpt", IGPT).state_dict()), heads=2, depth=2)
    del arrays["model/sos"]
    arrays["model/clf/wclf"] = np.ones((3, 16), np.float32)
    write_checkpoint(tmp_path / "model.ckpt", arrays)
    found = read(str(tmp_path / "model.ckpt"))
    assert found.options["masked"] and found.options["classes"] == 3
    assert not found.state["sos"].any() and not found.state["classifier.bias"].any() and found.state["classifier.weight"].all()


def test_missing_and_unknown_variables_are_named(tmp_path: Path) -> None:
    arrays = openai(dict(make("igpt", IGPT).state_dict()), heads=2, depth=2)
    arrays["model/h1/mlp/c_fc/b"] = arrays.pop("model/h1/ln_2/g")
    arrays["model/wpe"] = arrays["model/wpe"][:, :5].copy()
    write_checkpoint(tmp_path / "model.ckpt", arrays)
    with pytest.raises(CheckpointError) as refused:
        read(str(tmp_path / "model.ckpt"))
    assert str(refused.value) == (
        f"{tmp_path}/model.ckpt: does not fit the model, missing: model/h1/ln_2/g; unknown: model/h1/mlp/c_fc/b; "
        "of another shape: model/wpe (16, 5) instead of (16, 16)"
    )


def test_all_types(tmp_path: Path) -> None:
    arrays = {name: np.arange(6).reshape(2, 3).astype(name) for name in TYPES} | {"scalar": np.array(3.5, np.float32)}
    write_checkpoint(tmp_path / "some", arrays, shards=3, per_block=2)
    found = read_bundle(tmp_path / "some", "some")
    assert found.keys() == arrays.keys()
    for name, array in arrays.items():
        assert np.array_equal(found[name].numpy(), array) and found[name].numpy().dtype == array.dtype


@pytest.mark.parametrize("file", ["model.ckpt.index", "model.ckpt.data-00000-of-00001"])
def test_every_changed_byte_is_found(file: str, tmp_path: Path) -> None:
    """But for the padding of the footer, which says nothing."""
    arrays = {"model/a": np.arange(4, dtype=np.float32), "model/b": np.arange(3, dtype=np.float32)}
    write_checkpoint(tmp_path / "model.ckpt", arrays)
    whole = (tmp_path / file).read_bytes()
    for place in range(len(whole)):
        if file.endswith("index") and whole[place] == 0 and place >= len(whole) - 48:
            continue
        (tmp_path / file).write_bytes(whole[:place] + bytes([whole[place] ^ 64]) + whole[place + 1 :])
        with pytest.raises(CheckpointError, match=r"damaged|there is no"):
            read_bundle(tmp_path / "model.ckpt", "model.ckpt")
    for size in (0, 10, len(whole) - 1):
        (tmp_path / file).write_bytes(whole[:size])
        with pytest.raises(CheckpointError, match="damaged"):
            read_bundle(tmp_path / "model.ckpt", "model.ckpt")
    (tmp_path / "model.ckpt.data-00000-of-00001").unlink()
    with pytest.raises(CheckpointError):
        read_bundle(tmp_path / "model.ckpt", "model.ckpt")


@pytest.mark.parametrize("size", [0, 1, 64, 65, 1_100_000])
def test_checksums(size: int) -> None:
    data = np.random.default_rng(size).integers(0, 256, size, dtype=np.uint8)
    crc, table = 0xFFFFFFFF, []
    for byte in range(256):
        for _ in range(8):
            byte = byte >> 1 ^ (0x82F63B78 if byte & 1 else 0)
        table.append(byte)
    for byte in data.tolist():
        crc = table[(crc ^ byte) & 255] ^ crc >> 8
    assert crc32c(data) == crc ^ 0xFFFFFFFF
    assert crc32c(np.frombuffer(b"123456789", np.uint8)) == 0xE3069283  # RFC 3720's check
