"""R-AMT: masks in attention alone, whose scores learn from a random part of their gradients."""

from __future__ import annotations

import zlib
from dataclasses import dataclass

import torch

from efftune.errors import EfftuneError
from efftune.methods.sparse import _batch
from efftune.methods.sparse._masks import Masks

INPUTS = r"[qkv]_proj|qkv_proj|(query|key|value)(_proj)?|query_key_value|[qkv]_lin|c_attn"
OUTPUTS = r"o_proj|out_lin|(self_)?attn\.(c_proj|out_proj)|(self_)?attention\.(dense|out_proj|output\.dense)"
T5 = r"\w+Attention\.[qkvo]"


@dataclass
class State(_batch.State):
    _called: bool = False


@dataclass(frozen=True)
class Ramt(Masks):
    """Switches single entries of attention's weights off, as `mft` does, and drops a random part of the scores'
    gradients in each step.

    Which part follows from the seed and the step alone.

    Args:
        drop: the probability with which the gradient of a score is dropped; what is left is not scaled.
        density, threshold, init, scorer, rank, seed, file: see `mft`.   target_modules: the projections of attention,
            which are told by their names.   modules_to_save: see `lora`.
    Source: Zheng et al. 2023, arXiv:2307.15049.
    """

    drop: float = 0.5
    target_modules: str | tuple[str, ...] = f"{INPUTS}|{OUTPUTS}|{T5}"

    name, learning_rate = "ramt", 1e-3
    State = State

    def __post_init__(self):
        super().__post_init__()
        if not 0 <= self.drop < 1:
            raise EfftuneError(f"gradients are dropped with a probability in [0, 1), not drop={self.drop}.")

    def backward(self, micro, inner):
        loss, run = super().backward(micro, inner), micro.run
        run.state(self)._called = True
        for name, layer in self.layers(run).items():
            if self.drop and (grad := layer.values.grad) is not None:
                draw = torch.Generator().manual_seed(zlib.crc32(f"{self.seed}:{run.step}:{name}".encode()))
                # The same part for all micro-batches of a step, so that it can be dropped after each of them.
                grad[(torch.rand(len(grad), generator=draw) < self.drop).to(grad.device)] = 0
        return loss

    def missed(self, run):
        without = self.drop and not run.state(self)._called
        return ("drops gradients", "all of them are used") if without else None
