"""Every process of the tests runs one thread, since the models are small and threads that wait for each other cost ten
times the work; a test about threads sets its own number. Where there is no GPU, Triton kernels are interpreted; the
variable is read when a kernel is decorated, so it is set here, before anything imports one."""

import os

os.environ["OMP_NUM_THREADS"] = "1"  # of child processes; read by OpenMP at its start, so before torch

import pytest
import torch

torch.set_num_threads(1)

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
    from tests.interpreter import mend

    mend()


def pytest_collection_modifyitems(items):
    if torch.cuda.is_available():
        return
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(pytest.mark.skip(reason="needs a GPU"))
