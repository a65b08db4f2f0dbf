"""One Linear: every base x delta x keep that combines, against float64, and as a citizen of torch."""

import copy
import dataclasses
import itertools

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from efftune import EfftuneError, Linear
from efftune.linear import Dense, Exact, Int8, LoRA, NoDelta, Nothing, Trained
from efftune.linear.delta.columns import AddedColumns, Columns
from efftune.linear.delta.dora import DoRA
from efftune.linear.delta.entries import AddedEntries, Entries
from efftune.linear.delta.hira import HiRA
from efftune.linear.delta.masked import Masked
from efftune.linear.keep.quantized import Quantized
from efftune.linear.keep.sampled import Sampled
from efftune.linear.picks import repick
from tests.budget import assert_within_budget
from tests.devices import devices
from tests.methods.matrix import CONTRACTS, kinds
from tests.saved import saved_bytes

M, K, N = 33, 48, 40
BASES = [Dense(), Int8(group=16), Int8(group=20)]
DELTAS = [
    Trained(), NoDelta(), LoRA(r=4), LoRA(r=4, dtype=None), LoRA(r=8, lora_alpha=24, use_rslora=True),
    LoRA(r=3, lora_dropout=0.3), LoRA(r=4, freeze_a=True),
    DoRA(r=4), DoRA(r=3, lora_alpha=5, lora_dropout=0.3, dtype=None),
    HiRA(r=4), HiRA(r=3, hira_dropout=0.3, dtype=None), Entries(0.05), AddedEntries(0.05), Masked(0.05), Columns(6),
    AddedColumns(6),
]  # fmt: skip
KEEPS = [Exact(), Nothing()]  # those that give the exact gradient
DRAWING = [Quantized(group=16), Sampled(0.5, min_rows=1)]


def make(base, delta, keep=None, bias=True, dtype=torch.float32, seed=0, shape=(N, K)):
    torch.manual_seed(seed)
    layer = nn.Linear(shape[1], shape[0], bias=bias, dtype=dtype).requires_grad_(False)
    layer = Linear.from_linear(layer, base=base, delta=delta, keep=keep or Exact())
    for name in ("lora_b", "hira_b"):
        if name in delta.names:
            nn.init.normal_(getattr(layer, name))
    if isinstance(delta, AddedEntries):
        repick(layer, torch.arange(3, 3 + 2 * delta.count(shape), 2))
        left = torch.tensor([0, 2, 12])
        layer.replace((layer.indices, torch.randn(len(layer.indices)), left, torch.randn(3)))
    elif isinstance(delta, AddedColumns):
        layer.replace((layer.columns, torch.randn(shape[0], delta.count)))
    return layer


def combines(base, delta, keep):
    if delta.in_place and not base.puts:
        return False
    keeps_nothing = isinstance(delta, NoDelta) or getattr(delta, "freeze_a", False)
    return not isinstance(keep, Nothing) or keeps_nothing


COMBINATIONS = list(itertools.product(BASES, DELTAS, KEEPS))
VALID = [c for c in COMBINATIONS if combines(*c)]


def dy_for(y):
    return torch.linspace(-1, 1, y.numel()).reshape(y.shape).to(y)


