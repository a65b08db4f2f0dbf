"""PEFT's LoRA files, read and written without PEFT: adapter_config.json and adapter_model.safetensors."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

from torch import nn

from efftune.errors import EfftuneError
from efftune.files import copy_tensors, read_json, read_tensors, required
from efftune.linear import Linear, LoRA
from efftune.methods.adapters.lora import LoraMethod
from efftune.plan import Plan
from efftune.structure import matches

PREFIX = "base_model.model."
WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
TASKS = {"ForCausalLM": "CAUSAL_LM", "ForSequenceClassification": "SEQ_CLS", "ForTokenClassification": "TOKEN_CLS"}
# What PEFT can do to a LoRA layer and this library's cannot: a file that uses it is refused, not half read.
FOREIGN = (
    "use_dora", "layer_replication", "megatron_config", "trainable_token_indices",
    "target_parameters", "exclude_modules", "layers_to_transform", "use_qalora", "alora_invocation_tokens",
    "lora_bias", "arrow_config",
)  # fmt: skip


def adapters(model: nn.Module) -> dict[str, Linear]:
    return {n: m for n, m in model.named_modules() if isinstance(m, Linear) and type(m.delta) is LoRA}


def save_adapter(model: nn.Module, trained: dict[str, nn.Parameter], path: Path) -> None:
    """Writes the LoRA layers of `model`, and whole what else `trained` names, as PEFT writes an adapter.

    Keys: base_model.model.<path>.lora_A.weight (r, in), .lora_B.weight (out, r); modules trained whole and biases keep
    their path. Ranks and alphas that differ between layers go into rank_pattern and alpha_pattern.
    """
    from safetensors.torch import save_file

    layers = adapters(model)
    tensors, biases = {}, False
    for name, layer in layers.items():
        tensors[f"{PREFIX}{name}.lora_A.weight"] = layer.lora_a
        tensors[f"{PREFIX}{name}.lora_B.weight"] = layer.lora_b
    whole = []  # modules that train beside the adapters
    for name, parameter in trained.items():
        parent, _, leaf = name.rpartition(".")
        if parent in layers:
            if leaf == "bias":
                tensors[f"{PREFIX}{parent}.base_layer.bias"] = parameter
                biases = True
        elif leaf == "bias" and f"{parent}.weight" not in trained:
            tensors[PREFIX + name] = parameter
            biases = True
        else:
            tensors[PREFIX + name] = parameter
            whole.append(parent)
    deltas = {n: m.delta for n, m in layers.items() if isinstance(m.delta, LoRA)}
    first = next(iter(deltas.values()))
    others = {n: delta for n, delta in deltas.items() if delta != first}
    task = next((t for ending, t in TASKS.items() if type(model).__name__.endswith(ending)), None)
    config = {
        "peft_type": "LORA",
        "task_type": task,
        "base_model_name_or_path": getattr(getattr(model, "config", None), "_name_or_path", None) or None,
        "r": first.r,
        "lora_alpha": alpha(first),
        "lora_dropout": first.lora_dropout,
        "use_rslora": first.use_rslora,
        "use_dora": False,
        "fan_in_fan_out": any(layer.conv1d is not None for layer in layers.values()),
        "bias": "none" if not biases else "lora_only" if _only_in(trained, layers) else "all",
        "target_modules": endings(model, set(layers)),
        "rank_pattern": {exactly([n]): d.r for n, d in others.items() if d.r != first.r},
        "alpha_pattern": {exactly([n]): alpha(d) for n, d in others.items() if alpha(d) != alpha(first)},
        "modules_to_save": sorted({outermost(model, name, set(trained)) for name in whole}) or None,
        "init_lora_weights": True,
        "inference_mode": True,
    }
    save_file({k: v.detach().contiguous() for k, v in tensors.items()}, path / WEIGHTS, metadata={"format": "pt"})
    (path / CONFIG).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")


def alpha(delta: LoRA) -> float:
    value = delta.r if delta.lora_alpha is None else delta.lora_alpha
    return int(value) if value == int(value) else value


def _only_in(trained: dict[str, nn.Parameter], layers: dict[str, Linear]) -> bool:
    parents = [
        n.rpartition(".")[0]
        for n in trained
        if n.endswith(".bias") and n.removesuffix("bias") + "weight" not in trained
    ]
    return all(parent in layers for parent in parents)


def outermost(model: nn.Module, name: str, trained: set[str]) -> str:
    """The outermost module around `name` all of whose parameters train: "classifier", not each of its two layers."""
    parent = name.rpartition(".")[0]
    if parent and all(f"{parent}.{n}" in trained for n, _ in model.get_submodule(parent).named_parameters()):
        return outermost(model, parent, trained)
    return name


def endings(model: nn.Module, chosen: set[str]) -> list[str] | str:
    """The last names of the chosen modules if these mean no other module, else an expression for their full paths."""
    short = sorted({name.rpartition(".")[2] for name in chosen})
    meant = {name for name, _ in model.named_modules() if matches(name, short)}
    return short if meant == chosen else exactly(chosen)


def exactly(names: Iterable[str]) -> str:
    """A regular expression for these paths and no others, to PEFT as well as to `matches`: both try it behind a dot."""
    return f"^({'|'.join(re.escape(name) for name in sorted(names))})"


def read_methods(path: Path, model: nn.Module) -> list[LoraMethod]:
    """The recipe that the PEFT adapter in the folder `path` means for `model`: one LoRA method per rank and alpha.

    Raises: EfftuneError if it is no LoRA adapter, or uses a setting that this library's LoRA does not have.
    """
    config = read_json(path / CONFIG)
    if config.get("peft_type") != "LORA":
        raise EfftuneError(f"{path / CONFIG} is a {config.get('peft_type')} adapter; only LORA can be read.")
    used = [name for name in FOREIGN if config.get(name)]
    if used:
        raise EfftuneError(f"{path / CONFIG} uses {', '.join(used)}, which efftune's LoRA has not; merge it with PEFT.")
    init = config.get("init_lora_weights")
    if isinstance(init, str) and init not in ("gaussian", "orthogonal", "eva"):
        raise EfftuneError(
            f"{path / CONFIG} was begun by {init!r}, which changes the base weights; merge it with PEFT."
        )
    r, lora_alpha, targets = (required(config, key, path / CONFIG) for key in ("r", "lora_alpha", "target_modules"))
    # PEFT lists every name that a classification head may have.
    names = [name for name, _ in model.named_modules()]
    wholly = tuple(m for m in config.get("modules_to_save") or () if any(matches(name, (m,)) for name in names))
    common = LoraMethod(
        r=r,
        lora_alpha=float(lora_alpha),
        lora_dropout=config.get("lora_dropout", 0.0),
        target_modules=targets if isinstance(targets, str) else tuple(sorted(targets)),
        bias=config.get("bias", "none"),
        use_rslora=config.get("use_rslora", False),
        modules_to_save=wholly,
    )
    ranks, alphas = config.get("rank_pattern") or {}, config.get("alpha_pattern") or {}
    if not ranks and not alphas:
        return [common]
    groups: dict[tuple, list[str]] = {}
    for name in (layer.name for layer in Plan(model).targets(common, common.target_modules)):
        key = _by_pattern(ranks, name, common.r), _by_pattern(alphas, name, common.lora_alpha)
        groups.setdefault(key, []).append(name)
    return [
        replace(
            common, r=r, lora_alpha=float(a), target_modules=exactly(names), modules_to_save=wholly if i == 0 else ()
        )
        for i, ((r, a), names) in enumerate(groups.items())
    ]


def _by_pattern(patterns: dict, name: str, default):
    return next((value for key, value in patterns.items() if re.match(rf"(.*\.)?({key})$", name)), default)


def load_adapter(model: nn.Module, path: Path) -> None:
    """Copies the tensors of the PEFT adapter in the folder `path` into `model`, which has the LoRA layers it names.

    Raises: EfftuneError, before anything is copied, if a tensor is missing, left over or of another shape.
    """
    targets = {}
    for name, layer in adapters(model).items():
        targets[f"{PREFIX}{name}.lora_A.weight"] = layer.lora_a
        targets[f"{PREFIX}{name}.lora_B.weight"] = layer.lora_b
    parameters = dict(model.named_parameters())
    tensors = read_tensors(path / WEIGHTS)
    for key in tensors:
        name = key.removeprefix(PREFIX).replace(".base_layer.", ".")
        if key not in targets and name in parameters:
            targets[key] = parameters[name]
    copy_tensors(tensors, targets, path / WEIGHTS, type(model).__name__)
