"""y = x·Wᵀ + h·Bᵀ (+ bias): a product with a rank-R epilogue, for LoRA forward and, transposed, for its dx."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.compiler import is_compiling

from efftune.ops._available import ANY, kernels
from efftune.ops._op import Op, forced_backend

MAX_TRITON_RANK = 256


def _reference(x: Tensor, w: Tensor, h: Tensor, b: Tensor, bias: Tensor | None) -> Tensor:
    wide = torch.promote_types(x.dtype, torch.float32)
    y = x.to(wide) @ w.to(wide).t() + h.to(wide) @ b.to(wide).t()
    return (y if bias is None else y + bias.to(wide)).to(x.dtype)


def _fake(x: Tensor, w: Tensor, h: Tensor, b: Tensor, bias: Tensor | None) -> Tensor:
    torch._check(x.dim() == w.dim() == h.dim() == b.dim() == 2, lambda: "lowrank_linear takes matrices")
    (m, k), (n, r) = x.shape, b.shape
    torch._check(w.shape[1] == k, lambda: f"x has {k} columns, w {w.shape[1]}; w must be (N, K)")
    torch._check(w.shape[0] == n, lambda: f"w has {w.shape[0]} rows, b {n}; both are N")
    torch._check(h.shape[0] == m, lambda: f"x has {m} rows, h {h.shape[0]}; both are M")
    torch._check(h.shape[1] == r, lambda: f"h has rank {h.shape[1]}, b {r}")
    return x.new_empty(m, n)


OP = Op(
    "lowrank_linear(Tensor x, Tensor w, Tensor h, Tensor b, Tensor? bias) -> Tensor",
    reference=_reference,
    fake=_fake,
)


_LOW = (torch.bfloat16, torch.float16)


def _rank_first_why_not(x: Tensor, *_) -> str | None:
    return None if x.dtype in _LOW else f"it takes bfloat16 and float16; in {x.dtype} the large product comes first"


# The order is the default: the first that does not refuse. On an H200 (bench/lowrank_linear.py) "rank_first" takes
# 1.10 to 1.14 times as long as the product alone, "torch" 1.12 to 1.18, the fused kernel 1.24 to 1.31: what it saves is
# one pass over y, which is less than what a product loses in it against cuBLAS.
@OP.backend("rank_first", "cuda", why_not=_rank_first_why_not)
def _rank_first(x: Tensor, w: Tensor, h: Tensor, b: Tensor, bias: Tensor | None) -> Tensor:
    # The large product reads y in its epilogue, while other tiles are still multiplied: the pass over y costs no time
    # of its own. What is rounded on the way is the small term.
    return F.linear(h, b, bias).addmm_(x, w.t())


@OP.backend("torch", "cpu", "cuda")
def _torch(x: Tensor, w: Tensor, h: Tensor, b: Tensor, bias: Tensor | None) -> Tensor:
    # In place: a separate product and an add cost three more passes over y; concatenating K and R copies x and W.
    return F.linear(x, w, bias).addmm_(h, b.t())


def _aligned(t: Tensor) -> bool:
    """Whether the copy engine takes the matrix as it lies in memory: rows, or columns, of neighbours at 16 bytes."""
    major, minor = t.stride() if t.stride(1) == 1 else t.stride()[::-1]
    width = t.shape[1] if t.stride(1) == 1 else t.shape[0]
    return minor == 1 and major >= width and major % 8 == t.storage_offset() % 8 == 0


def _triton_why_not(x: Tensor, w: Tensor, h: Tensor, b: Tensor, bias: Tensor | None) -> str | None:
    if h.shape[1] > MAX_TRITON_RANK:
        return f"rank {h.shape[1]} exceeds the {MAX_TRITON_RANK} that the epilogue takes"
    if x.dtype not in _LOW:
        return f"it takes bfloat16 and float16, not {x.dtype}"
    if x.is_cuda and torch.cuda.get_device_capability(x.device) < (9, 0):
        return "tiles are copied by descriptor from compute capability 9.0 on (Hopper)"
    if x.stride(1) != 1 or h.stride(1) != 1 or b.shape[0] % 8 or not all(_aligned(t) for t in (x, w, h, b)):
        return "it takes dense matrices whose sizes and offsets are multiples of 8"
    return None


@OP.backend("triton", "cuda", layout=ANY, of="x w h b", why_not=_triton_why_not)
def _triton(x: Tensor, w: Tensor, h: Tensor, b: Tensor, bias: Tensor | None) -> Tensor:
    return kernels("lowrank_linear").lowrank_linear(x, w, h, b, bias)


def lowrank_linear(x: Tensor, w: Tensor, h: Tensor, b: Tensor, bias: Tensor | None = None) -> Tensor:
    """y = x·Wᵀ + h·Bᵀ (+ bias). The transposed twin, dx = dy·W + dh·A, is `lowrank_linear(dy, w.t(), dh, a.t())`.

    Args:
        x: (M, K) f32 | bf16 | f16 (f64 by the reference and torch).   w: (N, K), any strides.   h: (M, R).
        b: (N, R), any strides.   bias: (N,) or None.   All of one dtype and device.
    Returns: (M, N), dtype of x.
    Numerics: products accumulate in f32. "torch" rounds y to its dtype twice (before and after the rank-R term),
        "rank_first" that term and y, "triton" and the reference y once. On a GPU torch lets cuBLAS add partial sums
        of 16-bit products in 16 bits; see torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction.
    Saved for backward: nothing; the caller owns the gradient (`efftune.linear`).
    Raises: RuntimeError on shapes that do not fit, or if a forced backend refuses.
    Source: Hu et al. 2021, arXiv:2106.09685, eq. 3.
    """
    if not _plain(x):
        return OP(x, w, h, b, bias)
    return (_rank_first if _rank_comes_first(x) else _torch)(x, w, h, b, bias)


def lowrank_linear_t(dy: Tensor, w: Tensor, dh: Tensor, a: Tensor) -> Tensor:
    """dx = dy·W + dh·A, the twin: `lowrank_linear(dy, w.t(), dh, a.t())`, of which the four transposes cost as much on
    the host as a small product.

    Args: dy (M, N), w (N, K), dh (M, R), a (R, K).   Returns: (M, K). Numerics and errors as there.
    """
    if not _plain(dy):
        return OP(dy, w.t(), dh, a.t(), None)
    return torch.mm(dh, a).addmm_(dy, w) if _rank_comes_first(dy) else torch.mm(dy, w).addmm_(dh, a)


def linear(
    x: Tensor, weight: Tensor, low_rank: tuple[Tensor, Tensor] | None, bias: Tensor | None, add: Tensor | None
) -> Tensor:
    """x·weightᵀ (+ h·Bᵀ, low_rank = (h, b)) (+ bias) (+ add (M, N), which it consumes) -> (M, N): the product of every
    base that has its weight at hand as a matrix, of any strides."""
    if low_rank is not None:
        y = lowrank_linear(x, weight, *low_rank, bias)
    elif add is not None and bias is None:
        return add.addmm_(x, weight.t())
    else:
        y = F.linear(x, weight, bias)
    return y if add is None else y.add_(add)


def linear_t(dy: Tensor, weight: Tensor, low_rank: tuple[Tensor, Tensor] | None, add: Tensor | None) -> Tensor:
    """dy·weight (+ dh·A, low_rank = (dh, a)) (+ add (M, K), which it consumes) -> a fresh (M, K)."""
    if low_rank is not None:
        dx = lowrank_linear_t(dy, weight, *low_rank)
        return dx if add is None else dx.add_(add)
    return torch.mm(dy, weight) if add is None else add.addmm_(dy, weight)


def _plain(x: Tensor) -> bool:
    # Where torch's own products are the backend they need no operator around them: two dispatches through Python are
    # 5 µs on a CPU, a twelfth of a small layer's forward and backward, and 35 µs beside a GPU that waits.
    return (x.is_cpu or x.is_cuda) and not is_compiling() and forced_backend() is None


def _rank_comes_first(x: Tensor) -> bool:
    """The first backend that `OP.select` would find."""
    return x.is_cuda and x.dtype in _LOW
