"""Every kernel compiles without a GPU: Triton's for sm_80, sm_90 and gfx942, without register spills on sm_90
but for SPILLS; CUDA's by nvcc, where there is one.

A module of triton_kernels that has kernels exports COMPILE_CASES: {name: {"kernel", "types", "constants"}}, types as
Triton spells them ("*bf16", "i32", "fp32"), in the order of the kernel's arguments; optionally "options" (num_warps),
and "aligned", the integers that 16 divides in an aligned launch (all that are specialised, if it is not there).

Each is compiled in two forms, since a launch whose pointers and sizes 16 divides runs other code than one without.
"""

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

# In a process of its own: in this one the kernels may have been decorated for the interpreter.
COMPILE = """
import importlib, json, os, re, subprocess, sys, tempfile
import triton
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import get_ptxas
from triton.compiler import ASTSource

cases = importlib.import_module("efftune.triton_kernels." + sys.argv[1]).COMPILE_CASES
for name, case in cases.items():
    types = case["types"] | dict.fromkeys(case["constants"], "constexpr")
    integers = {p.name for p in case["kernel"].params if not p.do_not_specialize and types[p.name] in ("i32", "i64")}
    wide = {n for n, t in types.items() if t.startswith("*")}.union(case.get("aligned", integers))
    is_aligned = [n in wide and sys.argv[2] == "aligned" for n in types]
    aligned = {(i,): [["tt.divisibility", 16]] for i, yes in enumerate(is_aligned) if yes}
    source = ASTSource(case["kernel"], types, case["constants"], aligned)
    targets = [GPUTarget("cuda", 90, 32)]
    if sys.argv[2] == "aligned":  # the other form differs in loads and stores, and one target shows it
        targets += [GPUTarget("cuda", 80, 32), GPUTarget("hip", "gfx942", 64)]
    for target in targets:
        compiled = triton.compile(source, target=target, options=case.get("options", {"enable_fp_fusion": True}))
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
        most = json.loads(sys.argv[3]).get(name, 0)
        assert spills and max(map(int, spills)) <= most, f"{name} spills registers on sm_90: {log}"
"""

# Unaligned, the addresses and masks of single elements take registers; bytes a thread then keeps in memory, at most.
SPILLS = {
    "lowrank_linear": {f"{dtype} M 8192 R 256 transposed": 324 for dtype in ("bf16", "fp16")},
    "rms_norm": {"layer-f32-backward": 128, "layer-f32-backward-16384": 32},
}


@pytest.mark.parametrize("form", ["aligned", "unaligned"])
@pytest.mark.parametrize("module", MODULES)
def test_triton_kernels_compile(module, form, tmp_path):
    environment = {"TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path), "PATH": "/usr/bin:/bin"}
    spills = SPILLS.get(module, {}) if form == "unaligned" else {}
    run = subprocess.run(
        [sys.executable, "-c", COMPILE, module, form, json.dumps(spills)],
        env=environment, cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    print(run.stdout)


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="nvcc is not on the PATH")
@pytest.mark.parametrize("source", sorted(p.name for p in (ROOT / "csrc").glob("*.cu")))
def test_cuda_sources_compile(source, tmp_path):
    command = ["nvcc", "-c", "-std=c++17", "-O3", "-arch=sm_90", "-Xptxas=-v", str(ROOT / "csrc" / source)]
    run = subprocess.run([*command, "-o", str(tmp_path / "o.o")], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    assert "0 bytes spill stores" in run.stderr
    assert all(" 0 bytes spill" in line for line in run.stderr.splitlines() if "spill" in line), run.stderr
