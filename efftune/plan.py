"""What a recipe wants of a model, written down before the model is touched: one table that is checked, and built once.

Each method of a recipe writes its wishes (`Method.plan`), those that say how weights are stored before those that say
what trains, then those that say what backward keeps, then the rest: the order of a recipe's terms changes nothing.
`Plan.check` then refuses what cannot be, and `Plan.build` makes each layer once from its weight.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from efftune.errors import EfftuneError
from efftune.hooks import hooked
from efftune.linear import Dense, Exact, Linear, NoDelta, Trained
from efftune.linear.base.dense import FLOATS, is_matrix
from efftune.linear.contracts import Base, Delta, Keep, check
from efftune.linear.delta.columns import Columns
from efftune.linear.delta.entries import Entries
from efftune.linear.module import is_conv1d, rehearse
from efftune.nn.attention import KEEP
from efftune.nn.subbatch import install as run_again
from efftune.random_state import generators, replaying
from efftune.structure import (
    CLASSIFIERS,
    blocks,
    in_classifier,
    is_linear,
    linear_layers,
    matches,
    output_head,
    overlaps,
    parameter_names,
    places,
    read_without_a_call,
)

ALL_LINEAR = "all-linear"


def _kind(tensor: Tensor) -> str:
    """Its dtype, layout and dimensions, as a refusal names them."""
    layout = "" if tensor.layout == torch.strided else f", {tensor.layout}"
    return f"{tensor.dtype}{layout} with {tensor.ndim} dimensions".replace("torch.", "")


def _floats() -> str:
    return ", ".join(map(str, FLOATS)).replace("torch.", "")


Method = Any  # of `efftune.methods`, which lies above: who writes into a plan, named where two want different things


@dataclass
class Layer:
    """A row of the plan: how one linear layer stores, trains and keeps, as it does now until methods wish otherwise."""

    name: str
    plain: bool  # nn.Linear, Conv1D or what a base of the recipe adopts, not efftune.Linear
    shape: tuple[int, int]  # (N, K)
    base: Base
    delta: Delta
    keep: Keep
    parameters: dict[str, str]  # name in the layer -> name in the model, of those that it has
    foreign: bool = False  # of another library, adopted by `base`
    by: dict[str, str] = field(default_factory=dict)  # axis -> the method that wished it

    @property
    def trains(self) -> bool:
        return self.delta.trains

    @property
    def keeps(self) -> bool:
        """Whether backward keeps the layer's input."""
        return self.delta.trains and self.delta.needs_keep()

    @property
    def is_replaced(self) -> bool:
        """Whether an efftune.Linear takes its place: exact layers that train or rest as they are stay nn.Linear."""
        same = self.plain and isinstance(self.base, Dense) and isinstance(self.delta, Trained | NoDelta)
        return bool(self.by) and not (same and self.keep == Exact())


