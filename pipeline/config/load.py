"""From a YAML file and overrides to a checked `Config`, or to one sentence that says what is wrong with it."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

from pipeline.config.schema import Config
from pipeline.core.errors import ConfigError, nearest


class _Loader(yaml.SafeLoader):
    """YAML with two repairs: `5e-4` is a number, and a key given twice is refused."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [self.construct_object(key) for key, _ in node.value]
        for key in keys:
            if keys.count(key) > 1:
                raise yaml.YAMLError(f"the key {key!r} is given twice, the second time near line {node.end_mark.line + 1}")
        return super().construct_mapping(node, deep)


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(?:[0-9]+\.?[0-9]*|\.[0-9]+)[eE][-+]?[0-9]+$"),
    list("-+0123456789."),
)


def load_config(path: str | Path, overrides: list[str] | None = None) -> Config:
    """Read `path`, follow its `extends`, apply `section.key=value` overrides, and check the result.

    Raises:
        ConfigError: naming the config path at fault, what was given and what is allowed.
    """
    return parse_config(_read(Path(path), "", seen=()), overrides)


def parse_config(values: dict[str, Any], overrides: list[str] | None = None) -> Config:
    """Check plain values, with `section.key=value` overrides applied; raises as `load_config`."""
    values = deepcopy(values)
    for override in overrides or []:
        apply_override(values, override)
    _refuse_passwords(values)
    _make_paths_absolute(values)
    try:
        return Config.model_validate(values)
    except ValidationError as e:
        raise ConfigError("; ".join(dict.fromkeys(_explain(error) for error in e.errors()))) from None


# Where a config may name a local path; relative ones resolve against the working directory.
_PATHS = (
    "storage",
    "storage.url",
    "data",
    "data.url",
    "data.deny",
    "shard.source.url",
    "pretrain.start",
    "pretrain.start.from",
    "pretrain.text",
    "pretrain.text.tokenizer",
    "pretrain.palette",
    "pretrain.palette.url",
    "pretrain.objective.teacher",
    "pretrain.loader.cache",
    "pretrain.loader.cache.path",
    "pretrain.validate.knn",
    "pretrain.validate.knn.data",
    "pretrain.validate.zero_shot",
    "pretrain.validate.zero_shot.data",
    "evaluate.model",
    "evaluate.palette",
    "evaluate.tokenizer",
    "evaluate.suites.data",
)
_WORDS = ("own", "three-bit")  # no paths: a suite's data, a palette
_URLS = (*_PATHS, "storage.endpoint", "shard.source.endpoint", "tracking.uri", "cluster.address")

# What a plain word stands for, where it is not the name.
_PLAIN_KEYS = {
    "storage": "url",
    "data": "url",
    "pretrain.start": "from",
    "pretrain.text": "tokenizer",
    "pretrain.palette": "url",
    "pretrain.loader.cache": "path",
    "pretrain.validate.knn": "data",
    "pretrain.validate.zero_shot": "data",
}


def _make_paths_absolute(values: dict[str, Any]) -> None:
    for dotted in _PATHS:
        for section, key in _texts(values, dotted):
            path = section[key]
            if path and "://" not in path and not (path in _WORDS and dotted.endswith((".data", ".palette", ".palette.url"))):
                section[key] = os.path.abspath(os.path.expanduser(path))


def _refuse_passwords(values: dict[str, Any]) -> None:
    """Configs are kept with the run, tracked and shown."""
    for dotted in _URLS:
        if any(re.search(r"://[^/]*:[^/]*@", section[key]) for section, key in _texts(values, dotted)):
            raise ConfigError(
                f"{dotted}: holds a password; give it in the environment (for MLflow MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD)"
            )


def _texts(values: Any, dotted: str) -> Iterator[tuple[Any, Any]]:
    """Each section or list that holds a text at the end of `dotted`, and its key there; a list on the way stands for all its items."""
    key, _, rest = dotted.partition(".")
    for node in values if isinstance(values, list) else [values]:
        below = node.get(key) if isinstance(node, dict) else None
        if rest:
            yield from _texts(below, rest)
        elif isinstance(below, str):
            yield node, key
        elif isinstance(below, list):
            yield from ((below, i) for i, item in enumerate(below) if isinstance(item, str))


def parse_yaml(text: str | bytes, where: str) -> Any:
    try:
        return yaml.load(text, _Loader)  # noqa: S506  the loader is a SafeLoader
    except yaml.YAMLError as e:
        mark = getattr(e, "problem_mark", None)
        line = f", line {mark.line + 1}" if mark else ""
        raise ConfigError(f"{where}{line}: this is not YAML ({getattr(e, 'problem', None) or e})") from e


