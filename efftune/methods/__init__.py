"""Methods by family, one paper a file. The list is read from the folder, and from what other packages register."""

from __future__ import annotations

import functools
import importlib
import importlib.metadata
import pkgutil
import warnings

from efftune.methods._base import Method

GROUP = "efftune.methods"  # of entry points


@functools.cache
def available() -> dict[str, type[Method]]:
    """name -> class, of every method file below this folder, and of every entry point `name = "package.module:Class"`
    of the group "efftune.methods". One that does not load, or takes a name that there is, is left out with a warning.
    """
    found = {}
    for info in pkgutil.walk_packages(__path__, f"{__name__}."):
        if info.ispkg or info.name.rpartition(".")[2].startswith("_"):
            continue
        for value in vars(importlib.import_module(info.name)).values():
            if isinstance(value, type) and issubclass(value, Method) and value.__module__ == info.name:
                found[value.name] = value
    for entry in importlib.metadata.entry_points(group=GROUP):
        if (why := _add(found, entry)) is not None:
            warnings.warn(f"the method {entry.name!r} of {entry.value} is left out: {why}.", stacklevel=2)
    return dict(sorted(found.items()))


def _add(found: dict[str, type[Method]], entry: importlib.metadata.EntryPoint) -> str | None:
    """Adds what the entry point names; why not, or None."""
    if entry.name in found:
        return f"{found[entry.name].__module__} has the name already"
    try:
        method = entry.load()
    except Exception as error:  # whatever the package raises
        return f"it does not load ({type(error).__name__}: {error})"
    if not (isinstance(method, type) and issubclass(method, Method)) or method.name != entry.name:
        return f"it is no subclass of efftune.methods.Method with name = {entry.name!r}"
    found[entry.name] = method
    return None