def oracle(layer, x, dtype, rounded=lambda t: t):
    """y, dx and the gradients of what trains, from the formulas, in dtype; `rounded` is applied where the docstrings
    say that something is rounded to x.dtype."""
    n, scale = layer.out_features, getattr(layer.delta, "scale", 0.0)
    w = layer.base.rows(layer.stored(), 0, n, x.dtype).detach().to(dtype)
    x2 = x.detach().reshape(-1, x.shape[-1]).to(dtype)
    bias = 0 if layer.bias is None else layer.bias.detach().to(dtype)
    y = x2 @ w.t() + bias
    dy = dy_for(torch.empty(*x.shape[:-1], n, dtype=x.dtype)).reshape(-1, n).to(dtype)
    dx, grads = dy @ w, []
    if isinstance(layer.delta, Trained) and isinstance(layer.base, Dense):
        grads = [dy.t() @ x2]
    elif isinstance(layer.delta, Trained):
        codes, scales = layer.stored().tensors
        padded = torch.zeros(n, scales.shape[1] * layer.base.group, dtype=dtype)
        padded[:, : codes.shape[1]] = (dy.t() @ x2) * codes
        grads = [padded.view(n, scales.shape[1], -1).sum(-1)]
    elif isinstance(layer.delta, DoRA):
        a, b, m = (t.detach().to(dtype) for t in layer.added())
        g = m / (w + scale * b @ a).norm(dim=1)
        a, b, dyg = rounded(a), rounded(b), rounded(dy * g)
        h, dh = rounded(scale * (x2 @ a.t())), rounded(scale * (dyg @ b))
        y, dx = rounded(x2 @ w.t() + h @ b.t()) * g + bias, dyg @ w + dh @ a
        dm = rounded(dy * rounded(rounded(y) - bias)).sum(0) / m
        grads = [dh.t() @ x2, dyg.t() @ h, dm]
    elif isinstance(layer.delta, HiRA):
        a, b = (t.detach().to(dtype) for t in layer.added())
        dw, added = rounded(dy.t() @ x2) * w, rounded(w * (b @ a))
        y, dx = rounded(y) + x2 @ added.t(), rounded(dy @ added) + dx
        grads = [b.t() @ dw, dw @ a.t()]
    elif isinstance(layer.delta, LoRA):
        a, b = (rounded(t.detach().to(dtype)) for t in layer.added())
        h, dh = rounded(scale * (x2 @ a.t())), rounded(scale * (dy @ b))
        y, dx, grads = y + h @ b.t(), dx + dh @ a, [dh.t() @ x2, dy.t() @ h]
    elif isinstance(layer.delta, AddedEntries):
        indices, values, left, left_values = (t.detach() for t in layer.added())
        s = torch.zeros(n * w.shape[1], dtype=dtype)
        s[indices], s[left] = values.to(dtype), left_values.to(dtype)
        s = s.view(w.shape)
        if isinstance(layer.base, Dense):
            y, dx = rounded(y) + x2 @ s.t(), rounded(dx) + dy @ s
        else:
            y, dx = x2 @ rounded(w + s).t() + bias, dy @ rounded(w + s)
        grads = [(dy.t() @ x2).flatten()[indices]]
    elif isinstance(layer.delta, AddedColumns):
        columns, values = layer.columns, rounded(layer.values.detach().to(dtype))
        y, dx = y + x2[:, columns] @ values.t(), rounded(dx).index_add(1, columns, rounded(dy @ values))
        grads = [rounded((dy.t() @ x2)[:, columns])]
    elif isinstance(layer.delta, Masked):
        grads = [(dy.t() @ x2).flatten()[layer.indices] * layer.original.to(dtype)]
    elif isinstance(layer.delta, Entries):
        grads = [(dy.t() @ x2).flatten()[layer.indices]]
    elif isinstance(layer.delta, Columns):
        grads = [rounded((dy.t() @ x2)[:, layer.columns])]
    return [y.reshape(*x.shape[:-1], n), dx.reshape(x.shape), *grads]


def actual(layer, x):
    return actual_through(layer, layer, x)


def actual_through(call, layer, x):
    x = x.detach().requires_grad_()
    y = call(x)
    y.backward(dy_for(y))
    trained = [getattr(layer, name) for name in layer.delta.stored_learns(layer.base)]
    parameters = trained or [p for p in layer.added() if p.requires_grad or isinstance(layer.delta, LoRA)]
    return [y.detach(), x.grad, *(t.grad for t in parameters)]


@pytest.mark.parametrize("table, contract", [(BASES, "base"), (DELTAS, "delta"), ([*KEEPS, *DRAWING], "keep")])
def test_every_kind_is_in_the_tables(table, contract):
    assert kinds(CONTRACTS[contract]) == {type(kind) for kind in table}


@pytest.mark.parametrize("base, delta, keep", [*COMBINATIONS, *itertools.product(BASES, DELTAS, DRAWING)], ids=str)
def test_what_cannot_be_combined_refuses_in_words(base, delta, keep):
    if combines(base, delta, keep):
        y, *gradients = actual(make(base, delta, keep), torch.randn(2, K))
        assert y.shape == (2, N) and all(g.isfinite().all() for g in gradients if g is not None)
    else:
        why = "needs the layer's input" if isinstance(keep, Nothing) else "writes entries of the stored weight"
        with pytest.raises(EfftuneError, match=why):
            make(base, delta, keep)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows", [1, 2])
