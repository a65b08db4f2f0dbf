"""Importing efftune stays cheap, and `efftune info` says what is missing."""

import importlib.metadata
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import efftune
from efftune import EfftuneError, versions
from efftune.info import report
from efftune.ops import _available
from efftune.ops._op import OPS

ROOT = Path(__file__).parents[1]
HEAVY = ("transformers", "datasets", "tokenizers", "peft", "matplotlib", "triton", "safetensors", "torch._inductor")


def test_import_loads_nothing_heavy_and_patches_nothing():
    code = "import sys, torch; before = set(sys.modules); import efftune; "
    code += f"print([m for m in {HEAVY} if m in sys.modules and m not in before])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_info_names_every_operator_and_what_is_missing(monkeypatch):
    text = report()
    assert all(name in text for name in OPS)
    monkeypatch.setattr(_available, "_load", lambda name: (None, "is not built"))
    text = report()
    assert "cpp        no: the C++ extension is not built; install a C++17 compiler and reinstall efftune" in text
    if not torch.cuda.is_available():
        assert "cuda       no: the CUDA C++ kernels run on an NVIDIA GPU" in text


def test_a_backend_that_cannot_run_gives_its_reason(monkeypatch):
    w = torch.zeros(8)
    with (
        efftune.use_backend("cuda"),
        pytest.raises(RuntimeError, match="'cuda' cannot run here: .* run on an NVIDIA GPU"),
    ):
        efftune.perturb_(w, 1.0, seed=1, stream=1)
    with efftune.use_backend("cpp"), pytest.raises(RuntimeError, match="contiguous"):
        efftune.perturb_(torch.zeros(8, 2).t(), 1.0, seed=1, stream=1)


@pytest.mark.parametrize("package, found", [("torch", "2.10.1"), ("torch", "3.0"), ("transformers", "4.57.1")])
def test_an_unsupported_version_is_one_sentence_at_first_use(monkeypatch, package, found):
    from tests.methods.models import llama

    model, real = llama(), importlib.metadata.version
    monkeypatch.setattr(importlib.metadata, "version", lambda name: found if name == package else real(name))
    versions.why_not.cache_clear()
    low, high = versions.SUPPORTED[package]
    try:
        with pytest.raises(
            EfftuneError, match=rf"^efftune needs {package} from {low} .* and {found} is installed: pip"
        ):
            efftune.apply(model, "lora(r=2)")
        assert f"needs {package} from {low} on and before {high}" in report()
        if package == "transformers":  # nobody else needs it
            efftune.apply(torch.nn.Sequential(torch.nn.Linear(8, 8)), "full")
    finally:
        versions.why_not.cache_clear()
    assert not any(isinstance(module, efftune.Linear) for module in model.modules())


def test_an_unsupported_triton_costs_its_backend(monkeypatch):
    real = importlib.metadata.version
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "3.5.1" if name == "triton" else real(name))
    versions.why_not.cache_clear()
    try:
        assert "efftune needs triton from 3.6" in _available.why_not("triton", torch.empty(1))
    finally:
        versions.why_not.cache_clear()


def test_the_versions_in_use_are_supported():
    """Builds and nightlies count as their release."""
    assert [name for name in versions.SUPPORTED if versions.why_not(name)] == []
    assert versions._numbers("2.15.0.dev20261101+cu130") == (2, 15)


def test_a_broken_compiler_costs_the_kernels_and_one_line(tmp_path):
    environment = os.environ | {"CXX": "/bin/false", "CC": "/bin/false", "PATH": f"{Path(sys.executable).parent}:/bin"}
    command = [sys.executable, "setup.py", "-q", "build_ext", "--build-lib", tmp_path / "lib", "--build-temp", tmp_path]
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, check=True)
    warnings = [line for line in done.stderr.splitlines() if "was not built" in line]
    assert len(warnings) == 1 and "efftune runs without these kernels" in warnings[0]
    assert not list(tmp_path.rglob("*.so"))
