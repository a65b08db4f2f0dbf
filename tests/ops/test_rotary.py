"""Rotary embedding: every backend within the budget, the transposed one as the gradient, the strides and the layout of
transformers, its very bits in float32."""

import pytest
import torch

from efftune import use_backend
from efftune.ops._available import extension
from efftune.ops.rotary import rotary, rotary_op, rotary_pair
from tests.budget import assert_within_budget
from tests.ops.backends import BACKENDS, cases, on, skip_truncation

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
RUNS = [b for b in BACKENDS if b.values[0][0] != "cuda"]
SHAPES = [(2, 4, 5, 64), (1, 3, 7, 10), (2, 1, 3, 96)]  # B, H, T, D


def hf(q, k, cos, sin):
    from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

    return getattr(apply_rotary_pos_emb, "__wrapped__", apply_rotary_pos_emb)(q, k, cos, sin)


def operands(shape, dtype, table=None, shared=False):
    """x as projections give it, (B, T, H, D) seen as (B, H, T, D); cos and sin of unequal halves."""
    g = torch.Generator().manual_seed(0)
    b, h, t, d = shape
    x = torch.randn(b, t, h, d, generator=g).to(dtype).transpose(1, 2)
    cos, sin = (torch.randn(1 if shared else b, t, d, generator=g).to(table or dtype) for _ in range(2))
    return x, cos, sin


def oracle(x, cos, sin, transposed, dtype):
    """transformers' function, or its gradient by autograd."""
    x, cos, sin = (t.to(dtype) for t in (x, cos, sin))
    if not transposed:
        return hf(x, x, cos, sin)[0]
    leaf = torch.zeros_like(x).requires_grad_()
    return torch.autograd.grad(hf(leaf, x, cos, sin)[0], leaf, x)[0]


@pytest.mark.parametrize("backend", RUNS)
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("table", [None, torch.float32])
@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_within_budget(backend, transposed, table, shared, dtype, shape):
    skip_truncation(backend, dtype)
    args = operands(shape, dtype, table, shared)
    before = [t.clone() for t in args]
    result = on(backend, rotary, *args, transposed)
    assert result.dtype == dtype and result.stride() == args[0].stride()
    assert_within_budget(result, oracle(*args, transposed, torch.float64), oracle(*args, transposed, torch.float32))
    assert all(torch.equal(a, b) for a, b in zip(args, before, strict=True))


@pytest.mark.parametrize("backend", ["reference", "cpp"])
@pytest.mark.parametrize("shape", [*SHAPES, (1, 2, 3, 1100)])
def test_float32_has_transformers_own_bits(backend, shape):
    args = operands(shape, torch.float32)
    for transposed in (False, True):
        result = on((backend, "cpu"), rotary, *args, transposed)
        assert torch.equal(result, oracle(*args, transposed, torch.float32))


@pytest.mark.parametrize("backend", RUNS)
@pytest.mark.parametrize("transposed", [False, True])
def test_strides(backend, transposed):
    """As transformers lays them out and as it might; what is adjacent is not copied."""
    x, cos, sin = operands((2, 3, 4, 16), torch.float32)
    expected = on(backend, rotary, x, cos, sin, transposed)
    merged = torch.cat([x, x, x], 1).transpose(1, 2).contiguous().transpose(1, 2)[:, 3:6]  # q, k and v in one tensor
    wide = torch.cat([x, x], -1)[..., 16:]  # a part of the columns
    tables = [torch.cat([t, t], -1)[..., 16:] for t in (cos, sin)]
    for same, c, s in (
        (x.contiguous(), cos, sin), (merged, cos, sin), (wide, *tables),
        (x.transpose(-1, -2).contiguous().transpose(-1, -2), cos.mT.contiguous().mT, sin),
    ):  # fmt: skip
        result = on(backend, rotary, same, c, s, transposed)
        assert torch.equal(result, expected)
        assert result.stride() == torch.empty_like(same if same.stride(-1) == 1 else expected.contiguous()).stride()
    for args in ((merged, *tables), (wide, cos, sin)):
        assert rotary_op.select(args[0], None, *args[1:], transposed).name == "cpp"
    one = on(backend, rotary, x, cos[:1], sin[:1], transposed)
    assert torch.equal(on(backend, rotary, x, *(t[:1].expand(2, 4, 16) for t in (cos, sin)), transposed), one)
    heads = x[:, :1].expand(2, 3, 4, 16)
    assert torch.equal(
        on(backend, rotary, heads, cos, sin, transposed), on(backend, rotary, heads.clone(), cos, sin, transposed)
    )


