"""Whether two modules, or two functions, are the same function: tried on numbers, not told by names.

What is tried is a copy with small random weights, for fresh ones hide what is done with them (a norm's ones, zeros of
an MLP that starts as nothing), and real ones take time. It is tried in training and in evaluation mode, on inputs so
small that an epsilon shows and so large that a clamp does, with its derivative, and it must not draw.
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

SCALES = tuple(2.0**e for e in (-20, -10, 0, 5, 10, 20))  # from below the eps of any norm to beyond any clamp


def stand_in(module: nn.Module, **children: nn.Module | None) -> nn.Module:
    """A copy of `module` on the CPU, with random parameters of its own and `children` in the place of those of these
    names; the others are copied, too. Nothing of the module's is touched when the copy changes its mode or dtype."""
    made = object.__new__(type(module))
    own = vars(made)
    own.update(vars(module))
    own["_parameters"] = {
        n: None if p is None else nn.Parameter(_random(tuple(p.shape))) for n, p in own["_parameters"].items()
    }
    own["_buffers"] = {n: None if b is None else b.detach().to("cpu") for n, b in own["_buffers"].items()}
    kept = {n: m for n, m in own["_modules"].items() if n not in children}
    own["_modules"] = {n: None if m is None else stand_in(m) for n, m in kept.items()} | children
    return made


def linear(n: int, k: int) -> nn.Linear:
    """A linear layer for a stand-in."""
    made = nn.Linear(k, n, device="meta")
    made.weight, made.bias = nn.Parameter(_random((n, k)) / k**0.5), nn.Parameter(_random((n,)))
    return made


def _random(shape: tuple[int, ...], seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), device="cpu")


def takes_one(module: nn.Module) -> bool:
    """Whether the module's forward takes one argument, so that nobody can give it another."""
    return len(inspect.signature(type(module).forward).parameters) == 2  # itself and x


def same(old: nn.Module, new: nn.Module, width: int) -> bool:
    """Whether two stand-ins give the same for x (2, 3, width): shape, dtype, values and gradient up to rounding, in
    either mode, without drawing. In float32 for x of all sizes, in 16 bits, where squares overflow, of one."""
    for dtype, scales in ((torch.float32, SCALES), (torch.bfloat16, (1.0,))):
        for module in (old, new):
            module.to(dtype)
        for seed, scale in enumerate(scales):
            x = (_random((2, 3, width), seed + 1) * scale).to(dtype)
            for training in (True, False):
                if not agree(old.train(training), new.train(training), x):
                    return False
    return True


def promotes(module: nn.Module, width: int) -> bool | None:
    """Whether a stand-in in float32 gives float32 for a narrower x; None if it takes none."""
    found = _run(module.to(torch.float32), _random((2, 3, width)).bfloat16())
    return None if found is None else found[0].dtype == torch.float32


def same_function(act: Callable[[Tensor], Tensor], formula: Callable[[Tensor], Tensor]) -> bool:
    """Whether an element-wise function, a stand-in or no module, is the formula: where it bends and far out."""
    far = torch.tensor([s * 2.0**e for e in (-10, 3.5, 4.5, 5.5, 7, 10, 20) for s in (1.0, -1.0)])
    x = torch.cat([torch.linspace(-8, 8, 1024), far])  # without 0, where slopes may differ
    for training in (True, False):
        given = act.train(training) if isinstance(act, nn.Module) else act
        # The far ends of a curve are differences of large numbers in many a formula, so that the yardstick is x's size.
        if not agree(given, formula, x, 16.0) or not agree(given, formula, x.to(torch.bfloat16), 16.0):
            return False
    return True


def agree(old: Callable, new: Callable, x: Tensor, each: float | None = None) -> bool:
    """Whether two functions give the same for x, and the same gradient, up to the rounding of a few operations; as a
    whole, or each element up to `each` ulps of the larger of 1 and the result."""
    expected, actual = _run(old, x), _run(new, x)
    if expected is None or actual is None:
        return False
    return all(near(a, e, each) for a, e in zip(actual, expected, strict=True))


def near(a: Tensor, b: Tensor, each: float | None) -> bool:
    """Of one shape and dtype, and equal up to rounding; see `agree`."""
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    a, b, eps = a.double(), b.double(), torch.finfo(a.dtype).eps
    if each is not None:
        return torch.allclose(a, b, rtol=each * eps, atol=each * eps)
    return bool((a - b).norm() <= 4 * eps * b.norm())


def _run(function: Callable[[Tensor], Any], x: Tensor) -> tuple[Tensor, Tensor] | None:
    """function(x) and the gradient of its sum with random weights; None where it fails, draws, or changes x."""
    given = x.clone().requires_grad_()
    with (
        torch.random.fork_rng(devices=[]), torch.enable_grad(), torch.autocast("cpu", enabled=False),
        warnings.catch_warnings(action="ignore"),  # torch's RMSNorm says which of its kernels it takes
    ):  # fmt: skip
        copy = given * 1  # a leaf cannot be changed in place, and this can
        before = torch.get_rng_state()
        try:
            y = function(copy)
            if not isinstance(y, Tensor) or copy._version or not torch.equal(before, torch.get_rng_state()):
                return None
            slope = torch.autograd.grad(y, given, _random(tuple(y.shape), 99).to(y.dtype))[0]
        except Exception:  # it wants other arguments, or is no function of x: it is something else
            return None
    return y.detach(), slope
