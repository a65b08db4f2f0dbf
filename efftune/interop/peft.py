"""PEFT's adapter files, read and written without PEFT: adapter_config.json and adapter_model.safetensors.

`KINDS` is a table, an entry for each kind of delta that PEFT has too: what PEFT calls its tensors and its settings.
"""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from efftune.errors import EfftuneError
from efftune.files import read_json, read_tensors
from efftune.linear import Dense, Linear, LoRA
from efftune.linear.contracts import Delta
from efftune.linear.delta.dora import DoRA
from efftune.linear.delta.entries import Entries
from efftune.linear.delta.hira import HiRA
from efftune.methods._base import Method
from efftune.methods.adapters.dora import DoraMethod
from efftune.methods.adapters.hira import HiraMethod
from efftune.methods.adapters.lora import LoraMethod
from efftune.methods.sparse.shira import Shira
from efftune.plan import Plan
from efftune.structure import CLASSIFIERS, is_linear, matches

PREFIX = "base_model.model."
WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
TASKS = {"ForCausalLM": "CAUSAL_LM", "ForSequenceClassification": "SEQ_CLS", "ForTokenClassification": "TOKEN_CLS"}
# What PEFT can do to a layer and this library cannot: a file that uses it is refused, not half read.
FOREIGN = (
    "layer_replication", "megatron_config", "trainable_token_indices", "target_parameters", "use_qalora",
    "alora_invocation_tokens", "lora_bias", "arrow_config", "use_bdlora", "velora_config", "monteclora_config",
    "kasa_config",
)  # fmt: skip
FEWER = ("exclude_modules", "layers_to_transform")  # of the layers that target_modules means, not all have an adapter


@dataclass(frozen=True)
class Kind:
    """A kind of delta in PEFT's words. An adapter is of one kind, with a rank and an alpha for each layer.

    Args:
        delta: the kind, exactly: a subclass has a meaning of its own.   method: makes it, and has `fields` as fields.
        keys: our name of a tensor -> what PEFT's key ends in.
        fields: our setting -> (PEFT's, its default there).
        patterns: those of them that a layer may have for itself -> the setting in which PEFT lists such layers. A layer
            that in evaluation differs from most in another one has no place in the file.
        settings: what else tells the kind in a file.
        begins: the setting that says how the adapter began, and the words there that leave the base weights alone.
        biases: whether PEFT's settings have `bias`.
        restate: (delta, that of the first layer) -> the same delta, with the first one's settings where PEFT has one
            for all layers.
    """

    delta: type[Delta]
    method: Callable[..., Any]
    peft_type: str
    keys: dict[str, str]
    fields: dict[str, tuple[str, Any]]
    patterns: dict[str, str] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)
    begins: tuple[str, tuple[str, ...]] = ("init_weights", ("gaussian",))
    biases: bool = False
    restate: Callable[[Any, Any], Any] = lambda delta, first: delta


def _one_scale(delta: LoRA, first: LoRA) -> LoRA:
    """The same scale, said by an alpha over r or √r as `first` says it."""
    alpha = delta.r if delta.lora_alpha is None else delta.lora_alpha
    if delta.use_rslora != first.use_rslora:
        alpha = delta.scale * (math.sqrt(delta.r) if first.use_rslora else delta.r)
    return replace(delta, lora_alpha=alpha, use_rslora=first.use_rslora)


