"""A model as a directory in another format, at any URL."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable
from pathlib import Path

from safetensors.torch import save_file

from pipeline.core.errors import StorageError, choose
from pipeline.core.storage import Storage
from pipeline.models.formats import hf_export, open_clip_export, timm_export
from pipeline.models.formats.exported import Exported, Seen
from pipeline.models.formats.keys import listed
from pipeline.models.model import Model

TARGETS: dict[str, Callable[[Model, Seen], Exported]] = {
    "hf": hf_export.export,
    "timm": timm_export.export,
    "open_clip": open_clip_export.export,
}


def export(
    model: Model,
    url: str,
    to: str,
    *,
    endpoint: str | None = None,
    mean: tuple[float, ...] | None = None,
    std: tuple[float, ...] | None = None,
    classes: list[str] | None = None,
    force: bool = False,
) -> None:
    """Write `model` to the directory `url`, any fsspec has: weights in fp32 safetensors, then its configs.

    Args:
        to: `hf` (`transformers`' from_pretrained loads it), `timm` or `open_clip`.
        mean, std: of the images, scaled to [0, 1], as the model saw them.
        classes: their labels.
        force: write where files are; those of the same names are replaced, others stay.

    Raises:
        ConfigError: the format cannot express the model; nothing is written.
        StorageError: there are files already, or the store cannot be written.
    """
    exported = TARGETS[choose("--to", to, TARGETS)](model, Seen(mean, std, classes))
    directory = Storage(url, endpoint)
    if not force and (there := directory.names()):
        raise StorageError(f"{url}: is not empty, it holds {listed(there)}; choose another place or give --force")
    with tempfile.TemporaryDirectory(prefix="tessera-") as temporary:
        weights = Path(temporary) / exported.weights
        save_file(
            {name: t.detach().float() if t.is_floating_point() else t for name, t in exported.tensors.items()}, weights, {"format": "pt"}
        )
        directory.put(weights, exported.weights)
    for name, config in exported.configs.items():
        directory.write(name, json.dumps(config, indent=2, ensure_ascii=False).encode() + b"\n")