class Plan:
    """The table of what a recipe wants: linear layers, parameters that train, and how the blocks keep and run.

    Args:
        model: read, never written, until `build`.   begins: whether what trains begins here; else a file brings it.
    """

    def __init__(self, model: nn.Module, begins: bool = True):
        self.model, self.begins = model, begins
        for name, parameter in model.named_parameters():
            if is_lazy(parameter):
                raise EfftuneError(
                    f"{name} has no shape until the model is called for the first time; call it once, then apply the "
                    "recipe."
                )
        self.layers: dict[str, Layer] = {}
        self.parameters: dict[str, str] = {}  # name of what trains outside of deltas -> the method that says so
        # Block that runs again in backward -> the share of samples (None: all), and the method that says so.
        self.again: dict[str, tuple[float | None, str]] = {}
        # Attribute of norms, activations and attention (KEEP, ROWS) -> its value, and the method that says so.
        self.in_blocks: dict[str, tuple[Keep, Method]] = {}
        self._names, self._overlaps = parameter_names(model), overlaps(model)
        self._plain: dict[int, list[Layer]] = {}  # id of a weight -> the plain layers that have it
        for name, module in linear_layers(model).items():
            layer = self.layers[name] = self._row(name, module)
            if layer.plain:
                self._plain.setdefault(id(module.weight), []).append(layer)

    def _row(self, name: str, module: nn.Module) -> Layer:
        parameters = {n: f"{name}.{n}" for n, _ in module.named_parameters(recurse=False)}
        if isinstance(module, Linear):
            shape, axes = (module.out_features, module.in_features), (module.base, module.delta, module.keep)
            return Layer(name, False, shape, *axes, parameters)
        weight = cast(nn.Linear, module).weight
        transposed = is_conv1d(module)
        n, k = weight.shape if is_matrix(weight) else (0, 0)  # else it is refused, should a method mean it
        shape = (k, n) if transposed else (n, k)
        return Layer(name, True, shape, Dense(transposed), NoDelta(), Exact(), parameters)

    # What methods read.

    def targets(self, method: Method, target_modules: str | Iterable[str], base: Base | None = None) -> list[Layer]:
        """The linear layers that `target_modules` means. "all-linear": every one but those of the head, over the
        vocabulary or for classification. Of the layers of other libraries, those are among them that a base of the
        recipe adopts.

        Args:
            base: that the method wishes for them; asked what it adopts.

        Raises: EfftuneError if it matches nothing, or matches only layers that are not linear.
        """
        if is_linear(self.model):
            raise EfftuneError(
                f"{method.name} swaps layers inside a model, and this is a layer; use efftune.Linear.from_linear on it."
            )
        kind = type(self.model).__name__
        if base is not None:
            self._adopt(base, target_modules)
        if not self.layers:
            raise EfftuneError(f"{kind} has no linear layer for {method.name} to act on.")
        chosen = [
            name
            for name, layer in self.layers.items()
            if self._means(target_modules, name)
            and not (layer.foreign and base and base.adopt(self.model.get_submodule(name)) is None)
        ]
        unmet = [] if isinstance(target_modules, str) else [t for t in target_modules if not self._meets(t)]
        if not chosen or unmet:
            if unmet:
                target_modules = unmet
            endings = ", ".join(sorted({name.rsplit(".", 1)[-1] for name in self.layers}))
            raise EfftuneError(
                f"target_modules={target_modules!r} matches no linear layer of {kind}; "
                f"its linear layers end in: {endings}; give target_modules of these."
            )
        return [self.layers[name] for name in chosen]

    def _meets(self, target: str) -> bool:
        """Whether any module's path ends so: a name that none has is a slip."""
        return any(matches(name, (target,)) for name, _ in self.model.named_modules())

    def _means(self, target_modules: str | Iterable[str], name: str) -> bool:
        if target_modules == ALL_LINEAR:
            return self.model.get_submodule(name) is not output_head(self.model) and not in_classifier(name)
        return matches(name, target_modules)

    def _adopt(self, base: Base, target_modules: str | Iterable[str]) -> None:
        """Adds the meant layers of other libraries, in the order of the model, whose storage `base` has."""
        unseen, order = read_without_a_call(self.model), {}
        for name, module in self.model.named_modules():
            foreign = name and name not in self.layers and id(module) not in unseen and not isinstance(module, Linear)
            if foreign and self._means(target_modules, name) and (w := base.adopt(module)) is not None:
                parameters = {n: f"{name}.{n}" for n, _ in module.named_parameters(recurse=False)}
                order[name] = Layer(name, True, w.shape, base, NoDelta(), Exact(), parameters, foreign=True)
            elif name in self.layers:
                order[name] = self.layers[name]
        self.layers = order

    def inside(self, root: str) -> list[Layer]:
        """The linear layers at or below the module `root`; "" means the whole model."""
        return [layer for name, layer in self.layers.items() if not root or (name + ".").startswith(root + ".")]

    def tied(self, name: str) -> list[str]:
        """The other names of the parameter `name`."""
        parameter = self.model.get_parameter(name)
        return [other for other in self._names[id(parameter)] if other != name]

    def shared(self, layer: Layer) -> list[str]:
        """The other names of the parameters that the layer's weight is stored in."""
        return [o for part in layer.base.names if (name := layer.parameters.get(part)) for o in self.tied(name)]

    def writable(self, layer: Layer) -> bool:
        """Whether a delta can write into the layer's weight: any number can stand there, and nobody else reads it."""
        return layer.base.puts and not self._readers(layer)

    def _readers(self, layer: Layer) -> list[str]:
        """The names of whatever reads the memory of the layer's weight besides."""
        own = [self.model.get_parameter(layer.parameters[n]) for n in layer.base.names if n in layer.parameters]
        return self.shared(layer) + [name for parameter in own for name in self._overlaps.get(id(parameter), ())]

    def blocks(self) -> tuple[str, list[str]]:
        """The name of the stack of alike blocks, and of each block. Raises: EfftuneError if the model has none."""
        name, stack = blocks(self.model)
        return name, [f"{name}.{i}" for i in range(len(stack))]

    # What methods write.

    def wish(
        self,
        method: Method,
        layers: Iterable[Layer],
        base: Base | None = None,
        delta: Delta | None = None,
        keep: Keep | None = None,
    ) -> None:
        """Says for `method` how these layers are to store, train or keep.

        Raises: EfftuneError where a layer trains another way already, or another method wants another thing of it.
        """
        for layer in layers:
            for axis, kind in (("base", base), ("delta", delta), ("keep", keep)):
                if kind is None:
                    continue
                now, by = getattr(layer, axis), layer.by.get(axis)
                # Two methods that have the same delta of entries would each pick what trains.
                alone = (
                    by is not None
                    and isinstance(kind, Delta)
                    and (kind.in_place or isinstance(kind, Entries | Columns))
                )
                if axis == "delta" and layer.trains and (now != kind or alone):
                    how = "full" if layer.plain and isinstance(now, Trained) else str(now)
                    raise EfftuneError(
                        f"{layer.name} is already trained as {how}{f' by {by}' if by else ''}, so that {method.name} "
                        f"cannot train it as {kind}; give the two methods different target_modules."
                    )
                if by is not None and now != kind:
                    raise EfftuneError(
                        f"{layer.name}: {by} wants {now} and {method.name} {kind}; give the two methods different "
                        "target_modules."
                    )
                setattr(layer, axis, kind)
                layer.by[axis] = method.name

    def adapt(
        self,
        method: Method,
        delta: Delta | Callable[[Layer], Delta],
        target_modules: str | Iterable[str],
        modules_to_save: Iterable[str] | None,
    ) -> list[Layer]:
        """Wishes `delta`, or what it gives for each, for the layers that `target_modules` means, and returns them. The
        modules whose paths end as `modules_to_save` says train whole; None means a classification head.

        Raises: EfftuneError where either means nothing.
        """
        wholly = CLASSIFIERS if modules_to_save is None else modules_to_save
        saved = [name for name, _ in self.model.named_modules() if wholly and matches(name, wholly)]
        for missing in modules_to_save or ():
            if not any(matches(name, (missing,)) for name in saved):
                raise EfftuneError(
                    f"modules_to_save names {missing!r}, which is no module of {type(self.model).__name__}."
                )
        inside = {layer.name for name in saved for layer in self.inside(name)}
        targets = [layer for layer in self.targets(method, target_modules) if layer.name not in inside]
        for layer in targets:
            self.wish(method, [layer], delta=delta if isinstance(delta, Delta) else delta(layer))
        self.train_modules(method, saved)
        return targets

    def keep(self, method: Method, target_modules: str | Iterable[str], keep: Keep) -> list[Layer]:
        """Sets `keep` on the targeted layers that train and returns them. A layer that keeps a part of its rows goes on
        to do so where `keep` is another way to keep all of them.

        Raises: EfftuneError if none of them keeps its input: a frozen layer does not, so there is nothing to save.
        """
        chosen = self.targets(method, target_modules)
        trained = [layer for layer in chosen if layer.keeps]
        if not trained:
            raise EfftuneError(
                f"{method} acts on what trained layers keep, and none of the {len(chosen)} layers that it means keeps "
                "its input; add a method that trains them, or give it other target_modules."
            )
        sampled = [layer for layer in trained if layer.keep != keep and not layer.keep.restores]
        if sampled and not keep.restores:
            raise EfftuneError(
                f"{sampled[0].name} samples its rows already ({sampled[0].keep}); leave out one of the methods that "
                "sample, or give them different target_modules."
            )
        whole = [layer for layer in trained if layer.keep.restores]
        if not keep.restores:
            for layer in whole:
                layer.by.pop("keep", None)  # sampling is the stronger wish: it says which rows there are to keep
            whole = trained
        self.wish(method, whole, keep=keep)
        return whole

    def keep_in_blocks(self, method: Method, keep: Keep, attribute: str = KEEP) -> None:
        """Says with what norms, activations and attention in the blocks keep their inputs (`keep` restores), or with
        the attribute `ROWS` from which query rows eager attention estimates dk and dv.

        Raises: EfftuneError where another method wants it otherwise.
        """
        other, by = self.in_blocks.setdefault(attribute, (keep, method))
        if other != keep:
            what = "keeps its activations" if attribute == KEEP else "samples its query rows"
            raise EfftuneError(
                f"a block {what} one way, not as {other} by {by.name} and as {keep} by {method.name}; leave one of the "
                "two out."
            )

    def train(self, method: Method, names: Iterable[str]) -> None:
        """Says that these parameters train; a plain layer whose weight is one of them, or is tied to one, does."""
        for name in names:
            self.parameters[name] = method.name
            for layer in self._plain.get(id(self.model.get_parameter(name)), ()):
                if isinstance(layer.delta, NoDelta):
                    layer.delta = Trained()

    def train_modules(self, method: Method, roots: Iterable[str]) -> None:
        """Says that every floating-point parameter of these modules trains; "" means the whole model.

        Raises: EfftuneError where a layer's storage, or a parameter of theirs, cannot be trained.
        """
        for root in roots:
            for layer in self.inside(root):
                if not layer.base.trains:
                    by = layer.by.get("base")
                    raise EfftuneError(
                        f"{layer.name}: full trains the stored weight itself and {layer.base} stores integers; use "
                        f"an adapter beside it ({f'{by} + ' if by else ''}lora(r=16)), or train the scales by peqa."
                    )
                if self._unfit(layer) is None:  # else what of it is floating-point is named below
                    self.wish(method, [layer], delta=Trained())
            floating = {n: p for n, p in self.model.get_submodule(root).named_parameters(root) if p.is_floating_point()}
            for name, p in floating.items():
                if p.dtype not in FLOATS or p.layout != torch.strided:
                    raise EfftuneError(
                        f"{name}: {method.name} cannot train {_kind(p)}; give it target_modules without, or make it a "
                        f"dense one in {_floats()}."
                    )
            self.train(method, floating)

    def run_again(self, method: Method, names: Iterable[str], ratio: float | None = None) -> None:
        """Says that these blocks keep their inputs only and run again in backward, on a share of the samples if
        `ratio` is one. Raises: EfftuneError where they do so already."""
        for name in names:
            if name in self.again:
                raise EfftuneError(
                    f"{method.name}: the blocks run again in backward already, by {self.again[name][1]}; leave one "
                    "of the two methods out."
                )
            self.again[name] = ratio, method.name

    # What becomes of it.

    def check(self) -> None:
        """Raises: EfftuneError, naming the layer, for what cannot be built. Every layer is rehearsed, so that what a
        base or a delta refuses while a layer is made is known before the first is changed."""
        replaced = {name: layer for name, layer in self.layers.items() if layer.is_replaced}
        for name, layer in replaced.items():
            if not name:
                raise EfftuneError("this is a layer and no model; use efftune.Linear.from_linear on it.")
            if (problem := self._unfit(layer) or check(layer.base, layer.delta, layer.keep, layer.shape)) is not None:
                raise EfftuneError(f"{name}: {problem}.")
        self._check_tied()
        for name, layer in replaced.items():
            module = self.model.get_submodule(name)
            device = next((t.device for t in (*module.parameters(), *module.buffers())), torch.device("cpu"))
            with replaying(generators(device), device):  # as if nothing had been drawn
                self._named(layer, rehearse, module, layer.base, layer.delta)

    def _unfit(self, layer: Layer) -> str | None:
        """Why the layer has no weight for what the recipe wants of it, as a sentence with the remedy, or None."""
        module = self.model.get_submodule(layer.name)
        if not layer.plain or layer.foreign:
            return None
        weight = cast(Tensor, module.weight)
        if is_matrix(weight):
            return None
        by = " and ".join(dict.fromkeys(layer.by.values()))
        return (
            f"{by} works with a dense weight (N, K) in {_floats()}, and this one is {_kind(weight)}; give {by} "
            "target_modules without it, or make it a dense one"
        )

    @staticmethod
    def _named(layer: Layer, make: Callable[..., Any], *args: Any) -> Any:
        """make(*args), and its refusals with the name of the layer."""
        try:
            return make(*args)
        except (MemoryError, torch.OutOfMemoryError):
            raise
        except ValueError as error:
            raise EfftuneError(f"{layer.name}: {error}") from None
        except Exception as error:
            by = " and ".join(dict.fromkeys(layer.by.values()))
            raise EfftuneError(
                f"{layer.name}: {layer.base} with {layer.delta}, as {by} wants it, fails on this layer "
                f"({type(error).__name__}: {error}); give {by} target_modules without it."
            ) from error

    def _check_tied(self) -> None:
        """A weight may not train by one layer while another, tied to it, only adds to it; and no layer may write its
        delta into a weight that others read."""
        trained = {id(self.model.get_parameter(name)): by for name, by in self.parameters.items()}
        for name, layer in self.layers.items():
            if layer.plain and not layer.is_replaced:
                continue
            shared = self._readers(layer)
            if shared and layer.delta.in_place:
                raise EfftuneError(
                    f"{name} would write {layer.delta} into a weight that others read ({', '.join(shared)}); choose "
                    "target_modules without it."
                )
            learns = layer.delta.stored_learns(layer.base)
            module, base = self.model.get_submodule(name), layer.base
            stored: list[Any] = [module._parameters.get(part) for part in base.names if part not in learns]
            by = next((trained[id(t)] for t in stored if isinstance(t, Tensor) and id(t) in trained), None)
            if by is not None:
                raise EfftuneError(
                    f"{name} adds {layer.delta} to a weight that a layer tied to it trains, by {by}; leave one of them "
                    "out."
                )

    def build(self, model: nn.Module) -> None:
        """Makes the linear layers of `model`, which has the modules that the plan was made for, what the plan says, and
        lets parameters train and blocks run again as it says."""
        for parameter in model.parameters():
            parameter.requires_grad_(False)
        where = places(model)
        for layer in self.layers.values():
            if layer.is_replaced:
                self._replace(model, layer, where)
        named = dict(model.named_parameters(remove_duplicate=False))
        for name in self.parameters:
            if name in named:  # else a delta trains what took its place
                named[name].requires_grad_(True)
        for name, (ratio, _) in self.again.items():
            run_again(model.get_submodule(name), ratio)
        self.model = model
        self._overlaps.clear()
        self._names.clear()  # ids of tensors that are no more
        self._plain.clear()

    @staticmethod
    def _replace(model: nn.Module, layer: Layer, where: dict[int, list[tuple[nn.Module, str]]]) -> Linear:
        """Swaps the layer, wherever it stands below `model`: one that is used under two names stays one layer. The old
        one is held no longer than this call: its weight may be the memory that is short."""
        old = model.get_submodule(layer.name)
        new = Plan._named(layer, Linear.from_linear, old, layer.base, layer.delta, layer.keep)
        for parent, child in where[id(old)]:
            parent._modules[child] = new  # not by setattr, which a module may have made its own
        return new

    def replace_trained(self) -> list[tuple[nn.Module, str, nn.Module, nn.Module]]:
        """Swaps the plain layers that train beside blocks of ours, for once the plan is built: an nn.Linear saves its
        input whatever made it, and efftune.Linear keeps what the input is made of. Returns (parent, name, old, new)."""
        model, swaps = self.model, []
        head, where = output_head(model), places(model)
        for name, layer in self.layers.items():
            old = model.get_submodule(name)
            if isinstance(old, Linear) or not layer.trains or old is head or in_classifier(name) or hooked(old):
                continue
            new = self._replace(model, layer, where)
            swaps += [(parent, child, old, new) for parent, child in where[id(old)]]
        return swaps
