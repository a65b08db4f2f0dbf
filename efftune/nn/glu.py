"""act(gate) · up, and act(x): what backward keeps is their inputs, never their output."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor, nn
from torch.compiler import is_compiling

from efftune.errors import refuse_second_derivative
from efftune.linear import Exact
from efftune.linear.contracts import Keep
from efftune.linear.function import applied, as_matrix, only
from efftune.linear.handle import Handle, attach, flatten, load, reshaped, unflatten
from efftune.ops.draw_seed import draw_seed
from efftune.ops.glu import composition, glu_backward
from efftune.ops.glu import glu as activate
from efftune.ops.relu import relu, relu_backward

CLIPPED = ("relu", "relu2")  # zero below zero, with a kink or a bend there


class _Glu(torch.autograd.Function):
    @staticmethod
    def forward(ctx, keep: Keep, activation: str, seed, made: list, gate, up):
        rows = [as_matrix(t) for t in (gate, up) if t is not None]
        y = activate(rows[0], rows[1] if up is not None else None, activation)
        bits = ()
        if keep.random and activation in CLIPPED:
            # E[relu(x̃)] is not relu(x) near 0, and 1[x̃ > 0] is not 1[x > 0]; codes of relu(x) have the right mean,
            # zeros stay zeros, and half of the range needs no codes.
            clipped, *bits = relu(rows[0]) if activation == "relu" else (rows[0].relu(),)
            rows[0] = clipped
        held = tuple([keep.hold(t.detach(), seed, stream) for stream, t in enumerate(rows)])
        for part in held:
            if isinstance(part, Handle):
                part.keep()
        handle = Handle(partial(_again, activation), held, elementwise=True)
        made.append(handle)
        saved, structure = flatten((*held, *bits))
        ctx.save_for_backward(*saved)
        ctx.call = handle.once, structure, activation, len(held)
        return reshaped(y, gate.shape)

    @staticmethod
    def backward(ctx, dy):
        refuse_second_derivative("An activation of efftune.nn")
        once, structure, activation, parts = ctx.call
        once.drop()
        saved, rows = unflatten(ctx.saved_tensors, structure), as_matrix(dy)
        gate, *up = [load(part) for part in saved[:parts]]
        dgate, dup = glu_backward(rows, gate, up[0] if up else None, activation)
        if bits := saved[parts:]:
            dgate = relu_backward(rows * up[0], bits[0])
        return None, None, None, None, reshaped(dgate, dy.shape), None if dup is None else reshaped(dup, dy.shape)


_apply = applied(_Glu)


class _Relu(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        y, bits = relu(x)
        ctx.save_for_backward(bits)
        return y

    @staticmethod
    def backward(ctx, dy):
        refuse_second_derivative("An activation of efftune.nn")
        return relu_backward(dy, *ctx.saved_tensors)


def _again(activation: str, gate: Tensor, up: Tensor | None = None) -> Tensor:
    return activate(gate, up, activation)


def glu(gate: Tensor, up: Tensor | None, activation: str, keep: Keep | None = None) -> Tensor:
    """y = act(gate) · up, or act(gate) without `up`.

    Args:
        gate, up: (..., F) f32 | bf16 | f16; also the two halves of a merged projection, without a copy.
        activation: "silu", "gelu", "gelu_tanh", "relu" or "relu2".
        keep: how backward keeps gate and up, `Exact()` or `Quantized(bits)`.
    Returns: (..., F), dtype of gate. Linear layers of efftune that read it keep no input of their own.
    Numerics: float32 inside, rounded once (transformers rounds act(gate), too). With a quantised keep the gradients are
        those at the inputs that were kept.
        What is a bias there, and what not, given dy: silu and gelu are curved, so that act'(g̃) and act(g̃) are off
        by second order in the rounding error. relu and relu2 keep relu(gate), whose codes have the mean relu(gate):
        relu(gate) · up is unbiased with its gradients; of relu2, dgate is, and y and dup are off by the variance of a
        code. relu alone is exact.
    Saved for backward: keep(gate) and keep(up); with a quantised keep an eighth of a byte an element besides for relu
        with `up`. For relu alone, whatever the keep, only that eighth: the layer that reads y keeps y.
    Source: Shazeer 2020, arXiv:2002.05202.
    """
    if is_compiling():
        return composition(gate, up, activation)  # the compiler fuses it, and recomputes it in backward
    needed = torch.is_grad_enabled() and (gate.requires_grad or (up is not None and up.requires_grad))
    if not needed:  # nothing is kept for this layer, so that a handle would not be free
        return activate(as_matrix(gate), None if up is None else as_matrix(up), activation).view(*gate.shape)
    if activation == "relu" and up is None:
        return _Relu.apply(gate)
    keep = Exact() if keep is None else keep
    made: list[Handle] = []
    y = _apply(keep, activation, draw_seed() if keep.random else None, made, gate, up)
    return attach(y, made[0], y.shape[-1])


class Activation(nn.Module):
    """act(x) as a module."""

    def __init__(self, activation: str, keep: Keep | None = None):
        super().__init__()
        self.activation, self.keep = activation, keep or Exact()

    def forward(self, x: Tensor | None = None, **named: Tensor) -> Tensor:
        x = only(x, named) if x is None or named else x
        return glu(x, None, self.activation, self.keep)

    def extra_repr(self) -> str:
        return f"{self.activation}, {self.keep}"


class GatedMLP(nn.Module):
    """down_proj(act(gate_proj(x)) · up_proj(x))."""

    def __init__(
        self, gate_proj: nn.Module, up_proj: nn.Module, down_proj: nn.Module, activation: str, keep: Keep | None = None
    ):
        super().__init__()
        self.gate_proj, self.up_proj, self.down_proj = gate_proj, up_proj, down_proj
        self.activation, self.keep = activation, keep or Exact()

    def forward(self, x: Tensor | None = None, **named: Tensor) -> Tensor:
        x = only(x, named) if x is None or named else x
        return self.down_proj(glu(self.gate_proj(x), self.up_proj(x), self.activation, self.keep))

    def extra_repr(self) -> str:
        return f"{self.activation}, {self.keep}"
