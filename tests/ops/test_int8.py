"""Group-wise int8: the product rounded once on every backend, codes that fit their stored scale, ragged groups."""

import pytest
import torch

from efftune import use_backend
from efftune.ops.int8 import int8_dequantize, int8_op, int8_quantize
from tests.ops.backends import BACKENDS, on, skip_truncation

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def weight(shape, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)


@pytest.mark.parametrize("backend", [b for b in BACKENDS[1:] if b.values[0][0] != "cuda"])
@pytest.mark.parametrize("scale_dtype", DTYPES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "shape, group", [((1, 1), 1), ((3, 64), 64), ((5, 131), 32), ((7, 33), 100), ((0, 64), 32), ((2, 2311), 128)]
)
def test_backends_equal(backend, scale_dtype, dtype, shape, group):
    skip_truncation(backend, dtype)
    codes, scales = int8_quantize(weight(shape, scale_dtype), group)
    expected = on(("reference", "cpu"), int8_dequantize, codes, scales, group, dtype)
    oracle = codes.double() * scales.double().repeat_interleave(group, 1)[:, : shape[1]]
    assert torch.equal(expected, oracle.float().to(dtype))
    assert torch.equal(on(backend, int8_dequantize, codes, scales, group, dtype), expected)


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64])
@pytest.mark.parametrize("shape, group", [((16, 256), 64), ((5, 131), 32), ((3, 7), 100), ((4, 9), 1)])
def test_quantize_error(dtype, shape, group):
    w = weight(shape, dtype)
    codes, scales = int8_quantize(w, group)
    assert codes.shape == shape and codes.dtype == torch.int8 and codes.min() >= -127
    assert scales.dtype == dtype and scales.shape == (shape[0], -(-shape[1] // group))
    each = scales.double().repeat_interleave(group, 1)[:, : shape[1]]
    assert ((w.double() - codes.double() * each).abs() <= each * (0.5 + 1e-5)).all()
    assert (codes.abs().float().amax(1) >= 126).all()


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64])
@pytest.mark.parametrize("shape, group", [((5, 131), 32), ((3, 7), 100), ((0, 64), 32)])
def test_a_weight_without_data_gives_codes_and_scales_of_the_same_form(dtype, shape, group):
    w = weight(shape[::-1], dtype).t()
    for there, here in zip(int8_quantize(w.to("meta"), group), int8_quantize(w, group), strict=True):
        assert there.is_meta and there.shape == here.shape and there.dtype == here.dtype
        assert there.stride() == here.stride()


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64])
def test_a_gpu_quantises_to_the_same_bits(dtype):
    w = weight((512, 300), dtype)
    for group in (1, 7, 64):
        here, there = int8_quantize(w, group), int8_quantize(w.cuda(), group)
        assert all(torch.equal(a, b.cpu()) for a, b in zip(here, there, strict=True))


@pytest.mark.parametrize("dtype", DTYPES)
def test_zero_and_tiny_groups(dtype):
    w = torch.zeros(2, 8, dtype=dtype)
    w[1, 4:] = torch.finfo(dtype).smallest_normal
    w[1, 0] = 1e-3
    codes, scales = int8_quantize(w, 4)
    w_hat = int8_dequantize(codes, scales, 4, torch.float32)
    assert (codes[0] == 0).all() and (scales[0] == 0).all() and w_hat.isfinite().all()
    assert torch.allclose(w_hat, w.float(), rtol=1e-2, atol=torch.finfo(dtype).smallest_normal)


def test_row_ranges():
    codes, scales = int8_quantize(weight((20, 131)), 32)
    whole = int8_dequantize(codes, scales, 32, torch.bfloat16)
    assert torch.equal(int8_dequantize(codes[3:11], scales[3:11], 32, torch.bfloat16), whole[3:11])
    columns = codes.t().contiguous().t()
    assert torch.equal(int8_dequantize(columns, scales, 32, torch.bfloat16), whole)


def test_float64():
    w = weight((8, 96), torch.float64)
    codes, scales = int8_quantize(w, 32)
    assert torch.equal(
        int8_dequantize(codes, scales, 32, torch.float64).view(8, 3, 32), codes.view(8, 3, 32) * scales[..., None]
    )


@pytest.mark.parametrize(
    "w, group, sentence",
    [
        (torch.tensor([[1.0, torch.inf]]), 2, "finite"),
        (torch.tensor([[1.0, torch.nan]]), 2, "finite"),
        (torch.ones(4), 2, "dimensions"),
        (torch.ones(2, 2, dtype=torch.int32), 2, "floating-point"),
        (torch.ones(2, 2), 0, "group of at least 1"),
    ],
)
def test_quantize_errors(w, group, sentence):
    with pytest.raises(ValueError, match=sentence):
        int8_quantize(w, group)


def test_dequantize_errors():
    codes, scales = int8_quantize(weight((4, 64)), 32)
    for backend in ("reference", "cpp"):
        with use_backend(backend):
            with pytest.raises(ValueError, match=r"scales \(4, 4\)"):
                int8_dequantize(codes, scales, 16, torch.float32)
            with pytest.raises(ValueError, match="int8"):
                int8_dequantize(codes.float(), scales, 32, torch.float32)


def test_opcheck_and_compile():
    torch._dynamo.reset()
    codes, scales = int8_quantize(weight((4, 70)), 32)
    torch.library.opcheck(int8_op.overload, (codes, scales, 32, torch.bfloat16))
    compiled = torch.compile(
        lambda c, s: int8_dequantize(c, s, 32, torch.float32) * 2, fullgraph=True, backend="aot_eager"
    )
    assert torch.equal(compiled(codes, scales), int8_dequantize(codes, scales, 32, torch.float32) * 2)
