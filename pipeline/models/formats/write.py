"""A model as a directory in another format, at any URL."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path

from pipeline.core.errors import ConfigError, CredentialsError, StorageError, choose
from pipeline.core.files import in_tmpdir
from pipeline.core.progress import say
from pipeline.core.retry import insist
from pipeline.core.storage import Storage
from pipeline.models.formats import hf_export, open_clip_export, timm_export
from pipeline.models.formats.exported import Exported, Seen
from pipeline.models.formats.keys import listed
from pipeline.models.formats.lazy import State, state_of
from pipeline.models.formats.weights import is_of, split, write_file
from pipeline.models.model import Model

TARGETS: dict[str, Callable[[Model, State, Seen], Exported]] = {
    "hf": hf_export.export,
    "timm": timm_export.export,
    "open_clip": open_clip_export.export,
}
MOST = 5 * 10**9  # bytes of a file
_PATIENCE = 60.0  # seconds that an upload is tried again


def export(
    model: Model,
    url: str,
    to: str,
    *,
    state: State | None = None,
    endpoint: str | None = None,
    mean: tuple[float, ...] | None = None,
    std: tuple[float, ...] | None = None,
    classes: list[str] | None = None,
    force: bool = False,
    most: int | None = None,
    told: Callable[[int], None] = lambda count: None,
) -> None:
    """Write `model` to the directory `url`, any fsspec has: weights in fp32 safetensors, then its configs. What is half written has none
    and loads nowhere; where writing fails, what was written is removed.

    Memory holds a few tensors at a time, TMPDIR a file.

    Args:
        to: `hf` (`transformers`' from_pretrained loads it), `timm` or `open_clip`.
        state: where the weights come from; of the model itself, unless it is on the meta device.
        mean, std: of the images, scaled to [0, 1], as the model saw them.
        classes: their labels.
        force: write where files are; those of the same names and an older export's weights are replaced, others stay.
        most: bytes of one file, by default 5 GB; in `hf`, whose readers know that, a larger model has several and an index.
        told: is given numbers of bytes as they are written.

    Raises:
        ConfigError: the format cannot express the model; nothing is written.
        StorageError: there are files already, or the store, or TMPDIR, cannot be written.
    """
    state = state or state_of(model)
    exported = TARGETS[choose("--to", to, TARGETS)](model, state, Seen(mean, std, classes))
    if most is not None and not exported.has_parts:
        raise ConfigError(f"--max-file: {to} reads its weights from one file (allowed for: hf)")
    directory = Storage(url, endpoint)
    if not force and (there := directory.names()):
        raise StorageError(f"{url}: is not empty, it holds {listed(there)}; choose another place or give --force")
    directory.check_writable()
    files = split(exported.weights, exported.tensors, (most or MOST) if exported.has_parts else None)
    index = f"{exported.weights}.index.json"
    written: list[str] = []
    try:
        with in_tmpdir("temporary directory"):
            folder = tempfile.TemporaryDirectory(prefix="tessera-")
        with folder as temporary:
            for name, names in files.items():
                path = Path(temporary) / name
                write_file(path, {n: exported.tensors[n] for n in names}, state.read, told)
                if not written:  # an older export ends here, its configs first
                    stale = [n for n in directory.names() if is_of(n, exported.weights)]
                    _remove(directory, [*exported.configs, index, *stale])
                written.append(name)
                _put(directory, path, name)
                path.unlink()
        written += [index, *exported.configs]
        if len(files) > 1:
            total = sum(tensor.bytes for tensor in exported.tensors.values())
            places = {tensor: name for name, names in files.items() for tensor in names}
            _write_json(directory, index, {"metadata": {"total_size": total}, "weight_map": places})
        for name, config in exported.configs.items():
            _write_json(directory, name, config)
    except BaseException:
        with suppress(StorageError, CredentialsError):  # a store that takes nothing gives nothing up either; the first error tells why
            _remove(directory, reversed(written))
        raise


def _put(directory: Storage, path: Path, name: str) -> None:
    """Publish a file that took long to make; a store that stutters is asked again."""
    insist(lambda: directory.put(path, name), 0.0 if directory.is_local else _PATIENCE, lambda text: say(f"warning: {text}"))


def _write_json(directory: Storage, name: str, values: object) -> None:
    directory.write(name, json.dumps(values, indent=2, ensure_ascii=False).encode() + b"\n")


def _remove(directory: Storage, names: Iterable[str]) -> None:
    for name in names:
        directory.remove(name)
