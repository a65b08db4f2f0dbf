"""What optional builds and packages can do here: None, or a sentence why not. Asked when needed, not at import."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import os
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


# Asked at every call, of small tensors too: loops and properties, since a generator costs as much as a small kernel,
# `device.type` ten times `is_cpu`, and `isinstance(1.0, Tensor)`, which torch answers in Python, as much as three
# properties.


def cpp_why_not(*tensors: torch.Tensor | None, contiguous: bool = True) -> str | None:
    for t in tensors:
        if t is not None:
            if not t.is_cpu:
                return "the C++ kernels run on the CPU"
            if contiguous and not t.is_contiguous():
                return "the C++ kernels take contiguous tensors"
    if extension("_cpu") is None:
        return f"the C++ extension {_load('_cpu')[1]}; install a C++17 compiler and reinstall efftune"
    return None


def rows_adjacent(t: torch.Tensor) -> bool:
    """Whether the elements of each row are neighbours, however far apart the rows are."""
    return t.ndim > 0 and (t.is_contiguous() or t.stride(-1) == 1 or t.shape[-1] <= 1)


def adjacent(t: torch.Tensor) -> torch.Tensor:
    """t, or a copy of it that `rows_adjacent` holds for."""
    return t if rows_adjacent(t) else t.contiguous()


def cpp_float_why_not(*tensors: torch.Tensor | None, apart: bool = False) -> str | None:
    """`cpp_why_not` of kernels that compute in float32, whose tensors are contiguous or have their rows `apart`; one
    loop instead of three."""
    for t in tensors:
        if t is not None:
            if not t.is_cpu:
                return "the C++ kernels run on the CPU"
            if t.dtype == torch.float64:
                return "float64 is computed by the reference"
            if not (t.is_contiguous() or (apart and rows_adjacent(t))):
                return f"the C++ kernels take {'rows whose elements are adjacent' if apart else 'contiguous tensors'}"
    return cpp_why_not()


def cuda_why_not(*tensors: torch.Tensor) -> str | None:
    for t in tensors:
        if not t.is_cuda:
            return "the CUDA C++ kernels run on an NVIDIA GPU"
    if extension("_cuda") is None:
        return f"the CUDA extension {_load('_cuda')[1]}; put nvcc on the PATH and reinstall efftune"
    for t in tensors:
        if not t.is_contiguous():
            return "the CUDA C++ kernels take contiguous tensors"
    return None


@functools.cache
def interpreted() -> bool:
    """True if Triton kernels are interpreted on the CPU. Triton reads the variable when a kernel is decorated."""
    return os.environ.get("TRITON_INTERPRET") == "1"


@functools.cache
def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


def triton_why_not(*tensors: torch.Tensor | None) -> str | None:
    if not _has_triton():
        return "triton is not installed"
    if (reason := versions.why_not("triton")) is not None:
        return reason
    for t in tensors:
        if t is not None and t.is_cpu and not interpreted():
            return (
                "Triton kernels run on a GPU; set TRITON_INTERPRET=1 before the first import to interpret them on the "
                "CPU"
            )
    return None


@functools.cache
def dtype_name(dtype: torch.dtype) -> str:
    """As compiled kernels are told it: "float32"."""
    return str(dtype).removeprefix("torch.")
