"""The rotary embedding of transformers' models, routed through ours."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.compiler import is_compiling

from efftune.nn.rotary import MARK, is_marked, rotary_pair, set_marked
from efftune.ops.rotary import composition

# A modeling file of transformers calls the function below by its global name, and gives it nothing of the model. So a
# switch stands before it, and the model's own rotary embedding marks the cos that it hands to its layers.
FUNCTION = "apply_rotary_pos_emb"


def mark(module: nn.Module, args: Any, output: Any) -> None:
    """A forward hook for a rotary embedding: its (cos, sin) lead to `rotary`."""
    if not is_compiling() and isinstance(output, tuple) and len(output) == 2:
        set_marked(output[0])


def register(kinds: Iterable[type]) -> bool:
    """Puts the switch before the `FUNCTION` of every file that these classes come from, if it computes the formula.
    Unmarked calls get what they got. True if any file has a switch."""
    found = False
    for name in {base.__module__ for kind in kinds for base in kind.__mro__} & sys.modules.keys():
        file = vars(sys.modules[name])
        function = file.get(FUNCTION)
        if not callable(function):
            continue
        original = getattr(function, "__wrapped__", function) if hasattr(function, MARK) else function
        computes = _computes(original)  # asked each time: what it calls may have been exchanged
        if computes and original is function:
            file[FUNCTION] = _switch(function)
        elif not computes:
            file[FUNCTION] = original
        found |= hasattr(file[FUNCTION], MARK)
    return found


def _switch(original: Callable) -> Callable:
    narrow = _computes(original, (torch.bfloat16, torch.float32))  # OLMo's gives q's dtype whatever that of cos

    @functools.wraps(original)
    def switch(*args, **kwargs):
        # Under torch.compile the compiler fuses the formula, and marks are not looked at.
        if not is_compiling() and len(args) == 4 and not kwargs and is_marked(args[2]):
            q, k, cos, sin = args
            if _fits(q, k, cos, sin, narrow):
                return rotary_pair(q, k, cos, sin)
        return original(*args, **kwargs)

    setattr(switch, MARK, True)
    return switch


def _fits(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, narrow: bool) -> bool:
    """Whether `rotary` takes these and gives the dtype that the model would go on with; `narrow`: it is q's anyway."""
    if q.ndim != 4 or q.dtype not in (torch.float32, torch.bfloat16, torch.float16) or q.dtype != k.dtype:
        return False
    if cos.requires_grad or sin.requires_grad or cos.shape != sin.shape or cos.dtype != sin.dtype:
        return False
    b, _, t, d = q.shape
    if d % 2 or cos.shape not in ((b, t, d), (1, t, d)) or (k.shape[0], *k.shape[2:]) != (b, t, d):
        return False
    if cos.dtype == q.dtype:
        return True
    device = q.device.type  # under autocast torch gives float32, which the product behind it rounds to q's dtype
    cast = torch.is_autocast_enabled(device) and q.dtype == torch.get_autocast_dtype(device)
    return (cast or narrow) and cos.dtype == torch.float32


@torch.no_grad()
def _computes(function: Callable, *dtypes: tuple[torch.dtype, torch.dtype]) -> bool:
    """Whether the function is the formula of `rotary`, in the dtype of q, for k with other heads than q and for halves
    of cos that differ. `dtypes` are pairs of q's and cos's, by default the same."""
    generator = torch.Generator().manual_seed(0)
    q, k, cos, sin = (torch.randn(s, generator=generator) for s in ((2, 4, 3, 8), (2, 2, 3, 8), (2, 3, 8), (2, 3, 8)))
    for dtype, table in dtypes or ((torch.float32, torch.float32), (torch.bfloat16, torch.bfloat16)):
        given = [q.to(dtype), k.to(dtype), cos.to(table), sin.to(table)]
        try:
            results = function(*given)
        except Exception:  # it takes other arguments, so it is something else
            return False
        if not isinstance(results, tuple) or len(results) != 2:
            return False
        for result, x in zip(results, given[:2], strict=True):
            if not isinstance(result, Tensor) or result.shape != x.shape or result.dtype != dtype:
                return False
            exact = composition(x.double(), given[2].unsqueeze(1).double(), given[3].unsqueeze(1).double())
            if not (result.double() - exact).norm() <= 4 * torch.finfo(dtype).eps * exact.norm():
                return False
    return True
