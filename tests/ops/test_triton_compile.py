"""Every kernel compiles without a GPU: Triton's for sm_80, sm_90 and gfx942, without register spills on sm_90;
CUDA's by nvcc, where there is one.

A module of triton_kernels that has kernels exports COMPILE_CASES: {name: {"kernel", "types", "constants"}}, types as
Triton spells them ("*bf16", "i32", "fp32"), in the order of the kernel's arguments; optionally "options" (num_warps),
"aligned", the integers that 16 divides in an aligned launch (all that are specialised, if it is not there), and
"constants_unaligned", where another launch has others.

Each is compiled in two forms, since a launch whose pointers and sizes 16 divides runs other code than one without.
"""

import ast
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

# In a process of its own: in this one the kernels may have been decorated for the interpreter.
COMPILE = """
import importlib, os, re, subprocess, sys, tempfile
import triton
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import get_ptxas
from triton.compiler import ASTSource

cases = importlib.import_module("efftune.triton_kernels." + sys.argv[1]).COMPILE_CASES
for name, case in cases.items():
    constants = case["constants"]
    if sys.argv[2] == "unaligned":
        constants = case.get("constants_unaligned", constants)
    types = case["types"] | dict.fromkeys(constants, "constexpr")
    integers = {p.name for p in case["kernel"].params if not p.do_not_specialize and types[p.name] in ("i32", "i64")}
    wide = {n for n, t in types.items() if t.startswith("*")}.union(case.get("aligned", integers))
    is_aligned = [n in wide and sys.argv[2] == "aligned" for n in types]
    aligned = {(i,): [["tt.divisibility", 16]] for i, yes in enumerate(is_aligned) if yes}
    source = ASTSource(case["kernel"], types, constants, aligned)
    targets = [GPUTarget("cuda", 90, 32)]
    if sys.argv[2] == "aligned":  # the other form differs in loads and stores, and one target shows it
        targets += [GPUTarget("cuda", 80, 32), GPUTarget("hip", "gfx942", 64)]
    for target in targets:
        options = {"enable_fp_fusion": True} | case.get("options", {})
        compiled = triton.compile(source, target=target, options=options)
        if target.arch != 90:
            continue
        with tempfile.TemporaryDirectory() as folder:
            ptx = os.path.join(folder, "kernel.ptx")
            with open(ptx, "w") as f:
                f.write(compiled.asm["ptx"])
            command = [get_ptxas(90).path, "-v", "--gpu-name=sm_90a", ptx, "-o", os.path.join(folder, "kernel.cubin")]
            log = subprocess.run(command, capture_output=True, text=True, check=True).stderr
        registers, spills = re.search(r"Used (\\d+) registers", log)[1], re.findall(r"(\\d+) bytes spill", log)
        print(name, "registers", registers, "shared", compiled.metadata.shared, "spills", *spills)
        assert spills and not any(map(int, spills)), f"{name} spills registers on sm_90: {log}"
"""


@pytest.mark.parametrize("form", ["aligned", "unaligned"])
@pytest.mark.parametrize("module", MODULES)
def test_triton_kernels_compile(module, form, tmp_path):
    environment = {"TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path), "PATH": "/usr/bin:/bin"}
    run = subprocess.run(
        [sys.executable, "-c", COMPILE, module, form],
        env=environment, cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    print(run.stdout)


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
    command = ["nvcc", "-c", "-std=c++17", "-O3", "-arch=sm_90", "-Xptxas=-v", str(ROOT / "csrc" / source)]
    run = subprocess.run([*command, "-o", str(tmp_path / "o.o")], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    assert "0 bytes spill stores" in run.stderr
    assert all(" 0 bytes spill" in line for line in run.stderr.splitlines() if "spill" in line), run.stderr
