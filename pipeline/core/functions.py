"""Functions of a user's own, which a config names: package.module.name."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from functools import cache
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
