"""`efftune.apply`: a recipe onto a model, and the handle it returns."""

from __future__ import annotations

import copy
import json
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from efftune.errors import EfftuneError
from efftune.interop import formats, transformers
from efftune.interop.transformers.blocks import Blocks
from efftune.linear import Linear
from efftune.methods._base import ESTIMATES, TRAINS, Backward, Method, Micro, Run, autograd, drawing_keeps
from efftune.methods.full import FullFineTuning
from efftune.nn.subbatch import Recompute, uninstall
from efftune.ops.draw_seed import capturing
from efftune.optim.contract import Optimizer, begin_new_entries, fits
from efftune.plan import Plan
from efftune.recipe import format_recipe, parse, unnamed
from efftune.structure import parameter_names, places
from efftune.summary import summary
from efftune.versions import require_for
from efftune.wrappers import compile_in_place, refuse_wrapped, unwrapped

CONFIG = "efftune_config.json"
CLOCK = "efftune"  # key of an optimizer's state_dict under which the recipe's step and state are
# Hooks of a method that run on the CPU in every step. A CUDA graph has what they did in one of them.
EVERY_STEP = "before_step", "backward", "after_step", "optimizer"


def apply(model: nn.Module, recipe: str | Method | Iterable[Method], blocks: bool = True) -> Tuner:
    """Freezes `model`, changes it in place as the methods of `recipe` say, and returns the handle to train it. The
    order of a recipe's terms changes nothing.

    A recipe in which nothing says what trains ("lisa(layers=2)", "mezo") trains everything, as if it had `full`.

    Args:
        model: any nn.Module with linear layers. What torch.compile has wrapped (the model itself, or its blocks) is
            taken out of its wrapper and compiled in place, as `nn.Module.compile` does, so that names are those of the
            plain model; `Tuner.model` is the model without its wrapper.
        recipe: as the recipe language writes it, or methods (`efftune.recipe.parse` gives those of a text).
        blocks: also swap norms, gated MLPs, activations and attention (sdpa or eager) for those of efftune.nn, whose
            outputs backward makes again instead of keeping them, and the rotary embedding for one pass: less memory,
            the same gradients up to rounding.
    Raises: EfftuneError, before the model is touched, if the recipe does not parse or cannot be applied, and for a
        model that is wrapped for several devices, is a torch.jit module, or has weights that accelerate offloads.
    """
    return applied(model, recipe, blocks)


def applied(
    model: nn.Module, recipe: str | Method | Iterable[Method], blocks: bool = True, begins: bool = True
) -> Tuner:
    """`apply`, where what trains may not begin here: a file brings it."""
    methods, plan = planned(model, recipe, begins)
    model = compile_in_place(model)
    plan.build(model)
    return Tuner(model, methods, plan, transformers.install(plan, blocks))


def planned(
    model: nn.Module, recipe: str | Method | Iterable[Method], begins: bool = True
) -> tuple[list[Method], Plan]:
    """The methods of a recipe, and what they want of `model`, checked; the model is only read. See `apply`, and
    `Plan` for `begins`."""
    require_for(model)
    if torch.is_inference_mode_enabled():
        raise EfftuneError("Tensors that are made under torch.inference_mode() cannot train; apply the recipe outside.")
    methods = parse(recipe) if isinstance(recipe, str) else [recipe] if isinstance(recipe, Method) else list(recipe)
    rivals = {
        "backward": [m.name for m in methods if m.place == ESTIMATES],
        "optimizer": [m.name for m in methods if m.overrides("optimizer")],
    }
    for hook, names in rivals.items():
        if len(names) > 1:
            raise EfftuneError(f"{' and '.join(names)} each bring their own {hook}; a recipe takes one of them.")
    for method in methods:
        if (reason := method.why_not([m for m in methods if m is not method])) is not None:
            raise EfftuneError(f"{method.name}: {reason}.")
    for name, count in Counter(m.name for m in methods if not hasattr(m, "target_modules")).items():
        if count > 1:
            raise EfftuneError(f"{name} stands {count} times in the recipe, for the whole model; leave one of them in.")
    recipe, implied = format_recipe(methods), None
    if not any(m.phase == TRAINS for m in methods):
        methods.insert(0, implied := FullFineTuning())
    refuse_wrapped(model)
    plan = Plan(unwrapped(model), begins)
    for method in sorted(methods, key=lambda m: m.phase):
        try:
            method.plan(plan)
        except EfftuneError as error:
            if method is not implied:
                raise
            raise EfftuneError(f"'{recipe}' says nothing of what trains, and everything cannot: {error}") from None
    plan.check()
    transformers.check(plan)
    return methods, plan


