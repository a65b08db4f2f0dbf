"""WTA-CRS: weight gradients from a random, reweighted part of the tokens."""

from __future__ import annotations

from dataclasses import dataclass

from efftune.errors import EfftuneError
from efftune.linear import Linear
from efftune.linear.keep.sampled import Sampled, fallbacks
from efftune.methods._base import KEEPS, Method, exact_keeps
from efftune.methods.sampled._scores import TokenScores
from efftune.nn.eager_attention import ROWS
from efftune.plan import ALL_LINEAR
from efftune.structure import blocks


@dataclass(frozen=True)
class WtaCrs(Method):
    """Estimates the weight gradients dW = dyᵀ·x of the trained linear layers that `target_modules` selects from a share
    `ratio` of the tokens, without bias. The gradient dx of a layer's input stays exact.

    `efftune.linear.keep.sampled.Sampled` describes the samplers, and says when rows are drawn.

    A token's score is ‖x_i‖ · ‖dy_i‖. Where rows are drawn in forward, ‖dy_i‖ is remembered from the last time that the
    sample was seen: one number per token for all layers, under the `sample_ids` of the batch. `tuner.summary()` says
    how often there was one.

    With `attention`, models that run with attn_implementation="eager" also estimate dv and dk of attention, from a
    share `ratio` of the query rows (see `efftune.nn.eager_attention`). This saves time only. It composes with `mesa`,
    which says how the attention weights are kept.

    Memory: a share `ratio` of what such layers keep, k·K elements, once for layers that read the same tensor. An input
        that backward can make again costs nothing in any case, and its layer draws in backward, with exact scores.
    Raises: EfftuneError for a ratio outside (0, 1], for sampler="topk" without biased=True, where no layer trains, and
        for attention=True on a model without eager attention.
    Source: Liu et al. 2023, arXiv:2305.15265.
    """

    ratio: float = 0.3
    sampler: str = "systematic"
    min_rows: int = 16
    target_modules: str | tuple[str, ...] = ALL_LINEAR
    biased: bool = False
    attention: bool = False

    name = "wtacrs"
    phase = KEEPS
    State = TokenScores

    def __post_init__(self):
        Sampled(self.ratio, self.sampler, self.min_rows)  # raises on a value out of range
        if self.sampler == "topk" and not self.biased:
            raise EfftuneError(
                "wtacrs(sampler='topk') drops the small rows for good: its gradient is biased; add biased=True if that "
                "is what you want to look at, or use the unbiased 'systematic'."
            )

    def plan(self, plan):
        plan.keep(self, self.target_modules, self._keep())
        if self.attention:
            plan.keep_in_blocks(self, self._keep(), ROWS)

    def _keep(self) -> Sampled:
        return Sampled(self.ratio, self.sampler, self.min_rows)

    def install(self, run):
        model, scores = run.model, run.state(self)
        for module in model.modules():
            if isinstance(module, Linear) and module.keep == self._keep():
                module.scores = scores
        for block in _stack(model):
            if _Observer(scores) not in block._forward_hooks.values():  # of another wtacrs of the recipe
                block.register_forward_hook(_Observer(scores))

    def backward(self, micro, inner):
        scores = micro.run.state(self)
        scores.begin(micro.batch)
        loss = inner(micro)
        scores.end()
        return loss

    def exactly(self, run):
        return exact_keeps(run.model)

    def remove(self, run):
        for block in _stack(run.model):
            for key in [key for key, hook in block._forward_hooks.items() if isinstance(hook, _Observer)]:
                del block._forward_hooks[key]

    def report(self, run):
        text = f"token scores: {run.state(self)}"
        count = fallbacks()
        return text + (f"; {count} draws had no finite scores and were uniform" if count else "")


def _stack(model):
    try:
        return blocks(model)[1]
    except EfftuneError:
        return []  # then nothing is remembered, and the norms of the inputs are the scores


@dataclass(frozen=True)
class _Observer:
    """Forward hook of a block: lets `scores` see the gradient of its output."""

    scores: TokenScores

    def __call__(self, module, args, output):
        output = output[0] if isinstance(output, tuple) else output
        if output.requires_grad:
            output.register_hook(self.scores.observe)
