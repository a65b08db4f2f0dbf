"""efftune.Linear: one module, three axes."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.compiler import is_compiling

from efftune.errors import EfftuneError
from efftune.hooks import hooked
from efftune.linear.base.dense import Dense
from efftune.linear.contracts import Base, Delta, Keep, Need, check
from efftune.linear.delta.full import Full
from efftune.linear.delta.none import NoDelta
from efftune.linear.function import apply_linear, as_matrix
from efftune.linear.handle import Source, source_of
from efftune.linear.keep.exact import Exact
from efftune.linear.scores import TokenScores
from efftune.ops.draw_seed import draw_seed


def is_conv1d(module: nn.Module) -> bool:
    """Whether it is transformers' Conv1D, a linear layer with W stored as (K, N)."""
    return type(module).__name__ == "Conv1D" and type(module).__module__ == "transformers.pytorch_utils"


class Linear(nn.Module):
    """y = x · base(W)ᵀ + delta(x) + bias, while backward keeps keep(x). Made by `Linear.from_linear`.

    Args:
        base: how W is stored, `Dense()` or `Int8(group=64)`.   w: its tensors, as `base.store(weight)` gives them.
        delta: what is trained, `Full()`, `LoRA(r=16)` or `NoDelta()`.
        keep: what backward keeps of x, `Exact()`, `Quantized(bits)`, `Sampled(ratio)` or `Nothing()`.
        bias: (N,) or None; trains if it requires grad.   p: the delta's tensors; fresh ones if None.
    Shapes: x (..., K), y (..., N), both of W's dtype, or under autocast of autocast's.
    Saved for backward: what `delta` and `keep` say, and only for gradients that are asked for.
    Raises: EfftuneError if the three cannot be combined; TypeError if x has another dtype than W outside autocast.
    """

    bias: nn.Parameter | None
    in_features: int
    out_features: int
    conv1d: type | None = None  # the class of the plain layer, where it is transformers' Conv1D
    scores: TokenScores | None = None  # of a keep that samples: which rows' gradients are expected to be large

    def __init__(self, base: Base, w, delta: Delta, keep: Keep, bias: nn.Parameter | None = None, p=None):
        super().__init__()
        self.out_features, self.in_features = base.shape(w)
        problem = check(base, delta, keep, (self.out_features, self.in_features))
        if problem is not None:
            raise EfftuneError(problem + ".")
        self.base, self.delta, self.keep = base, delta, keep
        self._eval_delta = delta.eval()
        p = delta.init(base, w) if p is None else p
        w_trains, p_trains = delta.trainable(base, w)
        self._w_trains = any(w_trains)
        for name, tensor, trains in zip((*base.names, *delta.names), (*w, *p), (*w_trains, *p_trains), strict=True):
            if not tensor.is_floating_point():
                self.register_buffer(name, tensor)
                continue
            # An nn.Parameter that comes in stays the same object, so that tied weights stay tied.
            parameter = tensor if isinstance(tensor, nn.Parameter) else nn.Parameter(tensor, requires_grad=False)
            parameter.requires_grad_(trains)
            self.register_parameter(name, parameter)
        self.register_parameter("bias", bias)

    @classmethod
    def from_linear(
        cls, linear: nn.Module, base: Base | None = None, delta: Delta | None = None, keep: Keep | None = None
    ) -> Linear:
        """The layer `linear` (nn.Linear, transformers' Conv1D or efftune.Linear) with the given axes replaced and the
        others as they are.

        W and the bias are shared, not copied, unless `base` stores them otherwise. An nn.Linear counts as `Dense`, as
        `Full` if its weight requires grad and `NoDelta` if not, and as `Exact`.
        """
        if isinstance(linear, Linear):
            w, p, bias = linear.stored(), linear.added(), linear.bias
            old = linear.base, linear.delta, linear.keep
        elif isinstance(linear, nn.Linear) or is_conv1d(linear):
            plain = cast(nn.Linear, linear)
            w, p, bias = (plain.weight,), (), plain.bias
            old = Dense(is_conv1d(linear)), Full() if linear.weight.requires_grad else NoDelta(), Exact()
        else:
            raise EfftuneError(
                f"from_linear takes an nn.Linear, a Conv1D or an efftune.Linear, not {type(linear).__name__}."
            )
        if hooked(linear):
            raise EfftuneError(
                "it has hooks or a state dict of its own, which the new layer would not have; add hooks after the swap."
            )
        if base is not None and base != old[0]:
            n, _ = old[0].shape(w)
            w = base.store(old[0].rows(w, 0, n, old[0].dtype(w)).detach())
        if delta is not None and delta != old[1]:
            p = None
            if bias is not None and not isinstance(delta, Full):
                bias.requires_grad_(False)  # what trains is the adapter; who wants the bias too says so afterwards
        new = cls(base or old[0], w, delta or old[1], keep or old[2], bias, p)
        new.conv1d = type(linear) if is_conv1d(linear) else getattr(linear, "conv1d", None)
        new.scores = getattr(linear, "scores", None)
        return new.train(linear.training)

    def stored(self) -> tuple[Tensor, ...]:
        return self._tensors(self.base.names)

    def added(self) -> tuple[Tensor, ...]:
        return self._tensors(self.delta.names)

    def _tensors(self, names: tuple[str, ...]) -> tuple[Tensor, ...]:
        parameters: dict[str, Any] = self._parameters  # a tenth of the time of nn.Module's __getattr__
        return tuple([parameters[name] if name in parameters else getattr(self, name) for name in names])

    def forward(self, x: Tensor) -> Tensor:
        device, w, source = "cpu" if x.is_cpu else x.device.type, self.stored(), None
        if torch.is_grad_enabled() and not is_compiling():
            source = source_of(x, create=self.keep.random or self.delta.random)
        if torch.is_autocast_enabled(device) and x.dtype != torch.float64:
            # Cast outside the Function, so that autograd casts dx back; inside, every operand already has its dtype.
            dtype = torch.get_autocast_dtype(device)
            if source is not None and x.dtype != dtype:
                source = source.cast(dtype)
            x = x.to(dtype)
            with torch.autocast(device, enabled=False):
                return self._forward(x, w, source)
        dtype = self.base.dtype(w)
        if x.dtype != dtype:
            raise TypeError(f"x is {x.dtype} and the layer is {dtype}; cast one of them or run under torch.autocast.")
        return self._forward(x, w, source)

    def _forward(self, x: Tensor, w: tuple[Tensor, ...], source: Source | None) -> Tensor:
        p = self.added()
        bias = self._parameters["bias"] if "bias" in self._parameters else self.bias
        delta = self.delta if self.training else self._eval_delta
        if torch.is_grad_enabled():
            need = Need(
                x.requires_grad,
                bias is not None and bias.requires_grad,
                tuple([t.requires_grad for t in w]),
                tuple([t.requires_grad for t in p]),
            )
        else:
            need = Need(False, False, (False,) * len(w), (False,) * len(p))
        if not self._w_trains and any(need.w):
            raise RuntimeError(
                f"{delta} does not train the weight that it adds to, and this one requires grad: it was unfrozen by "
                "hand, or is tied to a layer that trains."
            )
        if bias is not None and bias.dtype != x.dtype:
            bias = bias.to(x.dtype)
        needed = need.any()
        seed = draw_seed() if delta.random or (self.keep.random and needed) else None
        if needed:
            if source is not None and self.scores is not None:
                source.scores = self.scores.of_rows(x)
            return apply_linear((self.base, delta, self.keep), need, source, seed, x, bias, *w, *p)
        y, _ = delta.forward(self.base, self.keep, as_matrix(x), bias, w, p, seed, need, None)
        return y.view(*x.shape[:-1], y.shape[-1])

    @torch.no_grad()
    def merge(self) -> nn.Module:
        """The plain nn.Linear (or Conv1D, where it was one) with W + ΔW, added in float32 (float64 layers: in float64)
        and rounded once to W's dtype. Shares what did not change."""
        w, p, dtype = self.stored(), self.added(), self.base.dtype(self.stored())
        if self.conv1d is None:
            linear = nn.Linear(self.in_features, self.out_features, bias=False, device="meta", dtype=dtype)
        else:
            with torch.device("meta"):
                linear = self.conv1d(self.out_features, self.in_features)
        if self.delta.rows(p, 0, 0) is None and self.base == Dense(self.conv1d is not None):
            linear.weight = w[0]
        else:
            weight = torch.empty(self.out_features, self.in_features, device=w[0].device, dtype=dtype)
            step = max(1, 2**22 // self.in_features)  # tiles of 16 MiB in float32
            for a in range(0, self.out_features, step):
                b = min(a + step, self.out_features)
                added = self.delta.rows(p, a, b)
                rows = self.base.rows(w, a, b, dtype if added is None else added.dtype)
                weight[a:b] = rows if added is None else rows + added
            linear.weight = nn.Parameter(
                weight if self.conv1d is None else weight.t().contiguous(), requires_grad=False
            )
        linear.register_parameter("bias", self.bias)
        return linear.train(self.training)

    def extra_repr(self) -> str:
        shape = f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"
        return f"{shape}, {self.base}, {self.delta}, {self.keep}"