class Tuner:
    """A model with a recipe applied. The optimizer it makes is its clock: each optimizer.step() ends a step, whoever's
    loop calls it, so a hand-written loop, `efftune.train` and Hugging Face's Trainer all drive the recipe alike."""

    def __init__(self, model: nn.Module, methods: list[Method], plan: Plan, blocks: Blocks):
        self.model, self.plan, self.blocks = model, plan, blocks
        self.methods = methods
        self.run = Run(model, plan, states={m.name: m.State() for m in methods if m.State is not None})
        self._hooks: list[Any] = []  # on the optimizer that drives the recipe
        # Everything that may ever train: a schedule turns requires_grad off and on among these.
        self._trained = [name for name, p in model.named_parameters() if p.requires_grad]
        for method in methods:
            method.install(self.run)

    def __deepcopy__(self, memo: dict[int, Any]) -> Tuner:
        """A tuner of its own, whose model is driven by a copy of the optimizer: `copied.run.optimizer`, which is also
        what `deepcopy((tuner, optimizer))` gives.

        Raises: EfftuneError where the optimizer takes gradients in backward, from tensors that it has hooks on.
        """
        optimizer = self.run.optimizer
        if isinstance(optimizer, Optimizer) and optimizer.in_backward:
            raise EfftuneError(
                f"A copy of {type(optimizer).__name__} would have no hooks in backward; copy the tuner before it "
                "has an optimizer."
            )
        copied = memo[id(self)] = object.__new__(type(self))
        vars(copied).update(copy.deepcopy({n: v for n, v in vars(self).items() if n != "_hooks"}, memo), _hooks=[])
        if optimizer is not None:
            own = copied.run.optimizer
            for name, value in vars(optimizer).items():  # torch copies groups and state, and no hooks, ours among them
                if name not in vars(own) and not callable(value):  # a scheduler's `step` is bound to the original
                    setattr(own, name, copy.deepcopy(value, memo))
            # By way of its state_dict: in what the optimizer has beside, parameters may be known by their ids.
            copied.attach(own).load_state_dict(copy.deepcopy(optimizer.state_dict()))  # torch would share the tensors
        return copied

    @property
    def step(self) -> int:
        """The number of optimizer steps so far."""
        return self.run.step

    @step.setter
    def step(self, step: int) -> None:
        self.run.step = step

    @property
    def recipe(self) -> str:
        return format_recipe(self.methods)

    def named_trained(self) -> dict[str, nn.Parameter]:
        """name -> parameter, of all that the recipe may ever train."""
        parameters = dict(self.model.named_parameters())
        return {name: parameters[name] for name in self._trained if name in parameters}

    def named_delta(self) -> dict[str, Tensor]:
        """name -> tensor, of all that the base model does not have: what trains, and the frozen parts of deltas."""
        named: dict[str, Tensor] = dict(self.named_trained())
        for name, module in self.model.named_modules():
            if isinstance(module, Linear):
                named |= zip((f"{name}.{part}" for part in module.delta.names), module.added(), strict=True)
        return named

    def named_saved(self) -> dict[str, Tensor]:
        """`named_delta` and the model's own persistent buffers: running statistics change in training, too."""
        kept = self.model.state_dict(keep_vars=True)
        own = {id(b) for m in self.model.modules() if not isinstance(m, Linear) for b in m.buffers(recurse=False)}
        return {**self.named_delta(), **{name: t for name, t in kept.items() if id(t) in own}}

    def state_dict(self) -> dict:
        """The step, and what the methods have learnt. It is also in the state_dict of the optimizer that `optimizer` or
        `attach` returned, so that whoever saves the optimizer saves it."""
        return {"step": self.step, "methods": {name: state.state_dict() for name, state in self.run.states.items()}}

    def load_state_dict(self, state: dict) -> None:
        """Raises: EfftuneError for the state of a recipe that has learnt what this one has no place for."""
        states = state.get("methods", {})  # a bare step will do
        if not isinstance(states, dict):  # of a version that had a list, in the order of the recipe
            states = {m.name: own for m, own in zip(self.methods, states, strict=False) if m.name in self.run.states}
        for name in states:
            if name not in self.run.states:
                raise EfftuneError(
                    f"The state is of a recipe with {name}, and this one is '{self.recipe}'; apply the recipe that the "
                    "run began with."
                )
        device = next((p.device for p in self.model.parameters()), torch.device("cpu"))
        for name, own in states.items():
            if own:
                self.run.states[name].load_state_dict(copy.deepcopy(own), device)  # of another run, which may go on
        for method in self.methods:
            if states.get(method.name):
                method.loaded(self.run)
        self.seek(state["step"])

    def param_groups(self) -> list[dict]:
        """Optimizer groups of ("name", parameter) pairs: as a method asks, else one group of all that trains."""
        for method in self.methods:
            groups = method.param_groups(self.run)
            if groups is not None:
                return groups
        return [{"params": list(self.named_trained().items())}]

    def optimizer(self, lr: float, weight_decay: float = 0.0, **kwargs) -> torch.optim.Optimizer:
        """The optimizer of the recipe (torch's fused AdamW unless a method brings its own), attached."""
        groups, settings = self.param_groups(), dict(lr=lr, weight_decay=weight_decay, **kwargs)
        made = (method.optimizer(groups, **settings) for method in self.methods)
        optimizer = next((o for o in made if o is not None), None)
        # One pass over the state instead of a dozen: on two CPU cores a tenth of a step of full fine-tuning.
        return self.attach(optimizer or torch.optim.AdamW(groups, **{"fused": True, **settings}))

    def attach(self, optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
        """Lets an optimizer made elsewhere, over `param_groups()`, drive the recipe's hooks and carry its state.

        Raises: EfftuneError for an optimizer that takes gradients in backward, where a method of the recipe goes
            through backward several times for one gradient.
        """
        if isinstance(optimizer, Optimizer) and optimizer.in_backward:
            again = [m.name for m in self.methods if m.place == ESTIMATES or m.repeats]
            if again:
                raise EfftuneError(
                    f"{' and '.join(again)} goes through backward several times for one gradient, and "
                    f"{type(optimizer).__name__} would take a step each time; use an optimizer that steps after it."
                )
        self._detach()  # one clock: an optimizer that this one replaces drives nothing
        self.run.optimizer = optimizer
        self._hooks = [
            optimizer.register_step_post_hook(self._end_step),
            optimizer.register_state_dict_post_hook(self._save_clock),
            optimizer.register_load_state_dict_pre_hook(self._load_clock),
        ]
        begin_new_entries(optimizer)
        self.seek(self.step)
        return optimizer

    def _detach(self) -> None:
        for hook in self._hooks:
            hook.remove()
        self._hooks = []

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name != "_hooks"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state, _hooks=[])
        if self.run.optimizer is not None:
            self.attach(self.run.optimizer)

    def _save_clock(self, optimizer: torch.optim.Optimizer, state: dict) -> dict:
        return state | {CLOCK: self.state_dict()}

    def _load_clock(self, optimizer: torch.optim.Optimizer, state: dict) -> None:
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        indices = [i for group in state["param_groups"] for i in group["params"]]
        if len(parameters) != len(indices):
            return  # torch refuses it
        for p, index in zip(parameters, indices, strict=True):
            for name, value in state["state"].get(index, {}).items():
                if isinstance(value, Tensor) and not fits(optimizer, p, name, value):
                    raise EfftuneError(
                        f"The optimizer's state has {name} {tuple(value.shape)} for a parameter of {tuple(p.shape)}, "
                        f"so that it is of another recipe than '{self.recipe}'."
                    )
        if CLOCK in state:  # else of an optimizer that no recipe was attached to
            self.load_state_dict(state[CLOCK])

    def seek(self, step: int) -> None:
        """Puts the recipe where it was before `step`, for a resumed run: now, or when an optimizer is attached."""
        self.step = step
        if self.run.optimizer is not None:
            for method in self.methods:
                method.before_step(self.run)

    def _end_step(self, optimizer: torch.optim.Optimizer, args, kwargs) -> None:
        # A GradScaler does not call an optimizer whose gradients overflowed, but a fused one, whose kernels do nothing
        # then, is called. Looking waits for the GPU, as the scaler does itself before it calls the other ones.
        found_inf = getattr(optimizer, "found_inf", None)  # only there within a scaler's step
        if found_inf is not None and not capturing() and bool(found_inf):
            return
        for method in self.methods:
            method.after_step(self.run)
        if self.step == 0:
            self._name_untouched()
        self.seek(self.step + 1)

    def _name_untouched(self) -> None:
        """Warns of what trains and got no gradient in the first step: it may never."""
        named = {name: p for name, p in self.named_trained().items() if p.requires_grad}
        without = [name for name, p in named.items() if p.grad is None]
        if 0 < len(without) < len(named):  # where none has any, gradients are not what the recipe works with
            more = f" and {len(without) - 5} more" if len(without) > 5 else ""
            warnings.warn(
                f"{', '.join(without[:5])}{more} train and got no gradient in the first step: the model did not use "
                "them, or cut their gradient off.",
                stacklevel=2,
            )

    def backward(
        self, batch, loss_fn: Callable[[nn.Module, object], Tensor], scale: float = 1.0, last: bool = True
    ) -> Tensor:
        """Accumulates the gradient of scale · loss_fn(model, batch), by autograd or as the recipe does. `last`: no
        other micro-batch of this step follows.

        Returns: the loss, detached.
        Raises: EfftuneError while a CUDA graph is being captured, if the recipe draws or has work for the CPU in every
            step: replays would repeat that of one step.
        """
        self._refuse_plain()
        if capturing():
            self._refuse_capture()
        if isinstance(self.run.optimizer, Optimizer) and self.run.optimizer.in_backward:
            self.run.optimizer.begin(last)
        call: Backward = autograd
        # From the inside; of one place by name, so that the order of a recipe's terms changes nothing.
        for method in sorted(self.methods, key=lambda m: (m.place, m.name), reverse=True):
            if method.overrides("backward"):
                call = partial(method.backward, inner=call)
        return call(Micro(self.run, batch, loss_fn, scale, last))

    def _refuse_capture(self) -> None:
        named = [m.name for m in self.methods if any(map(m.overrides, EVERY_STEP))]
        layers = [m for m in self.model.modules() if isinstance(m, Linear)]
        named += sorted({str(m.delta) for m in layers if m.delta.random})
        if not named:  # what no method says of itself: layers made by hand, and blocks that look at torch's generators
            keeps = [*(m.keep for m in layers), *(keep for _, _, keep in drawing_keeps(self.model))]
            again = [f for m in self.model.modules() if isinstance(f := vars(m).get("forward"), Recompute)]
            named = sorted({str(kind) for kind in (*(k for k in keeps if k.random), *again)})
        if named:
            raise EfftuneError(
                f"a CUDA graph would repeat in every replay what {' and '.join(named)} drew or did on the CPU in this "
                "step; capture a recipe without, or run this step without a graph."
            )

    @contextmanager
    def exactly(self) -> Iterator[None]:
        """Within it, the recipe approximates nothing: every keep is exact, every sample and row is used, and a
        zeroth-order recipe takes gradients, to be looked at (its optimizer has no step for them)."""
        with ExitStack() as stack:
            for method in self.methods:
                stack.enter_context(method.exactly(self.run))
            yield

    @torch.no_grad()
    def merge(self) -> nn.Module:
        """Takes the blocks out and replaces every efftune.Linear by the plain nn.Linear with its delta added. Returns
        the model, now plain."""
        layers = [(name, m) for name, m in self.model.named_modules() if isinstance(m, Linear)]
        tied = parameter_names(self.model)
        for name, layer in layers:  # all refusals before the first change
            shared = tied.get(id(layer.stored().tensors[0]), [])
            if len(shared) > 1 and layer.delta.adds:
                raise EfftuneError(
                    f"{name} shares its weight ({', '.join(shared)}): merging its adapter would change the others too; "
                    "save the adapter instead."
                )
        return self._plain(lambda layer: layer.merge())

    def remove(self) -> nn.Module:
        """Takes out everything that `apply` put in: blocks, adapters (not merged) and the layers' own storage. Weights
        that trained themselves keep what they have learned. Returns the model, now plain."""
        return self._plain(lambda layer: layer.remove())

    def _plain(self, make: Callable[[Linear], nn.Module]) -> nn.Module:
        for method in self.methods:
            method.remove(self.run)
        self.methods = []  # the optimizer, should somebody go on with it, drives nothing
        self._detach()
        for name in self.plan.again:
            uninstall(self.model.get_submodule(name))
        self.blocks.remove()
        where = places(self.model)
        for layer in [m for m in self.model.modules() if isinstance(m, Linear)]:
            plain = make(layer)
            for parent, child in where[id(layer)]:
                parent._modules[child] = plain
        return self.model

    def save(self, path: str | Path, format: str | None = None) -> None:
        """Writes `named_saved` to the folder `path`: a PEFT adapter where the recipe has layers that PEFT knows,
        entries and columns of weights in `sparse.safetensors`, what is left in `trained.safetensors`, and beside them
        the recipe in `efftune_config.json`. A warning names what trains and PEFT has no place for, and another one
        methods that their text in the recipe does not bring back.

        Args:
            format: the only one to write, "peft", "sparse", "safetensors", or "shira": entries and columns as PEFT has
                them, in a file four or more times as large.
        Raises: EfftuneError, before anything is written, naming what no format, or not this one, can carry.
        """
        self._refuse_plain()
        written = formats.save(self, Path(path), format)
        config: dict[str, Any] = {"format": 1, "formats": written, "recipe": self.recipe}
        if unknown := unnamed(self.methods):
            config["unnamed"] = {method.name: type(method).__name__ for method in unknown}
        (Path(path) / CONFIG).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
        if unknown:
            warnings.warn(
                f"{format_recipe(unknown)} cannot be made again from this text, so that efftune.load(model, "
                f"{str(path)!r}) needs the methods as recipe=[...]; to load by name, register the class (an entry "
                "point of the group efftune.methods) and give it settings that are literals.",
                stacklevel=2,
            )

    def _refuse_plain(self) -> None:
        if not self.methods:
            raise EfftuneError("The recipe was taken out (merge, remove): save the model itself, or apply one again.")

    def reports(self) -> list[str]:
        """A line of each method that has something to tell: what cannot be read off the settings."""
        return [line for method in self.methods if (line := method.report(self.run)) is not None]

    def counts(self) -> dict[str, int]:
        """What the methods count in a run: see `Method.counts`."""
        return {name: count for method in self.methods for name, count in method.counts(self.run).items()}

    def summary(self, batch=None, loss_fn: Callable[[nn.Module, object], Tensor] | None = None) -> str:
        """What trains, what is frozen, how each kind of layer stores, trains and keeps, and what the recipe does not
        reach; parameters and bytes.

        With a batch and the loss that `backward` takes: also the bytes that backward keeps of this batch, by kind of
        module, from one forward pass whose result is dropped.
        """
        loss = None if batch is None or loss_fn is None else partial(loss_fn, self.model, batch)
        lines = [f"blocks     {self.blocks}", *self.reports()]
        return summary(self.plan, self.recipe, set(self.named_trained()), lines, loss)
