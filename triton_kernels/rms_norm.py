"""RMSNorm and LayerNorm: forward with one program per row; backward with one program per chunk of rows, whose sums over
rows go into a buffer that torch adds up. A row is held in registers, up to 16384 columns."""

import torch
import triton
import triton.language as tl

WIDEST = 8192  # columns of which a row and sums over rows fit the registers; beyond, the sums take a pass of their own


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
    dweight_ptr,  # (programs, K) partial sums
    M,
    K,
    rows_each,
    offset: tl.float32,
    CENTER: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
    NEED_WEIGHT: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    pid = tl.program_id(0).to(tl.int64)
    offs_k = tl.arange(0, BLOCK_K)
    mask = offs_k < K
    dweight = tl.zeros((BLOCK_K,), tl.float32)
    for row in range(pid * rows_each, tl.minimum((pid + 1) * rows_each, M)):
        rstd = tl.load(rstd_ptr + row)
        mean = tl.load(mean_ptr + row) if CENTER else 0.0
        at = row * K + offs_k
        dy = tl.load(dy_ptr + at, mask=mask, other=0.0).to(tl.float32)  # 0 where masked: so is g
        g = dy * _gain(weight_ptr, offs_k, mask, offset, HAS_WEIGHT)
        of_g = tl.sum(g) / K if CENTER else 0.0  # before x is loaded: at most two rows are in registers without sums
        x_hat = (tl.load(x_ptr + at, mask=mask, other=0.0).to(tl.float32) - mean) * rstd
        if NEED_WEIGHT:
            dweight += dy * x_hat
        of_x_hat = tl.sum(g * x_hat) / K
        dx = g - of_g - x_hat * of_x_hat
        tl.store(dx_ptr + at, (dx * rstd).to(dx_ptr.dtype.element_ty), mask=mask)
    if NEED_WEIGHT:
        tl.store(dweight_ptr + pid * K + offs_k, dweight, mask=mask)


