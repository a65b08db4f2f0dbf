"""Every process of the tests runs one thread, since the models are small and threads that wait for each other cost ten
times the work; a test about threads sets its own number. Where there is no GPU, Triton kernels are interpreted; the
variable is read when a kernel is decorated, so it is set here, before anything imports one.
"""

import gc
import os

os.environ["OMP_NUM_THREADS"] = "1"  # of child processes; read by OpenMP at its start, so before torch

import pytest
import torch

torch.set_num_threads(1)

if not torch.cuda.is_available():
    # torch keeps each call of manual_seed, with its stack, for three kinds of devices that may yet be initialised.
    torch.manual_seed = lambda seed: torch.default_generator.manual_seed(int(seed))
    os.environ["TRITON_INTERPRET"] = "1"
    from tests.interpreter import mend

    mend()


@pytest.fixture(scope="session", autouse=True)
def many_small_models():
    """Layers that read one tensor work as one in tests' small models, too, where it pays for large ones only; and
    blocks of the same code are recognised once, which takes 50 ms of each `apply`."""
    from efftune.interop.transformers import blocks
    from efftune.linear import group

    group.SMALL, blocks.SHARED = 0, {}


@pytest.fixture
def recognised_anew(monkeypatch):
    monkeypatch.setattr("efftune.interop.transformers.blocks.SHARED", None)


# What starts processes of its own runs in one process of `pytest -n`, one after the other: no more run than there are
# cores. And it comes first, with what compiles, so that no process is left alone with it at the end.
STARTS_PROCESSES = (
    "tests/train/test_processes.py",
    "tests/train/test_kill.py",
    "tests/methods/test_mezo.py::test_two_processes",
    "tests/methods/test_ferret.py::test_processes",
)
CUDA_ON_CPU = "tests/ops/test_cuda_on_cpu.py"  # compiles what other tests load
COMPILES = "tests/ops/test_triton_compile.py"
CONTRACT = "tests/methods/test_contract.py::"  # looks at one result of each recipe, which is expensive to make


def unit(nodeid: str) -> str:
    """What runs in one process of `pytest -n`, named by the nodeid: the processes share no fixtures."""
    if nodeid.startswith(STARTS_PROCESSES):
        return "processes"
    if nodeid.startswith(CUDA_ON_CPU):
        return CUDA_ON_CPU
    if nodeid.startswith(f"{COMPILES}::test_triton_kernels_compile"):  # a compiler takes four seconds to start
        return COMPILES
    if nodeid.startswith(CONTRACT) and "[" in nodeid:
        return CONTRACT + nodeid.partition("[")[2]
    return nodeid


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    """By nodeid: xdist's own groups are made from marks by changing nodeids, which pytest 9 does not let it do."""
    from xdist.scheduler import LoadScopeScheduling

    scheduler = LoadScopeScheduling(config, log)
    scheduler._split_scope = unit
    return scheduler


def pytest_collection_modifyitems(items):
    items.sort(key=lambda item: not item.nodeid.startswith(COMPILES))
    items.sort(key=lambda item: not item.nodeid.startswith((*STARTS_PROCESSES, CUDA_ON_CPU)))
    if torch.cuda.is_available():
        return
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(pytest.mark.skip(reason="needs a GPU"))


def pytest_collection_finish():
    """What imports and collecting made stays to the end: the garbage collector need not look through it again."""
    gc.collect()
    gc.freeze()


def pytest_unconfigure():
    gc.unfreeze()  # what still lives when the interpreter ends would be reported as a leak by some extensions
