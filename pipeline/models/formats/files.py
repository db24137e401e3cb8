"""The files of a checkpoint at any URL, and the tensors in them. No pickle is executed.

safetensors and .npz hold numbers alone. PyTorch's own files are pickles: `torch.load(weights_only=True)` makes tensors, containers and
`argparse.Namespace` (a bag of values, in which training scripts keep their arguments), and refuses everything else; TorchScript
archives are read by torchscript.py, TensorFlow's by tensorbundle.py.
"""

from __future__ import annotations

import argparse
import json
import pickle
import tempfile
import zipfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from pipeline.core.errors import CheckpointError
from pipeline.core.files import split_file
from pipeline.core.storage import Storage
from pipeline.models.formats.keys import Tensors, strip_prefix
from pipeline.models.formats.tensorbundle import read_bundle
from pipeline.models.formats.torchscript import is_torchscript, read_torchscript

HF_CONFIG, OPEN_CLIP_CONFIG, PREPROCESSOR = "config.json", "open_clip_config.json", "preprocessor_config.json"
SAFETENSORS, OPEN_CLIP_SAFETENSORS = "model.safetensors", "open_clip_model.safetensors"
_CONFIGS = (HF_CONFIG, OPEN_CLIP_CONFIG, PREPROCESSOR)
_WEIGHTS = (
    SAFETENSORS, "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json",
    OPEN_CLIP_SAFETENSORS, "open_clip_pytorch_model.bin",
)  # fmt: skip
_PICKLES = (".pt", ".pth", ".bin", ".tar")
_TENSORFLOW = (".index", ".meta")
# Where training scripts put the weights in what they save; EMA weights are taken only where there are no others.
_INSIDE = ("model", "state_dict", "model_state_dict", "model_state", "module", "model_ema", "state_dict_ema")
KNOWN = (
    "Hugging Face (a directory with config.json and safetensors or .bin), timm, DeiT and MAE (safetensors, .pth or .bin), Google's ViT and "
    "BiT (.npz), OpenAI's CLIP (.pt) and open_clip, OpenAI's iGPT (model.ckpt-*.index), torchvision's ResNets (.pth)"
)


@dataclass(frozen=True)
class Source:
    """One checkpoint. `kind` says how its tensors were stored: safetensors, pickle, torchscript, npz or tensorflow; `wrapper` is the key
    that they lay under in a pickle."""

    url: str
    kind: str
    tensors: Tensors
    config: dict[str, Any] | None = None
    open_clip: dict[str, Any] | None = None
    preprocessor: dict[str, Any] = field(default_factory=dict)
    wrapper: str = ""


@contextmanager
def open_source(url: str, endpoint: str | None = None) -> Iterator[Source]:
    """The checkpoint at `url`: a directory, a file, or the prefix of a TensorFlow checkpoint. Local files are mapped where they lie,
    others are fetched to a temporary directory, which tensors that are mapped keep alive.

    Raises:
        CheckpointError: there is none, it is damaged, of no known format, or asks for code to be run.
        StorageError, CredentialsError: the store cannot be read.
    """
    with tempfile.TemporaryDirectory(prefix="tessera-") as temporary:
        path = _find(url, endpoint, Path(temporary))
        if path.is_dir():
            yield _read_directory(path, url)
        elif path.suffix == ".json" or (path.name in _WEIGHTS and any(path.with_name(name).is_file() for name in _CONFIGS)):
            yield _read_directory(path.parent, url, path.name if path.name in _WEIGHTS else None)
        else:
            yield _read_file(path, url)


def _find(url: str, endpoint: str | None, temporary: Path) -> Path:
    """A local path of what `url` means."""
    if (storage := Storage(url, endpoint)).is_local:
        path = Path(storage.path)
        if path.suffix in _TENSORFLOW or ".data-" in path.name:
            path = path.with_suffix("")
        if not path.exists() and not Path(f"{path}.index").exists():
            raise CheckpointError(f"{url}: there is no such file or directory")
        if path.is_dir():
            _check_no_run([p.name for p in path.iterdir()], url)
        return path
    directory, name = split_file(url.rstrip("/"), endpoint)
    web = storage.protocol in ("http", "https")  # lists nothing: names are tried
    there = [] if web or _is_file(name) else [n for n in storage.names() if n != name]
    _check_no_run(there, url)
    if there or (web and not _is_file(name)):
        found = [n for n in there if n in _CONFIGS] if there else list(_CONFIGS)
        weights = [n for n in _WEIGHTS if n in there][:1] or [n for n in there if _is_weights(n)] or list(_WEIGHTS)
        _fetch(storage, found, temporary)
        _fetch(storage, weights, temporary, first=not there)
        return temporary
    if _is_file(name) and _fetch(directory, [name], temporary):
        _fetch(directory, _CONFIGS if name in _WEIGHTS else (), temporary)
        return temporary / name
    prefix = name.removesuffix(".index").removesuffix(".meta").partition(".data-")[0]
    if not web and _fetch(directory, [f"{prefix}.index"], temporary):
        _fetch(directory, [n for n in directory.names() if n.startswith(f"{prefix}.data-")], temporary)
        return temporary / prefix
    raise CheckpointError(f"{url}: there is no such file or directory")


def _check_no_run(names: Iterable[str], url: str) -> None:
    if "run.yaml" in names:
        raise CheckpointError(f"{url}: is a run; `python -m pipeline.checkpoint export` writes its model in other formats")


def _is_file(name: str) -> bool:
    return name.endswith((".safetensors", ".npz", ".json", *_PICKLES))


def _is_weights(name: str) -> bool:
    return name.endswith((".safetensors", ".npz", ".index", *_PICKLES)) or ".data-" in name


