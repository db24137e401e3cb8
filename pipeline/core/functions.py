"""Functions of a user's own, which a config names: package.module.name."""

from __future__ import annotations

import hashlib
import importlib
import inspect
import sys
from collections.abc import Callable
from functools import cache
from types import ModuleType
from typing import Any

from pipeline.core.errors import ConfigError, nearest


@cache
def load_function(where: str, name: str) -> Callable[..., Any]:
    """The function (or whatever can be called) `name`, looked up once a process; `where` is the config path that names it.

    Raises:
        ConfigError: its module cannot be imported, has no such name, or it is nothing that can be called.
    """
    module_name, dot, attribute = name.rpartition(".")
    if not (dot and all(part.isidentifier() for part in name.split("."))):
        raise ConfigError(f"{where}: {name!r} does not name a function (allowed: package.module.name)")
    try:
        module = importlib.import_module(module_name)
    except Exception as e:  # a module of somebody else's may raise anything
        missing = isinstance(e, ModuleNotFoundError) and e.name is not None and f"{module_name}.".startswith(f"{e.name}.")
        why = f"there is none of this name on Python's path ({e})" if missing else f"{type(e).__name__}: {e}"
        raise ConfigError(f"{where}: the module {module_name} of {name!r} cannot be imported: {why}") from e
    try:
        function = getattr(module, attribute)
    except AttributeError:
        raise ConfigError(f"{where}: the module {module_name} has no {attribute!r}{nearest(attribute, vars(module))}") from None
    if not callable(function):
        raise ConfigError(f"{where}: {name!r} is a {type(function).__name__}, not a function")
    return function


def source_hash(where: str, name: str) -> str | None:
    """SHA-256 of the files that a function comes from, as they are now: of the module that it is named in, and of the one where it, or what
    it wraps, was written. What these import is not looked at. None where there is no such file, as of what is built into Python.

    Raises:
        ConfigError: as `load_function`.
    """
    written = getattr(inspect.unwrap(load_function(where, name)), "__module__", None)
    named, digest = name.rpartition(".")[0], hashlib.sha256()
    modules = [named] if written in (None, named) or written.partition(".")[0] in sys.stdlib_module_names else [named, written]
    for module in modules:
        if (data := _file_of(sys.modules[module])) is None:
            return None
        digest.update(data)
    return digest.hexdigest()


def _file_of(module: ModuleType) -> bytes | None:
    """Its bytes, in an archive too."""
    path, read = getattr(module, "__file__", None), getattr(getattr(module, "__loader__", None), "get_data", None)
    if path is None or read is None:
        return None
    try:
        return read(path)
    except OSError:
        return None
