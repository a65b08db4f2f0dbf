"""Every C++ kernel gives the same bits at each instruction set that this processor has. The table names all of
efftune._cpu, so that a new kernel cannot be forgotten."""

import contextlib
from unittest import mock

import pytest
import torch

import efftune.ops.linear_cross_entropy as cross_entropy
from efftune.ops._available import extension
from efftune.ops._op import use_backend
from efftune.ops.dropout import dropout
from efftune.ops.entries_grad import entries_grad
from efftune.ops.entries_linear import entries_linear, entries_linear_t
from efftune.ops.glu import glu, glu_backward
from efftune.ops.int8 import int8_dequantize, int8_quantize
from efftune.ops.pack_act import pack_act, unpack_act
from efftune.ops.perturb import perturb, perturb_many
from efftune.ops.relu import relu, relu_backward
from efftune.ops.rms_norm import rms_norm, rms_norm_apply, rms_norm_backward
from efftune.ops.rotary import rotary
from efftune.ops.rows_grad import rows_grad
from efftune.ops.sample_rows import row_norms, sample_rows, select_rows
from efftune.ops.topk_entries import topk_entries

SEED = torch.tensor(7)


def normal(*shape, dtype=torch.float32, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def perturbed(dtype):
    w, several = normal(5001, dtype=dtype), torch.tensor([1e-2] * 9)
    for dist in ("normal", "rademacher"):
        yield from perturb_many([w, w[:77]], several, seed=range(9), streams=[1, 2], dist=dist, rounding="stochastic")
        for rounding in ("nearest", "stochastic"):
            yield perturb(w, 1e-2, seed=3, stream=1, offset=5, dist=dist, rounding=rounding)
            yield perturb(w, several, seed=range(9), stream=1, offset=5, dist=dist, rounding=rounding, threshold=0.5)


def packed(dtype):
    for bits in (8, 4):
        codes, stats = pack_act(normal(37, 1031, dtype=dtype), bits, 72, SEED, 1)
        yield from (codes, stats, unpack_act(codes, stats, bits, 72, 1031, dtype))


def norms(dtype):
    x, dy, weight = normal(33, 211, dtype=dtype), normal(33, 211, dtype=dtype, seed=1), normal(211, dtype=dtype, seed=2)
    for center in (False, True):
        y, mean, rstd = rms_norm(x, weight, weight if center else None, 1e-6, 0.0, center)
        yield from (y, mean, rstd, rms_norm_apply(x, weight, None, mean, rstd))
        yield from rms_norm_backward(dy, x, weight, mean, rstd, 0.0, True, center)


def gated(dtype):
    dy, gate, up = (normal(7, 4999, dtype=dtype, seed=i) for i in range(3))
    for activation in ("silu", "gelu", "gelu_tanh", "relu", "relu2"):
        yield glu(gate, up, activation)
        yield from glu_backward(dy, gate, up, activation)


def clipped(dtype):
    y, bits = relu(normal(5001, dtype=dtype))
    yield from (y, bits, relu_backward(normal(5001, dtype=dtype, seed=1), bits))


def rotated(dtype):
    angle = normal(1, 13, 34)
    yield from (rotary(normal(2, 3, 13, 34, dtype=dtype), angle.cos(), angle.sin(), t) for t in (False, True))


def rows(dtype):
    x, g = normal(300, 65, dtype=dtype), normal(300, 17, dtype=dtype, seed=1)
    yield row_norms(x)
    for sampler in ("systematic", "wta", "crs", "topk"):
        yield from select_rows(row_norms(x), 40, SEED, sampler, 1)
        kept, idx, weight, _ = sample_rows(x, None, 40, SEED, sampler, 1)
        yield from (idx, weight, kept, rows_grad(g, idx, weight, kept))


def quantised(dtype):
    codes, scales = int8_quantize(normal(9, 130, dtype=dtype), 32)
    yield int8_dequantize(codes, scales, 32, dtype)


def picked(dtype):
    g, z = normal(1100, 37, dtype=dtype), normal(1100, 53, dtype=dtype, seed=1)
    yield entries_grad(g, z, torch.arange(0, 37 * 53, 3, dtype=torch.int32))


def added(dtype):
    x, y = normal(37, 53, dtype=dtype), normal(37, 41, dtype=dtype, seed=1)
    indices = torch.arange(0, 41 * 53, 3, dtype=torch.int32)
    yield entries_linear(y.clone(), x, indices, normal(len(indices)))
    yield entries_linear_t(x.clone(), y, indices, normal(len(indices)))


def largest(dtype):
    scores = normal(300, 1001, dtype=dtype)
    for k in (1, 5000, 200000):
        yield topk_entries(lambda: scores.split(170), k)


def losses(dtype):
    for smoothing, softcap in ((0.0, None), (0.1, 3.0)):
        settings = (-100, smoothing, softcap)
        made = normal(19, 13, dtype=dtype), normal(2311, 13, dtype=dtype), normal(2311, dtype=dtype, seed=1)
        targets = torch.arange(19)
        loss, norm, dx = cross_entropy.FORWARD(*made, targets, *settings, True)
        yield from (loss, norm, dx)
        yield from cross_entropy.BACKWARD(normal(19), *made, targets, norm, *settings, True, True)


KERNELS = {
    "perturb perturb_many": perturbed,
    "dropout": lambda dtype: [dropout(normal(5001, dtype=dtype), 0.3, SEED, 1)],
    "int8_dequantize": quantised,
    "pack_act unpack_act": packed,
    "norm norm_backward": norms,
    "glu": gated,
    "relu": clipped,
    "rotary": rotated,
    "row_norms select_rows gather_rows scale_rows": rows,
    "entries_grad": picked,
    "entries_linear": added,
    "topk_count topk_collect topk_merge": largest,
    "linear_cross_entropy": losses,
}
# draw: numbers that perturb adds. bf16_product has units, not levels: tests/ops/test_bf16_product.py.
OTHERS = {"draw", "bf16_product", "bf16_unit", "limit_isa"}


@contextlib.contextmanager
def level(limit):
    extension("_cpu").limit_isa(limit)
    try:
        yield
    finally:
        extension("_cpu").limit_isa(2)


def test_every_kernel_is_in_the_table():
    bound = {name for name in dir(extension("_cpu")) if not name.startswith("_")}
    assert bound - OTHERS == {name for names in KERNELS for name in names.split()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("names", KERNELS)
def test_levels_agree_bit_for_bit(names, dtype):
    cpu, results = extension("_cpu"), []
    called = {name: mock.Mock(wraps=getattr(cpu, name)) for name in names.split()}
    with use_backend("cpp") if names != "row_norms select_rows gather_rows scale_rows" else contextlib.nullcontext():
        for limit in (0, 1, 2):
            with level(limit), mock.patch.multiple(cpu, **called):
                results.append([t.clone() for t in KERNELS[names](dtype) if t is not None])
    assert all(c.call_count >= 3 for c in called.values())
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))
