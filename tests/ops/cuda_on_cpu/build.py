"""csrc/*.cu as C++: compiled against the headers beside this file, loaded in place of efftune._cuda, and run on CPU
tensors through the operators' own CUDA backends. Needs a C++ compiler, and neither a GPU nor CUDA."""

from __future__ import annotations

import fcntl
import functools
import hashlib
import importlib.util
import os
import shlex
import shutil
import subprocess
import sysconfig
from contextlib import ExitStack, contextmanager, nullcontext
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import pytest
import torch

from efftune.ops import _available

CSRC = Path(__file__).parents[3] / "csrc"
HEADERS = Path(__file__).parent / "include"
BUILT = Path(__file__).parents[3] / "build" / "tests"
NAMES = sorted(p.stem for p in CSRC.glob("*.cu"))


def once(name: str, command: list[str]) -> Path:
    """The file that `command` makes of csrc and of what lies beside it here, with the options -o and its name behind.
    It is kept in build/tests, so that of the processes of the tests one makes it and the others wait for it."""
    sources = [*CSRC.glob("*.*"), *Path(__file__).parents[1].rglob("*.h"), *Path(__file__).parents[1].rglob("*.cpp")]
    digest = hashlib.sha256(repr((command, torch.__version__)).encode())
    for source in sorted(sources):
        digest.update(source.read_bytes())
    stem, _, suffix = name.partition(".")
    target = BUILT / f"{stem}-{digest.hexdigest()[:16]}.{suffix}"
    BUILT.mkdir(parents=True, exist_ok=True)
    with (BUILT / f"{name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not target.exists():
            for old in BUILT.glob(f"{stem}-*.{suffix}"):
                old.unlink()
            beside = target.with_suffix(".new")
            subprocess.run([*command, "-o", str(beside)], check=True)
            beside.rename(target)
    return target


@functools.cache
def compiler() -> list[str]:
    """The C++ compiler, found as setup.py finds it; skips the test where there is none."""
    command = shlex.split(os.environ.get("CXX") or sysconfig.get_config_var("CXX") or "c++")
    if shutil.which(command[0]) is None:
        pytest.skip(f"there is no C++ compiler {command[0]!r} to compile csrc/*.cu with")
    if not Path(sysconfig.get_path("include"), "Python.h").exists():
        pytest.skip("Python.h is missing, without which no module is compiled")
    return [*command, "-std=c++17", "-fPIC", "-fvisibility=hidden"]


def of_kernels(source: Path) -> list[str]:
    """No contraction, as in the CPU build: what differs is then the fused product that the kernel asks for by name."""
    flags = ["-O1", "-ffp-contract=off", "-Wall", "-Werror", "-Wno-unknown-pragmas", f"-I{HEADERS}", f"-I{CSRC}"]
    return [*compiler(), *flags, "-x", "c++", "-c", str(source)]


def compile_kernels(source: Path, target: Path) -> Path:
    subprocess.run([*of_kernels(source), "-o", str(target)], check=True)
    return target


@functools.cache
def _object(name: str) -> Path:
    of_module = [*compiler(), "-DEFFTUNE_MODULE=_cuda", f"-I{sysconfig.get_path('include')}", "-c"]
    of_module += [str(CSRC / "module.cpp")]
    return once(f"{name}.o", of_module if name == "module" else of_kernels(CSRC / f"{name}.cu"))


def _linked(**other: Path) -> list[str]:
    objects = [other.get(name) or _object(name) for name in [*NAMES, "module"]]
    return [*compiler(), "-shared", *map(str, objects)]


def link(folder: Path, **other: Path):
    """The module, with other objects in place of some of its own."""
    target = folder / f"_cuda{sysconfig.get_config_var('EXT_SUFFIX')}"
    subprocess.run([*_linked(**other), "-o", str(target)], check=True)
    return _loaded(target)


def _loaded(target: Path):
    # A name of its own, beside the module that setup.py builds.
    spec = importlib.util.spec_from_file_location(f"{target.parent.name}._cuda", target)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@functools.cache
def kernels():
    """The module as csrc has it, loaded once a process."""
    return _loaded(once(f"_cuda{sysconfig.get_config_var('EXT_SUFFIX')}", _linked()))


@contextmanager
def cuda_on_cpu(module=None):
    """Within the block the backend "cuda" takes CPU tensors."""
    module, load = module or kernels(), _available._load
    with ExitStack() as stack:
        put = lambda *args: stack.enter_context(mock.patch.object(*args))  # noqa: E731
        put(_available, "_load", lambda name: (module, "") if name == "_cuda" else load(name))
        elsewhere = _available.elsewhere
        put(_available, "elsewhere", lambda kind, t: None if kind == "cuda" else elsewhere(kind, t))
        put(torch.cuda, "device", lambda device: nullcontext())
        put(torch.cuda, "current_stream", lambda: SimpleNamespace(cuda_stream=0))
        yield