LORA = Kind(
    delta=LoRA,
    method=LoraMethod,
    peft_type="LORA",
    keys={"lora_a": "lora_A.weight", "lora_b": "lora_B.weight"},
    fields={
        "r": ("r", 8),
        "lora_alpha": ("lora_alpha", 8),
        "lora_dropout": ("lora_dropout", 0.0),
        "use_rslora": ("use_rslora", False),
    },
    patterns={"r": "rank_pattern", "lora_alpha": "alpha_pattern"},
    settings={"use_dora": False},
    begins=("init_lora_weights", ("gaussian", "orthogonal", "eva")),
    biases=True,
    restate=_one_scale,
)
DORA = replace(
    LORA,
    delta=DoRA,
    method=DoraMethod,
    keys={**LORA.keys, "lora_magnitude_vector": "lora_magnitude_vector"},
    settings={"use_dora": True},
)
HIRA = Kind(
    delta=HiRA,
    method=HiraMethod,
    peft_type="HIRA",
    keys={"hira_a": "hira_A", "hira_b": "hira_B"},
    fields={"r": ("r", 32), "hira_dropout": ("hira_dropout", 0.0)},
)  # PEFT 0.21 has a rank_pattern for it and does not look at it
KINDS = [LORA, DORA, HIRA]
# Not among these: such a file is four or more times as large as `sparse.safetensors`. `interop/shira.py` has it.
SHIRA = Kind(
    delta=Entries,
    method=Shira,
    peft_type="SHIRA",
    keys={"values": "shira_weight", "indices": "shira_indices"},
    fields={"r": ("r", 32)},
)


class Adapter:
    """A PEFT adapter: the layers of one kind of `KINDS`, modules that train whole, and biases."""

    name, file = "peft", CONFIG
    reader: str | None = "PEFT"

    def carries(self, tuned):
        layout = Layout.of(tuned)
        return set() if layout is None else set(layout.keys.values())

    def write(self, tuned, names, path):
        """Keys: base_model.model.<path>.lora_A.weight (r, in), .lora_B.weight (out, r), or what `KINDS` says; modules
        trained whole and biases keep their path, each under all the names that it has in the model. Settings that
        differ between layers go into rank_pattern and alpha_pattern."""
        layout = Layout.of(tuned)
        assert layout is not None  # else it carries nothing
        layout.write(tuned, names, path, {})

    def read(self, tuned, path):
        layout = Layout.of(tuned)
        return by_our_names(tuned, layout.keys if layout is not None else {}, read_tensors(path / WEIGHTS), path)


def by_our_names(tuned, known: dict[str, str], tensors: dict[str, Tensor], path: Path) -> dict[str, Tensor]:
    """What an adapter in the folder `path` has, by the names of `named_saved`; `known` are those of PEFT's keys.

    Raises: EfftuneError where it has a tensor twice, or a weight of the base model that is another here.
    """
    saved, aliases = tuned.named_saved(), _aliases(tuned.model)
    plain = {alias: name for name, t in saved.items() for alias in aliases.get(id(t), [name])}
    base, found = tuned.model.state_dict(), dict[str, Tensor]()
    for key, tensor in tensors.items():
        own = key.removeprefix(PREFIX).replace(".base_layer.", ".")
        if _as_it_was(own, plain):
            continue
        name = known.get(key) or plain.get(_of_the_copy(own, plain))
        if name is None and own in base:  # of a head or an embedding, PEFT writes what it adds to as well
            _refuse_another(tensor, base[own], own, path / WEIGHTS, tuned.model)
            continue
        name = name or key
        if name in found and not found[name].equal(tensor):
            raise EfftuneError(
                f"{path / WEIGHTS} has two different tensors for {name}, one for each of its names: the model that "
                "it was trained on did not tie them; load it into one that does not."
            )
        found[name] = tensor
    return found


