"""`efftune info`: versions, builds, and which backend of which operator can run here."""

from __future__ import annotations

import importlib
import importlib.metadata
import pkgutil
import platform

import torch

import efftune.ops
from efftune.ops import _available
from efftune.ops._op import OPS
from efftune.versions import SUPPORTED, why_not

PACKAGES = ("torch", "triton", "numpy", "safetensors", "transformers", "datasets", "peft")


def report() -> str:
    """Versions, devices, and operator x backend: available, or why not."""
    for module in pkgutil.iter_modules(efftune.ops.__path__):
        importlib.import_module(f"efftune.ops.{module.name}")
    lines = [f"efftune {efftune.__version__}, Python {platform.python_version()}, {platform.machine()}"]
    lines.append(", ".join(f"{name} {_version(name)}" for name in PACKAGES))
    gpu = torch.cuda.is_available()
    lines += [f"  {reason}" for name in SUPPORTED if (reason := why_not(name)) is not None]
    lines.append(f"CPU threads {torch.get_num_threads()}; GPU {torch.cuda.get_device_name() if gpu else 'none'}")
    device = torch.device("cuda" if gpu else "cpu")
    probe = torch.empty(1, device=device)
    where = {"cpp": torch.empty(1), "triton": probe, "cuda": probe}
    questions = {kind: _available.why_not(kind, t) for kind, t in where.items()}
    lines += ["", "backends"]
    for name, reason in questions.items():
        lines.append(f"  {name:<10} {'available' if reason is None else 'no: ' + reason}")
    columns = ("reference", "torch", *questions)
    width = max(18, *(len(name) + 1 for name in OPS))
    lines += ["", f"{'operator':<{width}}" + "".join(f"{name:<11}" for name in columns) + "default here"]
    for name, op in sorted(OPS.items()):
        backends = [b.name for b in op.backends]
        cells = [
            "yes" if c == "reference" or c in backends and not questions.get(c) else "no" if c in backends else "-"
            for c in columns
        ]
        default = next(
            (b.name for b in op.backends if device.type in b.devices and not questions.get(b.name)), "reference"
        )
        lines.append(f"{name:<{width}}" + "".join(f"{cell:<11}" for cell in cells) + default)
    return "\n".join(lines)


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"
