"""Importing efftune stays cheap, and `efftune info` says what is missing."""

import subprocess
import sys

import pytest
import torch

import efftune
from efftune.info import report
from efftune.ops import _available
from efftune.ops._op import OPS

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
