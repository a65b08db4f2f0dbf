"""Methods by family, one paper a file. The list is read from the folder."""

from __future__ import annotations

import functools
import importlib
import pkgutil

from efftune.methods._base import Method


@functools.cache
def available() -> dict[str, type[Method]]:
    """name -> class, of every method file below this folder."""
    found = {}
    for info in pkgutil.walk_packages(__path__, f"{__name__}."):
        if info.ispkg or info.name.rpartition(".")[2].startswith("_"):
            continue
        for value in vars(importlib.import_module(info.name)).values():
            if isinstance(value, type) and issubclass(value, Method) and value.__module__ == info.name:
                found[value.name] = value
    return dict(sorted(found.items()))
