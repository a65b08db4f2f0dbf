"""Small kinds of base and delta, each of which bends the contracts in a way of its own. They are here to hold them to
that, and are no part of the library: no kernels, no care for speed."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from efftune.linear import Dense, LoRA
from efftune.linear.base.dense import product, product_with
from efftune.linear.contracts import Base, Delta, product_t
from efftune.linear.delta.trained import Trained

LEVELS = torch.tensor(
    [-1.0, -0.7, -0.53, -0.39, -0.28, -0.18, -0.09, 0.0, 0.08, 0.16, 0.25, 0.34, 0.44, 0.56, 0.72, 1.0]
)


class Unpacked(Base):
    """A base that multiplies by the W it makes."""

    def matrix(self, w, dtype) -> Tensor:
        """What z is multiplied by, (N, K')."""
        return self.rows(w, 0, w.shape[0], dtype)

    def linear(self, w, z, low_rank=None, bias=None, add=None):
        return product(z, self.matrix(w, z.dtype), low_rank, bias, add)

    def linear_t(self, w, dy, low_rank=None, add=None):
        return product_with(self.matrix(w, dy.dtype), dy, low_rank, add)


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


@dataclass(frozen=True)
class Pissa(LoRA):
    """The largest singular part of W trains, and the rest is stored."""

    def begin(self, weight):
        u, s, v = torch.linalg.svd(weight.double(), full_matrices=False)
        root = s[: self.r].sqrt()
        a, b = root[:, None] * v[: self.r] / self.scale, u[:, : self.r] * root
        rest = weight - self.scale * (b @ a).to(weight.dtype)
        dtype = weight.dtype if self.dtype is None else getattr(torch, self.dtype)
        return rest, (a.to(dtype).contiguous(), b.to(dtype).contiguous())


@dataclass(frozen=True)
class Magnitude(LoRA):
    """As DoRA: y = g ∘ (x Wᵀ + s x Aᵀ Bᵀ) + bias with g = m / ‖W + sBA‖ by row, the norm held constant in backward."""

    dtype: str | None = None

    names = ("lora_a", "lora_b", "magnitude", "squares")  # squares: ‖W‖² by row, as it began

    @property
    def learns(self):
        return "lora_a", "lora_b", "magnitude"

    def begin(self, weight):
        a, b = self.init(weight.shape, weight.dtype, weight.device)
        return weight, (a, b, weight.norm(dim=1), weight.square().sum(1))

    def norm(self, c) -> Tensor:
        a, b, _, squares = c.p
        wa = c.base.linear(c.w, c.base.enter(c.w, a)).t()  # W Aᵀ, over any storage
        s = squares + 2 * self.scale * (wa * b).sum(1) + self.scale**2 * ((b @ (a @ a.t())) * b).sum(1)
        return s.sqrt()

    def forward(self, c, x):
        norm = self.norm(c)
        u, saved = super().forward(c._replace(bias=None, p=c.p[:2], need=c.need._replace(p=(True, True))), x)
        y = u * (c.p[2] / norm)
        return y if c.bias is None else y + c.bias, (u, norm, *saved)

    def backward(self, c, dy, saved, add=None):
        u, norm, *rest = saved
        inner = c._replace(p=c.p[:2], need=c.need._replace(p=(True, True)))
        dx, dws, dab = super().backward(inner, dy * (c.p[2] / norm), tuple(rest), add)
        return dx, dws, (*dab, (dy * u).sum(0) / norm, None)

    def weight(self, c, a, b, dtype):
        plain = super().weight(c._replace(p=c.p[:2]), a, b, dtype)
        return plain * (c.p[2] / self.norm(c))[a:b, None].to(dtype)


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
        dx = product_with(self.weight(c, 0, n, dy.dtype), dy, None, add)
        return dx, c.no_dw(), (torch.cat(ds),)


BASES = [Dense(), FourBits(), Codebook(), Rotated(), Rotated(None)]
DELTAS = [Trained(), LoRA(r=4, dtype=None), Pissa(r=4, dtype=None), Magnitude(r=4), Kronecker(), Masked()]
