"""A method is a frozen dataclass: its fields are its settings, its hooks are what it does. One paper, one file.

A recipe is a list of methods. `efftune.apply` lets each write what it wants into a `Plan`, which is checked and built
once; the training loop calls the other hooks. The order of a recipe's terms changes nothing: plans are written in the
order of `phase`, and `backward` is a chain in the order of `place`. Methods hold no state: what a run needs to replay
follows from the settings and the step, or is in the `State` that the tuner makes, hands out and checkpoints.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from efftune.linear import Exact
from efftune.linear.contracts import Keep, brief
from efftune.nn.attention import KEEP
from efftune.nn.eager_attention import ROWS
from efftune.plan import Plan

STORES, TRAINS, KEEPS, RUNS = range(4)  # see Method.phase
CHANGES, WATCHES, ESTIMATES = range(3)  # see Method.place


class State:
    """What the methods of one name learn in a run: a dataclass, whose fields have defaults and hold numbers, strings,
    tensors and nestings of them. Fields that begin with "_" are of this process alone."""

    def state_dict(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if not name.startswith("_")}

    def load_state_dict(self, state: dict[str, Any], device: torch.device) -> None:
        """Takes what `state_dict` gave; tensors belong on `device`, where the model is."""
        for name, value in state.items():
            setattr(self, name, value.to(device) if isinstance(value, Tensor) else value)


@dataclasses.dataclass
class Run:
    """A recipe's run on its model: what every hook is given."""

    model: nn.Module
    plan: Plan
    step: int = 0
    optimizer: Any = None  # a torch.optim.Optimizer, once there is one
    states: dict[str, Any] = dataclasses.field(default_factory=dict)

    def state(self, method: Method) -> Any:
        """Returns what the method has learnt, a `method.State`."""
        return self.states[method.name]


@dataclasses.dataclass(frozen=True)
class Micro:
    """One micro-batch on its way through the methods of a recipe, each of which may hand on another one."""

    run: Run
    batch: Any
    loss: Callable[[nn.Module, Any], torch.Tensor]  # (model, batch) -> the loss, ()
    scale: float = 1.0  # the gradient is that of scale · loss
    last: bool = True  # of its step

    @property
    def model(self) -> nn.Module:
        return self.run.model


Backward = Callable[[Micro], torch.Tensor]


def autograd(micro: Micro) -> torch.Tensor:
    """The end of the chain: accumulates the gradient of scale · loss and returns the detached loss."""
    loss = micro.loss(micro.model, micro.batch)
    (loss * micro.scale).backward()
    return loss.detach()


@dataclasses.dataclass(frozen=True)
class Method:
    name: ClassVar[str]
    # Whose `plan` comes first: those that say how weights are stored, then those that say what trains (where none of a
    # recipe does, `full` is implied), what backward keeps, and at last what sees all of that.
    phase: ClassVar[int] = RUNS
    place: ClassVar[int] = WATCHES  # in the chain of `backward`, from the outside
    learning_rate: ClassVar[float | None] = None  # of `efftune train` where none is given; None: the trainer's own
    State: ClassVar[type | None] = None  # of what it learns in a run
    verified: ClassVar[str | None] = (
        None  # a sentence under the table of `efftune verify`, where rows mean another thing
    )
    repeats: ClassVar[bool] = False  # whether it takes gradients, beside those of the step, that are dropped again

    def why_not(self, others: list[Method]) -> str | None:
        """Why this method cannot work with the others of a recipe, ending with a remedy, or None."""

    def plan(self, plan: Plan) -> None:
        """Writes into `plan` what is wanted of the model, which is only read; EfftuneError where it cannot be."""

    def install(self, run: Run) -> None:
        """Puts into the model, once it is built, what a plan has no place for (hooks, attributes)."""

    def remove(self, run: Run) -> None:
        """Takes out what `install` has put in."""

    def param_groups(self, run: Run) -> list[dict] | None:
        """Returns optimizer groups with ("name", parameter) pairs, or None for one group of all that trains."""

    def optimizer(self, groups: list[dict], **defaults) -> torch.optim.Optimizer | None:
        """Returns the optimizer that this method needs, or None for AdamW."""

    def before_step(self, run: Run) -> None:
        """Called before the first micro-batch of step 0, 1, 2, ..."""

    def loaded(self, run: Run) -> None:
        """Called when its state was loaded, to put into the model what the state says of it."""

    def backward(self, micro: Micro, inner: Backward) -> torch.Tensor:
        """Accumulates the gradient of scale · loss and returns the detached loss, around the methods inside: `inner`
        does so for the micro-batch that it is given. What changes the loss or the batch, or skips it, stands outside
        (`place = CHANGES`), then what looks at each micro-batch once (`WATCHES`), then what takes the place of
        autograd's gradient, or calls for it several times (`ESTIMATES`: one in a recipe)."""
        return inner(micro)

    def after_step(self, run: Run) -> None:
        """Called after optimizer.step()."""

    def exactly(self, run: Run) -> AbstractContextManager:
        """Within it, the method approximates nothing: what `efftune verify` holds it against."""
        return nullcontext()

    def selects(self, run: Run) -> bool | None:
        """Whether it leaves out samples on purpose from here on; None: it never does. `efftune verify` shows what that
        does to the gradient and lets it pass, and holds all else against the gradient of all samples, within `exactly`.
        """
        return None

    def arrives(self, name: str, change: torch.Tensor, turn: int) -> torch.Tensor:
        """Returns what becomes in round `turn` of a change of the parameter `name`, where the method approximates
        changes."""
        return change

    def report(self, run: Run) -> str | None:
        """Returns a line for `Tuner.summary` and the end of a run with what cannot be read off the settings, or
        None."""

    def counts(self, run: Run) -> dict[str, int]:
        """Returns what it has counted since the run began, by name, with "_" for spaces; the lines of a run's log show
        it."""
        return {}

    def overrides(self, hook: str) -> bool:
        return getattr(type(self), hook) is not getattr(Method, hook)

    def __str__(self) -> str:
        """As the recipe language writes it, with the settings that differ from their defaults."""
        return brief(self, self.name)


@contextmanager
def exact_keeps(model: nn.Module) -> Iterator[None]:
    """Within it, everything in `model` that backward keeps is kept exactly."""
    drawing = drawing_keeps(model)
    for module, name, _ in drawing:
        setattr(module, name, Exact())
    try:
        yield
    finally:
        for module, name, keep in drawing:
            setattr(module, name, keep)


def drawing_keeps(model: nn.Module) -> list[tuple[nn.Module, str, Keep]]:
    """Returns module, attribute and keep of everything in `model` that backward keeps by drawing."""
    keeps = ((m, name, getattr(m, name, None)) for m in model.modules() for name in (KEEP, ROWS))
    return [(module, name, keep) for module, name, keep in keeps if isinstance(keep, Keep) and keep.random]
