"""Full: the stored weight itself is trained."""

from __future__ import annotations

from dataclasses import dataclass

from efftune.linear.contracts import Delta


@dataclass(frozen=True)
class Full(Delta):
    """y = x·Wᵀ + bias, dW = dyᵀ·x̃ with x̃ as `keep` returns it.

    Saved for backward: keep(x), and only if W's gradient is asked for.
    """

    def trainable(self, base, w):
        return (True,) * len(w), ()

    def why_not(self, base, keep, shape):
        if not base.trains:
            return (
                f"full trains the stored weight itself and {base} stores integers; add an adapter such as lora(r=16), "
                "or train the scales by peqa"
            )
        return None

    def forward(self, base, keep, x, bias, w, p, seed, need, source):
        return base.linear(w, x, bias=bias), keep.save(x, source, seed) if any(need.w) else ()

    def backward(self, base, keep, dy, w, p, saved, seed, need):
        dx = base.linear_t(w, dy) if need.x else None
        dws = (None,) * len(w)
        if any(need.w):
            dws = base.weight_vjp(w, keep.weight_grad(dy, saved), 0, dy.shape[1])
        return dx, dws, ()