@dataclass
class Layout:
    """What of a tuned model goes into an adapter, and under which keys."""

    kind: Kind
    deltas: dict[str, Any]  # layer -> its delta, restated
    keys: dict[str, str]  # PEFT's key -> the name in named_saved
    whole: set[str]  # modules that are saved whole
    biases: set[str]  # that train outside of them

    @classmethod
    def of(cls, tuned) -> Layout | None:
        """None where the model has no layer of a kind that PEFT knows. Of several kinds, that of most layers."""
        linear = {name: m for name, m in tuned.model.named_modules() if isinstance(m, Linear)}
        counts = Counter(type(m.delta) for m in linear.values())
        kind, shared = max(KINDS, key=lambda kind: counts[kind.delta]), in_several_places(tuned.model)
        deltas = {n: m.delta for n, m in linear.items() if type(m.delta) is kind.delta and n not in shared}
        if not deltas:
            return None
        first = next(iter(deltas.values()))
        deltas = {name: kind.restate(delta, first) for name, delta in deltas.items()}
        common = [field for field in kind.fields if field not in kind.patterns]
        settings = {name: [getattr(delta.eval(), field) for field in common] for name, delta in deltas.items()}
        most = max(settings.values(), key=list(settings.values()).count)
        deltas = {name: delta for name, delta in deltas.items() if settings[name] == most}
        layout = cls.around(tuned, kind, deltas)
        layout.keys |= {f"{PREFIX}{n}.{ending}": f"{n}.{part}" for n in deltas for part, ending in kind.keys.items()}
        return layout

    @classmethod
    def around(cls, tuned, kind: Kind, deltas: dict[str, Any]) -> Layout:
        """Of deltas whose tensors are not in the model as PEFT has them: the keys are those of what lies beside."""
        added = {id(t) for m in tuned.model.modules() if isinstance(m, Linear) for t in m.added()}
        keys: dict[str, str] = {}
        names = {id(t): name for name, t in tuned.named_saved().items() if id(t) not in added}
        inside, biases, whole = _beside(tuned.model, set(names), kind.biases)
        keys |= {PREFIX + alias: names[i] for alias, i in inside.items()}
        for alias, i in biases.items():
            parent = alias.removesuffix(".bias")
            keys[PREFIX + (f"{parent}.base_layer.bias" if parent in deltas else alias)] = names[i]
        return cls(kind, deltas, keys, whole, set(biases))

    def write(self, tuned, names: set[str], path: Path, tensors: dict[str, Tensor], **metadata: str) -> None:
        """Writes both files, with those of `keys` that `names` has, and `tensors` beside them."""
        from safetensors.torch import save_file

        saved = tuned.named_saved()
        keys = {key: name for key, name in self.keys.items() if name in names}
        own = {key: saved[name].detach().contiguous().clone() for key, name in keys.items()}
        save_file(own | tensors, path / WEIGHTS, metadata={"format": "pt", **metadata})
        (path / CONFIG).write_text(json.dumps(self.config(tuned.model), indent=2, sort_keys=True) + "\n")

    def config(self, model: nn.Module) -> dict[str, Any]:
        """adapter_config.json."""
        kind, first = self.kind, next(iter(self.deltas.values()))
        task = next((t for ending, t in TASKS.items() if type(model).__name__.endswith(ending)), None)
        if task != "CAUSAL_LM" and not _wrapped(model, CLASSIFIERS) <= self.whole:
            task = None  # for the others PEFT wraps what is called so, whatever modules_to_save says
        config = {
            "peft_type": kind.peft_type,
            "task_type": task,
            "base_model_name_or_path": getattr(getattr(model, "config", None), "_name_or_path", None) or None,
            "target_modules": endings(model, set(self.deltas)),
            "modules_to_save": sorted(self.whole) or None,
            kind.begins[0]: True,
            "inference_mode": True,
            **kind.settings,
        }
        for ours, (theirs, default) in kind.fields.items():
            config[theirs] = value = _number(getattr(first, ours), default)
            if ours in kind.patterns:
                each = {exactly([n]): _number(getattr(delta, ours), default) for n, delta in self.deltas.items()}
                config[kind.patterns[ours]] = {n: other for n, other in each.items() if other != value}
        if kind.biases:
            ours = all(name.removesuffix(".bias") in self.deltas for name in self.biases)
            config["bias"] = "none" if not self.biases else "lora_only" if ours else "all"
        if any(model.get_submodule(name).conv1d is not None for name in self.deltas):
            config["fan_in_fan_out"] = True
        return config


