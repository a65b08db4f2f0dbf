"""Builds csrc, without torch: one wheel serves every torch. A missing or failing compiler costs the kernels, not the
installation; `efftune info` then says what is missing."""

import os
import shutil
import subprocess
import sys
import sysconfig
from multiprocessing.pool import ThreadPool
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent
SOURCES = sorted(str(p.relative_to(ROOT)) for p in (ROOT / "csrc").glob("*.cpp"))
DEPENDS = ["setup.py", *sorted(str(p.relative_to(ROOT)) for p in (ROOT / "csrc").glob("*.h"))]
CUDA_SOURCES = ["csrc/module.cpp", *sorted(str(p.relative_to(ROOT)) for p in (ROOT / "csrc").glob("*.cu"))]


def newer(target: str | Path, sources: list[str]) -> bool:
    """Whether the target is there, and newer than its sources, all headers and this file."""
    if not os.path.exists(target):
        return False
    return os.path.getmtime(target) > max(os.path.getmtime(ROOT / p) for p in (*sources, *DEPENDS))


def cpu_extension() -> Extension:
    # No contraction: see philox.h. -fno-math-errno and -fno-trapping-math let square roots and conversions vectorise,
    # with the same results; -fwrapv, which Python's own flags bring, would keep loops over `int` scalar, five times
    # slower. Loops begin a cache line, or what stands before a short one decides whether it takes 1.2 or 1.6 times as
    # long. GCC 12 warns without cause about its own intrinsics.
    flags = "-std=c++17 -fvisibility=hidden -g0 -O3 -falign-loops=64 -fopenmp -fno-wrapv -ffp-contract=off"
    flags += " -fno-math-errno -fno-trapping-math -Wall -Wno-uninitialized -Wno-maybe-uninitialized"
    flags = [*flags.split(), "-DEFFTUNE_MODULE=_cpu"]
    options = {"extra_compile_args": flags, "extra_link_args": ["-fopenmp"], "depends": DEPENDS}
    return Extension("efftune._cpu", SOURCES, language="c++", **options)


def cuda_extension() -> Extension:
    return Extension("efftune._cuda", CUDA_SOURCES)


class BuildKernels(build_ext):
    def finalize_options(self) -> None:
        super().finalize_options()
        self.parallel = True  # nvcc beside the C++ compiler

    def build_extensions(self) -> None:
        compile_all = self.compiler.compile

        def compile(sources, output_dir, **options):
            """Side by side, and only what its source or a header has changed since."""
            objects = self.compiler.object_filenames(sources, output_dir=output_dir)
            for folder in {os.path.dirname(o) for o in objects}:
                self.mkpath(folder)
            changed = [s for s, o in zip(sources, objects) if self.force or not newer(o, [s])]
            with ThreadPool() as pool:
                pool.map(lambda source: compile_all([source], output_dir=output_dir, **options), changed, chunksize=1)
            return objects

        self.compiler.compile = compile
        super().build_extensions()

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
        if newer(target, ext.sources):
            return
        target.parent.mkdir(parents=True, exist_ok=True)
        command = ["nvcc", "-shared", "-std=c++17", "-O1", "-cudart=static", "-Xcompiler=-fPIC,-fvisibility=hidden"]
        command += ["-gencode=arch=compute_80,code=sm_80", "-gencode=arch=compute_90,code=[sm_90,compute_90]"]
        command += ["-DEFFTUNE_MODULE=_cuda", f"-I{sysconfig.get_path('include')}", *ext.sources, "-o", str(target)]
        subprocess.run(command, check=True, cwd=ROOT)


extensions = [cpu_extension()] + ([cuda_extension()] if shutil.which("nvcc") else [])

setup(
    ext_modules=extensions,
    cmdclass={"build_ext": BuildKernels},
    packages=[*find_packages(include=["efftune", "efftune.*"]), "efftune.triton_kernels"],
)