def _fetch(directory: Storage, names: Iterable[str], into: Path, *, first: bool = False) -> list[str]:
    """Stream to disk those of `names` that there are, or only the `first`, and the parts that an index lists; gives their names."""
    fetched = []
    for name in names:
        try:
            directory.get(name, into / name)
        except FileNotFoundError:
            (into / name).unlink(missing_ok=True)
            continue
        fetched.append(name)
        if name.endswith(".index.json"):
            _fetch(directory, _parts(_json(into / name, directory.url)), into)
        if first:
            break
    return fetched


def _parts(index: Mapping[str, Any]) -> list[str]:
    """The files of a checkpoint in several parts, which lie beside its index."""
    parts = index.get("weight_map")
    return sorted({Path(str(part)).name for part in parts.values()}) if isinstance(parts, dict) else []


def _read_directory(path: Path, url: str, weights: str | None = None) -> Source:
    """`weights` is the name of the file that was asked for, if one was."""
    config, open_clip, preprocessor = (_json(path / name, url) if (path / name).is_file() else None for name in _CONFIGS)
    names = {p.name for p in path.iterdir()}
    weights = weights or next((name for name in _WEIGHTS if name in names), None)
    if weights is None:
        loose = sorted(name for name in names if _is_weights(name) and ".data-" not in name)
        if len(loose) != 1:
            what = f"holds {len(loose)} files of weights, name one" if loose else f"holds no checkpoint; known are {KNOWN}"
            raise CheckpointError(f"{url}: {what}")
        source = _read_file(path / loose[0].removesuffix(".index"), url)
    elif weights.endswith(".index.json"):
        read = []
        for part in _parts(_json(path / weights, url)):
            if part not in names:
                raise CheckpointError(f"{url}: {weights} names {part}, which is not there")
            read.append(_read_file(path / part, url))
        if not read:
            raise CheckpointError(f"{url}: {weights} names no files")
        source = Source(url, read[0].kind, {name: t for part in read for name, t in part.tensors.items()})
    else:
        source = _read_file(path / weights, url)
    if weights is not None and weights.startswith("open_clip"):
        config = None
    return replace(source, config=config, open_clip=None if config else open_clip, preprocessor=preprocessor or {})


def _read_file(path: Path, url: str) -> Source:
    if Path(f"{path}.index").exists():
        return Source(url, "tensorflow", read_bundle(path, url))
    try:
        if path.suffix == ".safetensors":
            return Source(url, "safetensors", load_file(path))
        if path.suffix == ".npz":
            return Source(url, "npz", _read_npz(path, url))
    except (SafetensorError, ValueError, OSError, EOFError, zipfile.BadZipFile) as e:
        raise CheckpointError(f"{url}: {path.name} is damaged, or no {path.suffix} file ({e})") from e
    if is_torchscript(path):
        return Source(url, "torchscript", read_torchscript(path, url))
    tensors, wrapper = _unwrap(_unpickle(path, url), url)
    return Source(url, "pickle", tensors, wrapper=wrapper)


def _read_npz(path: Path, url: str) -> Tensors:
    tensors = {}
    with np.load(path, allow_pickle=False) as arrays:
        for name in arrays.files:
            array = arrays[name]
            if array.dtype.kind == "V" and array.dtype.itemsize == 2:  # big_vision saves bfloat16 as two bytes without a type
                tensors[name] = torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
            elif array.dtype.kind in "fiub":
                tensors[name] = torch.from_numpy(array)
            else:
                raise ValueError(f"{name} holds no numbers, but {array.dtype}")
    return tensors


def _unpickle(path: Path, url: str) -> Any:
    mapped = {"mmap": True} if zipfile.is_zipfile(path) else {}  # torch before 1.6 wrote no zip files
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):
            return torch.load(path, map_location="cpu", weights_only=True, **mapped)
    except pickle.UnpicklingError as e:
        refused = next(
            (line.strip() for line in str(e).splitlines() if "GLOBAL" in line or "Unsupported" in line), "it is no pickle of tensors"
        )
        raise CheckpointError(f"{url}: is not read, for it may run code: only tensors are taken from a pickle ({refused})") from e
    except (RuntimeError, EOFError, ValueError, KeyError, AttributeError, IndexError, TypeError) as e:
        raise CheckpointError(
            f"{url}: is damaged, or none of the known formats: {KNOWN} ({str(e).splitlines()[0] if str(e) else 'empty'})"
        ) from e


def _unwrap(found: Any, url: str) -> tuple[Tensors, str]:
    """The tensors in what a training script saved, and the key they lay under."""
    wrapper = ""
    while isinstance(found, Mapping) and not any(isinstance(value, torch.Tensor) and value.ndim for value in found.values()):
        inner = next((key for key in _INSIDE if isinstance(found.get(key), Mapping)), None)
        if inner is None:
            break
        wrapper, found = wrapper or inner, found[inner]
    tensors = {str(k): v for k, v in found.items() if isinstance(v, torch.Tensor)} if isinstance(found, Mapping) else {}
    if not tensors:
        raise CheckpointError(f"{url}: holds no state dict of tensors; known formats are {KNOWN}")
    for prefix in ("module.", "_orig_mod."):  # of DistributedDataParallel and torch.compile
        if all(name.startswith(prefix) for name in tensors):
            tensors = strip_prefix(tensors, prefix)
    return tensors, wrapper


def _json(path: Path, url: str) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text("utf-8"))
    except (ValueError, OSError) as e:
        raise CheckpointError(f"{url}: {path.name} is no JSON ({e})") from e
    if not isinstance(found, dict):
        raise CheckpointError(f"{url}: {path.name} is no JSON object")
    return found
