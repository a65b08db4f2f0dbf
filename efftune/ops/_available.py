"""What optional builds and packages can do here: None, or a sentence why not. Asked when needed, not at import."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import os
from collections.abc import Callable
from typing import Any

import torch

from efftune import versions


@functools.cache
def _load(name: str) -> tuple[Any, str]:
    try:
        return importlib.import_module(f"efftune.{name}"), ""
    except ModuleNotFoundError:
        return None, "is not built"
    except ImportError as error:  # built elsewhere: another C library, no OpenMP runtime
        return None, f"cannot be loaded ({error})"


def extension(name: str) -> Any:
    """The compiled module `efftune.<name>` ("_cpu" or "_cuda"), or None."""
    return _load(name)[0]


@functools.cache
def kernels(name: str) -> Any:
    """The module `efftune.triton_kernels.<name>`, which imports triton; an import statement costs 0.8 µs each time."""
    return importlib.import_module(f"efftune.triton_kernels.{name}")


def rows_adjacent(t: torch.Tensor) -> bool:
    """Whether the elements of each row are neighbours, however far apart the rows are."""
    return t.ndim > 0 and (t.is_contiguous() or t.stride(-1) == 1 or t.shape[-1] <= 1)


def adjacent(t: torch.Tensor) -> torch.Tensor:
    """t, or a copy of it that `rows_adjacent` holds for."""
    return t if rows_adjacent(t) else t.contiguous()


@functools.cache
def interpreted() -> bool:
    """True if Triton kernels are interpreted on the CPU. Triton reads the variable when a kernel is decorated."""
    return os.environ.get("TRITON_INTERPRET") == "1"


@functools.cache
def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


def elsewhere(kind: str, t: torch.Tensor) -> str | None:
    """Why kernels of this kind do not run where t is, or None."""
    if kind == "cpp":
        return None if t.is_cpu else "the C++ kernels run on the CPU"
    if kind == "cuda":
        return None if t.is_cuda else "the CUDA C++ kernels run on an NVIDIA GPU"
    if t.is_cpu and not interpreted():
        return (
            "Triton kernels run on a GPU; set TRITON_INTERPRET=1 before the first import to interpret them on the CPU"
        )
    return None


def missing(kind: str) -> str | None:
    """Why there are no kernels of this kind, "cpp", "cuda" or "triton", or None."""
    if kind == "triton":
        return versions.why_not("triton") if _has_triton() else "triton is not installed"
    if kind == "cpp":
        if extension("_cpu") is None:
            return f"the C++ extension {_load('_cpu')[1]}; install a C++17 compiler and reinstall efftune"
    elif extension("_cuda") is None:
        return f"the CUDA extension {_load('_cuda')[1]}; put nvcc on the PATH and reinstall efftune"
    return None


def why_not(kind: str, *tensors: torch.Tensor) -> str | None:
    """Why kernels of this kind cannot take these tensors: they are not there, or run elsewhere. None if they can."""
    return next(filter(None, (elsewhere(kind, t) for t in tensors)), None) or missing(kind)


# What layouts kernels take.
CONTIGUOUS, ROWS, ANY = "contiguous tensors", "rows whose elements are adjacent (neighbours in memory)", ""


def objection(kind: str, tensors: tuple[int, ...], dtypes: tuple[int, ...], layout: str) -> Callable[..., str | None]:
    """The question (*args) -> None | sentence that is common to compiled kernels, which compute in float32.

    Args:
        tensors, dtypes: which arguments are tensors, lists of tensors or None; which are dtypes.   layout: of them all.
    """

    # Asked at every call, of small tensors too: a loop and properties, since a generator costs as much as a small
    # kernel and `device.type` ten times `is_cpu`.
    def question(*args) -> str | None:
        for i in tensors:
            given = args[i]
            if given is None:
                continue
            for t in given if type(given) is list else (given,):
                if not (kind == "cpp" and t.is_cpu) and (reason := elsewhere(kind, t)) is not None:
                    return reason
                if t.dtype is torch.float64:
                    return "float64 is computed by the reference"
                if not (layout is ANY or t.is_contiguous() or (layout is ROWS and rows_adjacent(t))):
                    return f"the kernels take {layout}"
        for i in dtypes:
            if args[i] is torch.float64:
                return "float64 is computed by the reference"
        return missing(kind)

    return question


@functools.cache
def dtype_name(dtype: torch.dtype) -> str:
    """As compiled kernels are told it: "float32"."""
    return str(dtype).removeprefix("torch.")
