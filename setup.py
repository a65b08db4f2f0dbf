"""Builds csrc, without torch: one wheel serves every torch. A missing or failing compiler costs the kernels, not the
installation; `efftune info` then says what is missing."""

import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from pybind11 import get_include
from pybind11.setup_helpers import ParallelCompile, Pybind11Extension, build_ext
from setuptools import Extension, find_packages, setup

ROOT = Path(__file__).parent
SOURCES = sorted(str(p.relative_to(ROOT)) for p in (ROOT / "csrc").glob("*.cpp") if p.name != "cuda_module.cpp")
DEPENDS = ["setup.py", *sorted(str(p.relative_to(ROOT)) for p in (ROOT / "csrc").glob("*.h"))]
CUDA_SOURCES = ["csrc/cuda_module.cpp", *sorted(str(p.relative_to(ROOT)) for p in (ROOT / "csrc").glob("*.cu"))]


def newest_source() -> float:
    return max(p.stat().st_mtime for p in (*(ROOT / "csrc").iterdir(), ROOT / "setup.py"))


def cpu_extension() -> Extension:
    # No contraction: see philox.h. -fno-math-errno and -fno-trapping-math let square roots and conversions vectorise,
    # with the same results; -fwrapv, which Python's own flags bring, would keep loops over `int` scalar, five times
    # slower. GCC 12 warns without cause about its own intrinsics.
    flags = "-O3 -fopenmp -fno-wrapv -ffp-contract=off -fno-math-errno -fno-trapping-math -Wall -Wno-uninitialized"
    flags = [*flags.split(), "-Wno-maybe-uninitialized"]
    return Pybind11Extension(
        "efftune._cpu", SOURCES, cxx_std=17, extra_compile_args=flags, extra_link_args=["-fopenmp"], depends=DEPENDS
    )


def cuda_extension() -> Extension:
    return Extension("efftune._cuda", CUDA_SOURCES)


class BuildKernels(build_ext):
    def build_extension(self, ext: Extension) -> None:
        ext.optional = True  # setuptools then does not look for a file that was not built
        try:
            if ext.name == "efftune._cuda":
                self.build_cuda(ext)
            else:
                super().build_extension(ext)
        except Exception as error:
            reason = str(error).splitlines()[0]
            print(f"warning: {ext.name} was not built, efftune runs without these kernels ({reason})", file=sys.stderr)

    def build_cuda(self, ext: Extension) -> None:
        target = Path(self.get_ext_fullpath(ext.name))
        if target.exists() and target.stat().st_mtime > newest_source():
            return
        target.parent.mkdir(parents=True, exist_ok=True)
        command = ["nvcc", "-shared", "-std=c++17", "-O1", "-cudart=static", "-Xcompiler=-fPIC,-fvisibility=hidden"]
        command += ["-gencode=arch=compute_80,code=sm_80", "-gencode=arch=compute_90,code=[sm_90,compute_90]"]
        command += [f"-I{get_include()}", f"-I{sysconfig.get_path('include')}", *ext.sources, "-o", str(target)]
        subprocess.run(command, check=True, cwd=ROOT)


def needs_recompile(obj: str, source: str) -> bool:
    return not os.path.exists(obj) or os.stat(obj).st_mtime < newest_source()


extensions = [cpu_extension()] + ([cuda_extension()] if shutil.which("nvcc") else [])

with ParallelCompile(needs_recompile=needs_recompile):
    setup(
        ext_modules=extensions,
        cmdclass={"build_ext": BuildKernels},
        packages=[*find_packages(include=["efftune", "efftune.*"]), "efftune.triton_kernels"],
    )
