"""csrc/*.cu as C++: compiled against the headers beside this file, loaded in place of efftune._cuda, and run on CPU
tensors through the operators' own CUDA backends. Needs a C++ compiler, and neither a GPU nor CUDA."""

from __future__ import annotations

import atexit
import functools
import importlib.util
import os
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from contextlib import ExitStack, contextmanager, nullcontext
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import pytest
import torch

from efftune.ops import _available

CSRC = Path(__file__).parents[3] / "csrc"
HEADERS = Path(__file__).parent / "include"
NAMES = sorted(p.stem for p in CSRC.glob("*.cu"))


@functools.cache
def _folder() -> Path:
    folder = tempfile.mkdtemp(prefix="efftune-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return Path(folder)


@functools.cache
def compiler() -> list[str]:
    """The C++ compiler, found as setup.py finds it; skips the test where there is none."""
    command = shlex.split(os.environ.get("CXX") or sysconfig.get_config_var("CXX") or "c++")
    if shutil.which(command[0]) is None:
        pytest.skip(f"there is no C++ compiler {command[0]!r} to compile csrc/*.cu with")
    if not Path(sysconfig.get_path("include"), "Python.h").exists():
        pytest.skip("Python.h is missing, without which no module is compiled")
    return [*command, "-std=c++17", "-fPIC", "-fvisibility=hidden"]


def compile_kernels(source: Path, target: Path) -> Path:
    """No contraction, as in the CPU build: what differs is then the fused product that the kernel asks for by name."""
    flags = ["-O1", "-ffp-contract=off", "-Wall", "-Werror", "-Wno-unknown-pragmas", f"-I{HEADERS}", f"-I{CSRC}"]
    subprocess.run([*compiler(), *flags, "-x", "c++", "-c", str(source), "-o", str(target)], check=True)
    return target


@functools.cache
def _object(name: str) -> Path:
    target = _folder() / f"{name}.o"
    if name != "cuda_module":
        return compile_kernels(CSRC / f"{name}.cu", target)
    # torch brings pybind11's headers
    include = [f"-I{Path(torch.__file__).parent / 'include'}", f"-I{sysconfig.get_path('include')}"]
    subprocess.run([*compiler(), *include, "-c", str(CSRC / "cuda_module.cpp"), "-o", str(target)], check=True)
    return target


def link(folder: Path, **other: Path):
    """The module, with other objects in place of some of its own."""
    target = folder / f"_cuda{sysconfig.get_config_var('EXT_SUFFIX')}"
    objects = [other.get(name) or _object(name) for name in [*NAMES, "cuda_module"]]
    subprocess.run([*compiler(), "-shared", *map(str, objects), "-o", str(target)], check=True)
    # A name of its own: pybind11 gives a module of a known name back, from whatever file.
    spec = importlib.util.spec_from_file_location(f"{folder.name}._cuda", target)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@functools.cache
def kernels():
    """The module as csrc has it, compiled once a process."""
    return link(_folder())


def _why_not(*tensors: torch.Tensor) -> str | None:
    return None if all(t.is_contiguous() for t in tensors) else "the CUDA C++ kernels take contiguous tensors"


@contextmanager
def cuda_on_cpu(module=None):
    """Within the block the backend "cuda" takes CPU tensors."""
    module, load = module or kernels(), _available._load
    with ExitStack() as stack:
        put = lambda *args: stack.enter_context(mock.patch.object(*args))  # noqa: E731
        put(_available, "_load", lambda name: (module, "") if name == "_cuda" else load(name))
        for name, other in list(sys.modules.items()):
            if name.startswith("efftune.ops.") and hasattr(other, "cuda_why_not"):
                put(other, "cuda_why_not", _why_not)
        put(torch.cuda, "device", lambda device: nullcontext())
        put(torch.cuda, "current_stream", lambda: SimpleNamespace(cuda_stream=0))
        yield
