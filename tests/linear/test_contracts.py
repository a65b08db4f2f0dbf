"""The contracts of base, delta and keep, held by real kinds and by toys that bend them: a delta's gradients are those
of its formula over the W of any base, under every keep; merged is unmerged; what is fixed keeps its dtype."""

import copy
import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from efftune import EfftuneError, Linear
from efftune.linear import Dense, Exact, Int8, LoRA, NoDelta, Trained
from efftune.linear.contracts import Call, Need
from efftune.linear.delta import dora, masked, tiled, trained
from efftune.linear.delta.columns import AddedColumns, Columns
from efftune.linear.delta.dora import DoRA
from efftune.linear.delta.entries import AddedEntries, Entries
from efftune.linear.delta.factored import Factored
from efftune.linear.delta.hira import HiRA
from efftune.linear.delta.tiled import Tiled
from efftune.linear.keep.quantized import Quantized
from efftune.linear.keep.sampled import Sampled
from tests.linear import toys
from tests.linear.test_keeps import bias_z
from tests.linear.toys import Codebook, FourBits, Kasa, Kronecker, LoHa, Masked, Pissa, Rest, Rotated, Vera

M, K, N = 24, 32, 16
BASES = [*toys.BASES, Dense(transposed=True), Int8(group=8)]
DELTAS = [
    Trained(), NoDelta(), LoRA(r=4, dtype=None), DoRA(r=4, lora_alpha=6, dtype=None), HiRA(r=4, dtype=None),
    Entries(0.08), AddedEntries(0.08), masked.Masked(0.08, threshold=0.0), Columns(5), AddedColumns(5),
    *toys.DELTAS,
]  # fmt: skip
KEEPS = [Quantized(4, 8), Sampled(0.5, min_rows=2), Sampled(0.5, min_rows=2, at="backward")]


def made(base, delta, keep=None, bias=True, dtype=torch.float64):
    torch.manual_seed(0)
    plain = nn.Linear(K, N, bias=bias, dtype=dtype).requires_grad_(False)
    layer = Linear.from_linear(plain, base=base, delta=delta, keep=keep or Exact())
    for name in ("lora_b", "hira_b", "one_b", "u", "kron_p", "values"):  # those that begin at zero
        if name in layer._parameters and not getattr(layer, name).any():
            nn.init.normal_(getattr(layer, name))
    if isinstance(delta, masked.Masked):
        nn.init.normal_(layer.values)  # about half of the entries are off
    return layer


@pytest.fixture
def several_tiles(monkeypatch):
    for module in (trained, tiled, dora):
        monkeypatch.setattr(module, "TILE", 6 * K)


def inputs():
    g = torch.Generator().manual_seed(1)
    return torch.randn(M, K, dtype=torch.float64, generator=g), torch.randn(M, N, dtype=torch.float64, generator=g)


def formula(layer, x, w, p):
    """y without a bias, of the stored W (N, K) and the delta's tensors, as torch differentiates it."""
    delta = layer.delta
    s = getattr(delta, "scale", None)
    if isinstance(delta, Pissa):
        return F.linear(x, w + s * (p[1] @ p[0] - p[3] @ p[2]))
    if isinstance(delta, Vera):
        a, b, v, u = p
        return F.linear(x, w + s * u.diag() @ b @ v.diag() @ a)
    if isinstance(delta, Kasa):
        a, b, sigma, lost_a, lost_b = p
        return F.linear(x, w + s * (b @ sigma.diag() @ a - lost_b @ lost_a))
    if isinstance(delta, DoRA):
        a, b, m = p
        moved = w + s * b @ a
        return F.linear(x, moved) * (m / moved.norm(dim=1).detach())
    if isinstance(delta, LoRA):
        return F.linear(x, w + s * p[1] @ p[0])
    if isinstance(delta, HiRA):
        return F.linear(x, w + w * (p[1] @ p[0]))
    if isinstance(delta, LoHa):
        return F.linear(x, w + (p[1] @ p[0]) * (p[3] @ p[2]))
    if isinstance(delta, Kronecker):
        return F.linear(x, w + torch.kron(*p))
    if isinstance(delta, Masked):
        straight = (p[0] > 0) + p[0] - p[0].detach()
        return F.linear(x, w * straight)
    if isinstance(delta, AddedEntries):
        return F.linear(x, w.detach() + torch.zeros(N * K, dtype=w.dtype).index_put((p[0].long(),), p[1]).view(N, K))
    if isinstance(delta, AddedColumns):
        return F.linear(x, w.detach().index_add(1, p[0], p[1]))
    if isinstance(delta, masked.Masked):
        straight = p[1] * ((p[2] > delta.threshold) + p[2] - p[2].detach())
        return F.linear(x, w.detach().flatten().index_put((p[0].long(),), straight).view(N, K))
    if isinstance(delta, Entries):
        return F.linear(x, w.detach().flatten().index_put((p[0].long(),), p[1] + p[2]).view(N, K))
    if isinstance(delta, Columns):
        return F.linear(x, w.detach().index_copy(1, p[0].long(), p[1] + p[2]))
    return F.linear(x, w)


