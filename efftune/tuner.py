"""`efftune.apply`: a recipe onto a model, and the handle it returns."""

from __future__ import annotations

import json
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from efftune.errors import EfftuneError
from efftune.files import copy_tensors, read_json, read_tensors, required
from efftune.hooks import hooked
from efftune.interop import peft
from efftune.linear import Linear
from efftune.linear.contracts import Keep
from efftune.linear.module import is_conv1d
from efftune.memory.meter import saved_for_backward
from efftune.methods._base import (
    ESTIMATES,
    Backward,
    Method,
    Micro,
    autograd,
    drawing_keeps,
    in_classifier,
    linear_layers,
    output_head,
    places,
    shared_parameters,
    swap,
)
from efftune.methods.full import FullFineTuning
from efftune.nn import groups
from efftune.nn.blocks import Blocks, install
from efftune.nn.subbatch import Recompute
from efftune.ops.draw_seed import capturing
from efftune.recipe import format_recipe, parse
from efftune.versions import require_for
from efftune.wrappers import compile_in_place, inside, refuse_wrapped

CONFIG, TRAINED = "efftune_config.json", "trained.safetensors"
# Hooks of a method that run on the CPU in every step. A CUDA graph has what they did in one of them.
EVERY_STEP = "before_step", "backward", "after_step", "optimizer"


def apply(model: nn.Module, recipe: str | Iterable[Method], blocks: bool = True) -> Tuner:
    """Freezes `model`, lets the methods of `recipe` change it in place, in order, and returns the handle to train it.

    A recipe in which nothing says what trains ("lisa(layers=2)", "mezo") trains everything, as if it began with `full`.

    Args:
        model: any nn.Module with linear layers. What torch.compile has wrapped (the model itself, or its blocks) is
            taken out of its wrapper and compiled in place, as `nn.Module.compile` does, so that names are those of the
            plain model; `Tuner.model` is the model without its wrapper.
        blocks: also swap norms, gated MLPs, activations and attention (sdpa or eager) for those of efftune.nn, whose
            outputs backward makes again instead of keeping them, and the rotary embedding for one pass: less memory,
            the same gradients up to rounding.
    Raises: EfftuneError, before the model is touched, if the recipe does not parse or cannot be applied, and for a
        model that is wrapped for several devices, is a torch.jit module, or has weights that accelerate offloads.
    """
    require_for(model)
    methods = parse(recipe) if isinstance(recipe, str) else list(recipe)
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
    if not any(m.trains for m in methods):
        methods.insert(0, FullFineTuning())
    keep = block_keep(methods)
    refuse_wrapped(model)
    # First on a skeleton without data: what refuses does so before the model is touched, and no dense weight has to be
    # kept for an undo while its layer is being quantised.
    for make in (skeleton, compile_in_place):
        target = make(model)
        freeze(target)
        for method in methods:
            method.prepare(target)
        check_tied(target)
    return Tuner(target, methods, install_blocks(target, keep) if blocks else Blocks())


def block_keep(methods: list[Method]) -> Keep | None:
    keeps = {keep for method in methods if (keep := method.block_keep()) is not None}
    if len(keeps) > 1:
        raise EfftuneError(f"a block keeps its activations one way, not as {' and as '.join(sorted(map(str, keeps)))}.")
    return next(iter(keeps), None)


def install_blocks(model: nn.Module, keep: Keep | None) -> Blocks:
    done = install(model, keep)
    if done.swaps:
        # An nn.Linear saves its input whatever made it; efftune.Linear keeps what the input is made of.
        head = output_head(model)
        layers = {n: model.get_submodule(n) for n in linear_layers(model) if not in_classifier(n)}
        trained = {
            n: m
            for n, m in layers.items()
            if not isinstance(m, Linear) and m.weight.requires_grad and m is not head and not hooked(m)
        }
        where = places(model)
        swap(model, trained)
        for name, layer in trained.items():
            done.swaps += [(parent, child, layer, model.get_submodule(name)) for parent, child in where[id(layer)]]
    done.groups = groups.install(model)  # of the layers as they are now
    return done


def check_tied(model: nn.Module) -> None:
    """Raises EfftuneError where a weight trains by one layer and another, tied to it, only adds to it."""
    for name, layer in model.named_modules():
        if isinstance(layer, Linear):
            learns = layer.delta.stored_learns(layer.base)
            if any(getattr(layer, part).requires_grad and part not in learns for part in layer.base.names):
                raise EfftuneError(
                    f"{name} adds {layer.delta} to a weight that a layer tied to it trains; leave one of them out."
                )


