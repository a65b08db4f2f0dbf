"""Every kernel compiles without a GPU: Triton's for sm_80, sm_90 and gfx942, each case for sm_90 without register
spills and for one of the others; CUDA's by nvcc, where there is one.

A module of triton_kernels that has kernels exports COMPILE_CASES: {name: {"kernel", "types", "constants"}}, types as
Triton spells them ("*bf16", "i32", "fp32"), in the order of the kernel's arguments; optionally "options" (num_warps),
"aligned", the integers that 16 divides in an aligned launch (all that are specialised, if it is not there), and
"targets", if it is for some alone.

Each is compiled in two forms, since a launch whose pointers and sizes 16 divides runs other code than one without.
"""

import ast
import json
import pkgutil
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

triton_kernels = pytest.importorskip("efftune.triton_kernels")
pytest.importorskip("triton")

ROOT = Path(__file__).parents[2]
MODULES = sorted(m.name for m in pkgutil.iter_modules(triton_kernels.__path__) if m.name != "philox")


class Compiler:
    """`tests/ops/compile_kernels.py` while it runs, started again where it has crashed."""

    def __init__(self, cache: Path):
        self.environment = {"TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(cache), "PATH": "/usr/bin:/bin"}
        self.process = None

    def __call__(self, module: str, form: str) -> dict:
        if self.process is None or self.process.poll() is not None:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "tests.ops.compile_kernels"],
                env=self.environment, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
            )  # fmt: skip
        print(module, form, file=self.process.stdin, flush=True)
        answer = self.process.stdout.readline()
        return json.loads(answer) if answer else {"error": f"the compiler ended with {self.process.wait()}"}


@pytest.fixture(scope="module")
def compiler(tmp_path_factory):
    compiler = Compiler(tmp_path_factory.mktemp("triton"))
    yield compiler
    if compiler.process is not None:
        compiler.process.communicate()


@pytest.mark.parametrize("form", ["aligned", "unaligned"])
@pytest.mark.parametrize("module", MODULES)
def test_triton_kernels_compile(module, form, compiler):
    answer = compiler(module, form)
    assert answer["error"] is None, answer["error"]
    assert answer["report"]
    print(*answer["report"], sep="\n")


def test_every_launch_fuses_multiplications_with_additions():
    """Said at each launch: the default changes with Triton's version, and results would."""
    calls = []
    for module in MODULES:
        tree = ast.parse((ROOT / "triton_kernels" / f"{module}.py").read_text())
        calls += [n for n in ast.walk(tree) if isinstance(n, ast.Call) and isinstance(n.func, ast.Subscript)]
    assert len(calls) >= len(MODULES)
    assert not [ast.unparse(n) for n in calls if "enable_fp_fusion" not in {k.arg for k in n.keywords}]


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="nvcc is not on the PATH")
@pytest.mark.parametrize("source", sorted(p.name for p in (ROOT / "csrc").glob("*.cu")))
def test_cuda_sources_compile(source, tmp_path):
    # Without the host's half, which is parsed all the same.
    command = ["nvcc", "-cubin", "-std=c++17", "-O3", "-arch=sm_90", "-Xptxas=-v", str(ROOT / "csrc" / source)]
    run = subprocess.run([*command, "-o", str(tmp_path / "kernels.cubin")], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    assert "0 bytes spill stores" in run.stderr
    assert all(" 0 bytes spill" in line for line in run.stderr.splitlines() if "spill" in line), run.stderr
