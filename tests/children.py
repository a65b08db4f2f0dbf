"""Child processes that start in milliseconds: forked from a server that has imported torch and the library once."""

import multiprocessing
import os
import pickle
from collections.abc import Callable

MODULES = (
    "torch", "efftune", "efftune.cli", "efftune.train.run", "safetensors.torch", "transformers", "datasets",
    # What a run imports as it goes, in two seconds: torch.optim the first of them, transformers and the report others.
    "torch._dynamo", "transformers.models.llama.modeling_llama", "transformers.models.auto.modeling_auto",
    "transformers.models.auto.tokenization_auto", "matplotlib.figure",
)  # fmt: skip


def start(function: Callable, *args, **environment: str) -> multiprocessing.process.BaseProcess:
    """function(*args), importable and picklable, in a process of its own with these environment variables.

    It is killed with its parent, and what it prints comes out where the parent's does. Its interpreter does not end as
    a program's does (no atexit): who tests that starts a program.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([*MODULES])  # read when the first child starts
    child = context.Process(target=_run, args=(pickle.dumps((function, args)), environment), daemon=True)
    child.start()
    return child


def _run(pickled: bytes, environment: dict[str, str]) -> None:
    import torch

    os.environ.update(environment)
    torch.set_num_threads(1)
    function, args = pickle.loads(pickled)  # now: importing its module may read the environment
    function(*args)


def wait(children) -> list[int | None]:
    """Their exit codes; None of one that has not ended after two minutes."""
    for child in children:
        child.join(timeout=120)
    return [child.exitcode for child in children]
