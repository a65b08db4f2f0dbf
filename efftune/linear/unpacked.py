"""The `weight` of a layer that stores codes."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.compiler import is_compiling
from torch.utils._pytree import tree_leaves, tree_map

from efftune.errors import EfftuneError


class Unpacked(Tensor):
    """W of `layer`, as the plain layer has it: dtype, device and shape cost nothing, and each operation on it unpacks W
    anew and sees a plain tensor. Neither it nor a view of it can be written to.

    Models look at the dtype or the device of a layer's weight in every forward pass, and a few multiply by it.
    """

    layer: Any
    value: Tensor | None  # of a view of W: a view of what was unpacked for it

    @staticmethod
    def __new__(cls, layer: Any, value: Tensor | None = None) -> Unpacked:
        if value is None:
            w = layer.stored()
            shape = w.shape if layer.conv1d is None else w.shape[::-1]
            made = Tensor._make_wrapper_subclass(cls, shape, dtype=w.dtype, device=w.tensors[0].device)  # type: ignore
        else:
            made = Tensor._make_wrapper_subclass(  # type: ignore
                cls, value.shape, strides=value.stride(), dtype=value.dtype, device=value.device
            )
        made.layer, made.value = layer, value
        return made

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        of = next(part.layer for part in tree_leaves((args, kwargs)) if isinstance(part, Unpacked))
        if func._schema.is_mutable:
            named = zip((a.name for a in func._schema.arguments), args)
            given = {**dict(named), **kwargs}
            written = [given.get(a.name) for a in func._schema.arguments if a.alias_info and a.alias_info.is_write]
            if any(isinstance(part, Unpacked) for part in tree_leaves(written)):
                raise EfftuneError(
                    f"{of.base} stores codes, into which its weight cannot be written; write to the plain layer, "
                    "before the recipe is applied."
                )
        args, kwargs = tree_map(lambda part: part.read() if isinstance(part, Unpacked) else part, (args, kwargs))
        result = func(*args, **kwargs)
        views = any(r.alias_info is not None for r in func._schema.returns) and not func._schema.is_mutable
        if not views:
            return result
        return tree_map(lambda part: Unpacked(of, part) if isinstance(part, Tensor) else part, result)

    def read(self) -> Tensor:
        """The plain tensor."""
        return unpacked(self.layer) if self.value is None else self.value

    def requires_grad_(self, requires_grad: bool = True) -> Unpacked:
        if requires_grad:
            raise EfftuneError(
                f"{self.layer.base} stores codes, which do not train; train an adapter beside them (lora(r=16)), or "
                "their scales by peqa."
            )
        return self

    def __repr__(self, *, tensor_contents=None) -> str:
        return f"Unpacked({self.layer.base}, size={tuple(self.shape)}, dtype={self.dtype})"


def unpacked(layer: Any) -> Tensor:
    """W of an efftune.Linear as a plain tensor, in the plain layer's layout and without what the delta adds."""
    w = layer.stored()
    if torch.is_grad_enabled() and any(t.requires_grad for t in w.tensors):
        raise EfftuneError(
            f"The model reads the weight of {layer} without calling the layer, so that what it learns would get no "
            "gradient from there; leave that layer out of the recipe, or read it under torch.no_grad()."
        )
    with torch.no_grad():
        rows = layer.base.rows(w, 0, w.shape[0], w.dtype)
    return rows if layer.conv1d is None else rows.t()


def weight_of(layer: Any) -> Tensor:
    """What stands for `layer.weight` where the base has no such tensor."""
    # A traced graph has no place for the subclass; a compiler leaves out what is unpacked for its dtype alone.
    return unpacked(layer) if is_compiling() or torch._C._is_tracing() else Unpacked(layer)
