"""RMSNorm and LayerNorm whose output backward makes again instead of keeping it."""

from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.compiler import is_compiling

from efftune.errors import refuse_second_derivative
from efftune.linear import Exact
from efftune.linear.contracts import Keep
from efftune.linear.function import applied, as_matrix, only
from efftune.linear.handle import Handle, attach, flatten, load, reshaped, unflatten
from efftune.ops.draw_seed import draw_seed
from efftune.ops.rms_norm import rms_norm as normalize
from efftune.ops.rms_norm import rms_norm_apply, rms_norm_backward


class _Norm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, keep: Keep, settings: tuple[float, float, bool], seed, made: list, x, weight, bias):
        rows, (eps, offset, center) = as_matrix(x), settings
        y, mean, rstd = normalize(rows, weight, bias, eps, offset, center)
        held = keep.hold(rows.detach(), seed)
        if isinstance(held, Handle):
            held.keep()
        statistics = (rstd,) if mean is None else (rstd, mean)
        parameters = tuple([p.detach() for p in (weight, bias) if p is not None])
        again = partial(_again, offset, center, weight is not None)
        handle = Handle(again, (held, *statistics), parameters)
        made.append(handle)
        saved, structure = flatten((held, *statistics) if weight is None else (held, *statistics, weight))
        ctx.save_for_backward(*saved)
        ctx.call = handle.once, structure, offset, center, None if bias is None else bias.dtype
        return reshaped(y, x.shape)

    @staticmethod
    def backward(ctx, dy):
        refuse_second_derivative("A norm of efftune.nn")
        once, structure, offset, center, bias_dtype = ctx.call
        once.drop()
        held, rstd, *rest = unflatten(ctx.saved_tensors, structure)
        _, need_weight, need_bias = ctx.needs_input_grad[4:]
        x, mean = load(held), rest.pop(0) if center else None
        weight = rest[0] if rest else None
        dx, dw, db = rms_norm_backward(as_matrix(dy), x, weight, mean, rstd, offset, need_weight, need_bias)
        dw = None if dw is None or weight is None else _cast(dw, weight.dtype)
        db = None if db is None else _cast(db, bias_dtype)
        return None, None, None, None, reshaped(dx, dy.shape), dw, db


_apply = applied(_Norm)


def _cast(t: Tensor, dtype: torch.dtype) -> Tensor:
    return t if t.dtype == dtype else t.to(dtype)


def _again(offset: float, center: bool, has_weight: bool, x: Tensor, rstd: Tensor, *rest: Tensor) -> Tensor:
    mean, parameters = (rest[0], rest[1:]) if center else (None, rest)
    weight = parameters[0] if has_weight else None
    bias = parameters[-1] if len(parameters) > has_weight else None
    return rms_norm_apply(x, weight, bias, mean, rstd, offset)


def _norm(x, weight, bias, eps, offset, center, keep) -> Tensor:
    keep = Exact() if keep is None else keep
    trains = (weight is not None and weight.requires_grad) or (bias is not None and bias.requires_grad)
    if not (
        torch.is_grad_enabled() and (x.requires_grad or trains)
    ):  # nothing is kept of x for this layer, so that a handle would not be free
        return normalize(as_matrix(x), weight, bias, eps, offset, center)[0].view(*x.shape)
    seed = draw_seed() if keep.random else None
    made: list[Handle] = []
    y = _apply(keep, (eps, offset, center), seed, made, x, weight, bias)
    return attach(y, made[0], x.shape[-1])


