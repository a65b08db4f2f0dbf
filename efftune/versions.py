"""Which versions of other libraries are supported, asked at first use and not at import."""

from __future__ import annotations

import functools
import importlib.metadata
import re
import sys

from efftune.errors import EfftuneError

# From the first to the last of these releases; docs/versions.md says what is tested.
SUPPORTED = {"torch": ("2.11", "3"), "triton": ("3.6", "4"), "transformers": ("5.17", "6")}


@functools.cache
def why_not(package: str) -> str | None:
    """Why the installed version of `package` cannot be used, as a sentence, or None. What is not installed, or does not
    say its version, has no objection."""
    try:
        found = importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
    low, high = SUPPORTED[package]
    if _numbers(low) <= _numbers(found) < _numbers(high):
        return None
    return (
        f"efftune needs {package} from {low} on and before {high}, and {found} is installed: "
        f"pip install '{package}>={low},<{high}'"
    )


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", version.partition("+")[0])[:2])


def require(*packages: str) -> None:
    """Raises: EfftuneError for the first of the packages whose installed version is not supported."""
    for package in packages:
        if (reason := why_not(package)) is not None:
            raise EfftuneError(f"{reason}.")


def require_for(model: object) -> None:
    """`require` for what a model comes with: torch, and transformers where the model is one of its own."""
    kinds = {kind.__module__.partition(".")[0] for kind in type(model).__mro__}
    require("torch", *({"transformers"} & kinds & sys.modules.keys()))
