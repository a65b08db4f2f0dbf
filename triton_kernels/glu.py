"""act(gate) up and its gradients, one program per row and block of columns."""

import torch
import triton
import triton.language as tl


@triton.jit
def _value(x, ACTIVATION: tl.constexpr):
    if ACTIVATION == "silu":
        return x * tl.sigmoid(x)
    elif ACTIVATION == "gelu":
        return 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))
    elif ACTIVATION == "gelu_tanh":  # (1 + tanh(u)) / 2 is the logistic function of 2u
        return x * tl.sigmoid(1.5957691216057308 * (x * (1.0 + 0.044715 * x * x)))
    elif ACTIVATION == "relu":
        return tl.where(x < 0.0, 0.0, x)
    else:
        tl.static_assert(ACTIVATION == "relu2")
        r = tl.where(x < 0.0, 0.0, x)
        return r * r


@triton.jit
def _slope(x, ACTIVATION: tl.constexpr):
    if ACTIVATION == "silu":
        s = tl.sigmoid(x)
        return s * (1.0 + x * (1.0 - s))
    elif ACTIVATION == "gelu":
        pdf = 0.3989422804014327 * tl.exp(-0.5 * x * x)
        return 0.5 * (1.0 + tl.erf(x * 0.7071067811865476)) + x * pdf
    elif ACTIVATION == "gelu_tanh":
        s = tl.sigmoid(1.5957691216057308 * (x * (1.0 + 0.044715 * x * x)))
        return s + x * (s * (1.0 - s)) * (1.5957691216057308 * (1.0 + 0.134145 * x * x))
    elif ACTIVATION == "relu":
        return tl.where(x <= 0.0, 0.0, 1.0)
    else:
        tl.static_assert(ACTIVATION == "relu2")
        return 2.0 * tl.where(x < 0.0, 0.0, x)


@triton.jit
def glu_kernel(
    gate_ptr,
    up_ptr,
    y_ptr,
    F,
    stride_gate,
    stride_up,
    ACTIVATION: tl.constexpr,
    HAS_UP: tl.constexpr,
    BLOCK_F: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    offs_f = tl.program_id(1) * BLOCK_F + tl.arange(0, BLOCK_F)
    mask = offs_f < F
    gate = tl.load(gate_ptr + row * stride_gate + offs_f, mask=mask, other=0.0).to(tl.float32)
    y = _value(gate, ACTIVATION)
    if HAS_UP:
        y *= tl.load(up_ptr + row * stride_up + offs_f, mask=mask, other=0.0).to(tl.float32)
    tl.store(y_ptr + row * F + offs_f, y.to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit
def glu_backward_kernel(
    dy_ptr,
    gate_ptr,
    up_ptr,
    dgate_ptr,
    dup_ptr,
    F,
    stride_dy,
    stride_gate,
    stride_up,
    ACTIVATION: tl.constexpr,
    HAS_UP: tl.constexpr,
    BLOCK_F: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    offs_f = tl.program_id(1) * BLOCK_F + tl.arange(0, BLOCK_F)
    mask = offs_f < F
    dy = tl.load(dy_ptr + row * stride_dy + offs_f, mask=mask, other=0.0).to(tl.float32)
    gate = tl.load(gate_ptr + row * stride_gate + offs_f, mask=mask, other=0.0).to(tl.float32)
    dgate = dy
    if HAS_UP:
        dgate *= tl.load(up_ptr + row * stride_up + offs_f, mask=mask, other=0.0).to(tl.float32)
        dup = dy * _value(gate, ACTIVATION)
        tl.store(dup_ptr + row * F + offs_f, dup.to(dup_ptr.dtype.element_ty), mask=mask)
    dgate *= _slope(gate, ACTIVATION)
    tl.store(dgate_ptr + row * F + offs_f, dgate.to(dgate_ptr.dtype.element_ty), mask=mask)


def _grid(gate: torch.Tensor) -> tuple[tuple[int, int], int]:
    block = min(1024, max(16, triton.next_power_of_2(gate.shape[1])))
    return (gate.shape[0], triton.cdiv(gate.shape[1], block)), block


def _stride(t: torch.Tensor | None) -> int:
    return 0 if t is None else t.stride(0)


def glu(gate: torch.Tensor, up: torch.Tensor | None, y: torch.Tensor, activation: str) -> None:
    """gate, up (M, F) with adjacent elements in a row; y (M, F) contiguous."""
    if gate.numel() == 0:
        return
    grid, block = _grid(gate)
    glu_kernel[grid](
        gate, up, y, gate.shape[1], _stride(gate), _stride(up), activation, up is not None, block, enable_fp_fusion=True
    )


def glu_backward(
    dy: torch.Tensor, gate: torch.Tensor, up, dgate: torch.Tensor, dup: torch.Tensor | None, activation: str
) -> None:
    """dy, gate, up (M, F) with adjacent elements in a row; dgate and, with up, dup (M, F) contiguous."""
    if gate.numel() == 0:
        return
    grid, block = _grid(gate)
    strides = (_stride(t) for t in (dy, gate, up))
    glu_backward_kernel[grid](
        dy, gate, up, dgate, dup, gate.shape[1], *strides, activation, up is not None, block, enable_fp_fusion=True
    )


def _case(kernel, dtype: str, activation: str) -> dict:
    pointers = ("gate_ptr", "up_ptr", "y_ptr"), ("dy_ptr", "gate_ptr", "up_ptr", "dgate_ptr", "dup_ptr")
    sizes = ("F", "stride_gate", "stride_up"), ("F", "stride_dy", "stride_gate", "stride_up")
    backward = kernel is glu_backward_kernel
    return {
        "kernel": kernel,
        "types": dict.fromkeys(pointers[backward], f"*{dtype}") | dict.fromkeys(sizes[backward], "i32"),
        "constants": {"ACTIVATION": activation, "HAS_UP": True, "BLOCK_F": 1024},
        "aligned": sizes[backward],
    }


COMPILE_CASES = {
    "silu-bf16": _case(glu_kernel, "bf16", "silu"),
    "silu-bf16-backward": _case(glu_backward_kernel, "bf16", "silu"),
    "gelu-f32-backward": _case(glu_backward_kernel, "fp32", "gelu"),
    "gelu-tanh-bf16-backward": _case(glu_backward_kernel, "bf16", "gelu_tanh"),
    "relu2-f16-backward": _case(glu_backward_kernel, "fp16", "relu2"),
}
