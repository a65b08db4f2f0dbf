"""Several processes that train one model, each on its part of a step's rows; `torchrun` starts them."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, redirect_stdout
from typing import Any

import torch
from torch import distributed, nn

from efftune.errors import EfftuneError
from efftune.optim.zeroth_order import ZerothOrderSGD

LOSS = Callable[[nn.Module, Any], torch.Tensor]


def launched() -> int:
    """How many processes were started together, as the environment says."""
    return int(os.environ.get("WORLD_SIZE") or 1)


def world() -> int:
    return distributed.get_world_size() if distributed.is_available() and distributed.is_initialized() else 1


def rank() -> int:
    return distributed.get_rank() if world() > 1 else 0


def local_rank() -> int:
    """Which of the processes of this machine it is."""
    return int(os.environ.get("LOCAL_RANK", rank()))


@contextmanager
def joined() -> Iterator[None]:
    """Within it, processes that were started together have a process group (one that exists is taken as it is), and all
    but the first print nothing."""
    with ExitStack() as stack:
        if launched() > 1 and not (distributed.is_available() and distributed.is_initialized()):
            try:
                # Its functions' default arguments hold the group that there is when it is imported (transformers does),
                # whose threads would then live on into the interpreter's end and abort it.
                import torch.distributed.nn.functional  # noqa: F401

                gpu = torch.cuda.is_available() and distributed.is_nccl_available()
                distributed.init_process_group("cpu:gloo,cuda:nccl" if gpu else "gloo")
            except (ImportError, ValueError, RuntimeError) as error:
                raise EfftuneError(
                    f"WORLD_SIZE is {launched()}, but the processes do not find each other "
                    f"({str(error).partition(chr(10))[0].rstrip('.')}); start them with torchrun --no-python "
                    "--nproc-per-node N efftune train ..., or unset WORLD_SIZE."
                ) from error
            stack.callback(distributed.destroy_process_group)
        if rank() > 0:
            stack.enter_context(redirect_stdout(stack.enter_context(open(os.devnull, "w"))))
            stack.enter_context(warnings.catch_warnings(action="ignore"))
        yield


def gather(value: Any) -> list[Any]:
    """Returns the `value` of each process, in every process."""
    if world() == 1:
        return [value]
    values: list[Any] = [None] * world()
    distributed.all_gather_object(values, value)
    return values


def first(function: Callable[[], Any]) -> Any:
    """Calls `function` in the first process, and returns in every process what it gave, or raises what it raised."""
    result = error = None
    if rank() == 0:
        try:
            result = function()
        except Exception as caught:
            error = caught
    result, error = gather((result, error))[0]
    if error is not None:
        raise error
    return result


def zero_without_batch(loss: LOSS) -> LOSS:
    """Makes `loss` 0 for the batch None, which a process has where the others have one batch more."""

    def run(model: nn.Module, batch: Any) -> torch.Tensor:
        return loss(model, batch) if batch is not None else torch.zeros((), device=next(model.parameters()).device)

    return run


def everywhere(loss: LOSS) -> LOSS:
    """Sums `loss` over the batches of all processes, in float64 and without a gradient, so that each goes on as one
    process with all of the batches would."""
    if world() == 1:
        return loss

    def run(model: nn.Module, batch: Any) -> torch.Tensor:
        if torch.is_grad_enabled():
            raise no_gradients("this recipe")
        device = next(model.parameters()).device
        value = torch.as_tensor(zero_without_batch(loss)(model, batch), device=device).to(torch.float64, copy=True)
        distributed.all_reduce(value)
        return value

    return run


def no_gradients(recipe: str) -> EfftuneError:
    return EfftuneError(
        f"Gradients are not exchanged between processes, and {recipe} takes them; use accelerate or Hugging Face's "
        "Trainer, or train with a zeroth-order recipe such as mezo."
    )


def share_used(optimizer: ZerothOrderSGD) -> None:
    """Makes each direction one for all parameters that a forward pass used in any of the processes: a router may send
    the rows of one process another way than those of the others."""
    if world() == 1:
        return
    named = dict(optimizer.named_parameters())
    names = {id(p): name for name, p in named.items()}
    for (seed, (a, _)), *used in zip(
        list(optimizer.scalars.pending.items()),
        *gather([{names[i] for i in used} for _, used in optimizer.scalars.pending.values()]),
        strict=True,
    ):
        optimizer.scalars.pending[seed] = a, frozenset(id(named[name]) for name in set().union(*used))
