"""efftune.Linear: one module, three axes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.compiler import is_compiling

from efftune.errors import EfftuneError
from efftune.hooks import hooked, watched
from efftune.linear.base.dense import FLOATS, Dense, is_conv1d
from efftune.linear.contracts import Base, Call, Delta, Keep, Need, Stored, Tensors, check
from efftune.linear.delta.none import NoDelta
from efftune.linear.delta.trained import Trained
from efftune.linear.function import apply_linear, as_matrix, new
from efftune.linear.handle import Source, source_of
from efftune.linear.keep.exact import Exact
from efftune.linear.unpacked import weight_of
from efftune.ops._op import forced_backend
from efftune.ops.draw_seed import draw_seed

HOOKED = "it has hooks or a state dict of its own, which the new layer would not have; add hooks after the swap"


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
    `weight` is W as the plain layer has it, without what the delta adds. Where the base stores codes, its dtype, device
        and shape cost nothing, and whoever computes with it unpacks W.
    Raises: EfftuneError if the three cannot be combined; TypeError if x has another dtype than W outside autocast.
    """

    bias: nn.Parameter | None
    in_features: int
    out_features: int
    conv1d: type | None = None  # the class of the plain layer, where it is transformers' Conv1D
    scores: Any = None  # of a keep that samples: `scores.of_rows(x)` says which rows' gradients may be large
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
        self._eval_delta, self._in_place = delta.eval(), delta.in_place
        self._delta_draws = delta.random  # a property: half a microsecond, twice a call
        if p is None:
            p = delta.init(w.shape, w.dtype, w.tensors[0].device)
        if self._in_place:
            refuse_alias(delta, w, p)
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
        """The layer `linear` (nn.Linear, transformers' Conv1D, efftune.Linear, or what `base` adopts: a quantised layer
        of another library) with the given axes replaced and the others as they are.

        W and the bias are shared, not copied, unless `base` stores them otherwise. What is no efftune.Linear counts as
        `Trained` if its weight requires grad and `NoDelta` if not, and as `Exact`. An efftune.Linear whose delta is
        replaced is not to be called any more if that delta writes into W.
        """
        holder, w, p = opened(linear, base, delta)
        bias: Any = linear.bias
        if isinstance(linear, Linear):
            old = linear.delta, linear.keep
        else:
            trains = any(t.requires_grad for t in w.tensors)
            old = Trained() if trains else NoDelta(), Exact()
            if bias is not None and not isinstance(bias, nn.Parameter):
                bias = nn.Parameter(bias, requires_grad=False)
        base, delta, keep = base or holder, delta or old[0], keep or old[1]
        if delta == old[0] == Trained() and holder.trains and not base.trains:
            raise EfftuneError(
                f"its weight trains and {base} stores integers; add an adapter such as LoRA(r=16), or freeze it."
            )
        if delta != old[0] and bias is not None and not isinstance(delta, Trained):
            bias.requires_grad_(False)  # what trains is the adapter; who wants the bias too says so afterwards
        to_store, p = begun(holder, w, base, delta, p)
        if to_store is not None:
            w = w._replace(tensors=base.store(to_store))
        new = cls(base, w, delta, keep, bias, p)
        new.conv1d = type(linear) if is_conv1d(linear) else getattr(linear, "conv1d", None)
        if isinstance(linear, Linear) or isinstance(holder, Dense):
            carry(linear, new)  # what another library hangs on its layers is how it stores them
        new.scores = getattr(linear, "scores", None)
        return new.train(linear.training)

    def stored(self) -> Stored:
        """W as it is held, an in-place delta in it: the tensors, (N, K), and the dtype that it has now."""
        tensors = self._tensors(self.base.names)
        w = new(Stored, (tensors, self._shape, self.base.dtype(tensors) or self._dtype))
        if self._in_place:
            # Always: an optimizer that writes by a fused kernel or through `.data`, a tensor that is swapped for a
            # while, a copy and a checkpoint leave no trace to tell a change by. It costs what trains, and not W.
            if is_compiling():
                raise EfftuneError(not_compiled(self.delta))
            with torch.no_grad():
                self.delta.put(self._call(w))
        return w

    def __getattr__(self, name: str) -> Any:
        # Not a property: it would stand in front of the parameter that most bases have.
        if name == "weight" and "base" in vars(self) and name not in self.base.names:
            return weight_of(self)
        return super().__getattr__(name)

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "weight" and "base" in vars(self) and name not in self.base.names:
            raise EfftuneError(
                f"{self.base} stores codes, and a weight is none; give the plain layer another weight, before the "
                "recipe is applied."
            )
        super().__setattr__(name, value)

    def take_back(self) -> Stored:
        """W as it is held, without what an in-place delta writes into it: until `stored` or the layer is called."""
        w = self.stored()
        if self._in_place:
            with torch.no_grad():
                self.delta.take_back(self._call(w))
        return w

    def _call(self, w: Stored) -> Call:
        """A call that nobody asks gradients of."""
        p = self.added()
        need = Need(False, False, (False,) * len(w.tensors), (False,) * len(p))
        return Call(self.base, self.keep, w, p, None, None, need, None)

    @torch.no_grad()
    def replace(self, p: Tensors) -> None:
        """Copies p over the tensors of the delta, which stay the same objects, after their old values have been taken
        back out of a W that holds them. Those that `delta.resizes` names may have another length."""
        # Cloned, since p may have in it what is written to here: those that stay, or parts of them.
        given = {name: tensor.detach().clone() for name, tensor in zip(self.delta.names, p, strict=True)}
        for name, own in zip(self.delta.names, self.added(), strict=True):
            if name not in self.delta.resizes and given[name].shape != own.shape:
                raise EfftuneError(
                    f"{name} of {self.delta} is {tuple(own.shape)} and was given {tuple(given[name].shape)}; only what "
                    "`resizes` names can have another length."
                )
        self.make_room(given)
        for name, tensor in given.items():
            getattr(self, name).copy_(tensor)

    def make_room(self, given: Mapping[str, Tensor]) -> list[tuple[Tensor, Tensor]]:
        """To be called before values are copied over the tensors of the delta: takes the old ones back out of a W that
        holds them, and gives those that `delta.resizes` names the length of the given ones. Returns the resized
        tensors, each with the `.data` that it had.

        Raises: ValueError, before anything is changed, for tensors that the delta refuses.
        """
        own = dict(zip(self.delta.names, self.added(), strict=True))
        self.delta.refuse(own | dict(given), self._shape)  # a part of them has to fit the rest
        before = []
        self.take_back()  # first: it reads what is resized below
        for name in self.delta.resizes:
            tensor, other = cast(Tensor, getattr(self, name)), given.get(name)
            if other is not None and other.dim() == tensor.dim() and other.shape[1:] == tensor.shape[1:]:
                before.append((tensor, tensor.data))
                tensor.data = tensor.data.new_empty(other.shape)
        return before

    def weight_rows(self, a: int, b: int, dtype: torch.dtype) -> Tensor:
        """W[a:b] (b - a, K) in dtype with what the delta adds to it: W itself where it is that, and not to be written
        to."""
        return self._rows(self.delta, self.stored(), a, b, dtype)

    @torch.no_grad()
    def _rows(self, delta: Delta, w: Stored, a: int, b: int, dtype: torch.dtype) -> Tensor:
        return delta.weight(self._call(w), a, b, dtype)

    def added(self) -> tuple[Tensor, ...]:
        return self._tensors(self.delta.names)

    def _tensors(self, names: tuple[str, ...]) -> tuple[Tensor, ...]:
        parameters: dict[str, Any] = self._parameters  # a tenth of the time of nn.Module's __getattr__
        try:
            return tuple([parameters[name] for name in names])
        except KeyError:
            own: dict[str, Any] = {**self._buffers, **parameters}
            return tuple([own[name] if name in own else getattr(self, name) for name in names])

    def forward(self, x: Tensor) -> Tensor:
        group = self.group  # read once: a call in another thread may end it
        if group is not None and (y := group.output(self, x)) is not None:
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
        return self._plain(self.delta, self.stored())

    def remove(self) -> nn.Module:
        """The plain layer with the stored W, without what the delta adds to it. Shares W: this layer is not to be
        called any more if its delta writes into it."""
        return self._plain(NoDelta(), self.take_back())

    @torch.no_grad()
    def _plain(self, delta: Delta, w: Stored) -> nn.Module:
        if self.conv1d is None:
            linear = nn.Linear(self.in_features, self.out_features, bias=False, device="meta", dtype=w.dtype)
        else:
            with torch.device("meta"):
                linear = self.conv1d(self.out_features, self.in_features)
        if not delta.adds and self.base == Dense(self.conv1d is not None):
            linear.weight = w.tensors[0]
        else:
            dtype = torch.promote_types(w.dtype, torch.float32) if delta.adds else w.dtype
            weight = torch.empty(w.shape, device=w.tensors[0].device, dtype=w.dtype)
            step = max(1, 2**22 // self.in_features)  # tiles of 16 MiB in float32
            for a in range(0, self.out_features, step):
                b = min(a + step, self.out_features)
                weight[a:b] = self._rows(delta, w, a, b, dtype)
            linear.weight = nn.Parameter(
                weight if self.conv1d is None else weight.t().contiguous(), requires_grad=False
            )
        linear.register_parameter("bias", self.bias)
        carry(self, linear)
        return linear.train(self.training)

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        if self._in_place:
            self.stored()  # W as of now, whatever has been stepped since it was read
        super()._save_to_state_dict(destination, prefix, keep_vars)

    def _load_from_state_dict(self, state_dict, prefix, local_metadata, strict, missing, unexpected, errors):
        if self._in_place:
            given = {name for name in (*self.base.names, *self.delta.names) if prefix + name in state_dict}
            lacking = [name for name in self.delta.names if name not in given]
            if lacking and not given.isdisjoint(self.base.names):
                errors.append(
                    f"{prefix}{self.base.names[0]} comes without {', '.join(lacking)}, which tell what {self.delta} "
                    "wrote into it; load it before the recipe is applied."
                )
                return
        if self._in_place or self.delta.resizes:
            names = (*self.base.names, *self.delta.names)
            self.make_room({name: state_dict[prefix + name] for name in names if prefix + name in state_dict})
        super()._load_from_state_dict(state_dict, prefix, local_metadata, strict, missing, unexpected, errors)

    def _apply(self, fn, recurse=True):
        """`.to()` and its like: what the base calls fixed moves and keeps its dtype, W takes the new one, and what the
        delta calls wide takes no narrower one than float32."""
        fixed = {name: cast(Tensor, self._buffers.pop(name)) for name in self.base.fixed}
        parameters = [cast(Tensor, getattr(self, name)) for name in self.delta.wide]
        wide = {id(tensor) for p in parameters for tensor in (p, p.grad)}

        def move(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            if id(tensor) not in wide or moved.dtype.itemsize >= 4:
                return moved
            return tensor.to(moved.device, torch.float32)

        super()._apply(move, recurse)
        for name, tensor in fixed.items():
            moved = fn(tensor)
            self._buffers[name] = moved if moved.dtype == tensor.dtype else tensor.to(moved.device)
        if fixed:
            self._dtype = fn(torch.empty(0, dtype=self._dtype)).dtype
        return self

    def extra_repr(self) -> str:
        shape = f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"
        return f"{shape}, {self.base}, {self.delta}, {self.keep}"


def carry(old: nn.Module, new: nn.Module) -> None:
    """Lets parameters, buffers, modules and attributes that somebody has hung on the layer `old` go with it."""
    own = {"weight", "bias", *((*old.base.names, *old.delta.names) if isinstance(old, Linear) else ())}
    for kind in ("_parameters", "_buffers", "_modules"):
        for name, value in vars(old)[kind].items():
            if name not in own:
                vars(new)[kind].setdefault(name, value)
    new._non_persistent_buffers_set |= old._non_persistent_buffers_set & new._buffers.keys()
    for name, value in vars(old).items():
        if name not in ATTRIBUTES:
            vars(new).setdefault(name, value)


# Of an efftune.Linear, beside those of every module.
ATTRIBUTES = {
    "base", "delta", "keep", "w_trains", "scores", "group", "conv1d", "_shape", "_dtype", "_eval_delta", "_in_place",
    "_delta_draws",
}  # fmt: skip


def refuse_alias(delta: Delta, w: Stored, p: Tensors) -> None:
    """Raises EfftuneError where a tensor of an in-place delta is a part of W. (torch's fused optimizers write beside a
    strided one, and what W was before could not be kept in it.)"""
    memory = {t.untyped_storage()._cdata for t in w.tensors}
    for name, tensor in zip(delta.names, p, strict=True):
        if tensor.untyped_storage()._cdata in memory:
            raise EfftuneError(
                f"{name} of {delta} shares memory with the weight that it writes to; let `begin` clone it."
            )


def not_compiled(delta: Delta) -> str:
    # It would be right: the graph writes into a copy of W, which backward keeps, and copies that back into W.
    name = type(delta).__name__
    return f"{name} writes into the stored weight, of which a compiled graph would keep a copy; leave the layer eager."


def opened(linear: nn.Module, base: Base | None, delta: Delta | None) -> tuple[Base, Stored, Tensors | None]:
    """The base that `linear` is stored by, W without what `delta` replaces, and p if its delta stays.

    Raises: EfftuneError if no base has its storage, or if a new layer would lack what it has beside.
    """
    if isinstance(linear, Linear):
        stays = delta is None or delta == linear.delta
        holder, w, p = linear.base, linear.stored() if stays else linear.take_back(), linear.added() if stays else None
        loses = hooked(linear, by=Linear)
    else:
        (holder, w), p = adopted(linear, base), None
        # What another library does to its state dict concerns its own storage, which is not its own any more.
        loses = hooked(linear) if isinstance(holder, Dense) else watched(linear)
    if loses:
        raise EfftuneError(HOOKED + ".")
    return holder, w, p


def begun(holder: Base, w: Stored, base: Base, delta: Delta, p: Tensors | None) -> tuple[Tensor | None, Tensors]:
    """The dense weight that `base` is to store, or None where W stays as it is; and p as it begins, where None is
    given."""
    to_store = None
    begins = p is None and type(delta).begin is not Delta.begin  # from W
    if base != holder or begins:
        weight = holder.rows(w, 0, w.shape[0], w.dtype).detach()
        changed, p = delta.begin(weight) if begins else (weight, p)
        if base != holder or changed is not weight:
            to_store = changed
    return to_store, delta.init(w.shape, w.dtype, w.tensors[0].device) if p is None else p


@torch.no_grad()
def rehearse(linear: nn.Module, base: Base, delta: Delta) -> None:
    """Raises what `Linear.from_linear` would for a layer whose weight is frozen, and leaves it as it is: all that is
    made is dropped. It draws what that draws."""
    holder, w, p = opened(linear, base, delta)
    to_store, p = begun(holder, w, base, delta, p)
    if to_store is not None:
        base.refuse(to_store)
    elif delta.in_place:
        refuse_alias(delta, w, p)
    if isinstance(linear, Linear):
        linear.stored()  # with the delta that it has


def adopted(module: nn.Module, base: Base | None) -> tuple[Base, Stored]:
    """What `module` stores, and the base that it is the storage of: the given one, or else a dense one.

    Raises: EfftuneError if it is of neither.
    """
    for holder in (base, Dense(transposed=is_conv1d(module))):
        if holder is not None and (w := holder.adopt(module)) is not None:
            return holder, w
    kind = type(module).__name__
    if base is None or isinstance(base, Dense):
        floats = ", ".join(str(dtype).removeprefix("torch.") for dtype in FLOATS)
        why = (
            f"from_linear takes an nn.Linear or a Conv1D with a dense weight in {floats}, or an efftune.Linear, not "
            f"this {kind}; give a base for it, or"
        )
    else:
        why = f"{base} cannot adopt what a {kind} stores;"
    raise EfftuneError(f"{why} put an nn.Linear with its dequantised weight in its place.")


def take_back(model: nn.Module) -> None:
    """Leaves every W in the model as it was stored, until its layer is called: for who reads parameters themselves."""
    for layer in model.modules():
        if isinstance(layer, Linear):
            layer.take_back()


@contextmanager
def room_for(model: nn.Module, tensors: Mapping[str, Tensor]) -> Iterator[None]:
    """Within it, `tensors` (by their names in the model) can be copied over those of its layers, whatever length they
    have, and no W is to be asked for. Everything has its own length and values again if that raises."""
    before = []
    try:
        for path, layer in model.named_modules():
            if isinstance(layer, Linear) and (layer.delta.in_place or layer.delta.resizes):
                names = {name: f"{path}.{name}" for name in layer.delta.names}
                try:
                    before += layer.make_room({name: tensors[full] for name, full in names.items() if full in tensors})
                except ValueError as error:
                    raise EfftuneError(f"{path}: {error}") from None
        yield
    except BaseException:
        for tensor, data in before:
            tensor.data = data
        raise