@pytest.mark.parametrize("base, delta", [(b, d) for b, d, k in VALID if isinstance(k, Exact)], ids=str)
def test_a_call_changes_nothing_that_it_is_given(base, delta, rows, dtype):
    """Of one row, what is expanded to the shape of the output is a view of itself."""
    layer, x = make(base, delta, dtype=dtype), torch.randn(rows, K, dtype=dtype, requires_grad=True)
    tensors = [x, *layer.parameters(), *layer.buffers()]
    before = [t.detach().clone() for t in tensors]
    with torch.no_grad():
        first = layer(x)
    y = layer(x)
    y.backward(torch.ones_like(y))
    if not layer.delta.random:
        assert torch.equal(first, y)
    assert all(torch.equal(t, held) for t, held in zip(tensors, before, strict=True))


def hung(layer):
    """What users hang on a layer."""
    layer.register_parameter("gain", nn.Parameter(torch.full((N,), 2.0)))
    layer.register_buffer("steps", torch.zeros(1))
    layer.register_buffer("seen", torch.ones(2), persistent=False)
    layer.inner, layer.factor = nn.Linear(2, 2), 3
    return layer


@pytest.mark.parametrize("base, delta", [(b, d) for b, d, k in VALID if isinstance(k, Exact)], ids=str)
def test_what_somebody_has_hung_on_a_layer_goes_with_it(base, delta):
    plain = hung(nn.Linear(K, N).requires_grad_(False))
    keys, gain, inner = plain.state_dict().keys() - {"weight", "bias"}, plain.gain, plain.inner
    layer = Linear.from_linear(plain, base=base, delta=delta)
    for module in (layer, Linear.from_linear(layer, keep=Nothing(), delta=NoDelta()), layer.merge(), layer.remove()):
        assert keys <= module.state_dict().keys() and "seen" not in module.state_dict()
        assert module.gain is gain and module.inner is inner and module.factor == 3 and len(module.seen) == 2
    removed = layer.remove()
    assert vars(removed).keys() == vars(plain).keys()
    assert removed.state_dict().keys() == plain.state_dict().keys()


def test_a_weight_that_trains_is_not_stored_as_integers_unasked():
    with pytest.raises(EfftuneError, match="stores integers; add an adapter"):
        Linear.from_linear(nn.Linear(K, N), base=Int8())


