"""The tensors of a TorchScript archive, such as OpenAI's CLIP files, without running anything of it.

`torch.load(weights_only=True)` refuses these archives, and `torch.jit.load` compiles the code in them and runs what objects ask for
as they are made. Here neither happens: an archive is a zip file whose `data.pkl` says which module has which tensor, and whose
`data/<number>` hold the numbers. `pickletools` takes that pickle apart without carrying it out; the few instructions that
TorchScript writes are followed on plain tuples and dictionaries, and any other is refused.
"""

from __future__ import annotations

import pickletools
import zipfile
from pathlib import Path
from typing import Any, NamedTuple

import torch

from pipeline.core.errors import CheckpointError

_TYPES = {
    "DoubleStorage": torch.float64, "FloatStorage": torch.float32, "HalfStorage": torch.float16, "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64, "IntStorage": torch.int32, "ShortStorage": torch.int16, "CharStorage": torch.int8,
    "ByteStorage": torch.uint8, "BoolStorage": torch.bool,
}  # fmt: skip
_MODULES = "__torch__."
_MARK = object()


class _Name(NamedTuple):
    """A class or function that the pickle names; it is never looked up."""

    path: str


class _Made(NamedTuple):
    """What calling `_Name` with arguments would give; `state` is filled for modules."""

    name: _Name
    arguments: tuple[Any, ...]
    state: dict[str, Any]


class _Storage(NamedTuple):
    kind: str
    key: str


def is_torchscript(path: Path) -> bool:
    if not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as archive:
        return any(name.endswith("/constants.pkl") for name in archive.namelist())


def read_torchscript(path: Path, url: str) -> dict[str, torch.Tensor]:
    """Parameters and buffers by name, as `state_dict` of the module would give them; integers among the attributes are left out.

    Raises:
        CheckpointError: the archive holds something else than modules and tensors, or is damaged.
    """
    with zipfile.ZipFile(path) as archive:
        described = next((name for name in archive.namelist() if name.endswith("/data.pkl")), "data.pkl")
        folder = described.removesuffix("data.pkl") + "data/"
        try:
            root = _follow(archive.read(described))
            if not (isinstance(root, _Made) and isinstance(root.name, _Name) and root.name.path.startswith(_MODULES)):
                raise ValueError("it describes no module")
            found: dict[str, torch.Tensor] = {}
            _collect(root, "", found, archive, folder)
        except (ValueError, LookupError, TypeError, AttributeError, RuntimeError, OverflowError, zipfile.BadZipFile) as e:
            raise CheckpointError(f"{url}: this TorchScript archive is damaged, or holds more than modules and tensors ({e})") from e
    return found


def _follow(pickle: bytes) -> Any:
    """What the pickle describes, in our own tuples. Raises ValueError at an instruction that no TorchScript archive needs."""
    stack: list[Any] = []
    memory: dict[int, Any] = {}

    def pop_to_mark() -> list[Any]:
        place = len(stack) - 1 - stack[::-1].index(_MARK)
        items = stack[place + 1 :]
        del stack[place:]
        return items

    for code, argument, _ in pickletools.genops(pickle):
        match code.name:
            case "PROTO":
                pass
            case "MARK":
                stack.append(_MARK)
            case "GLOBAL":
                stack.append(_Name(str(argument).replace(" ", ".")))
            case "BINUNICODE" | "SHORT_BINUNICODE" | "BININT" | "BININT1" | "BININT2" | "LONG1" | "BINFLOAT":
                stack.append(argument)
            case "NONE" | "NEWTRUE" | "NEWFALSE":
                stack.append({"NONE": None, "NEWTRUE": True, "NEWFALSE": False}[code.name])
            case "EMPTY_TUPLE" | "EMPTY_LIST" | "EMPTY_DICT":
                stack.append({"EMPTY_TUPLE": (), "EMPTY_LIST": [], "EMPTY_DICT": {}}[code.name])
            case "TUPLE":
                stack.append(tuple(pop_to_mark()))
            case "TUPLE1" | "TUPLE2" | "TUPLE3":
                size = int(code.name[-1])
                stack[-size:] = [tuple(stack[-size:])]
            case "APPEND":
                item = stack.pop()
                stack[-1].append(item)
            case "APPENDS":
                items = pop_to_mark()
                stack[-1].extend(items)
            case "SETITEM":
                value, key = stack.pop(), stack.pop()
                stack[-1][key] = value
            case "SETITEMS":
                items = pop_to_mark()
                stack[-1].update(zip(items[::2], items[1::2], strict=True))
            case "BINPERSID":
                kind, storage, key = stack.pop()[:3]
                if kind != "storage":
                    raise ValueError(f"an object outside the archive, {kind!r}")
                stack.append(_Storage(storage.path.rpartition(".")[2], key))
            case "REDUCE" | "NEWOBJ":
                arguments = stack.pop()
                stack.append(_Made(stack.pop(), arguments, {}))
            case "BUILD":
                state = stack.pop()
                stack[-1].state.update(state)
            case "BINPUT" | "LONG_BINPUT":
                memory[int(argument or 0)] = stack[-1]
            case "BINGET" | "LONG_BINGET":
                stack.append(memory[int(argument or 0)])
            case "STOP":
                return stack.pop()
            case other:
                raise ValueError(f"the pickle instruction {other}")
    raise ValueError("it ends early")


def _collect(value: Any, name: str, found: dict[str, torch.Tensor], archive: zipfile.ZipFile, folder: str) -> None:
    match value:
        case _Made(_Name("torch._utils._rebuild_tensor_v2"), (_Storage() as storage, offset, size, stride, *_)):
            numbers = torch.frombuffer(bytearray(archive.read(folder + storage.key)), dtype=_TYPES[storage.kind])
            found[name] = numbers.as_strided(size, stride, offset)
        case _Made(_Name(path), _, state) if path.startswith(_MODULES):
            for attribute, inner in state.items():
                _collect(inner, f"{name}.{attribute}" if name else attribute, found, archive, folder)
        case _Made(_Name(path)) if not path.startswith(("torch.jit._pickle.", "collections.OrderedDict")):  # lists, hooks
            raise ValueError(f"a call of {path}")
