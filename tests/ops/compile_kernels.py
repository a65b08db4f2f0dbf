"""Compiles Triton kernels for targets that need not be there; a program, for tests/ops/test_triton_compile.py: it reads
lines "module form" and answers each with a line of JSON, {"report": what was compiled, "error": a traceback or null}.

A process of its own, since in that of the tests kernels may have been decorated for the interpreter; and one for all
modules, since it takes longer to start than most modules take to compile.
"""

import collections
import contextlib
import importlib
import io
import json
import re
import sys
import traceback

import triton
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

SM90 = GPUTarget("cuda", 90, 32)
OTHERS = {"sm_80": GPUTarget("cuda", 80, 32), "gfx942": GPUTarget("hip", "gfx942", 64)}


def compile_module(module: str, form: str) -> list[str]:
    """A line for each case, with what ptxas says for sm_90. Of the cases of one kernel every second is compiled for
    each other target, the first for both."""
    lines, seen = [], collections.Counter()
    for name, case in importlib.import_module(f"efftune.triton_kernels.{module}").COMPILE_CASES.items():
        constants = case["constants"]
        types = case["types"] | dict.fromkeys(constants, "constexpr")
        integers = {
            p.name for p in case["kernel"].params if not p.do_not_specialize and types[p.name] in ("i32", "i64")
        }
        wide = {n for n, t in types.items() if t.startswith("*")}.union(case.get("aligned", integers))
        is_aligned = [n in wide and form == "aligned" for n in types]
        aligned = {(i,): [["tt.divisibility", 16]] for i, yes in enumerate(is_aligned) if yes}
        source = ASTSource(case["kernel"], types, constants, aligned)
        options = {"enable_fp_fusion": True} | case.get("options", {})
        with contextlib.redirect_stdout(io.StringIO()) as log:
            compiled = triton.compile(source, target=SM90, options=options)
        registers = re.search(r"Used (\d+) registers", log.getvalue())
        spills = re.findall(r"(\d+) bytes spill", log.getvalue())
        assert registers and spills, f"{name}: ptxas said nothing about registers: {log.getvalue()}"
        assert not any(map(int, spills)), f"{name} spills registers on sm_90: {log.getvalue()}"
        lines.append(f"{name}: {registers[1]} registers, {compiled.metadata.shared} bytes shared")
        if form == "aligned":  # the other form differs in loads and stores, and one target shows it
            turn = seen[case["kernel"]]
            seen[case["kernel"]] += 1
            for at, (target, arch) in enumerate(OTHERS.items()):
                if target in case.get("targets", OTHERS) and (turn == 0 or turn % 2 == at):
                    triton.compile(source, target=arch, options=options)
    return lines


def main() -> None:
    knobs.nvidia.dump_ptxas_log = True
    knobs.compilation.store_binary_only = True  # what lies between is read by nobody
    answers, sys.stdout = sys.stdout, sys.stderr
    for request in sys.stdin:
        answer = {"report": [], "error": None}
        try:
            answer["report"] = compile_module(*request.split())
        except Exception:
            answer["error"] = traceback.format_exc()
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    main()
