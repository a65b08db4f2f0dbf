"""Whether two modules, or two functions, are the same function: tried on numbers, not told by names.

What is tried is a copy with small random weights, for fresh ones hide what is done with them (a norm's ones, zeros of
an MLP that starts as nothing), and real ones take time. It is tried in training and in evaluation mode, on inputs so
small that an epsilon shows and so large that a clamp does, with its derivative, and it must neither draw nor remember
anything. A copy is made by pickling; its bytes tell, too, whether a call has changed it, and which are alike.
"""

from __future__ import annotations

import inspect
import io
import pickle
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import count
from types import BuiltinFunctionType, CellType, FunctionType, ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from efftune.random_state import generator_states, restore_generators, unchanged

SCALES = tuple(2.0**e for e in (-20, -10, 0, 5, 10, 20))  # from below the eps of any norm to beyond any clamp
FORMS = (  # dtype, shape without the width, and size of x
    *((torch.float32, (2, 3), scale) for scale in SCALES),
    (torch.bfloat16, (2, 3), 1.0),
    (torch.float16, (2, 3), 8.0),  # a square times another, as in relu2, stays in its range
    *((torch.float32, shape, 1.0) for shape in ((), (70,), (2, 1), (1, 130), (2, 2, 3), (2, 1, 2, 3))),
)
LARGE = 2**26  # elements of tensors that are no parameters; with more, a module is not copied
PLAIN = frozenset((str, bytes, int, float, bool, type(None), dict, list, tuple, set))  # most of what is written
CODE = (FunctionType, staticmethod, classmethod, property)
SHARED = (type, ModuleType, torch.jit.ScriptFunction, torch._ops.OpOverload, torch._ops.OpOverloadPacket)


def stand_in(given: Any, **children: nn.Module | None) -> Any:
    """A copy of a module, or of another callable, on the CPU; None where it cannot be copied. A module's parameters are
    random ones of its own, and `children` stand in the place of those of these names. Whatever else it refers to is
    copied, so that nothing that the copy does reaches the original; only classes and the functions of Python modules
    are the same, and a module outside of it that it refers to is not copied, but makes it None."""
    seeds = count()
    return _copy(given, lambda p: _random(tuple(p.shape), next(seeds)), _numbers_of, children)


def outline(given: Any, mode: FakeTensorMode, **children: nn.Module | None) -> Any:
    """As `stand_in`, with fake tensors: of the same shapes, dtypes and devices, without numbers, so of any size."""

    def fake(tensor: Tensor) -> Tensor:
        return mode.from_tensor(tensor.detach())

    return _copy(given, fake, fake, children)


def _copy(
    given: Any,
    parameter: Callable[[Tensor], Tensor],
    tensor: Callable[[Tensor], Tensor],
    children: dict[str, nn.Module | None],
) -> Any:
    instead: dict[int, Any] = {id(given._modules[name]): child for name, child in children.items()}
    inside = _inside(given, instead)
    for module in inside:
        instead[id(module)] = object.__new__(type(module))
        for p in module._parameters.values():
            if p is not None:
                instead[id(p)] = nn.Parameter(parameter(p))
    try:
        data, parts = _written(given, inside)
        parts = [instead[id(part)] if id(part) in instead else _part(part, tensor) for part in parts]
        made = _Reader(data, parts).load()
    except Exception:  # locks, files, compiled code: there are too many kinds of what cannot be copied
        return None
    if not isinstance(given, nn.Module):
        return made
    for module, (_, state) in zip(inside, made, strict=True):
        vars(instead[id(module)]).update(state)
    return instead[id(given)]


def likeness(given: Any, *children: str) -> tuple[Any, Any] | None:
    """What a stand-in with other `children` is made of, as a key that is the same for blocks that differ in their
    weights only, and what has to be held while the key is in use, no parameters and no modules; None where there is no
    stand-in."""
    names = {id(given._modules[name]): name for name in children}
    inside = _inside(given, names)
    names |= {id(p): tuple(p.shape) for m in inside for p in m._parameters.values() if p is not None}
    names |= {id(module): "module" for module in inside}
    try:
        data, parts = _written(given, inside)
    except Exception:
        return None
    key = data, *[names.get(id(part), id(part)) for part in parts], *[code(module) for module in inside]
    return key, [part for part in parts if id(part) not in names]


def code(module: nn.Module) -> tuple:
    """The functions that the module's classes have, and those of their Python modules that they call by name: what
    somebody may exchange for others."""
    kinds = type(module).__mro__
    functions = [f for kind in kinds[: kinds.index(nn.Module)] for f in vars(kind).values() if isinstance(f, CODE)]
    called = [f.__globals__.get(name) for f in functions if isinstance(f, FunctionType) for name in f.__code__.co_names]
    return *functions, *[f for f in called if isinstance(f, FunctionType)]


def state(given: Any) -> tuple[Any, Any]:
    """What a callable, as a module, remembers: two are equal if it has changed nothing between, in place or not. The
    second of the pair has to be held meanwhile."""
    data, parts = _written(given, _inside(given, {}))
    return (data, [(id(part), part._version if isinstance(part, Tensor) else 0) for part in parts]), parts


