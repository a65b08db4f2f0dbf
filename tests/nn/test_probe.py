"""What is tried before a swap: on a copy from which nothing comes back, that remembers nothing, in many forms of x."""

import random
import threading
from types import SimpleNamespace

import numpy
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import efftune
from efftune.interop.transformers.blocks import install, recognise
from efftune.linear.keep.quantized import Quantized
from efftune.nn import probe
from efftune.nn.norm import RMSNorm
from tests.nn.test_same_function import Mlp, Norm


class Counter:
    def __init__(self):
        self.calls, self.seen = 0, []

    def add(self, x):
        self.calls += 1
        self.seen.append(float(x.detach().abs().max()))


def closure():
    calls, seen = 0, []

    def note(x):
        nonlocal calls
        calls += 1
        seen.append(float(x.abs().max()))

    note.seen = lambda: (calls, list(seen))
    return note


EFFECTS = {  # what a module holds, what its forward does with it, and what is seen of it
    "attribute": (lambda: 0, lambda m, x: setattr(m, "held", m.held + 1), lambda held: held),
    "flag and back": (bool, lambda m, x: setattr(m, "held", not m.held), bool),
    "tensor": (lambda: torch.zeros(()), lambda m, x: m.held.add_(x.abs().max()), float),
    "new tensor": (lambda: torch.zeros(()), lambda m, x: setattr(m, "held", x.abs().mean()), float),
    "dict": (dict, lambda m, x: m.held.update(top=float(x.abs().max())), dict),
    "list": (list, lambda m, x: m.held.append(x), len),
    "inner list": (lambda: {"a": [[]]}, lambda m, x: m.held["a"][0].append(1), lambda held: len(held["a"][0])),
    "set": (set, lambda m, x: m.held.add(float(x.abs().max())), len),
    "object": (Counter, lambda m, x: m.held.add(x), lambda held: (held.calls, held.seen)),
    "namespace": (SimpleNamespace, lambda m, x: setattr(m.held, "top", float(x.abs().max())), lambda held: vars(held)),
    "method": (lambda: Counter().add, lambda m, x: m.held(x), lambda held: held.__self__.calls),
    "built-in method": (lambda: [].append, lambda m, x: m.held(1), lambda held: len(held.__self__)),
    "closure": (closure, lambda m, x: m.held(x), lambda held: held.seen()),
    "generator": (random.Random, lambda m, x: m.held.random(), lambda held: held.getstate()),
    "lock": (lambda: (threading.Lock(), []), lambda m, x: m.held[1].append(1), lambda held: len(held[1])),
    "other module": (lambda: [nn.Linear(2, 2)], lambda m, x: setattr(m.held[0], "n", 1), lambda h: hasattr(h[0], "n")),
    "python's draws": (int, lambda m, x: random.random(), lambda held: random.getstate()),
    "numpy's draws": (int, lambda m, x: numpy.random.rand(), lambda held: str(numpy.random.get_state()[1:3])),
    "torch's draws": (int, lambda m, x: torch.rand(1), lambda held: torch.get_rng_state().tolist()),
}
CANDIDATES = {"act": nn.SiLU, "mlp": Mlp, "inside": lambda: Mlp(nn.SiLU()), "norm": Norm}


@pytest.mark.parametrize("effect", EFFECTS)
@pytest.mark.parametrize("candidate", CANDIDATES)
def test_what_has_effects_is_not_swapped_and_none_of_a_trial_reaches_it(candidate, effect):
    make, do, look = EFFECTS[effect]
    given = CANDIDATES[candidate]()
    target = given.act_fn if candidate == "inside" else given
    plain, target.held = type(target), make()
    name = "OneRMSNorm" if candidate == "norm" else "One"

    def forward(self, x):
        do(self, x)
        return plain.forward(self, x)

    target.__class__ = type(name, (plain,), {"forward": forward})
    before = look(target.held)
    done = install(nn.Sequential(given), Quantized(8))
    assert look(target.held) == before
    assert not any(old in (given, target) for _, _, old, _ in done.swaps)
    target.__class__ = type(name, (plain,), {})  # the effect was the reason, or that there is no copy
    copied = effect not in ("lock", "other module")
    assert any(old is target for _, _, old, _ in install(nn.Sequential(given), Quantized(8)).swaps) == copied


def test_a_function_with_effects_as_activation():
    class Act:
        calls = 0

        def __call__(self, x):
            self.calls += 1
            return F.silu(x)

    noted = []

    def act(x):
        noted.append(x)
        return F.silu(x)

    for function in (given := Act(), act):
        mlp = Mlp(function)
        assert recognise(function) is None and not install(nn.Sequential(mlp)).swaps
    assert given.calls == 0 and not noted
    assert recognise(lambda x: F.silu(x)) == "silu" and recognise(F.silu) == "silu"