def expected(layer, x, dy):
    """y, dx and the gradients of what trains, by autograd in float64 from the formula."""
    w = layer.base.rows(layer.stored(), 0, N, torch.float64).detach().requires_grad_()
    p = [t.detach().clone().requires_grad_(t.requires_grad) for t in layer.added()]
    x = x.clone().requires_grad_()
    y = formula(layer, x, w, p) + (0 if layer.bias is None else layer.bias.detach())
    trains = [t for t in p if t.requires_grad]
    grads = torch.autograd.grad(y, [x, w, *trains], dy, allow_unused=True)
    learns = layer.delta.stored_learns(layer.base)
    if learns:
        entered = layer.base.enter(layer.stored(), grads[1])  # the W of the product has its columns turned
        stored = layer.base.weight_vjp(layer.stored(), entered, 0, N)
        return y.detach(), grads[0], [g for g, name in zip(stored, layer.base.names, strict=True) if name in learns]
    return y.detach(), grads[0], list(grads[2:])


def actual(layer, x, dy):
    x = x.clone().requires_grad_()
    y = layer(x)
    parameters = [p for p in layer.parameters() if p.requires_grad]
    grads = torch.autograd.grad(y, [x, *parameters], dy)
    return y.detach(), grads[0], list(grads[1:])


def combines(base, delta):
    return base.learns if isinstance(delta, Trained) else base.puts or not delta.in_place


