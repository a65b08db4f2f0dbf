"""One declaration makes an operator: schema, reference, fake, and backends in order of preference.

The reference is plain torch and defines the result: any device, any float dtype, float64 for the oracle.
A backend is a plain function plus `why_not`, which looks at device, dtype, shape and strides (never at values) and
answers None or a sentence. The first backend made for the device that has no objection runs, else the reference.
An exception inside a kernel is never caught to fall back.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.compiler import is_compiling

from efftune.ops._available import CONTIGUOUS, objection

COMPILED = ("cpp", "cuda", "triton")
_LIB = torch.library.Library("efftune", "FRAGMENT")


def _keys(*names: str) -> int:
    """A set of dispatch keys, as a number."""
    keys = [torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, name)) for name in names]
    return functools.reduce(operator.or_, keys).raw_repr()


# What torch's dispatcher looks at in a thread and in a tensor where there is nothing to do for it: no mode, transform,
# trace or wrapper. Under inference_mode a part of the keys is absent.
_PLAIN_THREAD = frozenset([_keys("BackendSelect", "ADInplaceOrView"), _keys("BackendSelect")])
_PLAIN_TENSOR = frozenset(
    _keys(device, f"Autocast{device}", *more)
    for device in ("CPU", "CUDA")
    for more in (("ADInplaceOrView", f"Autograd{device}"), ())
)
_PLAIN_TYPES = (Tensor, torch.nn.Parameter)
_thread_keys, _tensor_keys = torch._C._dispatch_tls_local_include_set, torch._C._dispatch_keys
_function_modes = torch._C._len_torch_function_stack
_profiled = torch._C._autograd._profiler_enabled  # type: ignore[attr-defined]
_NUMBERS = frozenset([int, float, bool, str, type(None), torch.dtype])
_FORCED: ContextVar[str | None] = ContextVar("efftune_backend", default=None)
OPS: dict[str, Op] = {}


@dataclass(frozen=True)
class Backend:
    name: str
    devices: tuple[str, ...]  # device types it is chosen on without being asked
    run: Callable
    why_not: Callable  # (*args) -> None | sentence


def _no_objection(*args):
    return None


class Op:
    """A torch operator `efftune::<name>` with several implementations of one contract.

    Args:
        schema: as torch.library takes it, e.g. "scale(Tensor x, float a) -> Tensor"; `Tensor(a!)` marks what is
        written.
        reference: torch code that computes the result.
        fake: shapes, dtypes and argument errors; runs without data.
        tags: torch.Tag values, for example for draws.
    """

    def __init__(self, schema: str, reference: Callable, fake: Callable, tags: tuple = ()):
        self.name, _, arguments = schema.partition(" -> ")[0].partition("(")
        # As they stand: ("Tensor?", "bias"), ("Tensor(a!)", "out"), ("ScalarType", "dtype"), ...
        self.arguments = [tuple(part.rsplit(" ", 1)) for part in arguments.removesuffix(")").split(", ") if part]
        self.reference = Backend("reference", (), reference, _no_objection)
        self.backends: list[Backend] = []
        _LIB.define(schema, tags=tags)
        _LIB.impl(self.name, self._dispatch, "CompositeExplicitAutograd")
        torch.library.register_fake(f"efftune::{self.name}", fake, lib=_LIB)
        # The overload is what torch.compile traces and what opcheck takes.
        self.overload = getattr(torch.ops.efftune, self.name).default
        OPS[self.name] = self

    def __call__(self, *args):
        if is_compiling() or not _direct(args):
            return self.overload(*args)
        return self.select(*args).run(*args)

    def backend(
        self, name: str, *devices: str, layout: str = CONTIGUOUS, of: str = "", why_not: Callable = _no_objection
    ):
        """Decorator: registers an implementation, after those already there. Its arguments are those of the schema.

        Args:
            name: "cpp", "cuda" and "triton" are compiled kernels. They are asked whether they are there, run where the
                tensors are, and take their layout; float64 is left to the reference.
            layout: CONTIGUOUS, ROWS or ANY.   of: the names in the schema of the tensors that they are asked about;
                all but seeds, which are on the CPU.
            why_not: (*args) -> None, or what else there is against it, the end of a sentence.
        """
        if name in COMPILED:
            chosen = of.split() or [n for _, n in self.arguments if n != "seed"]
            tensors = tuple(i for i, (kind, n) in enumerate(self.arguments) if "Tensor" in kind and n in chosen)
            dtypes = tuple(i for i, (kind, _) in enumerate(self.arguments) if kind == "ScalarType")
            common, other = objection(name, tensors, dtypes, layout), why_not
            why_not = common if other is _no_objection else lambda *args: other(*args) or common(*args)

        def register(run: Callable) -> Callable:
            self.backends.append(Backend(name, devices, _on_device(run) if name.startswith("triton") else run, why_not))
            return run

        return register

    def select(self, *args) -> Backend:
        """The backend that `op(*args)` would run now. Raises RuntimeError if a forced one refuses."""
        forced = _FORCED.get()
        if forced is not None and self.backends:  # an operator with one implementation has nothing to force
            return self._forced(forced, args)
        # The schema begins with a tensor or has no argument. (`device.type` takes four times as long as `is_cpu`.)
        device = "cpu" if not args or args[0].is_cpu else args[0].device.type
        for backend in self.backends:
            if device in backend.devices and backend.why_not(*args) is None:
                return backend
        return self.reference

    def _forced(self, name: str, args) -> Backend:
        candidates = [b for b in (*self.backends, self.reference) if b.name == name]
        if not candidates:
            known = ", ".join(b.name for b in (*self.backends, self.reference))
            raise RuntimeError(f"{self.name} has no backend {name!r}; it has {known}.")
        reason = candidates[0].why_not(*args)
        if reason is not None:
            raise RuntimeError(f"{self.name}: backend {name!r} cannot run here: {reason}.")
        return candidates[0]

    def _dispatch(self, *args):
        return self.select(*args).run(*args)


def _direct(args: tuple) -> bool:
    """Whether torch's dispatcher would call the backend and do nothing else. The way through it and back into Python
    costs 5 to 10 µs a call, half of what an operator takes on small tensors."""
    if (
        _thread_keys().raw_repr() not in _PLAIN_THREAD
        or _function_modes()
        or _profiled()  # which shows operators by name
    ):
        return False
    grad = torch.is_grad_enabled()
    for arg in args:
        several = type(arg) is list
        for part in arg if several else (arg,):
            kind = type(part)
            if kind in _PLAIN_TYPES:
                if _tensor_keys(part).raw_repr() not in _PLAIN_TENSOR or (grad and part.requires_grad):
                    return False
            elif kind not in _NUMBERS or (several and kind is not int and kind is not float):
                return False
    return True


def contiguous_like(x: Tensor) -> Tensor:
    # Told the layout, torch takes half as long again, and where it is told nothing it takes that of x.
    return torch.empty_like(x) if x.is_contiguous() else torch.empty_like(x, memory_format=torch.contiguous_format)


def _on_device(run: Callable) -> Callable:
    """Triton launches on the current device, not on that of the tensors."""

    def launch(*args):
        # The context manager costs 5 µs, a tenth of a launch, and almost always there is nothing to change.
        at = args[0].get_device()  # -1 on the CPU
        if at < 0 or at == torch.cuda.current_device():
            return run(*args)
        with torch.cuda.device(at):
            return run(*args)

    return launch


def forced_backend() -> str | None:
    """The backend that `use_backend` forces here. Autograd runs a GPU's backward in threads of its own, which do not
    see it: a Function that wants the same there takes it along."""
    return _FORCED.get()


@contextmanager
def use_backend(name: str | None) -> Iterator[None]:
    """Within the block every operator runs this backend ("reference", "torch", "cpp", "triton", "cuda", or what one
    operator has besides), or raises RuntimeError with its reason. Operators with a single implementation are not
    affected."""
    token = _FORCED.set(name)
    try:
        yield
    finally:
        _FORCED.reset(token)
