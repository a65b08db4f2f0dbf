"""What makes a Hugging Face model call the layers and functions of `efftune.nn`, which itself knows torch alone."""

from __future__ import annotations

from efftune.errors import EfftuneError
from efftune.interop.transformers import blocks, eager_attention, groups
from efftune.interop.transformers.blocks import Blocks
from efftune.plan import Plan


def check(plan: Plan) -> None:
    """Raises: EfftuneError where the plan wants of the model's attention what that does not do."""
    for method in plan.query_rows.values():
        if not eager_attention.modules(plan.model):
            raise EfftuneError(
                f"{method} samples the products of eager attention, and {type(plan.model).__name__} runs none that is "
                'known; load it with attn_implementation="eager", or leave attention out.'
            )


def install(plan: Plan, around: bool = True) -> Blocks:
    """Makes the model of a plan that is built do what the plan says of its attention; with `around`, also swaps what
    stands around the linear layers, and lets layers that read one tensor work as one. Returns what was changed."""
    done = Blocks()
    if around:
        done = blocks.install(plan.model, next(iter(plan.block_keeps), None))
        if done.swaps:
            done.swaps += plan.replace_trained()
        done.groups = groups.install(plan.model)  # of the layers as they are now
    for rows in plan.query_rows:
        done.rows = eager_attention.sample_rows(plan.model, rows)
    return done
