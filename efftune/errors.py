"""The error for everything that a user can put right: one sentence that names the remedy."""

import torch


class EfftuneError(ValueError):
    pass


def refuse_second_derivative(of: str) -> None:
    """Called in the backward of an autograd.Function, where grad mode is on if create_graph=True."""
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():
        raise RuntimeError(f"{of} has no second derivative; call backward without create_graph=True.")


def refuse_tracing() -> None:
    """Called where torch.jit.trace would record an autograd.Function: as a call of Python, which no file can hold."""
    raise EfftuneError(
        "torch.jit.trace has no place for the backward pass of efftune's layers; trace under torch.no_grad(), where "
        "the outputs are the same."
    )
