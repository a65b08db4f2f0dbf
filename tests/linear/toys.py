"""Small kinds of base and delta, each of which bends the contracts in a way of its own. They are here to hold them to
that, and are no part of the library: no kernels, no care for speed."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from efftune.linear import Dense, Int8, LoRA
from efftune.linear.contracts import Base, Delta, Stored, add_entries, product_t
from efftune.linear.delta.factored import Factored
from efftune.linear.delta.tiled import Tiled
from efftune.ops.lowrank_linear import linear, linear_t

LEVELS = torch.tensor(
    [-1.0, -0.7, -0.53, -0.39, -0.28, -0.18, -0.09, 0.0, 0.08, 0.16, 0.25, 0.34, 0.44, 0.56, 0.72, 1.0]
)


class Unpacked(Base):
    """A base that multiplies by the W it makes."""

    def matrix(self, w, dtype) -> Tensor:
        """What z is multiplied by, (N, K')."""
        return self.rows(w, 0, w.shape[0], dtype)

    def linear(self, w, z, low_rank=None, bias=None, add=None, entries=()):
        return linear(z, add_entries(self.matrix(w, z.dtype), entries), low_rank, bias, add)

    def linear_t(self, w, dy, low_rank=None, add=None, entries=()):
        return linear_t(dy, add_entries(self.matrix(w, dy.dtype), entries), low_rank, add)


@dataclass(frozen=True)
class FourBits(Unpacked):
    """As NF4: two codes a byte and a scale a block, over the whole of W. The tensors tell neither its shape nor its
    dtype, nothing of them learns, and the scales stay float32."""

    block: int = 16

    names, fixed = ("packed", "absmax"), ("absmax",)

    def store(self, weight):
        blocks = weight.float().reshape(-1, self.block)
        absmax = blocks.abs().amax(1)
        codes = ((blocks / absmax[:, None])[..., None] - LEVELS).abs().argmin(-1).to(torch.uint8).flatten()
        return codes[::2] << 4 | codes[1::2], absmax

    def rows(self, w, a, b, dtype):
        packed, absmax = w.tensors
        codes = torch.stack([packed >> 4, packed & 15], -1).flatten().long()
        return (LEVELS[codes].view(-1, self.block) * absmax[:, None]).view(w.shape)[a:b].to(dtype)


@dataclass(frozen=True)
class Codebook(Unpacked):
    """As AQLM: runs of four weights of a row are entries of a book that all rows share; the book and the scales of rows
    learn. The gradient of the book has no rows of its own."""

    entries: int = 8

    names, learns = ("codes", "book", "row_scales"), ("book", "row_scales")

    def store(self, weight):
        scales = weight.abs().amax(1, keepdim=True)
        runs = (weight / scales).reshape(-1, 4)
        book = runs[:: len(runs) // self.entries][: self.entries].clone()
        return torch.cdist(runs, book).argmin(1).to(torch.uint8).view(len(weight), -1), book, scales

    def dtype(self, tensors):
        return tensors[1].dtype

    def rows(self, w, a, b, dtype):
        codes, book, scales = w.tensors
        return (book[codes[a:b].long()].flatten(1) * scales[a:b]).to(dtype)

    def weight_vjp(self, w, dw_rows, a, b):
        codes, book, scales = w.tensors
        entries = (dw_rows * scales[a:b]).reshape(-1, 4)
        dbook = torch.zeros_like(book).index_add_(0, codes[a:b].flatten().long(), entries.to(book.dtype))
        return None, dbook, (dw_rows * book[codes[a:b].long()].flatten(1)).sum(1, keepdim=True)


@dataclass(frozen=True)
class Rotated(Unpacked):
    """Straight-through training: W is rounded to 4 bits behind a rotation, and x is rotated with it."""

    bits: int | None = 4

    names = learns = ("weight",)
    trains = True

    def store(self, weight):
        return (weight,)

    def dtype(self, tensors):
        return tensors[0].dtype

    def turned(self, t: Tensor) -> Tensor:
        h = torch.ones(1, 1, dtype=t.dtype)
        while len(h) < t.shape[-1]:
            h = torch.cat([torch.cat([h, h], 1), torch.cat([h, -h], 1)])
        return t @ (h / math.sqrt(len(h)))  # symmetric, its own inverse

    def enter(self, w, x):
        return self.turned(x)

    def leave(self, w, dz):
        return self.turned(dz)

    def matrix(self, w, dtype):
        weight = self.turned(w.tensors[0].to(dtype))
        if self.bits is None:
            return weight
        scale = weight.abs().amax(-1, keepdim=True) / (2 ** (self.bits - 1) - 1)
        return (weight / scale).round() * scale

    def rows(self, w, a, b, dtype):
        return self.turned(self.matrix(w, dtype)[a:b])

    def weight_vjp(self, w, dw_rows, a, b):
        return (self.turned(dw_rows),)


class RowWise(nn.Module):
    """A quantised layer of another library: codes (K, N), a scale for each column of them, a bias that is a buffer, and
    a state dict of its own."""

    def __init__(self, plain: nn.Linear):
        super().__init__()
        scale = plain.weight.detach().abs().amax(1) / 127
        self.register_buffer(
            "int_weight", (plain.weight.detach() / scale[:, None]).round().to(torch.int8).t().contiguous()
        )
        self.register_buffer("scale", scale)
        self.register_buffer("bias", None if plain.bias is None else plain.bias.detach())

    def forward(self, x):
        y = (x @ self.int_weight.to(x.dtype)) * self.scale
        return y if self.bias is None else y + self.bias

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination[prefix + "format"] = torch.tensor(1)


class EightBits(nn.Linear):
    """One that is an nn.Linear to look at, with codes for a weight."""

    def __init__(self, plain: nn.Linear):
        super().__init__(plain.in_features, plain.out_features, bias=False, device="meta")
        codes, scales = Int8(group=plain.in_features).store(plain.weight.detach())
        self.weight, self.bias = nn.Parameter(codes, requires_grad=False), plain.bias
        self.scales = nn.Parameter(scales, requires_grad=False)


@dataclass(frozen=True)
class Adopting(Int8):
    """Takes over what both of them store."""

    def adopt(self, module):
        if isinstance(module, RowWise):
            codes, scales = module.int_weight.t().contiguous(), module.scale[:, None]
        elif isinstance(module, EightBits):
            codes, scales = module.weight, module.scales
        else:
            return None
        groups = -(-codes.shape[1] // self.group)
        return Stored((codes, scales.repeat_interleave(groups, 1) if groups > 1 else scales), codes.shape, scales.dtype)


def singular(weight: Tensor, r: int) -> tuple[Tensor, Tensor]:
    """A (r, K) and B (N, r) with B·A the largest part of W of that rank; for r < 0 the smallest of -r."""
    u, s, v = torch.linalg.svd(weight.double(), full_matrices=False)
    which = slice(r) if r > 0 else slice(r, None)
    root = s[which].sqrt()
    return (root[:, None] * v[which]).to(weight.dtype), (u[:, which] * root).to(weight.dtype)


@dataclass(frozen=True)
class Rest(LoRA):
    """The largest singular part of W trains, and the rest is what is stored."""

    def begin(self, weight):
        a, b = singular(weight, self.r)
        return weight - self.scale * (b @ a), (a, b)


@dataclass(frozen=True)
class Pissa(Factored):
    """The largest singular part of W trains, and W is stored as it was: what the part begins with is taken from it."""

    names, learns = ("lora_a", "lora_b", "start_a", "start_b"), ("lora_a", "lora_b")

    def begin(self, weight):
        a, b = singular(weight, self.r)
        return weight, (a, b, a.clone(), b.clone())

    def factors(self, p):
        return p[:2]

    def taken(self, p):
        return p[2:]


@dataclass(frozen=True)
class Vera(Factored):
    """ΔW = diag(u)·B·diag(v)·A, of which the vectors train."""

    names, learns = ("random_a", "random_b", "v", "u"), ("v", "u")

    def init(self, shape, dtype, device):
        a, b = super().init(shape, dtype, device)
        return a, torch.randn_like(b), torch.full_like(a[:, 0], 0.1), torch.zeros_like(b[:, 0])

    def factors(self, p):
        a, b, v, u = p
        return v[:, None] * a, u[:, None] * b


@dataclass(frozen=True)
class Kasa(Factored):
    """ΔW = B·diag(sigma)·A, and W loses its smallest singular part."""

    names, learns = ("lora_a", "lora_b", "sigma", "lost_a", "lost_b"), ("lora_a", "lora_b", "sigma")

    def begin(self, weight):
        a, b = self.init(tuple(weight.shape), weight.dtype, weight.device)
        lost_a, lost_b = singular(weight, -self.r)
        return weight, (a, b, torch.ones_like(a[:, 0]), lost_a / self.scale, lost_b)

    def factors(self, p):
        return p[2][:, None] * p[0], p[1]

    def taken(self, p):
        return p[3:]


@dataclass(frozen=True)
class LoHa(Tiled):
    """ΔW = B₁·A₁ ∘ B₂·A₂."""

    r: int = 3

    names = ("one_a", "one_b", "two_a", "two_b")

    def init(self, shape, dtype, device):
        factors = LoRA(self.r, dtype=None).init(shape, dtype, device)
        return *factors, *[torch.randn_like(t) for t in factors]

    def tile(self, p, a, b, w):
        assert w is None  # nobody has unpacked it for this
        return (p[1][a:b] @ p[0]) * (p[3][a:b] @ p[2])


@dataclass(frozen=True)
class Kronecker(Delta):
    """ΔW = P ⊗ Q, P (n, k), Q (N/n, K/k): the weight gradient is contracted in factors, and never exists."""

    n: int = 4
    k: int = 4

    names = ("kron_p", "kron_q")

    def init(self, shape, dtype, device):
        rows, columns = shape[0] // self.n, shape[1] // self.k
        p = torch.zeros(self.n, self.k, dtype=dtype, device=device)
        return p, torch.randn(rows, columns, dtype=dtype, device=device) / shape[1] ** 0.5

    def times(self, x, p, q):
        return torch.einsum("mab,ia,jb->mij", x.reshape(len(x), p.shape[1], q.shape[1]), p, q).flatten(1)

    def forward(self, c, x):
        return c.linear(x, add=self.times(x, *c.p)), c.save(x, c.source)

    def backward(self, c, dy, saved, add=None):
        p, q = c.p
        g, z = c.operands(dy, saved)
        g, z = g.reshape(len(g), p.shape[0], -1), z.reshape(len(z), p.shape[1], -1)
        dp = torch.einsum("mij,jb,mab->ia", g, q, z)
        dq = torch.einsum("mij,ia,mab->jb", g, p, z)
        dx = None
        if c.need.x:
            thin = self.times(dy, p.t(), q.t())
            dx = c.linear_t(dy, add=thin if add is None else add.add_(thin))
        return dx, c.no_dw(), (dp, dq)

    def weight(self, c, a, b, dtype):
        return c.base.rows(c.w, a, b, dtype) + torch.kron(*c.p)[a:b].to(dtype)


@dataclass(frozen=True)
class Masked(Delta):
    """W' = W ∘ 1[score > 0], straight through: d score = dW ∘ W, in tiles of rows."""

    tile: int = 8

    names = ("score",)

    def begin(self, weight):
        return weight, (torch.randn_like(weight) + 1,)

    def weight(self, c, a, b, dtype):
        return c.base.rows(c.w, a, b, dtype) * (c.p[0][a:b] > 0).to(dtype)

    def forward(self, c, x):
        y = x @ self.weight(c, 0, c.w.shape[0], x.dtype).t()
        return y if c.bias is None else y + c.bias, c.save(x, c.source)

    def backward(self, c, dy, saved, add=None):
        (g, z), n = c.operands(dy, saved), c.w.shape[0]
        tiles = [(a, min(a + self.tile, n)) for a in range(0, n, self.tile)]
        ds = [product_t(g[:, a:b], z) * c.base.rows(c.w, a, b, z.dtype) for a, b in tiles]
        dx = linear_t(dy, self.weight(c, 0, n, dy.dtype), None, add)
        return dx, c.no_dw(), (torch.cat(ds),)


BASES = [Dense(), FourBits(), Codebook(), Rotated(), Rotated(None)]
DELTAS = [
    Rest(r=4, dtype=None), Pissa(r=4, lora_alpha=6, dtype=None), Kasa(r=4, lora_alpha=6, dtype=None),
    Vera(r=4, dtype=None), LoHa(), Kronecker(), Masked(),
]  # fmt: skip