def _inside(given: Any, without: dict) -> list[nn.Module]:
    """The modules in a module, itself the first, and not those inside of some. An attribute counts as inside if it is
    a module without parameters, as the activation that a module of ours took over from the one before it."""
    found: dict[int, nn.Module] = {}

    def visit(module: nn.Module | None) -> None:
        if module is not None and id(module) not in without and id(module) not in found:
            found[id(module)] = module
            for child in module._modules.values():
                visit(child)
            for other in vars(module).values():
                if isinstance(other, nn.Module) and next(other.parameters(), None) is None:
                    visit(other)

    visit(given if isinstance(given, nn.Module) else None)
    return list(found.values())


def _written(given: Any, inside: list[nn.Module]) -> tuple[bytes, list]:
    """The state as bytes, with a number for each tensor, module, class and function, and what the numbers stand for."""
    file = io.BytesIO()
    writer = _Writer(file)
    writer.dump([(type(m), vars(m)) for m in inside] if isinstance(given, nn.Module) else given)
    return file.getvalue(), writer.parts


class _Writer(pickle.Pickler):
    def __init__(self, file: io.BytesIO):
        super().__init__(file, pickle.HIGHEST_PROTOCOL)
        self.parts: list = []
        self.places: dict[int, int] = {}

    def persistent_id(self, obj: Any) -> int | None:
        if type(obj) in PLAIN:
            return None
        if isinstance(obj, _Same):
            obj = obj.value
        elif not isinstance(obj, (Tensor, nn.Module, *SHARED)) and not _global(obj):
            return None
        if id(obj) not in self.places:
            self.places[id(obj)] = len(self.parts)
            self.parts.append(obj)
        return self.places[id(obj)]

    def reducer_override(self, obj: Any, /) -> Any:
        if not isinstance(obj, FunctionType):
            return NotImplemented
        cells = [cell.cell_contents for cell in obj.__closure__ or ()]
        return _function, (_Same(obj), cells, obj.__defaults__, obj.__kwdefaults__, vars(obj))


class _Reader(pickle.Unpickler):
    def __init__(self, data: bytes, parts: list):
        super().__init__(io.BytesIO(data))
        self.parts = parts

    def persistent_load(self, pid: Any, /) -> Any:
        return self.parts[pid]


class _Same:
    """Stands for an object that is written as itself."""

    def __init__(self, value: Any):
        self.value = value


def _global(value: Any) -> bool:
    """Whether it is a function without state: of a Python module's, or built in and bound to nothing that changes."""
    if isinstance(value, BuiltinFunctionType):
        return isinstance(value.__self__, (type, ModuleType, type(None)))
    if not isinstance(value, FunctionType):
        return False
    home = sys.modules.get(value.__module__)
    return home is not None and vars(home).get(value.__qualname__) is value


def _function(old: FunctionType, cells: list, defaults: Any, kwdefaults: Any, attributes: dict) -> FunctionType:
    made = FunctionType(old.__code__, old.__globals__, old.__name__, defaults, tuple(CellType(c) for c in cells))
    made.__kwdefaults__ = kwdefaults
    vars(made).update(attributes)
    return made


def _part(value: Any, tensor: Callable[[Tensor], Tensor]) -> Any:
    """What a copy has in the place of a tensor, a class or a function."""
    if isinstance(value, nn.Module):
        raise pickle.PicklingError
    return tensor(value) if isinstance(value, Tensor) else value


def _numbers_of(tensor: Tensor) -> Tensor:
    if tensor.numel() > LARGE:
        raise pickle.PicklingError
    return tensor.detach().to("cpu", copy=True)


@contextmanager
def undisturbed(given: Any) -> Iterator[Callable[[], bool]]:
    """Yields a function that tells whether, since then, no global generator has drawn and `given` has changed nothing
    that it remembers; a module has to be in the mode that it began in. At the end the generators get their states back.
    """
    before = generator_states()
    remembered, _held = state(given)
    try:
        yield lambda: unchanged(before) and state(given)[0] == remembered
    finally:
        restore_generators(before)


@contextmanager
def at_home() -> Iterator[None]:
    """Within it, what a caller has set for tensors that are made or saved for backward does not reach the trials."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)
    try:
        with torch.device("cpu"), torch.autograd.graph.saved_tensors_hooks(lambda t: t, lambda t: t):
            yield
    finally:
        torch.set_default_dtype(before)


def linear(n: int, k: int, seed: int) -> nn.Linear:
    """A linear layer for a stand-in; two of one seed would be the same function, and hide which of them is where."""
    made = nn.Linear(k, n, device="meta")
    made.weight, made.bias = nn.Parameter(_random((n, k), seed) / k**0.5), nn.Parameter(_random((n,), seed))
    return made


def _random(shape: tuple[int, ...], seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), device="cpu")


def takes_one(module: nn.Module) -> bool:
    """Whether the module's forward takes one argument, so that nobody can give it another."""
    return len(inspect.signature(type(module).forward).parameters) == 2  # itself and x


