"""From a YAML file and overrides to a checked `Config`, or to one sentence that says what is wrong with it."""

from __future__ import annotations

import os
import re
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
    return parse_config(_read(Path(path), seen=()), overrides)


def parse_config(values: dict[str, Any], overrides: list[str] | None = None) -> Config:
    """Check plain values, with `section.key=value` overrides applied; raises as `load_config`."""
    values = deepcopy(values)
    for override in overrides or []:
        _override(values, override)
    try:
        return Config.model_validate(_with_absolute_paths(values))
    except ValidationError as e:
        raise ConfigError("; ".join(dict.fromkeys(_explain(error) for error in e.errors()))) from None


# Where a config may name a local path; relative ones resolve against the working directory.
_PATHS = ("storage", "storage.url", "data", "shard.source.url", "pretrain.start", "pretrain.start.from")


def _with_absolute_paths(values: dict[str, Any]) -> dict[str, Any]:
    for dotted in _PATHS:
        *parents, last = dotted.split(".")
        node: Any = values
        for key in parents:
            node = node.get(key) if isinstance(node, dict) else None
        path = node.get(last) if isinstance(node, dict) else None
        if isinstance(path, str) and path and "://" not in path:
            node[last] = os.path.abspath(path)
    return values


def parse_yaml(text: str | bytes, where: str) -> Any:
    try:
        return yaml.load(text, _Loader)  # noqa: S506  the loader is a SafeLoader
    except yaml.YAMLError as e:
        mark = getattr(e, "problem_mark", None)
        line = f", line {mark.line + 1}" if mark else ""
        raise ConfigError(f"{where}{line}: this is not YAML ({getattr(e, 'problem', None) or e})") from e


def _read(path: Path, seen: tuple[Path, ...]) -> dict[str, Any]:
    path = path.resolve()
    if path in seen:
        raise ConfigError(f"{path}: extends itself, by way of {' and '.join(p.name for p in seen)}")
    try:
        text = path.read_text()
    except FileNotFoundError:
        folder = path.parent
        others = [p.name for p in folder.glob("*.yaml")] if folder.is_dir() else []
        raise ConfigError(f"config: there is no file {path}{nearest(path.name, others)}") from None
    except (OSError, UnicodeDecodeError) as e:
        raise ConfigError(f"config: cannot read {path} ({e})") from e
    values = parse_yaml(text, str(path))
    if not isinstance(values, dict):
        raise ConfigError(f"{path}: a config is a mapping of keys to values, this is {_kind(values)}")
    return _extend(values, path, seen)


def _extend(values: dict[str, Any], path: Path, seen: tuple[Path, ...]) -> dict[str, Any]:
    """Lay `values` over what their `extends` names, here and in every section below."""
    values = {k: _extend(v, path, seen) if isinstance(v, dict) else v for k, v in values.items()}
    base = values.pop("extends", None)
    if base is None:
        return values
    if not isinstance(base, str):
        raise ConfigError(f"{path}: extends names one file, this is {_kind(base)}")
    return _merge(_read(path.parent / base, (*seen, path)), values)


def _merge(under: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    merged = dict(under)
    for key, value in over.items():
        old = merged.get(key)
        if isinstance(value, dict) and isinstance(old, str):
            old = {"name": old}  # a plain word stands for a section with only a name
        merged[key] = _merge(old, value) if isinstance(old, dict) and isinstance(value, dict) else value
    return merged


def _override(values: dict[str, Any], text: str) -> None:
    dotted, equals, value = text.partition("=")
    if not equals or not dotted:
        raise ConfigError(f"override {text!r}: write section.key=value")
    node = values
    *parents, last = dotted.split(".")
    for depth, key in enumerate(parents):
        child = node.get(key)
        if isinstance(child, str):
            child = {"name": child}
        elif child is not None and not isinstance(child, dict):
            raise ConfigError(f"override {text!r}: {'.'.join(parents[: depth + 1])} is {_kind(child)}, not a section")
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
