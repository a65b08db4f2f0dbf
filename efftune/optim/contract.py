"""What a recipe and a training loop ask of an optimizer beyond what torch's have.

An optimizer that answers otherwise than the defaults derives from `Optimizer`; of any other the defaults hold.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


class Optimizer(torch.optim.Optimizer):
    """An optimizer that answers otherwise than torch's do."""

    in_backward: bool = False  # takes each gradient as soon as backward has it: none is left when `step` is called
    clips: bool = False  # limits gradients itself, to `max_norm`
    max_norm: float = 0.0  # 0: no limit

    def begin(self, last: bool) -> None:
        """Called before the backward pass of each micro-batch, of an optimizer that works `in_backward`. `last`: no
        other micro-batch of the step follows, so that the gradients it sees are the step's."""

    def move(self, p: nn.Parameter, index: Tensor) -> None:
        """Lets the state of p follow its entries, which are others now: entry i of the new order is the one that was at
        index[i], or a new one where index[i] < 0. State that has an entry for each of p's follows. Its new entries are
        0, but of Adam's moments, which are corrected for the age of the whole parameter: with their next gradient they
        become those of a first step (at 0, that step would be 3.2 times too long).

        Args:
            p: (n,) as it is now.   index: (n,) int64.
        """
        move_state(self, p, index)


def move_state(optimizer: torch.optim.Optimizer, p: nn.Parameter, index: Tensor) -> None:
    """Moves the state of any optimizer that has an entry for each of p's in 1-d tensors, as all of torch's have."""
    known, before = index >= 0, index.clamp(min=0)
    state = optimizer.state.get(p, {})
    for name, value in state.items():
        if isinstance(value, Tensor) and value.ndim == 1:
            padded = value if len(value) else value.new_zeros(1)
            state[name] = torch.where(known, padded[before], value.new_zeros(()))
    if MOMENTS <= state.keys() and not known.all():
        state[FRESH] = ~known | state.get(FRESH, ~known).bool()
        begin_new_entries(optimizer)


MOMENTS = {"exp_avg", "exp_avg_sq", "step"}
FRESH = "fresh"  # (n,) bool in the state of a parameter: entries of it that have not had a gradient yet


def begin_new_entries(optimizer: torch.optim.Optimizer) -> None:
    """Lets new entries begin as `Optimizer.move` says, those too whose move was before a state that is loaded."""
    if _begin not in optimizer._optimizer_step_pre_hooks.values():
        optimizer.register_step_pre_hook(_begin)


@torch.no_grad()
def _begin(optimizer: torch.optim.Optimizer, args: tuple, kwargs: dict) -> None:
    """Before a step: lets the moments of new entries be such that they are m = (1 - β₁ᵗ)·g and v = (1 - β₂ᵗ)·g² after
    it, where t is the parameter's age; corrected for it, those of a first step."""
    pending = [(g, p) for g in optimizer.param_groups for p in g["params"] if FRESH in optimizer.state.get(p, ())]
    overflow, scale = getattr(optimizer, "found_inf", None), getattr(optimizer, "grad_scale", None)  # a GradScaler's
    if not pending or (overflow is not None and bool(overflow)):
        return
    for group, p in pending:
        if p.grad is not None:
            state = optimizer.state[p]
            fresh, age = state.pop(FRESH).bool(), float(state["step"])
            g = p.grad[fresh] if scale is None else p.grad[fresh] / scale
            g = -g if group.get("maximize") else g
            for name, value, beta in zip(("exp_avg", "exp_avg_sq"), (g, g * g), group["betas"], strict=True):
                state[name][fresh] = ((1 - beta**age) * value).to(state[name].dtype)


def move(optimizer: torch.optim.Optimizer, p: nn.Parameter, index: Tensor) -> None:
    """Lets the state of `p` follow its entries, in whatever optimizer; see `Optimizer.move`."""
    if isinstance(optimizer, Optimizer):
        optimizer.move(p, index)
    else:
        move_state(optimizer, p, index)


def restart(optimizer: torch.optim.Optimizer, p: nn.Parameter) -> None:
    """Lets `p` be new to the optimizer: its next step is a first one."""
    state = optimizer.state.pop(p, None)
    if state is not None and isinstance(optimizer, torch.optim.Adagrad):  # which makes its state before the first step
        group = next(group for group in optimizer.param_groups if any(p is q for q in group["params"]))
        value = group["initial_accumulator_value"]
        optimizer.state[p] = {"step": torch.zeros_like(state["step"]), "sum": torch.full_like(p, value)}