def _as_it_was(name: str, plain: Iterable[str]) -> bool:
    """Whether `name` is of the module that PEFT keeps beside the copy that it trains: of no use to anybody, but with
    bias="all" its biases are in the file."""
    module, original, part = name.partition(".original_module.")
    return bool(original) and f"{module}.{part}" in plain


def _of_the_copy(name: str, plain: Iterable[str]) -> str:
    """`name`, or where it is of the copy that PEFT trains of a module, that of the module. With bias="all" such biases
    are in the file twice: "head.bias", and "head.modules_to_save.bias" or "head.modules_to_save.default.dense.bias"."""
    module, copy, part = name.partition(".modules_to_save.")
    names = (f"{module}.{part}", f"{module}.{part.partition('.')[2]}") if copy else ()
    return next((n for n in names if n in plain), name)


def _refuse_another(tensor: Tensor, weight: Tensor, name: str, file: Path, model: nn.Module) -> None:
    """Raises: EfftuneError where a weight of the base model is not `own`, in the dtype of fewer bits of the two."""
    narrow = min(tensor.dtype, weight.dtype, key=lambda dtype: dtype.itemsize)
    if tensor.shape != weight.shape or not tensor.to(weight.device, narrow).equal(weight.to(narrow)):
        raise EfftuneError(
            f"{file} does not fit {type(model).__name__} (first at {name}): nothing was loaded, since it holds this "
            "weight of the base model and the model has another; load it into the model that it was trained on, or "
            "merge it with PEFT."
        )


def _number(value: Any, default: Any) -> Any:
    """As PEFT has it: 8 and not 8.0 where it has a whole number."""
    return int(value) if type(default) is int and value == int(value) else value


def _wrapped(model: nn.Module, modules_to_save: Iterable[str]) -> set[str]:
    """The modules that PEFT saves whole: whose paths end so, also within a name."""
    endings = tuple(modules_to_save)
    return {name for name, _ in model.named_modules(remove_duplicate=False) if endings and name.endswith(endings)}


def _aliases(model: nn.Module) -> dict[int, list[str]]:
    """id(parameter) -> its names: several, of a tied weight and in a module that stands in several places."""
    found: dict[int, list[str]] = {}
    for name, p in model.named_parameters(remove_duplicate=False):
        found.setdefault(id(p), []).append(name)
    return found


def _beside(model: nn.Module, ids: set[int], biases: bool) -> tuple[dict[str, int], dict[str, int], set[str]]:
    """Of the tensors `ids`, those for which PEFT has a place beside its layers. A tensor with two names, since modules
    share it, needs a place for each: PEFT would else load one of them.

    Returns: name -> id, of those in modules that are saved whole and of biases, which have a place if `biases`; and the
    names of those modules: the outermost ones all of whose state is among `ids`, "classifier" and not each of its two
    layers.
    """
    aliases = {i: names for i, names in _aliases(model).items() if i in ids}
    states: dict[str, dict[str, int]] = {}
    for name in {alias.rpartition(".")[0] for names in aliases.values() for alias in names}:
        outermost = None
        while (state := _state(model, name)) and ids.issuperset(state.values()):
            outermost, name = (name, state), name.rpartition(".")[0]
        states |= [outermost] if outermost else []
    states = {name: state for name, state in states.items() if _wrapped(model, [name]) <= states.keys()}
    while True:
        inside = {f"{name}.{part}": i for name, state in states.items() for part, i in state.items()}
        outside = {alias: i for i, names in aliases.items() for alias in names if alias not in inside}
        alone = {alias: i for alias, i in outside.items() if biases and alias.endswith(".bias")}
        torn = {i for alias, i in outside.items() if alias not in alone}
        if torn.isdisjoint(inside.values()):
            return inside, {alias: i for alias, i in alone.items() if i not in torn}, set(states)
        states = {name: state for name, state in states.items() if torn.isdisjoint(state.values())}


