"""What training holds: weights, gradients, optimizer state, what is saved for backward, and what is allocated."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.func import functional_call
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook

from efftune.errors import EfftuneError


@dataclass
class Saved:
    """Bytes that autograd saved, once per storage; what the model owns (parameters, buffers) apart."""

    by_module: dict[str, int] = field(default_factory=dict)  # path of the module that saved the storage first -> bytes
    owned: int = 0

    @property
    def total(self) -> int:
        return sum(self.by_module.values())

    def by_kind(self, model: nn.Module) -> dict[str, tuple[int, int]]:
        """Class name -> (how many modules, bytes), the most bytes first."""
        kinds: dict[str, tuple[int, int]] = {}
        for path, size in self.by_module.items():
            kind = type(model.get_submodule(path)).__name__
            count, before = kinds.get(kind, (0, 0))
            kinds[kind] = count + 1, before + size
        return dict(sorted(kinds.items(), key=lambda item: -item[1][1]))


@contextmanager
def saved(model: nn.Module, owned: Iterable[Tensor] | None = None) -> Iterator[Saved]:
    """Counts what is saved for backward within the block; what the model owns, or `owned` if given, apart. It looks
    through saved-tensor hooks, so what other hooks inside pack (torch's own checkpointing, offloading) is counted where
    they unpack it, or not at all."""
    result = Saved()
    owned = (*model.parameters(), *model.buffers()) if owned is None else owned
    keys = {t.untyped_storage()._cdata for t in owned}
    # By the storage's own address, which fake tensors have, too. The storages stay alive as long as the block runs: a
    # freed one's address could come again.
    seen: dict[int, torch.UntypedStorage] = {}
    stack: list[str] = [""]
    names = {id(module): name for name, module in model.named_modules()}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key not in seen and storage.nbytes():
            seen[key] = storage
            if key in keys:
                result.owned += storage.nbytes()
            else:
                result.by_module[stack[-1]] = result.by_module.get(stack[-1], 0) + storage.nbytes()
        return tensor

    def enter(module: nn.Module, args: object) -> None:
        stack.append(names.get(id(module), stack[-1]))

    def leave(module: nn.Module, args: object, output: object) -> None:
        stack.pop()

    # Of all modules: hooks of its own would change what a module does (a watched head computes all its logits).
    before = register_module_forward_pre_hook(enter)
    after = register_module_forward_hook(leave, always_call=True)
    try:
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            yield result
    finally:
        before.remove()
        after.remove()


def saved_for_backward(model: nn.Module, forward: Callable[[], Tensor]) -> Saved:
    """What forward(), which returns a loss, saves for backward.

    Raises: EfftuneError if the result does not require grad: then nothing is saved, and nothing trains.
    """
    with saved(model) as result:
        loss = forward()
        if not loss.requires_grad:
            raise EfftuneError("The loss does not depend on anything that trains, so nothing is saved for backward.")
    return result


def counting(loss: Callable[[nn.Module, Any], Tensor], kept: list[int]) -> Callable[[nn.Module, Any], Tensor]:
    """`loss(model, batch)`, which also appends the bytes that it saved for backward to `kept`."""

    def counted(model: nn.Module, batch: Any) -> Tensor:
        with saved(model) as result:
            value = loss(model, batch)
        kept.append(result.total)
        return value

    return counted


def size(tensors: Iterable[Tensor]) -> int:
    """Bytes of the storages under `tensors`, each once."""
    return sum({s._cdata: s.nbytes() for s in (t.untyped_storage() for t in tensors)}.values())


@dataclass(frozen=True)
class Held:
    """Bytes that a training step holds, by what they are for."""

    weights: int  # parameters and buffers
    gradients: int
    optimizer: int  # its state
    saved: int  # for the backward pass of one micro-batch


def held(model: nn.Module, optimizer: torch.optim.Optimizer, saved: int) -> Held:
    """What a step has held, asked for after `optimizer.step()` and before gradients are dropped."""
    state = (value for values in optimizer.state.values() for value in values.values())
    return Held(
        size((*model.parameters(), *model.buffers())),
        size(p.grad for p in model.parameters() if p.grad is not None),
        size(value for value in state if isinstance(value, Tensor)),
        saved,
    )


def held_by_plain(model: nn.Module, inputs: dict[str, Tensor], forward: Callable[[Callable[..., Any]], Tensor]) -> Held:
    """What a step of plain full fine-tuning of `model` with AdamW would hold: gradients of all weights and two moments
    of their dtype. The forward pass runs on fake tensors, so nothing is allocated and nothing computed.

    Args:
        inputs: tensors of one micro-batch.
        forward: (call) -> loss, where call(**inputs) is the model's.
    Raises: what the model raises where it looks at the values of tensors, which fake ones do not have.
    """
    named = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    # allow_non_fake_inputs: modules hold tensors that are neither parameters nor buffers
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        state = {n: mode.from_tensor(t).requires_grad_(isinstance(t, nn.Parameter)) for n, t in named}
        fakes = {name: mode.from_tensor(tensor) for name, tensor in inputs.items()}
        with saved(model, state.values()) as result:
            forward(lambda **given: functional_call(model, state, kwargs={**fakes, **given}))
    weights = size(p for p in model.parameters())
    return Held(size((*model.parameters(), *model.buffers())), weights, 2 * weights, result.total)


def allocated(call: Callable[[], object], device: torch.device | str = "cpu") -> tuple[int, int]:
    """(bytes that live on while call()'s result does, the most in between), both above what was allocated before."""
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        result = call()
        torch.cuda.synchronize()
        live, peak = torch.cuda.memory_allocated() - before, torch.cuda.max_memory_allocated() - before
        del result
        return live, peak
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True, acc_events=True) as profile:
        result = call()
    profiler: Any = profile.profiler
    events = [e for e in profiler.kineto_results.events() if e.name() == "[memory]"]
    used = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        used += event.nbytes()
        peak = max(peak, used)
    del result
    return used, peak