def rms_norm(x: Tensor, weight: Tensor | None, eps: float = 1e-6, offset: float = 0.0, keep: Keep | None = None):
    """y = x / √(mean(x²) + eps) · (offset + weight), over the last dimension.

    Args:
        x: (..., K) f32 | bf16 | f16.   weight: (K,) of any float dtype, or None.   offset: 1 where the weight is stored
            as its difference from 1 (Gemma).
        keep: how backward keeps x, `Exact()` or `Quantized(bits)`.
    Returns: (..., K), dtype of x. Linear layers of efftune that read it keep no input of their own.
    Numerics: float32 throughout, rounded once. With a quantised keep the gradients are those at x̃.
    Saved for backward: keep(x) and 4 bytes a row. The output can be made again from them, bit for bit if keep is exact.
    Under torch.compile, whatever the keep: torch's own composition, which the compiler fuses and recomputes.
    Source: Zhang and Sennrich 2019, arXiv:1910.07467.
    """
    if is_compiling():
        scaled = weight if weight is None or offset == 0 else weight + offset
        return F.rms_norm(x, (x.shape[-1],), None if scaled is None else scaled.to(x.dtype), eps)
    return _norm(x, weight, None, eps, offset, False, keep)


def layer_norm(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float = 1e-5, keep: Keep | None = None):
    """y = (x - mean(x)) / √(var(x) + eps) · weight + bias, over the last dimension.

    Arguments, numerics and what is saved as in `rms_norm`; 8 bytes a row. Under CUDA autocast x is cast to float32, as
    torch does.
    Source: Ba et al. 2016, arXiv:1607.06450.
    """
    if is_compiling():
        return F.layer_norm(x, (x.shape[-1],), weight, bias, eps)
    if x.is_cuda and torch.is_autocast_enabled("cuda"):
        x = x.float()
    return _norm(x, weight, bias, eps, 0.0, True, keep)


class RMSNorm(nn.Module):
    """`rms_norm` as a module with the parameter `weight` (K,). `promotes`: a weight of a wider dtype than x makes the
    result as wide, as a product weight · x̂ does; otherwise it has x's dtype. None: where offset is 0."""

    weight: nn.Parameter | None

    def __init__(
        self,
        weight: nn.Parameter | None,
        eps: float = 1e-6,
        offset: float = 0.0,
        keep: Keep | None = None,
        promotes: bool | None = None,
    ):
        super().__init__()
        self.register_parameter("weight", weight)
        self.eps, self.offset, self.keep = eps, offset, keep or Exact()
        self.promotes = offset == 0 if promotes is None else promotes

    def forward(self, x: Tensor | None = None, **named: Tensor) -> Tensor:
        x = only(x, named) if x is None or named else x
        weight = self._parameters["weight"] if "weight" in self._parameters else self.weight  # a tenth of the time
        if weight is not None and self.promotes and weight.dtype != x.dtype:
            x = x.to(torch.promote_types(x.dtype, weight.dtype))
        return rms_norm(x, weight, self.eps, self.offset, self.keep)

    def extra_repr(self) -> str:
        size = None if self.weight is None else tuple(self.weight.shape)
        return f"{size}, eps={self.eps}, offset={self.offset}, {self.keep}"


class LayerNorm(nn.LayerNorm):
    """`layer_norm` as a module with the parameters `weight` and `bias` (K,). It is an nn.LayerNorm, since trainers ask
    for that class where they leave out weight decay."""

    weight: nn.Parameter | None
    bias: nn.Parameter | None

    def __init__(
        self,
        weight: nn.Parameter | None,
        bias: nn.Parameter | None,
        eps: float = 1e-5,
        keep: Keep | None = None,
    ):
        nn.Module.__init__(self)  # without parameters of its own
        self.register_parameter("weight", weight)
        self.register_parameter("bias", bias)
        if weight is not None:
            self.normalized_shape = tuple(weight.shape)
        self.elementwise_affine, self.eps, self.keep = weight is not None, eps, keep or Exact()

    def forward(self, x: Tensor | None = None, **named: Tensor) -> Tensor:
        x = only(x, named) if x is None or named else x
        return layer_norm(x, self.weight, self.bias, self.eps, self.keep)

    def extra_repr(self) -> str:
        size = None if self.weight is None else tuple(self.weight.shape)
        return f"{size}, eps={self.eps}, {self.keep}"