@triton.jit
def rms_norm_weight_kernel(
    dy_ptr,
    x_ptr,
    mean_ptr,
    rstd_ptr,
    dweight_ptr,  # (programs, K) partial sums
    M,
    K,
    rows_each,
    CENTER: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    pid = tl.program_id(0).to(tl.int64)
    offs_k = tl.program_id(1) * BLOCK_K + tl.arange(0, BLOCK_K)
    mask = offs_k < K
    dweight = tl.zeros((BLOCK_K,), tl.float32)
    for row in range(pid * rows_each, tl.minimum((pid + 1) * rows_each, M)):
        mean = tl.load(mean_ptr + row) if CENTER else 0.0
        x_hat = (tl.load(x_ptr + row * K + offs_k, mask=mask, other=0.0).to(tl.float32) - mean) * tl.load(
            rstd_ptr + row
        )
        dweight += tl.load(dy_ptr + row * K + offs_k, mask=mask, other=0.0).to(tl.float32) * x_hat
    tl.store(dweight_ptr + pid * K + offs_k, dweight, mask=mask)


def _block(k: int, backward: bool = False) -> tuple[int, int]:
    """BLOCK_K and num_warps: up to 16 elements a thread; 8 where sums over rows take registers, too."""
    block = max(16, triton.next_power_of_2(k))
    return block, 32 if backward and block >= WIDEST else min(32, max(4, block // 512))


def _forward(x, weight, bias, y, mean, rstd, eps, offset, saved) -> None:
    if x.numel() == 0:
        return
    block, warps = _block(x.shape[1])
    rms_norm_kernel[(x.shape[0],)](
        *(x, weight, bias, y, mean, rstd, x.shape[1], eps, offset),
        *(mean is not None, saved, weight is not None, bias is not None, block),
        num_warps=warps,
        enable_fp_fusion=True,
    )


def rms_norm(x, weight, bias, y, mean, rstd, eps: float, offset: float) -> None:
    """x, y (M, K), weight, bias (K,) or None, mean, rstd (M,); without a mean: not centred. All contiguous."""
    _forward(x, weight, bias, y, mean, rstd, eps, offset, False)


def rms_norm_apply(x, weight, bias, y, mean, rstd, offset: float) -> None:
    """As rms_norm, with mean and rstd given."""
    _forward(x, weight, bias, y, mean, rstd, 0.0, offset, True)


def rms_norm_backward(dy: torch.Tensor, x: torch.Tensor, weight, mean, rstd, dx, dweight, dbias, offset: float) -> None:
    """dy, x, dx (M, K); dweight, dbias (K,) f32, or None where they are not wanted. All contiguous."""
    m, k = x.shape
    # A partition that follows from M alone, so that it does not change with the GPU.
    # With fewer than 8 rows each the sums over rows would cost more than a sixth of what x, dy and dx do.
    rows_each = max(8, triton.cdiv(m, 512))
    programs = triton.cdiv(m, rows_each)
    partial = None if dweight is None else dweight.new_empty(programs, k)
    block, warps = _block(k, backward=True)
    fused = block <= WIDEST
    if m:
        rms_norm_backward_kernel[(programs,)](
            *(dy, x, weight, mean, rstd, dx, partial, m, k, rows_each, offset),
            *(mean is not None, weight is not None, fused and dweight is not None, block),
            num_warps=warps,
            enable_fp_fusion=True,
        )
        if dweight is not None and not fused:
            rms_norm_weight_kernel[(programs, triton.cdiv(k, 1024))](
                dy, x, mean, rstd, partial, m, k, rows_each, mean is not None, 1024, enable_fp_fusion=True
            )
    if dweight is not None:
        torch.sum(partial, 0, out=dweight)
    if dbias is not None:  # torch reads dy once more; a second sum in the kernel would cost registers
        torch.sum(dy, 0, dtype=dbias.dtype, out=dbias)


def _case(kernel, k: int, dtype: str, weight: str, **constants: bool) -> dict:
    block, warps = _block(k, kernel is rms_norm_backward_kernel)
    pointers = {
        "x_ptr": dtype,
        "dy_ptr": dtype,
        "y_ptr": dtype,
        "dx_ptr": dtype,
        "weight_ptr": weight,
        "bias_ptr": weight,
    }
    pointers |= dict.fromkeys(("mean_ptr", "rstd_ptr", "dweight_ptr"), "fp32")
    scalars = {"M": "i32", "K": "i32", "rows_each": "i32", "eps": "fp32", "offset": "fp32"}
    types = {name: f"*{t}" for name, t in pointers.items()} | scalars
    constants = {"BLOCK_K": 1024 if kernel is rms_norm_weight_kernel else block, "HAS_WEIGHT": True} | constants
    return {
        "kernel": kernel,
        "types": {name: types[name] for name in kernel.arg_names if name in types},
        "constants": {name: value for name, value in constants.items() if name in kernel.arg_names},
        "aligned": ("K",),
        "options": {"num_warps": 4 if kernel is rms_norm_weight_kernel else warps},
    }


_RMS, _LAYER = {"CENTER": False, "HAS_BIAS": False}, {"CENTER": True, "HAS_BIAS": True}
COMPILE_CASES = {
    "rms-bf16": _case(rms_norm_kernel, 4096, "bf16", "bf16", SAVED=False, **_RMS),
    "rms-bf16-16384": _case(rms_norm_kernel, 16384, "bf16", "fp32", SAVED=False, **_RMS),
    "layer-f32-16384": _case(rms_norm_kernel, 16384, "fp32", "fp32", SAVED=False, **_LAYER),
    "layer-f32-saved": _case(rms_norm_kernel, 1000, "fp32", "fp32", SAVED=True, **_LAYER),
    "rms-bf16-backward": _case(rms_norm_backward_kernel, 4096, "bf16", "bf16", NEED_WEIGHT=True, **_RMS),
    "layer-f32-backward": _case(rms_norm_backward_kernel, 8192, "fp32", "fp32", NEED_WEIGHT=True, **_LAYER),
    "layer-f32-backward-16384": _case(rms_norm_backward_kernel, 16384, "fp32", "fp32", NEED_WEIGHT=False, **_LAYER),
    "weight": _case(rms_norm_weight_kernel, 16384, "bf16", "bf16", **_RMS),
}
