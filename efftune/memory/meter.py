"""What training holds: bytes saved for backward, by module, and bytes allocated."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
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
def saved(model: nn.Module) -> Iterator[Saved]:
    """Counts what is saved for backward within the block. It looks through saved-tensor hooks, so what other hooks
    inside pack (torch's own checkpointing, offloading) is counted where they unpack it, or not at all."""
    result = Saved()
    owned = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
    # The storages stay alive as long as the block runs: a freed one's address could come again.
    seen: dict[int, torch.UntypedStorage] = {}
    stack: list[str] = [""]
    names = {id(module): name for name, module in model.named_modules()}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        key = storage.data_ptr()
        if key not in seen and storage.nbytes():
            seen[key] = storage
            if key in owned:
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
