"""efftune.Linear: one module, three axes."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.compiler import is_compiling

from efftune.errors import EfftuneError
from efftune.hooks import hooked
from efftune.linear.base.dense import Dense
from efftune.linear.contracts import Base, Call, Delta, Keep, Need, Stored, Tensors, check
from efftune.linear.delta.none import NoDelta
from efftune.linear.delta.trained import Trained
from efftune.linear.function import apply_linear, as_matrix, new
from efftune.linear.handle import Source, source_of
from efftune.linear.keep.exact import Exact
from efftune.linear.scores import TokenScores
from efftune.ops._op import forced_backend
from efftune.ops.draw_seed import draw_seed


def is_conv1d(module: nn.Module) -> bool:
    """Whether it is transformers' Conv1D, a linear layer with W stored as (K, N)."""
    return type(module).__name__ == "Conv1D" and type(module).__module__ == "transformers.pytorch_utils"


def not_dense(base: Base) -> str:
    """Why full fine-tuning cannot train a weight that is stored so."""
    return (
        f"full trains the stored weight itself and {base} stores integers; add an adapter such as lora(r=16), or train "
        "the scales by peqa"
    )


class Linear(nn.Module):
    """y = x · base(W)ᵀ + delta(x) + bias, while backward keeps keep(x). Made by `Linear.from_linear`.

    Args:
        base: how W is stored, `Dense()` or `Int8(group=64)`.   w: its tensors, as `base.store(weight)` gives them, and
            the shape and dtype of W.
        delta: what is trained, `Trained()`, `LoRA(r=16)` or `NoDelta()`.
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
    group: Any = None  # the Group that it is in while a module around it runs (see linear/group.py)

    def __init__(
        self,
        base: Base,
        w: Stored,
        delta: Delta,
        keep: Keep,
        bias: nn.Parameter | None = None,
        p: Tensors | None = None,
    ):
        super().__init__()
        self.out_features, self.in_features = self._shape = w.shape
        problem = check(base, delta, keep, w.shape)
        if problem is not None:
            raise EfftuneError(problem + ".")
        self.base, self.delta, self.keep, self._dtype = base, delta, keep, w.dtype
        self._eval_delta = delta.eval()
        self._delta_draws = delta.random  # a property: half a microsecond, twice a call
        if p is None:
            p = delta.init(w.shape, w.dtype, w.tensors[0].device)
        learns = {*delta.stored_learns(base), *(delta.names if delta.learns is None else delta.learns)}
        self.w_trains = not learns.isdisjoint(base.names)
        for name, tensor in zip((*base.names, *delta.names), (*w.tensors, *p), strict=True):
            if not tensor.is_floating_point() or name in base.fixed:
                self.register_buffer(name, tensor)
                continue
            # An nn.Parameter that comes in stays the same object, so that tied weights stay tied.
            parameter = tensor if isinstance(tensor, nn.Parameter) else nn.Parameter(tensor, requires_grad=False)
            parameter.requires_grad_(name in learns)
            self.register_parameter(name, parameter)
        self.register_parameter("bias", bias)

    @classmethod
    def from_linear(
        cls, linear: nn.Module, base: Base | None = None, delta: Delta | None = None, keep: Keep | None = None
    ) -> Linear:
        """The layer `linear` (nn.Linear, transformers' Conv1D or efftune.Linear) with the given axes replaced and the
        others as they are.

        W and the bias are shared, not copied, unless `base` stores them otherwise. An nn.Linear counts as `Dense`, as
        `Trained` if its weight requires grad and `NoDelta` if not, and as `Exact`.
        """
        if isinstance(linear, Linear):
            w, p, bias = linear.stored(), linear.added(), linear.bias
            old = linear.base, linear.delta, linear.keep
        elif isinstance(linear, nn.Linear) or is_conv1d(linear):
            plain = cast(nn.Linear, linear)
            transposed, weight, p, bias = is_conv1d(linear), plain.weight, (), plain.bias
            n, k = weight.shape[::-1] if transposed else weight.shape
            w = Stored((weight,), (n, k), weight.dtype)
            old = Dense(transposed), Trained() if weight.requires_grad else NoDelta(), Exact()
        else:
            raise EfftuneError(
                f"from_linear takes an nn.Linear, a Conv1D or an efftune.Linear, not {type(linear).__name__}."
            )
        if hooked(linear):
            raise EfftuneError(
                "it has hooks or a state dict of its own, which the new layer would not have; add hooks after the swap."
            )
        base, delta, keep = base or old[0], delta or old[1], keep or old[2]
        if delta == old[1] == Trained() and old[0].trains and not base.trains:
            raise EfftuneError(not_dense(base) + ".")
        if delta != old[1]:
            p = None
            if bias is not None and not isinstance(delta, Trained):
                bias.requires_grad_(False)  # what trains is the adapter; who wants the bias too says so afterwards
        begins = p is None and type(delta).begin is not Delta.begin  # from W
        if base != old[0] or begins:
            weight = to_store = old[0].rows(w, 0, w.shape[0], w.dtype).detach()
            if begins:
                to_store, p = delta.begin(weight)
            if base != old[0] or to_store is not weight:
                w = w._replace(tensors=base.store(to_store))
        new = cls(base, w, delta, keep, bias, p)
        new.conv1d = type(linear) if is_conv1d(linear) else getattr(linear, "conv1d", None)
        new.scores = getattr(linear, "scores", None)
        return new.train(linear.training)

    def stored(self) -> Stored:
        """W as it is held: the tensors, (N, K), and the dtype that it has now."""
        tensors = self._tensors(self.base.names)
        return new(Stored, (tensors, self._shape, self.base.dtype(tensors) or self._dtype))

    def added(self) -> tuple[Tensor, ...]:
        return self._tensors(self.delta.names)

    def _tensors(self, names: tuple[str, ...]) -> tuple[Tensor, ...]:
        parameters: dict[str, Any] = self._parameters  # a tenth of the time of nn.Module's __getattr__
        try:
            return tuple([parameters[name] for name in names])
        except KeyError:
            return tuple([getattr(self, name) for name in names])

    def forward(self, x: Tensor) -> Tensor:
        if self.group is not None and (y := self.group.output(self, x)) is not None:
            return y
        w, source, compiling = self.stored(), None, is_compiling()
        if torch.is_grad_enabled() and not compiling:
            source = source_of(x, create=self.keep.random or (self.training and self._delta_draws))
        device = x.device.type if torch._C._is_any_autocast_enabled() else None
        if device is not None and torch.is_autocast_enabled(device) and x.dtype != torch.float64:
            # Cast outside the Function, so that autograd casts dx back; inside, every operand already has its dtype.
            dtype = torch.get_autocast_dtype(device)
            if source is not None and x.dtype != dtype:
                source = source.cast(dtype)
            x = x.to(dtype)
            with torch.autocast(device, enabled=False):
                return self._forward(x, w, source, compiling)
        if x.dtype != w.dtype:
            raise TypeError(f"x is {x.dtype} and the layer is {w.dtype}; cast one of them or run under torch.autocast.")
        return self._forward(x, w, source, compiling)

    def _forward(self, x: Tensor, w: Stored, source: Source | None, compiling: bool) -> Tensor:
        axes, p, bias, need = self.operands(x, w)
        delta = axes[1]
        if any(need.w) and not self.w_trains:
            raise RuntimeError(
                f"{delta} does not train the weight that it adds to, and this one requires grad: it was unfrozen by "
                "hand, or is tied to a layer that trains."
            )
        if bias is not None and bias.dtype != x.dtype:
            bias = bias.to(x.dtype)
        needed = need.any()
        seed = None
        if (self.keep.random and needed) or (self._delta_draws and delta.random):
            seed = draw_seed()
        if needed:
            if source is not None and self.scores is not None:
                source.scores = self.scores.of_rows(x)
            backend = None if compiling else forced_backend()
            return apply_linear(axes, (w.shape, w.dtype), backend, need, source, seed, x, bias, *w.tensors, *p)
        y, _ = delta.forward(Call(self.base, self.keep, w, p, bias, seed, need, None), as_matrix(x))
        return y.view(*x.shape[:-1], y.shape[-1])

    def operands(self, x: Tensor, w: Stored) -> tuple[tuple[Base, Delta, Keep], Tensors, Tensor | None, Need]:
        """What a call with x works with, where w is `self.stored()`: the axes as they act in the layer's mode, what the
        delta adds, the bias, and which gradients are asked for."""
        tensors, p = w.tensors, self.added()
        bias = self._parameters["bias"] if "bias" in self._parameters else self.bias
        if torch.is_grad_enabled():
            need_w, need_p = tuple([t.requires_grad for t in tensors]), tuple([t.requires_grad for t in p])
            need = new(Need, (x.requires_grad, bias is not None and bias.requires_grad, need_w, need_p))
        else:
            need = Need(False, False, (False,) * len(tensors), (False,) * len(p))
        return (self.base, self.delta if self.training else self._eval_delta, self.keep), p, bias, need

    def merge(self) -> nn.Module:
        """The plain nn.Linear (or Conv1D, where it was one) with W + ΔW, added in float32 (float64 layers: in float64)
        and rounded once to W's dtype. Shares what did not change."""
        return self._plain(self.delta)

    def remove(self) -> nn.Module:
        """The plain layer with the stored W, without what the delta adds to it."""
        return self._plain(NoDelta())

    @torch.no_grad()
    def _plain(self, delta: Delta) -> nn.Module:
        w, p = self.stored(), self.added()
        if self.conv1d is None:
            linear = nn.Linear(self.in_features, self.out_features, bias=False, device="meta", dtype=w.dtype)
        else:
            with torch.device("meta"):
                linear = self.conv1d(self.out_features, self.in_features)
        if not delta.adds and self.base == Dense(self.conv1d is not None):
            linear.weight = w.tensors[0]
        else:
            need = Need(False, False, (False,) * len(w.tensors), (False,) * len(p))
            c = Call(self.base, self.keep, w, p, None, None, need, None)
            dtype = torch.promote_types(w.dtype, torch.float32) if delta.adds else w.dtype
            weight = torch.empty(w.shape, device=w.tensors[0].device, dtype=w.dtype)
            step = max(1, 2**22 // self.in_features)  # tiles of 16 MiB in float32
            for a in range(0, self.out_features, step):
                b = min(a + step, self.out_features)
                weight[a:b] = delta.weight(c, a, b, dtype)
            linear.weight = nn.Parameter(
                weight if self.conv1d is None else weight.t().contiguous(), requires_grad=False
            )
        linear.register_parameter("bias", self.bias)
        return linear.train(self.training)

    def _apply(self, fn, recurse=True):
        """`.to()` and its like: what the base calls fixed moves and keeps its dtype, and W takes the new one."""
        fixed = {name: cast(Tensor, self._buffers.pop(name)) for name in self.base.fixed}
        super()._apply(fn, recurse)
        for name, tensor in fixed.items():
            moved = fn(tensor)
            self._buffers[name] = moved if moved.dtype == tensor.dtype else tensor.to(moved.device)
        if fixed:
            self._dtype = fn(torch.empty(0, dtype=self._dtype)).dtype
        return self

    def extra_repr(self) -> str:
        shape = f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"
        return f"{shape}, {self.base}, {self.delta}, {self.keep}"
