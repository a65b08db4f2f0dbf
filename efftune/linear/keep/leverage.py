"""STAND-IN for Sampled(ratio, when="backward"): keeps x and picks rows in backward, by the true gradient norms."""

from __future__ import annotations

from dataclasses import dataclass

from efftune.linear.contracts import Keep
from efftune.linear.keep.exact import Exact
from efftune.nn.subbatch import _select
from efftune.ops.draw_seed import draw_seed


@dataclass(frozen=True)
class Leverage(Keep):
    ratio: float = 1.0

    def save(self, z, seed):
        return (z,)

    def weight_grad(self, g, kept):
        (x,) = kept
        rows = x.shape[0]
        k = max(1, min(rows, int(self.ratio * rows + 0.5)))
        if k >= rows:
            return Exact().weight_grad(g, kept)
        idx, weight, _ = _select(g.norm(dim=1).float() * x.norm(dim=1).float(), k, draw_seed())
        return (g[idx] * weight[:, None]).to(g.dtype).t() @ x[idx]