@pytest.mark.parametrize("device", devices("cpu", "cuda"))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("base, delta, keep", VALID, ids=str)
def test_values_and_gradients_are_within_budget(base, delta, keep, dtype, device):
    layer = make(base, delta, keep, dtype=dtype).eval()  # without dropout
    x = torch.randn(3, M // 3, K).to(dtype)
    exact = oracle(layer, x, torch.float64)
    single = oracle(layer, x, torch.float32, rounded=lambda t: t.to(dtype).float())
    for got, want, float32 in zip(actual(layer.to(device), x.to(device)), exact, single, strict=True):
        if got is None:
            assert delta == LoRA(r=4, freeze_a=True)
        else:
            got = got.to("cpu", dtype)  # gradients of float32 adapters are rounded to x.dtype
            assert_within_budget(got, want, float32)


@pytest.mark.parametrize("base, delta, keep", VALID, ids=str)
def test_gradcheck(base, delta, keep):
    if hasattr(delta, "dtype"):
        delta = dataclasses.replace(delta, dtype="float64")
    layer = make(base, delta, keep, dtype=torch.float64, shape=(8, 11))
    names = [n for n, p in layer.named_parameters() if p.requires_grad]
    if isinstance(delta, DoRA):  # what it takes for the gradients of A and B is none: the norm counts as a constant
        names = ["lora_magnitude_vector"]
    if isinstance(delta, Masked):  # of scores it is the straight-through one, of a function in steps
        names = []
    leaves = [layer.get_parameter(n).detach().clone().requires_grad_() for n in names]
    x = torch.randn(3, 11, dtype=torch.float64, requires_grad=True)

    def f(x, *leaves):
        torch.manual_seed(5)  # one dropout mask for all evaluations
        return torch.func.functional_call(layer, dict(zip(names, leaves, strict=True)), (x,))

    assert torch.autograd.gradcheck(f, (x, *leaves))


def test_long_k_accumulates_in_float32():
    torch.manual_seed(0)
    lin = nn.Linear(4096, 64, bias=False, dtype=torch.bfloat16).requires_grad_(False)
    layer = Linear.from_linear(lin, delta=LoRA(r=8))
    x = torch.rand(16, 4096).bfloat16()  # positive: a 16-bit accumulator loses digits
    assert_within_budget(layer(x).detach(), x.double() @ lin.weight.double().t(), x.float() @ lin.weight.float().t())


COMPILED = [
    (Dense(), Trained(), Exact()),
    (Dense(), LoRA(r=3, lora_dropout=0.3), Exact()),
    (Int8(group=20), LoRA(r=3, lora_dropout=0.3), Exact()),
    (Dense(), LoRA(r=4, freeze_a=True), Nothing()),
    (Int8(group=16), NoDelta(), Nothing()),
    (Int8(group=20), Trained(), Exact()),
    (Int8(group=20), DoRA(r=4), Exact()),
    (Dense(), DoRA(r=3, lora_dropout=0.3), Exact()),
    (Int8(group=20), HiRA(r=3, hira_dropout=0.3), Exact()),
]


@pytest.mark.parametrize("base, delta, keep", COMPILED, ids=str)
def test_compiled_equals_eager_over_many_seeds(base, delta, keep):
    torch._dynamo.reset()  # the recompilation limit counts per code object, which all these layers share
    layer = make(base, delta, keep)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    x = torch.randn(5, K)
    for seed in range(8):
        torch.manual_seed(seed)
        layer.zero_grad()
        expected = actual(layer, x)
        torch.manual_seed(seed)
        layer.zero_grad()
        got = actual_through(compiled, layer, x)
        for e, g in zip(expected, got, strict=True):
            assert (e is None and g is None) or torch.equal(e, g)


def test_compiles_with_inductor():
    torch._dynamo.reset()
    layer = make(Int8(group=16), LoRA(r=4, lora_dropout=0.5))
    compiled = torch.compile(layer, fullgraph=True)
    x = torch.randn(5, K)
    for seed in range(3):
        torch.manual_seed(seed)
        expected = [t.clone() for t in actual(layer, x)]
        layer.zero_grad()
        torch.manual_seed(seed)
        for e, g in zip(expected, actual_through(compiled, layer, x), strict=True):
            torch.testing.assert_close(g, e)
        layer.zero_grad()


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("base, delta, keep", VALID, ids=str)
def test_gradient_checkpointing_gives_the_same_bits(base, delta, keep, reentrant):
    layer = make(base, delta, keep)
    x = torch.randn(5, K)
    torch.manual_seed(1)
    expected = [t if t is None else t.clone() for t in actual(layer, x)]
    layer.zero_grad()
    torch.manual_seed(1)
    got = actual_through(lambda x: checkpoint(layer, x, use_reentrant=reentrant), layer, x)
    for e, g in zip(expected, got, strict=True):
        assert (e is None and g is None) or torch.equal(e, g)


def test_one_module_twice_in_a_graph():
    layer = make(Dense(), LoRA(r=4), bias=False)
    x = torch.randn(5, K, dtype=torch.float32, requires_grad=True)
    (layer(x).sum() + 2 * layer(x.flip(0)).sum()).backward()
    got = [x.grad, layer.lora_a.grad, layer.lora_b.grad]
    w = (layer.merge().weight).detach()
    ones = torch.ones(5, N)
    torch.testing.assert_close(got[0], 3 * ones @ w)
    a, b = layer.lora_a.detach().requires_grad_(), layer.lora_b.detach().requires_grad_()
    (((x.detach() @ a.t()) @ b.t()).sum() * 3).backward()
    torch.testing.assert_close(got[1], a.grad)
    torch.testing.assert_close(got[2], b.grad)


@pytest.mark.parametrize("delta", [Trained(), LoRA(r=4)], ids=str)
def test_non_contiguous_and_expanded_inputs(delta):
    layer = make(Dense(), delta)
    base = torch.randn(K, 6)
    for x in (
        base.t(),
        torch.randn(6, 2 * K)[:, ::2],
        torch.randn(1, K).expand(6, K),
        torch.randn(2, K, 3).transpose(1, 2),
    ):
        for got, expected in zip(actual(layer, x), actual(layer, x.contiguous()), strict=True):
            torch.testing.assert_close(got, expected)
            layer.zero_grad()
    x = torch.randn(4, K, requires_grad=True)
    layer(x).sum().backward()  # dy is expanded from a scalar
    assert torch.isfinite(x.grad).all()


def test_empty_batch():
    for base, delta, keep in VALID:
        x = torch.randn(0, 3, K, requires_grad=True)
        y = make(base, delta, keep)(x)
        assert y.shape == (0, 3, N)
        y.sum().backward()
        assert x.grad.shape == x.shape


def test_inputs_saved_tensors_and_dy_are_unchanged():
    for base, delta, keep in VALID:
        layer = make(base, delta, keep).eval()
        x = torch.randn(5, K, requires_grad=True)
        dy = torch.randn(5, N)
        before = [t.detach().clone() for t in (x, dy, *layer.parameters(), *layer.buffers())]
        layer(x).backward(dy)
        for t, b in zip((x, dy, *layer.parameters(), *layer.buffers()), before, strict=True):
            assert torch.equal(t.detach(), b)


def test_second_derivatives_are_refused():
    layer, x = make(Dense(), LoRA(r=4)), torch.randn(5, K, requires_grad=True)
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad(layer(x).sum(), x, create_graph=True)


# What backward keeps


def test_saved_bytes_of_lora():
    rows, r = 64, 16
    lin = nn.Linear(256, 128, bias=False, dtype=torch.bfloat16).requires_grad_(False)
    x = torch.randn(rows, 256, dtype=torch.bfloat16, requires_grad=True)
    for delta, elements in [
        (LoRA(r=r), rows * 256 + rows * r),
        (LoRA(r=r, freeze_a=True), rows * r),
        (LoRA(r=r, lora_dropout=0.1), rows * 256 + rows * r + 4),  # and the seed, 8 bytes
        (NoDelta(), 0),
    ]:
        layer = Linear.from_linear(lin, delta=delta)
        assert saved_bytes(lambda layer=layer: layer(x), layer) == 2 * elements, delta


def test_lora_keeps_nothing_it_does_not_need():
    layer = make(Dense(), LoRA(r=4))
    layer.lora_a.requires_grad_(False)
    layer.lora_b.requires_grad_(False)  # as lisa does with layers that rest
    x = torch.randn(5, K, requires_grad=True)
    assert saved_bytes(lambda: layer(x), layer) == 0
    with torch.no_grad():
        assert layer(x).grad_fn is None


def test_dropout_draws_anew_in_training_and_not_in_eval():
    layer, x = make(Dense(), LoRA(r=4, lora_dropout=0.5)), torch.randn(64, K)
    assert not torch.equal(layer(x), layer(x))
    layer.eval()
    assert torch.equal(layer(x), layer(x))


def test_dropout_is_unbiased():
    """The mean over seeds of the output and of A's gradient, within 4.5 standard errors of those without dropout."""
    layer, x = make(Dense(), LoRA(r=2, lora_dropout=0.4, dtype=None), bias=False), torch.randn(6, K)
    layer.eval()
    expected = actual(layer, x)
    layer.train()
    draws = [[], [], [], []]
    for seed in range(500):
        torch.manual_seed(seed)
        layer.zero_grad()
        for column, tensor in zip(draws, actual(layer, x), strict=True):
            column.append(tensor.double().clone())
    # dB and dA are linear in the mask, y and dx too: all four means must match.
    for column, want in zip(draws, expected, strict=True):
        stack = torch.stack(column)
        error = (stack.mean(0) - want.double()) / (stack.std(0) / len(column) ** 0.5 + 1e-12)
        assert error.abs().max() < 5.0


# A citizen of torch


@pytest.mark.parametrize("base, delta, keep", VALID, ids=str)
def test_state_dict_deepcopy_and_to(base, delta, keep):
    layer, x = make(base, delta, keep).eval(), torch.randn(5, K)
    y = layer(x)
    other = make(base, delta, keep, seed=1).eval()
    other.load_state_dict(layer.state_dict())
    assert torch.equal(other(x), y)
    twin = copy.deepcopy(layer)
    assert torch.equal(twin(x), y)
    half = copy.deepcopy(layer).to(torch.bfloat16)
    assert half.stored().dtype == torch.bfloat16 and half(x.bfloat16()).dtype == torch.bfloat16
    assert (half(x.bfloat16()).float() - y).norm() < 0.03 * y.norm()
    if isinstance(base, Int8):
        assert half.codes.dtype == torch.int8 and "codes" in layer.state_dict()
    else:
        plain = nn.Linear(K, N)
        plain.load_state_dict(
            {k: v for k, v in layer.state_dict().items() if k in ("weight", "bias")}
        )  # nn.Linear's names


@pytest.mark.parametrize("base, delta, keep", VALID, ids=str)
def test_merge_equals_unmerged(base, delta, keep):
    layer, x = make(base, delta, keep).eval(), torch.randn(5, K)
    merged = layer.merge()
    assert type(merged) is nn.Linear and merged.weight.dtype == torch.float32
    torch.testing.assert_close(merged(x), layer(x), rtol=1e-5, atol=1e-5)


def test_merge_rounds_once():
    layer = make(Dense(), LoRA(r=4), dtype=torch.bfloat16)
    exact = layer.weight.double() + layer.delta.scale * layer.lora_b.double() @ layer.lora_a.double()
    assert_within_budget(layer.merge().weight, exact, exact.float())


@pytest.mark.parametrize("delta", [Trained(), LoRA(r=4), LoRA(r=4, dtype=None)], ids=str)
def test_autocast(delta):
    layer, x = make(Dense(), delta), torch.randn(5, K, requires_grad=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = layer(x)
        assert y.dtype == torch.bfloat16
        loss = y.float().square().mean()
    loss.backward()
    assert x.grad.dtype == torch.float32
    expected = oracle(layer, x, torch.float32)
    assert (y.float() - expected[0]).norm() < 0.02 * expected[0].norm()
    for p in layer.parameters():
        assert p.grad is None or p.grad.dtype == p.dtype


def test_a_dtype_mismatch_is_refused():
    with pytest.raises(TypeError, match="x is torch.bfloat16 and the layer is torch.float32"):
        make(Dense(), LoRA(r=4))(torch.randn(2, K).bfloat16())


def test_from_linear_shares_the_weight_and_keeps_the_other_axes():
    lin = nn.Linear(K, N).requires_grad_(False)
    layer = Linear.from_linear(lin, delta=LoRA(r=4))
    assert layer.weight is lin.weight and layer.bias is lin.bias and layer.keep == Exact()
    again = Linear.from_linear(layer, base=Int8(group=16))
    assert again.delta == layer.delta and again.lora_a is layer.lora_a
    assert isinstance(Linear.from_linear(nn.Linear(K, N)).delta, Trained)
    assert isinstance(Linear.from_linear(lin).delta, NoDelta)
    with pytest.raises(EfftuneError, match="takes an nn.Linear"):
        Linear.from_linear(nn.LayerNorm(4))


@pytest.mark.parametrize(
    "bad", [dict(r=0), dict(r=-3), dict(lora_dropout=1.0), dict(dtype="int8"), dict(dtype="f32"), dict(dtype="Tensor")]
)
def test_lora_settings_out_of_range(bad):
    with pytest.raises(EfftuneError):
        LoRA(**bad)


def test_rank_above_the_layer_is_refused():
    with pytest.raises(EfftuneError, match=r"r=64 exceeds min\(N, K\) = 40"):
        make(Dense(), LoRA(r=64))


@pytest.mark.parametrize("base", [Dense(), Int8(group=16)], ids=str)
@pytest.mark.parametrize("shape", [(3, K), (2, 3, K)])
def test_tracing(base, shape):
    net = nn.Sequential(make(base, LoRA(r=4)), nn.ReLU(), make(base, LoRA(r=4), shape=(K, N))).eval()
    with torch.no_grad():
        traced = torch.jit.trace(net, torch.randn(shape))
        x = torch.randn(*shape[:-2], 7, K)  # another number of rows
        assert torch.equal(traced(x), net(x))
    with pytest.raises(EfftuneError, match=r"torch.jit.trace has no place for .*; trace under torch.no_grad\(\)"):
        torch.jit.trace(net, torch.randn(shape))
    net(torch.randn(shape)).sum().backward()  # and nothing is left of it
    assert net[0].lora_a.grad is not None