def _state(model: nn.Module, name: str) -> dict[str, int]:
    """The ids of the state of a module, by its names; nothing for the model itself, and where the names do not mean
    what they mean in a plain module."""
    module = model.get_submodule(name)
    if not name or any(isinstance(m, Linear) and not isinstance(m.base, Dense) for m in module.modules()):
        return {}
    return {key: id(t) for key, t in module.state_dict(keep_vars=True).items()}


def in_several_places(model: nn.Module) -> set[str]:
    """Modules that stand in several places: in one of them PEFT would put an adapter."""
    counts = Counter(id(m) for _, m in model.named_modules(remove_duplicate=False))
    return {name for name, m in model.named_modules() if counts[id(m)] > 1}


def endings(model: nn.Module, chosen: set[str]) -> list[str] | str:
    """The last names of the chosen modules if these mean no other module, else an expression for their full paths."""
    short = sorted({name.rpartition(".")[2] for name in chosen})
    meant = {name for name, _ in model.named_modules() if matches(name, short)}
    return short if meant == chosen else exactly(chosen)


def exactly(names: Iterable[str]) -> str:
    """A regular expression for these paths and no others, to PEFT as well as to `matches`: both try it behind a dot."""
    return f"^({'|'.join(re.escape(name) for name in sorted(names))})"


def methods(path: Path, model: nn.Module) -> list[Method]:
    """The recipe that the PEFT adapter in the folder `path` means for `model`: a method for each rank and alpha. Which
    layers have an adapter is read off the keys of its tensors.

    Raises: EfftuneError if it is of no kind of `KINDS`, uses a setting that this library has not, or does not fit.
    """
    file, plan = path / CONFIG, Plan(model)
    config = read_json(file)
    kind = _kind(config, file)
    parts = tuple("." + ending for ending in kind.keys.values())
    keys = [key.removeprefix(PREFIX) for key in read_tensors(path / WEIGHTS)]
    found = {key.removesuffix(part) for key in keys for part in parts if key.endswith(part)}
    wholly = _wrapped(model, _names(config, "modules_to_save", file))
    _refuse_others({key.rpartition(f".{kind.peft_type.lower()}_")[0] for key in keys}, model, path / WEIGHTS)
    _refuse_nested(wholly, file)
    _refuse_untied(model, wholly, config, file, keys)
    wrong, targets = found - plan.layers.keys() | found & in_several_places(model), config.get("target_modules")
    if not isinstance(targets, str) and (targets := _names(config, "target_modules", file)):
        meant = {layer.name for layer in plan.targets(kind.method(), targets)}
        meant -= {layer.name for module in wholly for layer in plan.inside(module)}
        wrong |= found - meant if any(config.get(name) not in (None, [], "") for name in FEWER) else found ^ meant
    if wrong or not found:
        at = f" (first at {min(wrong)})" if wrong else ""
        raise EfftuneError(f"{path / WEIGHTS} does not fit {type(model).__name__}{at}: nothing was loaded.")
    groups: dict[tuple, set[str]] = {}
    for name in found:
        groups.setdefault(tuple(_settings(kind, config, name, file)), set()).add(name)
    bias = {"bias": config.get("bias", "none")} if kind.biases else {}
    recipe: list[Any] = []
    for settings in sorted(groups):
        targets = endings(model, groups[settings])
        recipe.append(
            kind.method(
                **dict(zip(kind.fields, settings, strict=True)),
                **bias,
                target_modules=targets if isinstance(targets, str) else tuple(targets),
                modules_to_save=() if recipe else tuple(sorted(wholly)),
            )
        )
    return recipe


