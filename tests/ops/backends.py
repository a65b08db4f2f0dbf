"""Every backend of an operator on every device at hand: the interpreter stands in for Triton where there is no GPU, and
csrc's CUDA kernels run as C++."""

import itertools
from contextlib import nullcontext

import pytest
import torch

from efftune.ops._available import why_not
from efftune.ops._op import use_backend
from tests.ops.cuda_on_cpu.build import cuda_on_cpu
from tests.pairwise import pairwise

ON_GPU = [
    pytest.param(("reference", "cuda"), id="reference-gpu", marks=pytest.mark.gpu),
    pytest.param(("triton", "cuda"), id="triton-gpu", marks=pytest.mark.gpu),
    pytest.param(("cuda", "cuda"), id="cuda-gpu", marks=pytest.mark.gpu),
]
BACKENDS = [
    pytest.param(("reference", "cpu"), id="reference"),
    pytest.param(("cpp", "cpu"), id="cpp"),
    pytest.param(("triton", "cpu"), id="triton-interpreted"),
    pytest.param(("cuda", "cpu"), id="cuda-on-cpu"),
    *(ON_GPU if torch.cuda.is_available() else ()),  # without one there are no ids to skip
]


INTERPRETED = ("triton", "cpu")


def cases(backends, dtypes, *axes):
    """Parameters (backend, dtype, *axes): every combination, but where Triton is interpreted every backend with every
    dtype, and the other axes pairwise (see `tests.pairwise`): there a case takes seconds, and the same kernel runs with
    all of them on a GPU."""
    made = []
    for backend in backends:
        slow = backend.values[0] == INTERPRETED
        rows = pairwise([dtypes, *axes]) if slow else itertools.product(dtypes, *axes)
        for row in rows:
            name = "-".join([backend.id, *(str(value).removeprefix("torch.") for value in row)])
            made.append(pytest.param(backend.values[0], *row, id=name, marks=backend.marks))
    return made


def on(backend, function, *args, **kwargs):
    """function(...) with CPU tensors moved to the backend's device; the result comes back to the CPU."""
    name, device = backend
    if name.startswith("triton") and device == "cpu" and why_not("triton", torch.empty(0)) is not None:
        pytest.skip("Triton is not interpreted in this process")
    with use_backend(name), cuda_on_cpu() if backend == ("cuda", "cpu") else nullcontext():
        result = function(*(a.to(device) if isinstance(a, torch.Tensor) and a.ndim else a for a in args), **kwargs)
    return tuple(None if r is None else r.cpu() for r in result) if isinstance(result, tuple) else result.cpu()


def skip_truncation(backend, dtype, exact=False):
    """Triton's interpreter stores float32 to bfloat16 by truncation; results exact in bfloat16 are not affected."""
    if backend == ("triton", "cpu") and dtype == torch.bfloat16 and not exact:
        pytest.skip("the interpreter does not round to bfloat16")
