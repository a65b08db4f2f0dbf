"""bench/gpu.sh on a machine without a GPU: all but the launches. And what the harness does with what goes wrong."""

import importlib
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import pytest
import torch

from bench import gpu_tests, harness, launches, stage, tables
from bench.harness import Job, measure, parsed, parser, run
from efftune import use_backend
from efftune.ops import _op

ROOT = Path(__file__).parents[1]
COMMIT = "0123456789012345678901234567890123456789"


@pytest.fixture
def tree(tmp_path):
    """A copy of what a borrowed machine gets: no .git, the commit in a file."""
    copy = tmp_path / "tree"
    shutil.copytree(ROOT / "bench", copy / "bench", ignore=shutil.ignore_patterns("__pycache__", "results"))
    for name in ("efftune", "tests", "triton_kernels", "pyproject.toml"):
        (copy / name).symlink_to(ROOT / name)
    (copy / "kit").mkdir()
    (copy / "kit" / "COMMIT").write_text(COMMIT + "\n")
    return copy


def gpu_sh(tree: Path, *words: str, **variables: str) -> subprocess.Popen:
    folders = {"OUT": str(tree / "out"), "RESULTS": str(tree / "results"), "PYTHON": sys.executable}
    chosen = {"TESTS": "tests/ops/test_lowrank_linear.py"} | folders | variables
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | chosen
    command = [str(tree / "bench" / "gpu.sh"), *words]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def packed(tree: Path, name: str) -> dict[str, str]:
    with tarfile.open(tree / "out" / f"gpu-{name}.tgz") as tar:
        return {m.name: tar.extractfile(m).read().decode() for m in tar.getmembers() if m.isfile()}


def test_stages_run_dry_to_their_end(tree):
    asked = "1-2-3-4"  # in one call: what they import takes longer than what they do
    process = gpu_sh(tree, *asked.split("-"), "--dry", LIMIT="3600")
    output, _ = process.communicate(timeout=900)
    assert process.returncode == 0, output
    files, steps = packed(tree, asked), [step for number in asked.split("-") for step in stage.STAGES[number]]
    for step in steps:
        assert f"{step}: exit 0" in output
    results = {name: json.loads(text) for name, text in files.items() if name.endswith("-cuda.json")}
    assert len(results) == len(steps) + ("perturb" in steps)  # which has two
    for found in results.values():
        assert found["complete"] and found["environment"]["commit"] == COMMIT
        assert all(row["skipped"] == "skipped: a dry run" for row in found["rows"])
    (row,) = results["tests-cuda.json"]["rows"]
    assert row["collected"] > 0


def test_what_is_finished_is_not_repeated(tree):
    first = gpu_sh(tree, "ceilings", "--dry").communicate(timeout=300)[0]
    path = tree / "results" / "ceilings-cuda.json"
    saved = json.loads(path.read_text())
    for row in saved["rows"]:
        row["kept"] = True
    path.write_text(json.dumps(saved))
    gpu_sh(tree, "ceilings", "--dry").communicate(timeout=300)
    assert all(row["kept"] for row in json.loads(path.read_text())["rows"]), first
    (tree / "kit" / "COMMIT").write_text("another\n")
    gpu_sh(tree, "ceilings", "--dry").communicate(timeout=300)
    again = json.loads(path.read_text())
    assert again["environment"]["commit"] == "another" and not any("kept" in row for row in again["rows"])


def test_results_are_packed_when_it_is_stopped(tree):
    process = gpu_sh(tree, "2", "--dry")
    for line in process.stdout:
        if "lowrank_linear: begun" in line:
            break
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == 143
    assert "lowrank_linear: begun" in packed(tree, "2")["logs/steps-2.txt"]


def test_nothing_begins_with_too_little_time(tree):
    process = gpu_sh(tree, "4", "--dry", LIMIT="44")
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 1 and "begun, " not in output.replace("not begun, ", "")
    assert output.count("not begun") >= len(stage.STAGES["4"])
    assert list(packed(tree, "4")) == ["logs/steps-4.txt"]