@pytest.mark.parametrize(
    "backend, dtype, transposed, heads, form",
    cases(RUNS, DTYPES, [False, True], [(4, 2), (1, 3), (8, 8), (3, 0), (0, 2)], ["plain", "copied", "split", "mT"]),
)
def test_a_pair_is_two(backend, dtype, transposed, heads, form):
    """With the bits of two calls, however each of them lies in memory."""
    q, cos, sin = operands((2, heads[0], 5, 34), dtype, shared=True)
    k = operands((2, heads[1], 5, 34), dtype)[0] * 2
    if form == "split":
        q, k = torch.cat([q, k], 1).transpose(1, 2).contiguous().transpose(1, 2).split(heads, 1)
    else:
        k = {"plain": k, "copied": k.contiguous(), "mT": k.mT.contiguous().mT}[form]
    together = on(backend, rotary_pair, q, k, cos, sin, transposed)
    for x, result in zip((q, k), together, strict=True):
        alone = on(backend, rotary, x, cos, sin, transposed)
        assert torch.equal(result, alone) and result.stride() == alone.stride()


@pytest.mark.parametrize("backend", RUNS)
@pytest.mark.parametrize("shape", [(0, 2, 3, 8), (2, 0, 3, 8), (2, 2, 0, 8), (1, 1, 1, 2), (2, 2, 2, 0)])
def test_empty_and_single(backend, shape):
    args = operands(shape, torch.float32)
    torch.testing.assert_close(on(backend, rotary, *args), oracle(*args, False, torch.float32))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("transposed", [False, True])
def test_threads_and_instruction_sets_agree(dtype, transposed):
    args = operands((3, 5, 37, 182), dtype)
    cpu, before, results = extension("_cpu"), torch.get_num_threads(), []
    try:
        for threads, isa in ((1, 2), (3, 2), (1, 1), (1, 0)):
            torch.set_num_threads(threads)
            cpu.limit_isa(isa)
            results.append(on(("cpp", "cpu"), rotary, *args, transposed))
    finally:
        torch.set_num_threads(before)
        cpu.limit_isa(2)
    assert all(torch.equal(results[0], other) for other in results[1:])


def test_float64_and_the_way_back():
    x, cos, sin = operands((2, 3, 4, 8), torch.float64)
    torch.testing.assert_close(rotary(x, cos, sin), oracle(x, cos, sin, False, torch.float64), rtol=1e-14, atol=1e-14)
    angle = torch.randn(2, 4, 4, dtype=torch.float64).repeat(1, 1, 2)
    there = rotary(x, angle.cos(), angle.sin())
    torch.testing.assert_close(rotary(there, angle.cos(), angle.sin(), transposed=True), x)


@pytest.mark.parametrize("backend", ["reference", "cpp"])
def test_errors(backend):
    x, table = torch.ones(2, 3, 4, 8), torch.ones(2, 4, 8)
    with use_backend(backend):
        for args, sentence in (
            ((x[0], table, table), r"x \(B, H, T, D\)"),
            ((x.int(), table, table), "int32"),
            ((x[..., :7], table[..., :7], table[..., :7]), "even D, not 7"),
            ((x, table[..., :4], table[..., :4]), "only a part of the columns"),
            ((x, table[:, None], table[:, None]), "needs cos and sin"),
            ((x, table, table[:1]), "needs cos and sin"),
            ((x, table.bfloat16(), table.bfloat16()), "both in float32"),
            ((x.bfloat16(), table, table.bfloat16()), "both in float32"),
        ):
            with pytest.raises(ValueError, match=sentence):
                rotary(*args)
        for k in (x[:1], x[:, :, :3], x[..., :4], x[0], x.bfloat16()):
            with pytest.raises(ValueError, match="differ in the number of heads only"):
                rotary_pair(x, k, table, table)


def test_forced_backend_refuses():
    x, cos, sin = operands((1, 2, 3, 4), torch.float64)
    with use_backend("cpp"), pytest.raises(RuntimeError, match="computed by the reference"):
        rotary(x, cos, sin)
    with use_backend("cpp"), pytest.raises(RuntimeError, match="adjacent"):
        rotary_op(x.float().mT.contiguous().mT, None, cos.float(), sin.float(), False)
    with use_backend("cpp"), pytest.raises(RuntimeError, match="adjacent"):
        rotary_op(x.float(), x.float().mT.contiguous().mT, cos.float(), sin.float(), False)


def test_opcheck_and_compile():
    torch._dynamo.reset()
    x, cos, sin = operands((2, 3, 5, 8), torch.float32)
    part = x.contiguous()[..., 4:]
    for args in ((x, None, cos, sin, False), (part, part[:, :1], cos[:1, :, :4], sin[:1, :, :4], True)):
        torch.library.opcheck(rotary_op.overload, args)

    def f(x, cos, sin):
        y = rotary(x, cos, sin)
        return y + 1, *rotary_pair(y, x[:, :1], cos, sin, transposed=True)

    compiled = torch.compile(f, fullgraph=True, backend="aot_eager")
    assert all(torch.equal(a, b) for a, b in zip(compiled(x, cos, sin), f(x, cos, sin), strict=True))
