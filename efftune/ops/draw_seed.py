"""A random seed as a tensor, so that a traced graph carries the draw itself."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.compiler import is_compiling

from efftune.errors import EfftuneError
from efftune.ops._op import Op, _direct


def _drawn() -> Tensor:
    refuse_capture()
    return torch.randint(0, 2**62, (), device="cpu")


def _reference(where: Tensor) -> Tensor:
    return _drawn()


def _fake(where: Tensor) -> Tensor:
    return torch.empty((), dtype=torch.int64, device="cpu")


# `where` is any CPU tensor: under torch.compile, checkpointing saves and restores the generator's state around a draw
# only if an argument of the draw tells the device.
draw_seed_op = Op("draw_seed(Tensor where) -> Tensor", _reference, _fake, tags=(torch.Tag.nondeterministic_seeded,))


def capturing() -> bool:
    """Whether what the current stream does becomes a CUDA graph."""
    # Nothing is captured before CUDA is initialised, and `is_available` counts the devices at each call.
    return torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing()


def refuse_capture() -> None:
    """Raises EfftuneError while a CUDA graph is being captured: seeds are numbers of the CPU, and a captured kernel has
    its seed for good."""
    if capturing():
        raise EfftuneError(
            "a CUDA graph would repeat one draw in every replay, since seeds are drawn on the CPU; capture a recipe "
            "that draws nothing, or run this step without a graph."
        )


def draw_seed() -> Tensor:
    """A seed in [0, 2^62): 0-d int64, on the CPU.

    It comes from torch's default CPU generator: torch.manual_seed and checkpoint's preserve_rng_state govern it. It is
    an operator because AOT compilation draws a traced torch.randint a second time in backward. This one it saves where
    the forward's result depends on it (LoRA's dropout); for a keep that draws see docs/adding-an-axis.md.
    Raises: EfftuneError while a CUDA graph is being captured.
    """
    return _drawn() if not is_compiling() and _direct(()) else draw_seed_op(torch.empty(0, device="cpu"))