def skeleton(model: nn.Module, made: dict[int, Any] | None = None) -> nn.Module:
    """A copy of the module tree whose parameters and buffers are on the meta device; what is shared stays shared, and
    what torch.compile has wrapped stands there as itself."""
    made = {} if made is None else made
    if id(model) in made:
        return made[id(model)]
    if (compiled := inside(model)) is not None:
        return skeleton(compiled, made)
    # Shallow, module by module: models hold locks and other things that no deep copy takes.
    # Not by copy.copy, which parametrized modules refuse; into the dictionary, since a module's own __setattr__ may
    # write somewhere else.
    twin = made[id(model)] = object.__new__(type(model))
    own = vars(twin)
    own.update(vars(model))
    for name, value in vars(model).items():
        if isinstance(value, OrderedDict):  # hooks: those that a method adds to the skeleton are not the model's
            own[name] = value.copy()
    own["_parameters"] = {name: _meta(p, made) for name, p in model._parameters.items()}
    own["_buffers"] = {name: _meta(b, made) for name, b in model._buffers.items()}
    own["_modules"] = {name: None if m is None else skeleton(m, made) for name, m in model._modules.items()}
    return twin


def _meta(tensor: Tensor | None, made: dict[int, Any]) -> Any:
    if tensor is not None and id(tensor) not in made:
        empty = tensor.detach().to("meta")
        made[id(tensor)] = nn.Parameter(empty, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else empty
    return None if tensor is None else made[id(tensor)]


def freeze(model: nn.Module) -> None:
    for parameter in model.parameters():
        parameter.requires_grad_(False)


def load(model: nn.Module, path: str | Path) -> Tuner:
    """Applies to `model` what `Tuner.save` or PEFT wrote to the folder `path`: its recipe and its tensors.

    Raises: EfftuneError if files are missing, damaged, pickles, or do not fit the model.
    """
    path = Path(path)
    if (path / CONFIG).exists():
        methods = parse(required(read_json(path / CONFIG), "recipe", path / CONFIG))
    else:
        methods = peft.read_methods(path, model)
    tuner = apply(model, methods)
    model = tuner.model  # not its wrapper
    if peft.adapters(model):
        peft.load_adapter(model, path)
        statistics = tuner._statistics()
        if statistics and (path / TRAINED).exists():  # PEFT writes none
            copy_tensors(read_tensors(path / TRAINED), statistics, path / TRAINED, type(model).__name__)
        return tuner
    copy_tensors(read_tensors(path / TRAINED), tuner._saved(), path / TRAINED, type(model).__name__)
    return tuner


class Tuner:
    """A model with a recipe applied. The optimizer it makes is its clock: each optimizer.step() ends a step, whoever's
    loop calls it, so a hand-written loop, `efftune.train` and Hugging Face's Trainer all drive the recipe alike."""

    def __init__(self, model: nn.Module, methods: list[Method], blocks: Blocks):
        self.model, self.blocks = model, blocks
        self.methods = methods
        self.step = 0
        self._optimizer: torch.optim.Optimizer | None = None
        self._hook = None
        # Everything that may ever train: a schedule turns requires_grad off and on among these.
        self._trained = [name for name, p in model.named_parameters() if p.requires_grad]

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

    def _saved(self) -> dict[str, Tensor]:
        """`named_delta` and the model's own persistent buffers: running statistics change in training, too."""
        kept = self.model.state_dict(keep_vars=True)
        own = {id(b) for m in self.model.modules() if not isinstance(m, Linear) for b in m.buffers(recurse=False)}
        return {**self.named_delta(), **{name: t for name, t in kept.items() if id(t) in own}}

    def _statistics(self) -> dict[str, Tensor]:
        """Of `_saved`, what does not train: an adapter's files have no place for it."""
        delta = self.named_delta()
        return {name: tensor for name, tensor in self._saved().items() if name not in delta}

    def state_dict(self) -> dict:
        return {"step": self.step, "methods": [method.state_dict(self.model) for method in self.methods]}

    def load_state_dict(self, state: dict) -> None:
        for method, own in zip(self.methods, state.get("methods", ()), strict=False):  # a bare step will do
            method.load_state_dict(self.model, own)
        self.seek(state["step"])

    def param_groups(self) -> list[dict]:
        """Optimizer groups of ("name", parameter) pairs: as a method asks, else one group of all that trains."""
        for method in self.methods:
            groups = method.param_groups(self.model)
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
        """Lets an optimizer made elsewhere, over `param_groups()`, drive the recipe's hooks."""
        if self._hook is not None:
            self._hook.remove()  # one clock: an optimizer that this one replaces drives nothing
        self._optimizer = optimizer
        self._hook = optimizer.register_step_post_hook(self._end_step)
        self.seek(self.step)
        return optimizer

    def seek(self, step: int) -> None:
        """Puts the recipe where it was before `step`, for a resumed run: now, or when an optimizer is attached."""
        self.step = step
        if self._optimizer is not None:
            for method in self.methods:
                method.before_step(self.model, step, self._optimizer)

    def _end_step(self, optimizer: torch.optim.Optimizer, args, kwargs) -> None:
        for method in self.methods:
            method.after_step(self.model, self.step, optimizer)
        self.seek(self.step + 1)

    def backward(
        self, batch, loss_fn: Callable[[nn.Module, object], Tensor], scale: float = 1.0, last: bool = True
    ) -> Tensor:
        """Accumulates the gradient of scale · loss_fn(model, batch), by autograd or as the recipe does. `last`: no
        other micro-batch of this step follows.

        Returns: the loss, detached.
        Raises: EfftuneError while a CUDA graph is being captured, if the recipe draws or has work for the CPU in every
            step: replays would repeat that of one step.
        """
        if not self.methods:
            raise EfftuneError("The recipe has been taken out of this model (merge or remove); apply one again.")
        if capturing():
            self._refuse_capture()
        call: Backward = autograd
        # From the inside; of one place by name, so that the order of a recipe's terms changes nothing.
        for method in sorted(self.methods, key=lambda m: (m.place, m.name), reverse=True):
            if method.overrides("backward"):
                call = partial(method.backward, inner=call)
        return call(Micro(self.model, batch, loss_fn, scale, self.step, last, self._optimizer))

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
                stack.enter_context(method.exactly(self.model))
            yield

    @torch.no_grad()
    def merge(self) -> nn.Module:
        """Takes the blocks out and replaces every efftune.Linear by the plain nn.Linear with its delta added. Returns
        the model, now plain."""
        layers = [(name, m) for name, m in self.model.named_modules() if isinstance(m, Linear)]
        tied = shared_parameters(self.model)
        for name, layer in layers:  # all refusals before the first change
            shared = tied.get(id(layer.stored().tensors[0]), [])
            if shared and layer.delta.adds:
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
            method.remove(self.model)
        self.methods = []  # the optimizer, should somebody go on with it, drives nothing
        if self._hook is not None:
            self._hook.remove()
        self.blocks.remove()
        where = places(self.model)
        for layer in [m for m in self.model.modules() if isinstance(m, Linear)]:
            plain = make(layer)
            for parent, child in where[id(layer)]:
                parent._modules[child] = plain
        return self.model

    def save(self, path: str | Path) -> None:
        """Writes what was trained: a PEFT adapter where the recipe trains LoRA, and the buffers of the model beside it
        (running statistics); else all in `trained.safetensors`; beside either, `efftune_config.json` with the recipe.
        """
        from safetensors.torch import save_file

        path = Path(path)
        path.mkdir(parents=True, exist_ok=True)
        if peft.adapters(self.model):
            peft.save_adapter(self.model, self.named_trained(), path)
            saved = self._statistics()
        else:
            saved = self._saved()
        if saved:
            tensors = {name: t.detach().contiguous().clone() for name, t in saved.items()}
            save_file(tensors, path / TRAINED, metadata={"format": "pt"})
        config = {"format": 1, "recipe": self.recipe}
        (path / CONFIG).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")

    def summary(self, batch=None, loss_fn: Callable[[nn.Module, object], Tensor] | None = None) -> str:
        """What trains, what is frozen, and how each kind of layer stores, trains and keeps; parameters and bytes.

        With a batch and the loss that `backward` takes: also the bytes that backward keeps of this batch, by kind of
        module, from one forward pass whose result is dropped.
        """
        trained = {id(p) for p in self.named_trained().values()}
        tensors = {id(t): t for t in (*self.model.parameters(), *self.model.buffers())}
        sizes = {True: [0, 0], False: [0, 0]}
        for key, tensor in tensors.items():
            sizes[key in trained][0] += tensor.numel()
            sizes[key in trained][1] += tensor.numel() * tensor.element_size()
        (n_train, b_train), (n_frozen, b_frozen) = sizes[True], sizes[False]
        share = 100 * n_train / max(1, n_train + n_frozen)
        lines = [
            f"recipe     {self.recipe}",
            f"trainable  {n_train:>14,} parameters ({share:.2f} %)  {mebibytes(b_train)}",
            f"frozen     {n_frozen:>14,} parameters  {mebibytes(b_frozen)}",
        ]
        kinds: dict[tuple[str, ...], list[int]] = {}
        for module in self.model.modules():
            if isinstance(module, Linear):
                keep = module.keep if module.delta.needs_keep() else "Nothing()"
                kind = str(module.base), str(module.delta), str(keep)
            elif isinstance(module, nn.Linear) or is_conv1d(module):
                full = id(module.weight) in trained
                kind = type(module).__name__, "Trained()" if full else "NoDelta()", "Exact()" if full else "Nothing()"
            else:
                continue
            count = kinds.setdefault(kind, [0, 0])
            count[0] += 1
            count[1] += sum(t.numel() * t.element_size() for t in (*module.parameters(), *module.buffers()))
        for (base, delta, keep), (count, size) in kinds.items():
            lines.append(f"{count:>5} x    {base} · {delta} · {keep}  {mebibytes(size)}")
        lines.append(f"blocks     {self.blocks}")
        lines += [line for method in self.methods if (line := method.report(self.model)) is not None]
        if batch is not None and loss_fn is not None:
            kept = saved_for_backward(self.model, lambda: loss_fn(self.model, batch))
            lines.append(f"backward keeps {mebibytes(kept.total)} of this batch:")
            lines += [
                f"{count:>5} x    {kind}  {mebibytes(size)}" for kind, (count, size) in kept.by_kind(self.model).items()
            ]
        return "\n".join(lines)


def mebibytes(count: int) -> str:
    return f"{count / 2**20:.1f} MiB"
