"""What makes a Hugging Face model call the layers and functions of `efftune.nn`, which itself knows torch alone."""

from __future__ import annotations

from efftune.errors import EfftuneError
from efftune.interop.transformers import blocks, eager_attention, groups
from efftune.interop.transformers.blocks import Blocks
from efftune.nn.attention import KEEP
from efftune.nn.eager_attention import ROWS
from efftune.plan import Plan


def check(plan: Plan) -> None:
    """Raises: EfftuneError where the plan wants of the model's attention what that does not do."""
    if ROWS in plan.in_blocks and not eager_attention.modules(plan.model):
        raise EfftuneError(
            f"{plan.in_blocks[ROWS][1]} samples the products of eager attention, and {type(plan.model).__name__} runs "
            'none that is known; load it with attn_implementation="eager", or leave attention out.'
        )


def install(plan: Plan, around: bool = True) -> Blocks:
    """Makes the model of a plan that is built do what the plan says of its attention; with `around`, also swaps what
    stands around the linear layers, and lets layers that read one tensor work as one. Returns what was changed."""
    done, model = Blocks(), plan.model
    keep, rows = (plan.in_blocks.get(attribute, (None,))[0] for attribute in (KEEP, ROWS))
    if around:
        done = blocks.install(model, keep)
        if done.swaps:
            done.swaps += plan.replace_trained()
        done.groups = groups.install(model)  # of the layers as they are now
    if rows is not None:
        done.rows = eager_attention.modules(model)
        for module in done.rows:
            setattr(module, ROWS, rows)
        eager_attention.register()
    return done
