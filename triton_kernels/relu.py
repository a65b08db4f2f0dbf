"""relu with the bits of its derivative, and its gradient from these; one program per block of bytes."""

import torch
import triton
import triton.language as tl


@triton.jit
def relu_kernel(x_ptr, y_ptr, bits_ptr, count, BLOCK: tl.constexpr):
    offs_byte = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    bit = tl.arange(0, 8)
    offs = offs_byte[:, None] * 8 + bit[None, :]
    mask = offs < count
    x = tl.load(x_ptr + offs, mask=mask, other=0.0)
    off = x.to(tl.float32) <= 0.0  # NaN is not
    y = tl.where(x.to(tl.float32) < 0.0, 0.0, x)  # -0 and NaN stay, as in torch
    tl.store(y_ptr + offs, y.to(y_ptr.dtype.element_ty), mask=mask)
    packed = tl.sum(tl.where(off, 0, 1) << bit[None, :], axis=1)
    tl.store(bits_ptr + offs_byte, packed.to(tl.uint8), mask=offs_byte * 8 < count)


@triton.jit
def relu_backward_kernel(dy_ptr, bits_ptr, dx_ptr, count, BLOCK: tl.constexpr):
    offs = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = offs < count
    dy = tl.load(dy_ptr + offs, mask=mask, other=0.0)
    bits = tl.load(bits_ptr + offs // 8, mask=mask, other=0).to(tl.int32)
    on = (bits >> (offs % 8).to(tl.int32)) & 1
    tl.store(dx_ptr + offs, tl.where(on != 0, dy, 0.0).to(dx_ptr.dtype.element_ty), mask=mask)


def relu(x: torch.Tensor, y: torch.Tensor, bits: torch.Tensor) -> None:
    """x, y contiguous; bits (⌈count / 8⌉,) uint8."""
    if x.numel():
        relu_kernel[(triton.cdiv(x.numel(), 1024),)](x, y, bits, x.numel(), 128, enable_fp_fusion=True)


def relu_backward(dy: torch.Tensor, bits: torch.Tensor, dx: torch.Tensor) -> None:
    """dy, dx contiguous."""
    if dy.numel():
        relu_backward_kernel[(triton.cdiv(dy.numel(), 1024),)](dy, bits, dx, dy.numel(), 1024, enable_fp_fusion=True)


def _case(kernel, dtype: str) -> dict:
    types = {name: "*u8" if name == "bits_ptr" else f"*{dtype}" for name in kernel.arg_names if name.endswith("_ptr")}
    block = 128 if kernel is relu_kernel else 1024
    return {"kernel": kernel, "types": {**types, "count": "i32"}, "constants": {"BLOCK": block}, "aligned": ("count",)}


COMPILE_CASES = {
    "bf16": _case(relu_kernel, "bf16"),
    "f32": _case(relu_kernel, "fp32"),
    "bf16-backward": _case(relu_backward_kernel, "bf16"),
    "f32-backward": _case(relu_backward_kernel, "fp32"),
}
