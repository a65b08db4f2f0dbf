"""RMSNorm and LayerNorm: forward with one program per row; backward with one program per chunk of rows, whose sums over
rows go into a buffer that torch adds up. A row is held in registers, up to 16384 columns."""

import torch
import triton
import triton.language as tl

WIDEST = 8192  # columns whose sums over rows are held in registers


@triton.jit
def _gain(weight_ptr, offs_k, mask, offset, HAS_WEIGHT: tl.constexpr):
    if HAS_WEIGHT:
        gain = tl.load(weight_ptr + offs_k, mask=mask, other=0.0).to(tl.float32) + offset
    else:
        gain = tl.full(offs_k.shape, 1.0, tl.float32)
    return gain


@triton.jit(do_not_specialize=["eps", "offset"])
def rms_norm_kernel(
    x_ptr,
    weight_ptr,
    bias_ptr,
    y_ptr,
    mean_ptr,
    rstd_ptr,
    K,
    eps: tl.float32,
    offset: tl.float32,
    CENTER: tl.constexpr,
    SAVED: tl.constexpr,  # mean and rstd are read, not computed
    HAS_WEIGHT: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    offs_k = tl.arange(0, BLOCK_K)
    mask = offs_k < K
    x = tl.load(x_ptr + row * K + offs_k, mask=mask, other=0.0).to(tl.float32)  # (BLOCK_K,)
    if SAVED:
        if CENTER:
            x -= tl.load(mean_ptr + row)
        rstd = tl.load(rstd_ptr + row)
    else:
        if CENTER:
            mean = tl.sum(x) / K
            tl.store(mean_ptr + row, mean)
            x -= mean
        masked = tl.where(mask, x, 0.0)
        rstd = 1.0 / tl.sqrt_rn(tl.sum(masked * masked) / K + eps)
        tl.store(rstd_ptr + row, rstd)
    y = x * rstd * _gain(weight_ptr, offs_k, mask, offset, HAS_WEIGHT)
    if HAS_BIAS:
        y += tl.load(bias_ptr + offs_k, mask=mask, other=0.0).to(tl.float32)
    tl.store(y_ptr + row * K + offs_k, y.to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["offset"])
def rms_norm_backward_kernel(
    dy_ptr,
    x_ptr,
    weight_ptr,
    mean_ptr,
    rstd_ptr,
    dx_ptr,
    dweight_ptr,  # (programs, K) partial sums, zero at first
    M,
    K,
    rows_each,
    offset: tl.float32,
    CENTER: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
    NEED_WEIGHT: tl.constexpr,
    WIDE: tl.constexpr,  # a row and the sums over rows do not fit the registers: the sums stay in the cache
    BLOCK_K: tl.constexpr,
):
    pid = tl.program_id(0).to(tl.int64)
    offs_k = tl.arange(0, BLOCK_K)
    mask = offs_k < K
    sums_ptr = dweight_ptr + pid * K + offs_k
    dweight = tl.zeros((BLOCK_K,), tl.float32)
    for row in range(pid * rows_each, tl.minimum((pid + 1) * rows_each, M)):
        rstd = tl.load(rstd_ptr + row)
        mean = tl.load(mean_ptr + row) if CENTER else 0.0
        at = row * K + offs_k
        x_hat = (tl.load(x_ptr + at, mask=mask, other=0.0).to(tl.float32) - mean) * rstd
        dy = tl.load(dy_ptr + at, mask=mask, other=0.0).to(tl.float32)  # 0 where masked: so is g
        if NEED_WEIGHT and WIDE:
            tl.store(sums_ptr, tl.load(sums_ptr, mask=mask) + dy * x_hat, mask=mask)
        elif NEED_WEIGHT:
            dweight += dy * x_hat
        g = dy * _gain(weight_ptr, offs_k, mask, offset, HAS_WEIGHT)
        of_x_hat = tl.sum(g * x_hat) / K
        of_g = tl.sum(g) / K if CENTER else 0.0
        dx = g - of_g - x_hat * of_x_hat
        tl.store(dx_ptr + at, (dx * rstd).to(dx_ptr.dtype.element_ty), mask=mask)
    if NEED_WEIGHT and not WIDE:
        tl.store(sums_ptr, dweight, mask=mask)


def _block(k: int) -> tuple[int, int]:
    """BLOCK_K and num_warps: 16 elements a thread, 32 in the widest rows."""
    block = max(16, triton.next_power_of_2(k))
    return block, min(16, max(4, block // 512))


def _forward(x, weight, bias, y, mean, rstd, eps, offset, saved) -> None:
    if x.numel() == 0:
        return
    block, warps = _block(x.shape[1])
    rms_norm_kernel[(x.shape[0],)](
        *(x, weight, bias, y, mean, rstd, x.shape[1], eps, offset),
        *(mean.numel() > 0, saved, weight is not None, bias is not None, block),
        num_warps=warps,
    )


def rms_norm(x, weight, bias, y, mean, rstd, eps: float, offset: float) -> None:
    """x, y (M, K), weight, bias (K,) or None, mean, rstd (M,); an empty mean: not centred. All contiguous."""
    _forward(x, weight, bias, y, mean, rstd, eps, offset, False)


def rms_norm_apply(x, weight, bias, y, mean, rstd, offset: float) -> None:
    """As rms_norm, with mean and rstd given."""
    _forward(x, weight, bias, y, mean, rstd, 0.0, offset, True)


def rms_norm_backward(dy: torch.Tensor, x: torch.Tensor, weight, mean, rstd, dx, dweight, dbias, offset: float) -> None:
    """dy, x, dx (M, K); dweight, dbias (K,) f32, or empty where they are not wanted. All contiguous."""
    m, k = x.shape
    # A partition that follows from M alone, so that it does not change with the GPU.
    rows_each = max(16, triton.cdiv(m, 512))
    programs = triton.cdiv(m, rows_each)
    partial = dweight.new_zeros(programs, dweight.numel())
    if m:
        block, warps = _block(k)
        rms_norm_backward_kernel[(programs,)](
            *(dy, x, weight, mean, rstd, dx, partial, m, k, rows_each, offset),
            *(mean.numel() > 0, weight is not None, dweight.numel() > 0, block > WIDEST, block),
            num_warps=warps,
        )
    if dweight.numel():
        torch.sum(partial, 0, out=dweight)
    if dbias.numel():  # torch reads dy once more; a second sum in the kernel would cost registers
        torch.sum(dy, 0, dtype=dbias.dtype, out=dbias)


def _case(kernel, k: int, dtype: str, weight: str, center: bool, **constants: bool) -> dict:
    block, warps = _block(k)
    forward = {"x_ptr": f"*{dtype}", "weight_ptr": f"*{weight}", "bias_ptr": f"*{weight}", "y_ptr": f"*{dtype}"}
    forward |= {"mean_ptr": "*fp32", "rstd_ptr": "*fp32", "K": "i32", "eps": "fp32", "offset": "fp32"}
    backward = {"dy_ptr": f"*{dtype}", "x_ptr": f"*{dtype}", "weight_ptr": f"*{weight}", "mean_ptr": "*fp32"}
    backward |= {"rstd_ptr": "*fp32", "dx_ptr": f"*{dtype}", "dweight_ptr": "*fp32"}
    backward |= {"M": "i32", "K": "i32", "rows_each": "i32", "offset": "fp32"}
    if kernel is rms_norm_backward_kernel:
        constants["WIDE"] = block > WIDEST
    return {
        "kernel": kernel,
        "types": forward if kernel is rms_norm_kernel else backward,
        "constants": {"CENTER": center, "HAS_WEIGHT": True, "BLOCK_K": block} | constants,
        "aligned": ("K",),
        "options": {"enable_fp_fusion": True, "num_warps": warps},
    }


COMPILE_CASES = {
    "rms-bf16": _case(rms_norm_kernel, 4096, "bf16", "bf16", False, SAVED=False, HAS_BIAS=False),
    "rms-bf16-16384": _case(rms_norm_kernel, 16384, "bf16", "fp32", False, SAVED=False, HAS_BIAS=False),
    "layer-f32-16384": _case(rms_norm_kernel, 16384, "fp32", "fp32", True, SAVED=False, HAS_BIAS=True),
    "layer-f32-saved": _case(rms_norm_kernel, 1000, "fp32", "fp32", True, SAVED=True, HAS_BIAS=True),
    "rms-bf16-backward": _case(rms_norm_backward_kernel, 4096, "bf16", "bf16", False, NEED_WEIGHT=True),
    "layer-f32-backward": _case(rms_norm_backward_kernel, 8192, "fp32", "fp32", True, NEED_WEIGHT=True),
    "rms-bf16-backward-16384": _case(rms_norm_backward_kernel, 16384, "bf16", "bf16", False, NEED_WEIGHT=True),
    "layer-f32-backward-16384": _case(rms_norm_backward_kernel, 16384, "fp32", "fp32", True, NEED_WEIGHT=True),
}