VALID = [pair for pair in itertools.product(BASES, DELTAS) if combines(*pair)]


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("base, delta", VALID, ids=str)
def test_gradients_are_those_of_the_formula(base, delta, bias, several_tiles):
    layer, (x, dy) = made(base, delta, bias=bias), inputs()
    y, dx, grads = actual(layer, x, dy)
    y_right, dx_right, grads_right = expected(layer, x, dy)
    assert len(grads) == len(grads_right) == len([p for p in layer.parameters() if p.requires_grad])
    for got, right in zip((y, dx, *grads), (y_right, dx_right, *grads_right), strict=True):
        torch.testing.assert_close(got, right, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(
    "delta", [d for d in DELTAS if isinstance(d, DoRA | HiRA | Factored | Tiled)] + [
        DoRA(r=4, lora_dropout=0.3, dtype=None), HiRA(r=4, hira_dropout=0.3, dtype=None)
    ], ids=str,
)  # fmt: skip
def test_a_delta_adds_its_dx_to_what_it_is_given(delta):
    layer, (x, dy) = made(Int8(group=8), delta), inputs()
    need = Need(True, False, (False,) * 2, tuple(p.requires_grad for p in layer.added()))
    c = Call(layer.base, layer.keep, layer.stored(), layer.added(), layer.bias, torch.tensor(3), need, None)
    with torch.no_grad():
        _, saved = delta.forward(c, x)
        alone, _, _ = delta.backward(c, dy, saved)
        onto = torch.ones_like(x)
        together, _, _ = delta.backward(c, dy, saved, add=onto)
    torch.testing.assert_close(together, alone + 1, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("keep", KEEPS, ids=str)
@pytest.mark.parametrize(
    "base, delta", [p for p in VALID if p[1].trains and p[0] == (Dense() if p[1].in_place else Codebook())], ids=str
)
def test_every_keep_is_unbiased_under_every_delta(base, delta, keep, several_tiles):
    """Whatever the base: what a keep gives does not depend on it. (Over a dense one: tests/linear/test_keeps.py.)"""
    layer, (x, dy) = made(base, delta, keep), inputs()
    _, dx_right, grads_right = expected(layer, x, dy)
    draws = []
    for seed in range(300):
        torch.manual_seed(seed)
        _, dx, grads = actual(layer, x, dy)
        torch.testing.assert_close(dx, dx_right, rtol=1e-10, atol=1e-12)
        draws.append(torch.cat([g.flatten() for g in grads]))
    right = torch.cat([g.flatten() for g in grads_right])
    spread = torch.stack(draws).std(0)
    assert spread.max() > 1e-4 * right.norm() / right.numel() ** 0.5  # it draws
    moves = spread > 1e-9 * right.abs().max()
    assert bias_z([d[moves] for d in draws], right[moves]) < 5.5
    torch.testing.assert_close(draws[0][~moves], right[~moves], rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("base, delta", VALID, ids=str)
def test_merged_is_unmerged_and_remove_gives_the_stored_weight(base, delta, several_tiles):
    layer, (x, _) = made(base, delta), inputs()
    torch.testing.assert_close(layer.merge()(x), layer(x).detach(), rtol=1e-9, atol=1e-11)
    stored = layer.base.rows(layer.take_back(), 0, N, torch.float64).clone()
    assert delta.adds != torch.equal(layer.merge().weight, stored)
    assert torch.equal(layer.remove().weight, stored)


@pytest.mark.parametrize("base, delta", VALID, ids=str)
def test_a_copy_a_state_dict_and_another_dtype(base, delta):
    layer, (x, _) = made(base, delta), inputs()
    other = copy.deepcopy(layer)
    for t in (*other.parameters(), *other.buffers()):
        t.data.zero_()
    other.load_state_dict(layer.state_dict())
    assert torch.equal(other(x), layer(x))
    fixed = {name: getattr(layer, name).clone() for name in base.fixed}
    half = other.to(torch.float32)
    assert half.stored().dtype == torch.float32 and half(x.float()).dtype == torch.float32
    for name, before in fixed.items():
        assert torch.equal(getattr(half, name), before) and getattr(half, name).dtype == before.dtype
        assert name not in dict(half.named_parameters())
    torch.testing.assert_close(half(x.float()).double(), layer(x), rtol=1e-4, atol=1e-4)


def test_fixed_floats_move_and_keep_their_dtype():
    layer = made(FourBits(), NoDelta(), dtype=torch.float32).to(torch.bfloat16)
    assert layer.absmax.dtype == torch.float32 and layer.stored().dtype == torch.bfloat16
    assert layer.to("meta").absmax.is_meta and layer.absmax.dtype == torch.float32
    assert layer.stored().shape == (N, K)


def test_a_base_that_lets_nothing_learn_is_not_trained():
    with pytest.raises(EfftuneError, match=r"nothing that FourBits\(\) stores can train; add an adapter"):
        made(FourBits(), Trained())


def test_what_a_delta_begins_with_stays_with_another_keep_and_over_another_base():
    layer = made(Dense(), Rest(r=4, dtype=None))
    x, _ = inputs()
    kept = Linear.from_linear(layer, keep=Quantized(8, 8))
    assert kept.weight is layer.weight and kept.lora_a is layer.lora_a
    over = Linear.from_linear(layer, base=Rotated(None))
    torch.testing.assert_close(over(x), layer(x), rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(layer(x), nn.Linear.forward(made_plain(), x), rtol=1e-10, atol=1e-12)


def made_plain():
    torch.manual_seed(0)
    return nn.Linear(K, N, dtype=torch.float64)