def _read(path: Path, where: str, seen: tuple[Path, ...]) -> dict[str, Any]:
    """The values of one file, which stand at the config path `where`."""
    path = path.expanduser().resolve()
    if path in seen:
        raise ConfigError(f"{path}: extends itself, by way of {' and '.join(p.name for p in seen)}")
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        folder = path.parent
        others = [p.name for p in folder.glob("*.yaml")] if folder.is_dir() else []
        raise ConfigError(f"config: there is no file {path}{nearest(path.name, others)}") from None
    except (OSError, UnicodeDecodeError) as e:
        raise ConfigError(f"config: cannot read {path} ({e})") from e
    values = parse_yaml(text, str(path))
    if not isinstance(values, dict):
        raise ConfigError(f"{path}: a config is a mapping of keys to values, this is {_kind(values)}")
    return _extend(values, path, where, seen)


def _extend(values: dict[str, Any], path: Path, where: str, seen: tuple[Path, ...]) -> dict[str, Any]:
    """Lay `values` over what their `extends` names, here and in every section below."""
    values = {k: _extend(v, path, _join(where, k), seen) if isinstance(v, dict) else v for k, v in values.items()}
    base = values.pop("extends", None)
    if base is None:
        return values
    if not isinstance(base, str):
        raise ConfigError(f"{path}: extends names one file, this is {_kind(base)}")
    return _merge(_read(path.parent / os.path.expanduser(base), where, (*seen, path)), values, where)


def _merge(under: dict[str, Any], over: dict[str, Any], where: str) -> dict[str, Any]:
    merged = dict(under)
    for key, value in over.items():
        if isinstance(value, dict):
            old = _spell_out(merged.get(key), _join(where, key))
            value = _merge(old, value, _join(where, key)) if isinstance(old, dict) else value
        merged[key] = value
    return merged


def _spell_out(value: Any, where: str) -> Any:
    """The section that a plain word at the config path `where` stands for; anything else as it is."""
    return {_PLAIN_KEYS.get(where, "name"): value} if isinstance(value, str) else value


def _join(where: str, key: Any) -> str:
    return f"{where}.{key}" if where else str(key)


def split_words(words: Sequence[str]) -> tuple[list[str], list[str]]:
    """A command line's words as (configs, overrides of all of them): an override has a key before its first `=`.

    Raises:
        ConfigError: there is no config among them.
    """
    overrides = [word for word in words if re.match(r"[A-Za-z_][\w.-]*=", word)]
    configs = [word for word in words if word not in overrides]
    if not configs:
        raise ConfigError("config: is missing; name a YAML file, or the URL of a run")
    return configs, overrides


def apply_override(values: dict[str, Any], text: str) -> None:
    """Set one `section.key=value` in plain values; raises as `load_config`."""
    dotted, equals, value = text.partition("=")
    if not equals or not dotted:
        raise ConfigError(f"override {text!r}: write section.key=value")
    node = values
    *parents, last = dotted.split(".")
    for depth, key in enumerate(parents):
        where = ".".join(parents[: depth + 1])
        child = _spell_out(node.get(key), where)
        if child is not None and not isinstance(child, dict):
            raise ConfigError(f"override {text!r}: {where} is {_kind(child)}, not a section")
        node[key] = node = child or {}
    node[last] = parse_yaml(value, f"override {text!r}")


def _explain(error: Any) -> str:
    """One pydantic error as one sentence that begins with the config path."""
    location = [part for part in error["loc"] if not str(part).startswith("function-")]
    path = ".".join(str(part) for part in location) or "config"
    given = error.get("input")
    match error["type"]:
        case "extra_forbidden":
            names = _field_names(location[:-1])
            return f"{path}: no such key{nearest(str(location[-1]), names)} (allowed: {', '.join(names)})"
        case "missing":
            return f"{path}: is missing"
        case "value_error":
            # A section's own sentence names the key inside it ("batch: .."); a value's sentence follows what was given.
            reason = str(error["ctx"]["error"])
            if re.match(r"[a-z_.]+: ", reason):
                return f"{path}.{reason}".removeprefix("config.")
            return f"{path}: {reason}" if isinstance(given, dict) else f"{path}: {given!r} {reason}"
        case _:
            message = error["msg"].replace("Input should", "should")
            return f"{path}: {given!r} {message[0].lower() + message[1:]}"


def _field_names(location: list[Any]) -> list[str]:
    """The keys allowed in the section at `location`."""
    section: Any = Config
    for part in location:
        if isinstance(part, int):
            continue
        fields = {f.alias or name: f for name, f in section.model_fields.items()}
        section = _section_of(fields[part].annotation)
    return sorted(f.alias or name for name, f in section.model_fields.items())


def _section_of(annotation: Any) -> Any:
    """The section class inside an annotation such as `Shard | None` or `list[Suite]`."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    return next((s for a in getattr(annotation, "__args__", ()) if (s := _section_of(a))), None)


def _kind(value: object) -> str:
    names = {dict: "a mapping", list: "a list", str: "a text", int: "a number", float: "a number", type(None): "empty"}
    return names.get(type(value), type(value).__name__)