def test_a_copy_shares_nothing_that_changes_and_copies_no_weights():
    given = Mlp(nn.SiLU())
    given.alias, given.me, given.inner = [given.up_proj.weight], [given], {"act": given.act_fn}
    given.register_buffer("scale", torch.ones(3))
    children = {name: probe.linear(2, 2, seed) for seed, name in enumerate(("gate_proj", "up_proj"))}
    made = probe.stand_in(given, **children)
    assert made.gate_proj is children["gate_proj"] and made.down_proj is not given.down_proj
    assert made.me[0] is made and made.inner["act"] is made.act_fn is not given.act_fn
    assert made.scale.data_ptr() != given.scale.data_ptr() and torch.equal(made.scale, given.scale)
    assert not torch.equal(made.down_proj.weight, given.down_proj.weight)
    given.scale = torch.empty(1).expand(probe.LARGE + 1)
    assert probe.stand_in(given, **children) is None


def test_a_side_output_keeps_its_value():
    class WithAux(Mlp):
        def __init__(self):
            super().__init__(nn.SiLU())
            self.aux = torch.zeros(())

        def forward(self, x):
            h = self.act_fn(self.gate_proj(x))
            self.aux = h.abs().mean()
            return self.down_proj(h * self.up_proj(x))

    model, x = nn.Sequential(WithAux()), torch.randn(5, 8)
    expected = model(x).square().mean() + model[0].aux
    model[0].aux = torch.zeros(())
    efftune.apply(model, "full")
    torch.testing.assert_close(model(x).square().mean() + model[0].aux, expected)


def test_blocks_that_are_alike_are_tried_once(monkeypatch):
    tried = []
    monkeypatch.setattr(probe, "same", lambda *args, same=probe.same: tried.append(args) or same(*args))
    norms = [type("OneRMSNorm", (Norm,), {})() for _ in range(2)]  # of two classes
    other = type(norms[0])()
    other.eps = 1e-3
    again = type(norms[0])(2.0)
    model = nn.Sequential(*norms, again, other, *[Mlp() for _ in range(5)])
    assert len(install(model).swaps) == 9 and len(tried) == 4
    assert [m.eps for m in model[:4]] == [1e-6, 1e-6, 1e-6, 1e-3]
    assert model[2].weight is again.weight and model[0].weight is norms[0].weight


def test_a_trial_that_fails_leaves_the_weights_for_the_next_one():
    """A norm is tried with one offset after the other."""
    old = probe.stand_in(Norm())
    before = old.weight.detach().clone()
    assert not probe.same(old, RMSNorm(old.weight, 1e-6, 1.0), 8)
    assert torch.equal(old.weight, before) and probe.same(old, RMSNorm(old.weight, 1e-6, 0.0), 8)


def halves(y):
    """Clamped in float16 alone."""
    return y.clamp(-2, 2) if y.dtype == torch.float16 else y


def shifted(y, by):
    return y if y.ndim < 2 else torch.cat([y[..., :by, :], y[..., by:, :] + y[..., :-by, :]], -2)


class NormOverTwo(Norm):
    dims = 4

    def normal(self, x):
        if x.ndim != self.dims:
            return super().normal(x)
        return x * torch.rsqrt(x.square().mean((-2, -1), keepdim=True) + self.eps)


class FlattensMlp(Mlp):
    """Takes three dimensions only, and is the same there."""

    def forward(self, x):
        b, t, _ = x.shape
        return super().forward(x.view(b * t, -1)).view(b, t, -1)


OTHER = {
    "mlp in float16": (Mlp, lambda m, x: m.down_proj(halves(m.act_fn(m.gate_proj(x)) * m.up_proj(x)))),
    "norm in float16": (Norm, lambda m, x: m.weight * halves(m.normal(x))),
    "norm that is clamped": (Norm, lambda m, x: Norm.forward(m, x).clamp(-100, 100)),
    "act in float16": (nn.GELU, lambda m, x: halves(F.gelu(x))),
    "mlp with a shift": (Mlp, lambda m, x: shifted(Mlp.forward(m, x), 4)),
    "mlp with a long shift": (Mlp, lambda m, x: shifted(Mlp.forward(m, x), 100)),
    "norm with a shift": (Norm, lambda m, x: shifted(Norm.forward(m, x), 16)),
    "mlp of one token": (Mlp, lambda m, x: Mlp.forward(m, x) * (1 + (x.shape[-2:-1] == (1,)))),
    **{f"norm over two of {n}": (type("Own", (NormOverTwo,), {"dims": n}), None) for n in (2, 3, 4, 5)},
    **{f"mlp in {n}": (Mlp, lambda m, x, n=n: Mlp.forward(m, x) * (1 + (x.ndim == n))) for n in (1, 2, 3, 4, 5)},
    **{f"act in {n}": (nn.SiLU, lambda m, x, n=n: F.silu(x) * (1 + (x.ndim == n))) for n in (1, 2, 3, 4, 5)},
}


@pytest.mark.parametrize("other", OTHER)
def test_what_is_another_function_in_one_form_of_x_is_left_alone(other):
    kind, forward = OTHER[other]
    name = "OtherRMSNorm" if issubclass(kind, Norm) else "Other"
    changed = type(name, (kind,), {"forward": lambda self, x: forward(self, x)} if forward else {})()
    same = type(name, (kind.__base__ if kind.__name__ == "Own" else kind,), {"dims": 0})()
    net = nn.Sequential(changed, same)
    install(net)
    assert net[0] is changed and net[1] is not same


def test_what_takes_three_dimensions_only_is_the_same_there():
    assert len(install(nn.Sequential(FlattensMlp())).swaps) == 1
