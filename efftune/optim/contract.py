"""What a recipe and a training loop ask of an optimizer beyond what torch's have.

An optimizer that answers otherwise than the defaults derives from `Optimizer`; of any other the defaults hold.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from efftune.errors import EfftuneError


class Optimizer(torch.optim.Optimizer):
    """An optimizer that answers otherwise than torch's do."""

    in_backward: bool = False  # takes each gradient as soon as backward has it: none is left when `step` is called
    clips: bool = False  # limits gradients itself, to `max_norm`
    max_norm: float = 0.0  # 0: no limit

    def begin(self, last: bool) -> None:
        """Called before the backward pass of each micro-batch, of an optimizer that works `in_backward`. `last`: no
        other micro-batch of the step follows, so that the gradients it sees are the step's."""

    def move(self, p: nn.Parameter, index: Tensor, before: int) -> None:
        """Lets the state of p follow its entries, which are others now: entry i of the new order is the one that was at
        index[i], or a new one where index[i] < 0. State that has an entry for each of p's follows. Its new entries are
        0, but of Adam's moments, which are corrected for the age of the whole parameter: with their next gradient they
        become those of a first step (at 0, that step would be 3.2 times too long).

        Args:
            p: (n,) as it is now.   index: (n,) int64.   before: the number of entries that p had.
        Raises: EfftuneError, before anything is moved, for state that cannot follow.
        """
        move_state(self, p, index, before)

    def fits(self, p: nn.Parameter, name: str, value: Tensor) -> bool:
        """Whether a tensor that is about to be loaded can be the state `name` of p."""
        return _fits(p, value)


def move(optimizer: torch.optim.Optimizer, p: nn.Parameter, index: Tensor, before: int | None = None) -> None:
    """Lets the state of `p` follow its entries, in whatever optimizer; see `Optimizer.move`. `before`: None where p has
    as many entries as it had."""
    count = len(index) if before is None else before
    if isinstance(optimizer, Optimizer):
        optimizer.move(p, index, count)
    else:
        move_state(optimizer, p, index, count)


def refuse_move(optimizer: torch.optim.Optimizer, p: nn.Parameter) -> None:
    """To be asked before the entries of `p` change. Raises: EfftuneError where the optimizer's state cannot follow."""
    if not isinstance(optimizer, Optimizer) or type(optimizer).move is Optimizer.move:
        _of_entries(optimizer, p, p.numel())


def fits(optimizer: torch.optim.Optimizer, p: nn.Parameter, name: str, value: Tensor) -> bool:
    """See `Optimizer.fits`."""
    return optimizer.fits(p, name, value) if isinstance(optimizer, Optimizer) else _fits(p, value)


def _fits(p: nn.Parameter, value: Tensor) -> bool:
    # torch looks at no shapes, and its fused kernels write where they are told.
    return value.ndim != p.ndim or p.ndim == 0 or value.shape == p.shape


def uncast(optimizer: torch.optim.Optimizer, saved: dict[str, Any]) -> None:
    """torch's `load_state_dict` casts floating state, and integer codes with it, to the parameter's dtype; afterwards
    it is as it was saved."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    indices = [i for group in saved["param_groups"] for i in group["params"]]
    for parameter, index in zip(parameters, indices, strict=True):
        for key, value in saved["state"].get(index, {}).items():
            now = optimizer.state[parameter].get(key)
            if isinstance(value, Tensor) and isinstance(now, Tensor) and now.dtype != value.dtype:
                optimizer.state[parameter][key] = value.to(now.device)


def move_state(optimizer: torch.optim.Optimizer, p: nn.Parameter, index: Tensor, before: int) -> None:
    """Moves the state of any optimizer that has a number for each entry of p, or one for all, as all of torch's have.

    Raises: EfftuneError, before anything is moved, for other state.
    """
    names, known, at = _of_entries(optimizer, p, before), index >= 0, index.clamp(min=0)
    state = optimizer.state.get(p, {})
    for name in names:
        padded = state[name] if before else state[name].new_zeros(1)
        state[name] = torch.where(known, padded[at], padded.new_zeros(()))
    group = next((group for group in optimizer.param_groups if any(p is q for q in group["params"])), {})
    if MOMENTS <= state.keys() and len(group.get("betas", ())) == 2 and not known.all():
        state[FRESH] = ~known | state.get(FRESH, ~known).bool()
        begin_new_entries(optimizer)


def _of_entries(optimizer: torch.optim.Optimizer, p: nn.Parameter, count: int) -> list[str]:
    """The names of the state of p that has a number for each of its `count` entries, where the rest has one for all."""
    names = []
    for name, value in optimizer.state.get(p, {}).items():
        if value is None or isinstance(value, (bool, int, float, str)):
            continue
        plain = type(value) in (Tensor, nn.Parameter)  # else it may hold codes, whatever its shape
        if plain and not value.ndim:
            continue
        if plain and value.shape == (count,) and value.dtype not in CODES:
            names.append(name)
            continue
        what = f"{tuple(value.shape)} {value.dtype}" if plain else f"a {type(value).__name__}"
        raise EfftuneError(
            f"The state of {type(optimizer).__name__} cannot follow entries that move: of {count} entries it has "
            f"{name!r}, {what}, which is not a number for each; use an optimizer that has one, such as "
            "torch.optim.AdamW, or entries that are picked once, as by shira."
        )
    return names


CODES = (torch.uint8, torch.int8)  # whose 0 need not stand for 0
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


def restart(optimizer: torch.optim.Optimizer, p: nn.Parameter) -> None:
    """Lets `p` be new to the optimizer: its next step is a first one."""
    state = optimizer.state.pop(p, None)
    if state is not None and isinstance(optimizer, torch.optim.Adagrad):  # which makes its state before the first step
        group = next(group for group in optimizer.param_groups if any(p is q for q in group["params"]))
        value = group["initial_accumulator_value"]
        optimizer.state[p] = {"step": torch.zeros_like(state["step"]), "sum": torch.full_like(p, value)}
