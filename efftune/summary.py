"""What a recipe made of a model, in words and bytes, and what it did not reach."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from torch import nn

from efftune.linear import Dense, Linear
from efftune.linear.module import is_conv1d
from efftune.memory.meter import saved_for_backward
from efftune.plan import Plan
from efftune.structure import in_classifier, output_head, read_without_a_call


def summary(
    plan: Plan, recipe: str, trained: set[str], lines: Iterable[str], loss: Callable[[], Any] | None = None
) -> str:
    """Writes what `Tuner.summary` returns.

    Args:
        trained: the names of the parameters that may ever train.   lines: what the methods say of themselves.
        loss: () -> a loss whose forward pass is measured, or None.
    """
    model = plan.model
    parameters = dict(model.named_parameters())
    ids = {id(p) for name, p in parameters.items() if name in trained}
    tensors = {id(t): t for t in (*parameters.values(), *model.buffers())}
    sizes = {True: [0, 0], False: [0, 0]}
    for key, tensor in tensors.items():
        sizes[key in ids][0] += tensor.numel()
        sizes[key in ids][1] += tensor.numel() * tensor.element_size()
    (n_train, b_train), (n_frozen, b_frozen) = sizes[True], sizes[False]
    entries = max(1, unreached(model, trained)[1])  # what all shares are of: the model without what was added to it
    share = f"{100 * n_train / entries:.2f} % of the model's own"
    found = [
        f"recipe     {recipe}",
        f"trainable  {n_train:>14,} parameters ({share})  {mebibytes(b_train)}",
        f"frozen     {n_frozen:>14,} parameters  {mebibytes(b_frozen)}",
    ]
    for (base, delta, keep), (count, size) in _kinds(model, ids).items():
        found.append(f"{count:>5} x    {base} · {delta} · {keep}  {mebibytes(size)}")
    found += lines
    found += _not_reached(model, trained)
    if loss is not None:
        kept = saved_for_backward(model, loss)
        found.append(f"backward keeps {mebibytes(kept.total)} of this batch:")
        found += [f"{count:>5} x    {kind}  {mebibytes(size)}" for kind, (count, size) in kept.by_kind(model).items()]
    return "\n".join(found)


def _kinds(model: nn.Module, trained: set[int]) -> dict[tuple[str, ...], list[int]]:
    """(base, delta, keep) of the linear layers -> how many there are, and their bytes."""
    kinds: dict[tuple[str, ...], list[int]] = {}
    for module in model.modules():
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
    return kinds


def unreached(model: nn.Module, trained: set[str]) -> tuple[dict[str, dict[str, int]], int]:
    """What of the model's weights a recipe neither trains, nor adds to, nor stores in another way.

    Returns: reason -> name of the parameter -> its entries; and the entries of all weights of the model.
    """
    head, unseen = output_head(model), read_without_a_call(model)
    found: dict[str, dict[str, int]] = {}
    total, seen = 0, set[int]()
    for path, module in model.named_modules():
        added: set[str] = set()
        if isinstance(module, Linear):
            added = {*module.delta.names, *module.base.names}
            weights = {id(getattr(module, name)) for name in module.base.names}
            if seen.isdisjoint(weights):  # else it is tied to one that has been counted
                seen |= weights
                total += module.in_features * module.out_features
                if not module.delta.trains and isinstance(module.base, Dense):
                    reason = "the output head" if module is head else "linear layers that no target_modules means"
                    found.setdefault(reason, {})[path] = module.in_features * module.out_features
        for leaf, p in module.named_parameters(recurse=False):
            if leaf in added or id(p) in seen:
                continue
            seen.add(id(p))
            total += p.numel()
            name = f"{path}.{leaf}" if path else leaf
            if name not in trained:
                found.setdefault(_reason(path, module, p, head, id(module) in unseen), {})[name] = p.numel()
    return found, total


def _reason(path: str, module: nn.Module, p: nn.Parameter, head: nn.Module | None, unseen: bool) -> str:
    kind = type(module).__name__
    if p.ndim < 2:
        return "vectors (norms, biases)"
    if module is head:
        return "the output head"
    if in_classifier(path):
        return "the classification head"
    if isinstance(module, nn.Embedding):
        return "embeddings"
    if unseen or isinstance(module, nn.MultiheadAttention):
        return "weights that torch's Transformer modules read without calling a layer"
    if type(module) is nn.Linear or is_conv1d(module):
        return "linear layers that no target_modules means"
    if isinstance(module, nn.Linear):
        return f"{kind}, a subclass of nn.Linear, whose meaning is its own"
    return f"{kind}, whose weights have {p.ndim} dimensions"


def _not_reached(model: nn.Module, trained: set[str]) -> list[str]:
    found, total = unreached(model, trained)
    entries = {reason: sum(names.values()) for reason, names in found.items()}
    if not any(len(names) and reason != "vectors (norms, biases)" for reason, names in found.items()):
        return []  # what is left has no matrix
    share = 100 * sum(entries.values()) / max(1, total)
    lines = [f"not reached, {share:.2f} % of the model's own parameters, neither trained nor stored in another way:"]
    for reason in sorted(entries, key=lambda r: -entries[r]):
        names = list(found[reason])
        which = f"{names[0]}" + (f" and {len(names) - 1} more" if len(names) > 1 else "")
        lines.append(f"{100 * entries[reason] / max(1, total):>8.2f} %  {reason}: {which}")
    return lines


def mebibytes(count: int) -> str:
    return f"{count / 2**20:.1f} MiB"
