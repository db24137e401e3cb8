"""Which format a checkpoint is in, and reading it."""

from __future__ import annotations

from typing import Any

from pipeline.core.errors import CheckpointError
from pipeline.models.formats import google, hf, open_clip, openai_igpt, timm
from pipeline.models.formats.files import KNOWN, Source, open_source
from pipeline.models.formats.imported import NOTE, Imported, Plan, finish
from pipeline.models.model import Model


def read(url: str, *, endpoint: str | None = None, **options: Any) -> Imported:
    """The checkpoint at `url`, in any format that we know: a directory, a file or the prefix of a TensorFlow checkpoint; a path, or any
    URL that fsspec reads (`endpoint` is that of object stores). No pickle and no code in it is executed.

    Args:
        options: of the family, for what the file does not say (heads of an unusual width, a CLIP's activation) or says otherwise.

    Raises:
        CheckpointError: not there, damaged, of no known format, or its tensors do not fit the model that it describes. The sentence
            begins with `url`, names what is missing or unknown, and compares shapes.
        ConfigError: one of `options` is none of the family's.
        StorageError, CredentialsError: the store cannot be read.
    """
    with open_source(url, endpoint) as source:
        note = (source.config or source.open_clip or {}).get(NOTE)
        return finish(_plan(source, options), note, options, url)


def load(url: str, *, endpoint: str | None = None, pixels: int | None = None, classes: int | None = None, **options: Any) -> Model:
    """The model at `url`, whatever the format, in eval mode and fp32.

    Args:
        pixels: another resolution; positions are resized.
        classes: another number of classes; a head that does not fit is zero, 0 leaves it out.
        endpoint, options: as for `read`, whose errors it raises; a CLIP's `context` may be shorter than the file's.
    """
    changes = {"pixels": pixels, "classes": classes, "context": options.pop("context", None)}
    return read(url, endpoint=endpoint, **options).load(**changes)


def _plan(source: Source, given: dict[str, Any]) -> Plan:
    names = source.tensors
    if "model_type" in (source.config or {}):
        return hf.plan(source, given)
    for module in (google, openai_igpt, open_clip, timm):
        if module.recognises(names):
            return module.plan(source, given)
    if any(name.startswith(("vit.", "deit.", "vision_model.", "text_model.", "transformer.h.", "embeddings.cls_token")) for name in names):
        raise CheckpointError(f"{source.url}: has the names of a Hugging Face model, but no config.json of it lies beside it")
    raise CheckpointError(f"{source.url}: is none of the known formats ({KNOWN}); its first tensors are {', '.join(sorted(names)[:3])}")