def _kind(config: dict[str, Any], file: Path) -> Kind:
    def other(kind: Kind) -> list[str]:
        return [name for name, value in kind.settings.items() if bool(config.get(name)) != bool(value)]

    kinds = [kind for kind in (*KINDS, SHIRA) if kind.peft_type == config.get("peft_type")]
    if not kinds:
        known = ", ".join(dict.fromkeys(kind.peft_type for kind in (*KINDS, SHIRA)))
        raise EfftuneError(f"{file} is a {config.get('peft_type')} adapter; only {known} can be read.")
    kind = min(kinds, key=lambda kind: len(other(kind)))
    if used := other(kind) + [name for name in FOREIGN if config.get(name)]:
        raise EfftuneError(
            f"{file} uses {', '.join(used)}, which efftune's {kind.delta.__name__} has not; merge it with PEFT."
        )
    begun = config.get(kind.begins[0])
    if isinstance(begun, str) and begun not in kind.begins[1]:
        raise EfftuneError(f"{file} was begun by {begun!r}, which changes the base weights; merge it with PEFT.")
    return kind


def _settings(kind: Kind, config: dict[str, Any], layer: str, file: Path) -> Iterable[Any]:
    """What the file says of one layer, in the order of `kind.fields`."""
    for ours, (theirs, default) in kind.fields.items():
        value = config.get(theirs, default)
        patterns = config.get(kind.patterns.get(ours, "")) or {}
        try:
            for pattern, other in patterns.items():
                if re.match(rf"(.*\.)?({pattern})$", layer):
                    value = other
                    break
        except (AttributeError, re.error):
            raise EfftuneError(f"{file} has a {kind.patterns[ours]} that is none; save or fetch it again.") from None
        if not isinstance(value, bool if isinstance(default, bool) else int | float):
            raise EfftuneError(f"{file} says {theirs}={value!r}, where PEFT has {default!r}; save or fetch it again.")
        yield value


def _names(config: dict[str, Any], setting: str, file: Path) -> list[str]:
    names = config.get(setting) or []
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise EfftuneError(f"{file} says {setting}={names!r}, which is no list of names; save or fetch it again.")
    return names


def _refuse_others(adapted: set[str], model: nn.Module, file: Path) -> None:
    """PEFT adapts embeddings and convolutions as well."""
    modules = dict(model.named_modules(remove_duplicate=False))
    for name in sorted(adapted & modules.keys()):
        if name and not is_linear(modules[name]):
            raise EfftuneError(
                f"{file} has an adapter on {name}, and this {type(modules[name]).__name__} is no linear layer, which "
                "alone efftune adapts; merge it with PEFT (merge_and_unload) and go on from the merged model."
            )


def _refuse_nested(wholly: set[str], file: Path) -> None:
    """PEFT trains a copy of each, one of them in the other, and writes both under one name."""
    for inner in sorted(wholly):
        outer = next((name for name in sorted(wholly) if inner.startswith(name + ".")), None)
        if outer is not None:
            raise EfftuneError(
                f"{file} saves {outer} whole and {inner} in it once more, which PEFT itself cannot read; train it "
                f"again with {outer} alone in modules_to_save."
            )


def _refuse_untied(model: nn.Module, wholly: set[str], config: dict[str, Any], file: Path, keys: list[str]) -> None:
    """PEFT trains a copy of a module that is tied to another, which keeps what it had, unless it tied them again: then
    the file has all of their names. (`ensure_weight_tying` alone does not tell: it does nothing for many models.)"""
    names = _aliases(model)
    for module in sorted(wholly):
        for p in model.get_submodule(module).parameters():
            others = [name for name in names[id(p)] if not any((name + ".").startswith(m + ".") for m in wholly)]
            if others and not (config.get("ensure_weight_tying") and all(name in keys for name in others)):
                raise EfftuneError(
                    f"{file} saves {module} whole, a copy in PEFT of what {others[0]} is tied to in this model; load "
                    "it into a model that does not tie them, or merge it with PEFT."
                )
