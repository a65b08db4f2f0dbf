"""Every process of the tests runs one thread, since the models are small and threads that wait for each other cost ten
times the work; a test about threads sets its own number. Where there is no GPU, Triton kernels are interpreted; the
variable is read when a kernel is decorated, so it is set here, before anything imports one.

With pytest-xdist (`-n 2 --dist loadgroup`) tests of one `xdist_group` run in one process, one after the other: those
that start processes themselves ("processes"), so that no more run than there are cores, and those that look at one
result that is expensive to make."""

import os

os.environ["OMP_NUM_THREADS"] = "1"  # of child processes; read by OpenMP at its start, so before torch

import pytest
import torch

torch.set_num_threads(1)

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"


def pytest_collection_modifyitems(items):
    # What takes long comes first, so that no process is left alone with it at the end.
    items.sort(key=lambda item: not any(mark.args == ("processes",) for mark in item.iter_markers("xdist_group")))
    if torch.cuda.is_available():
        return
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(pytest.mark.skip(reason="needs a GPU"))