def state_of(pid: int) -> str:
    """Of a process, as /proc says it; "" of one that has ended."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return ""
    return "" if state == "Z" else state


def test_a_step_is_cut_off_with_what_it_started(tmp_path):
    child = "import subprocess, sys; p = subprocess.Popen(['sleep', '300']); print(p.pid, flush=True); p.wait()"
    began = time.monotonic()
    assert stage.in_process([sys.executable, "-c", child], 3.0, tmp_path / "log") is None
    assert time.monotonic() - began < 30
    pid = int((tmp_path / "log").read_text())
    deadline = time.monotonic() + 30  # a killed process may take a moment to end
    while (alive := state_of(pid)) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not alive
    assert stage.in_process([sys.executable, "-c", "raise SystemExit(3)"], 60.0, tmp_path / "log") == 3


def test_a_hanging_step_leaves_time_to_the_others():
    for steps in range(2, 8):
        left, taken = 520.0, 0
        for at in range(steps):
            if left >= stage.LEAST:
                left -= stage.share(left, steps - at)
                taken += 1
        assert taken == steps
    assert stage.share(100.0, 1) == 100.0


def options(tmp_path, *words: str):
    return parsed(parser(None), ["--device", "cpu", "--results", str(tmp_path), *words])


def saved(tmp_path, name: str) -> dict:
    return json.loads((tmp_path / f"{name}-cpu.json").read_text())


def test_a_job_that_does_not_fit_is_a_row_that_says_so(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(harness, "memory", lambda device: 3 << 30)

    def out_of_memory():
        raise torch.OutOfMemoryError("CUDA out of memory.")

    variants = {"large": out_of_memory, "small": lambda: None}
    jobs = [Job("stated", lambda: run("stated", {"v": lambda: None}), memory=5 << 30)]
    jobs += [Job("found", lambda: run("found", variants, repeats=3)), Job("inputs", out_of_memory)]
    measure(options(tmp_path), "fits", jobs)
    stated, large, small, inputs = saved(tmp_path, "fits")["rows"]
    assert stated["skipped"] == "skipped: needs 5.0 GiB, more than the 3.0 GiB that are free on this device"
    assert large["skipped"] == inputs["skipped"] == large["skipped"]
    assert large["skipped"].startswith("skipped: needs more memory than the 3.0 GiB")
    assert small["median_s"] > 0 and small["host_s"] == small["median_s"] and small["speedup"] is None
    assert large["skipped"] in capsys.readouterr().out


def test_a_failure_is_a_row_and_a_status_and_is_tried_again(tmp_path, monkeypatch):
    monkeypatch.setattr(harness, "commit", lambda: (COMMIT, False))
    calls = []

    def broken():
        raise ValueError("no such kernel\nmore")

    jobs = [Job("good", lambda: calls.append("good") or run("good", {"v": lambda: None}, repeats=2))]
    bad = [*jobs, Job("bad", lambda: calls.append("bad") or run("bad", {"v": broken}))]
    for _ in range(2):
        with pytest.raises(SystemExit):
            measure(options(tmp_path, "--resume"), "some", bad)
    assert calls == ["good", "bad", "bad"]
    assert saved(tmp_path, "some")["rows"][1]["skipped"] == "failed: ValueError: no such kernel"
    monkeypatch.setattr(harness, "commit", lambda: (COMMIT, True))  # changed files are no commit
    measure(options(tmp_path, "--resume"), "some", jobs)
    assert calls == ["good", "bad", "bad", "good"]


def test_rows_are_there_before_the_end(tmp_path):
    def cut_off():
        raise KeyboardInterrupt

    jobs = [Job("first", lambda: run("first", {"v": lambda: None}, repeats=2)), Job("second", cut_off)]
    with pytest.raises(KeyboardInterrupt):
        measure(options(tmp_path), "part", jobs)
    found = saved(tmp_path, "part")
    assert not found["complete"] and [row["name"] for row in found["rows"]] == ["first"]


def test_every_kernel_is_launched_once(capsys):
    made, small = launches.calls("cpu", (5, 72, 8, 17)), launches.kernels("meta")
    compiled = {op.name for op in _op.OPS.values() if {b.name for b in op.backends} & {"triton", "cuda", "cpp"}}
    assert {name for name, _ in (*small, *launches.kernels("cpu"))} == compiled == set(made)
    for name, backend in small:
        if backend == "triton":  # interpreted
            with use_backend(backend):
                made[name]()
    launches.main(["--device", "cpu"])
    assert len(capsys.readouterr().out.splitlines()) == len(launches.kernels("cpu"))


def test_reports_of_the_tools_are_read():
    (row,) = launches.rows_of("memcheck", "========= ERROR SUMMARY: 3 errors\n")
    assert row == {"variant": "all kernels", "found": 3}
    hazards = "========= RACECHECK SUMMARY: 0 hazards displayed (0 errors, 0 warnings)\n"
    assert launches.rows_of("racecheck", hazards)[0]["found"] == 0
    assert launches.rows_of("ncu", "==ERROR== ERR_NVGPUCTRPERM\n") == []
    report = io.StringIO()
    report.write("==PROF== Connected\n")
    report.write('"ID","Kernel Name","Section Name","Metric Name","Metric Unit","Metric Value"\n')
    report.write('"0","_normal","SOL","Duration","us","1,042.5"\n"0","_normal","SOL","Memory Throughput","%","91.5"\n')
    report.write('"0","_normal","SOL","L1/TEX Cache Throughput","%","20"\n')
    (row,) = launches.rows_of("ncu", report.getvalue())
    assert row == {"variant": "_normal", "duration": pytest.approx(1042.5e-6), "memory": pytest.approx(0.915)}


def test_outcomes_are_read_from_the_lines_that_pytest_prints(tmp_path):
    (tmp_path / "test_some.py").write_text("def test_a():\n    assert 1 == 2\ndef test_b():\n    pass\n")
    command = [sys.executable, "-m", "pytest", "-v", "-p", "no:cacheprovider", "--junitxml", "some.xml", "test_some.py"]
    output = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False).stdout
    assert gpu_tests.outcomes(output) == {"test_some.py::test_a": "FAILED", "test_some.py::test_b": "PASSED"}
    assert "1 == 2" in gpu_tests.messages(tmp_path / "some.xml")["test_a"]
    parallel = "[gw3] [ 12%] PASSED tests/a.py::test_x[bf16-a b] \n[gw1] [ 13%] FAILED tests/a.py::test_y \n"
    parallel += "FAILED tests/a.py::test_y - the summary\n"
    assert gpu_tests.outcomes(parallel) == {"tests/a.py::test_x[bf16-a b]": "PASSED", "tests/a.py::test_y": "FAILED"}


def test_the_tables_in_the_pages_are_those_of_the_results():
    for file in tables.FILES:
        text = (ROOT / file).read_text()
        assert tables.filled(text) == text, f"{file}: run python -m bench.tables"


def test_a_table_says_what_was_skipped(tmp_path, monkeypatch):
    monkeypatch.setattr(tables, "ROOT", tmp_path)
    row = {"name": "job", "variant": "v", "device": "cuda", "job": "job", "saved_d": None, "relative": None}
    measured = row | {"median_s": 2e-3, "host_s": 1e-3, "speedup": 1.0, "fraction_of_ceiling": 0.5}
    measured |= {
        "peak_bytes": 1 << 30,
        "tokens_per_s": 5.0,
        "forward_s": 1e-6,
        "backward_s": 1e-6,
        "ceiling": 1.0,
        "unit": "GB/s",
        "found": 0,
    }
    environment = {"device": "GPU", "threads": 1, "torch": "2", "commit": COMMIT, "date": "2026-01-01T00"}
    (tmp_path / "bench" / "results").mkdir(parents=True)
    for name in ("glu", "block-full", "llama", "host_time", "ceilings", "launches-ncu", "launches-memcheck", "tests"):
        rows = [row | {"skipped": "skipped: too large"}, measured]
        path = tmp_path / "bench" / "results" / f"{name}-cuda.json"
        path.write_text(json.dumps({"environment": environment, "rows": rows}))
        head, line, *rest = tables.table(f"{name}-cuda").splitlines()
        assert head.count("|") == line.count("|") == rest[0].count("|") == rest[1].count("|")
        assert "skipped: too large" in rest[0]
    assert "1.000 ms" in tables.table("glu-cuda")  # the host's time has a column
    assert tables.table("nothing-cuda") == "*Not measured yet.*"


def test_every_benchmark_of_the_stages_has_a_main():
    for step in stage.steps_of(list(stage.STAGES)):
        assert callable(importlib.import_module(f"bench.{step[0]}").main)