def same(old: nn.Module, new: nn.Module, width: int) -> bool:
    """Whether two stand-ins over the same parameters give the same for x in all `FORMS`, then for large parameters:
    shape, dtype, values and gradient up to rounding, in either mode of `old`, without drawing or remembering. x of
    other than three dimensions counts only if `old` takes it."""
    for forms, size in ((FORMS, 1.0), (FORMS[2:3], 2.0**10)):
        with torch.no_grad():
            for p in old.parameters():
                p.mul_(size)  # what a norm gives is as large as its weight, whatever x
        with undisturbed(old.train()) as untouched:
            current = None
            for seed, (dtype, shape, scale) in enumerate(forms):
                if dtype != current:
                    for module in (old, new):
                        module.to(dtype)
                    current = dtype
                x = (_random((*shape, width), seed + 1) * scale).to(dtype)
                if seed == 0 and not _same_once(old, new, x, None, untouched):
                    return False
                if not agree(old, new, x, optional=x.ndim != 3):
                    return False
            old.train()
            if not untouched():
                return False
    return True


def _same_once(old: Any, new: Callable, x: Tensor, each: float | None, untouched: Callable[[], bool]) -> bool:
    """After one call: what changes and changes back does not show after two."""
    return agree(old.__call__, new, x, each) and untouched()


def promotes(module: nn.Module, width: int) -> bool | None:
    """Whether a stand-in in float32 gives float32 for a narrower x; None if it takes none."""
    with undisturbed(module.to(torch.float32)), _alone():
        try:
            found = _run(module, _random((2, 3, width)).bfloat16())
        except Exception:  # layers of two dtypes
            return None
    return None if found is None else found[0].dtype == torch.float32


def same_function(act: Callable[[Tensor], Tensor], formula: Callable[[Tensor], Tensor]) -> bool:
    """Whether an element-wise function, a stand-in or no module, is the formula: where it bends and far out, whatever
    the shape and dtype of x; without drawing or remembering."""
    far = torch.tensor([s * 2.0**e for e in (-10, 3.5, 4.5, 5.5, 7, 10, 20) for s in (1.0, -1.0)], device="cpu")
    x = torch.cat([torch.linspace(-8, 8, 1024, device="cpu"), far])  # without 0, where slopes may differ
    forms = [
        x,
        x.bfloat16(),
        x.clamp(-128, 128).half(),
        x.view(6, 173),
        *(x.view(*ones, 2, 3, 173) for ones in ((), (1,), (1, 1))),
    ]
    is_module = isinstance(act, nn.Module)
    with undisturbed(act.train() if is_module else act) as untouched:
        # The far ends of a curve are differences of large numbers in many a formula, so that the yardstick is x's size.
        if not (_same_once(act, formula, x, 16.0, untouched) and all(agree(act, formula, f, 16.0) for f in forms)):
            return False
        if is_module:
            act.train()
        return untouched()


def agree(old: Callable, new: Callable, x: Tensor, each: float | None = None, optional: bool = False) -> bool:
    """Whether two functions give the same for x, and the same gradient, up to the rounding of a few operations; as a
    whole, or each element up to `each` ulps of the larger of 1 and the result. A module `old` in either mode, the last
    of them training. `optional`: or `old` does not take x."""
    modes = (old.eval, old.train) if isinstance(old, nn.Module) else (lambda: old,)
    with _alone():
        try:
            found = [_run(mode(), x) for mode in modes]
        except Exception:  # it wants other arguments, or is no function of x: it is something else
            return optional
        try:
            actual = _run(new, x)
        except Exception:
            return False
    if actual is None:
        return False
    return all(e is not None and all(near(*pair, each) for pair in zip(actual, e, strict=True)) for e in found)


def near(a: Tensor, b: Tensor, each: float | None) -> bool:
    """Of one shape and dtype, and equal up to rounding; see `agree`."""
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    a, b, eps = a.double(), b.double(), torch.finfo(a.dtype).eps
    if each is not None:
        return torch.allclose(a, b, rtol=each * eps, atol=each * eps)
    norm = torch.linalg.vector_norm  # Tensor.norm comes to it through Python
    return bool(norm(a - b) <= 4 * eps * norm(b))


@contextmanager
def _alone() -> Iterator[None]:
    """Whatever the caller's modes are."""
    with (
        torch.enable_grad(), torch.autocast("cpu", enabled=False),
        warnings.catch_warnings(action="ignore"),  # torch's RMSNorm says which of its kernels it takes
    ):  # fmt: skip
        yield


def _run(function: Callable[[Tensor], Any], x: Tensor) -> tuple[Tensor, Tensor] | None:
    """function(x) and the gradient of its sum with random weights; None where it changes x."""
    given = x.clone().requires_grad_()
    copy = given * 1  # a leaf cannot be changed in place, and this can
    y = function(copy)
    if not isinstance(y, Tensor) or copy._version:
        return None
    slope = torch.autograd.grad(y, given, _random(tuple(y.shape), 99).to(y.dtype))[0]
    return y.detach(), slope
