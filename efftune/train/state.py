"""What a run must remember to go on bit for bit: trained tensors, optimizer, schedule, generators, data position."""

from __future__ import annotations

import hashlib
from typing import Any

import torch

from efftune.errors import EfftuneError
from efftune.linear import Linear
from efftune.linear.module import room_for, take_back
from efftune.optim.contract import uncast
from efftune.random_state import generator_states, restore_generators

SAMPLED = 1024  # elements of each frozen tensor that enter the fingerprint
RESTORED = ("requires_grad", "optimizer", "scheduler", "generators")  # what `restore` needs beside tensors
BUFFER = "buffer:"  # prefix of a buffer among the trained tensors


def base_fingerprint(model: torch.nn.Module, trained: set[str]) -> str:
    """Returns a sha256 over names, shapes and dtypes of all, and a sample of the bytes of what is frozen.

    What is trained is in the checkpoint whole, so its values cannot be wrong, and neither can a length that the run
    decides.
    """
    take_back(model)
    digest = hashlib.sha256()
    layers = [(path, m) for path, m in model.named_modules() if isinstance(m, Linear)]
    resized = {f"{path}.{name}" for path, layer in layers for name in layer.delta.resizes}
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        shape = "any" if name in resized else tuple(tensor.shape)
        digest.update(f"{name} {shape} {tensor.dtype}\n".encode())
        if name not in trained and tensor.numel():
            digest.update(sample(tensor))
    return digest.hexdigest()


def sample(tensor: torch.Tensor) -> bytes:
    """Returns the bytes of about SAMPLED elements, evenly spread, or of all elements of a small tensor."""
    flat = tensor.detach().reshape(-1)
    return flat[:: max(1, flat.numel() // SAMPLED)].contiguous().cpu().view(torch.uint8).numpy().tobytes()


class Watch:
    """Which buffers have changed since the start (running statistics, drawn indices): those are part of the state.

    Version counters alone will not do: batch_norm writes its running statistics without counting.
    """

    def __init__(self, model: torch.nn.Module):
        self.model = model
        self.start = {name: (id(b), b._version, sample(b)) for name, b in model.named_buffers()}

    def changed(self) -> dict[str, torch.Tensor]:
        now = dict(self.model.named_buffers())
        return {BUFFER + n: b for n, b in now.items() if self.start.get(n) != (id(b), b._version, sample(b))}


def capture(tuner: Any, optimizer: Any, scheduler: Any, watch: Watch) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """(trained tensors, the rest), for checkpoint.save."""
    named = tuner.named_trained()
    rest = {
        "requires_grad": [name for name, p in named.items() if p.requires_grad],
        "optimizer": optimizer.state_dict(),
        "scheduler": scheduler.state_dict(),
        "generators": generator_states(),
    }
    delta = tuner.named_delta()
    return {**delta, **{n: b for n, b in watch.changed().items() if n.removeprefix(BUFFER) not in delta}}, rest


def restore(tuner: Any, optimizer: Any, scheduler: Any, trained: dict[str, torch.Tensor], rest: dict[str, Any]) -> None:
    restore_tensors(tuner, trained)
    if "tuner" in rest:  # of a version whose optimizers did not carry the recipe's clock
        tuner.load_state_dict(rest["tuner"])
    optimizer.load_state_dict(rest["optimizer"])
    training = set(rest["requires_grad"])
    for name, parameter in tuner.named_trained().items():
        parameter.requires_grad_(name in training)
    uncast(optimizer, rest["optimizer"])  # bit-exact means as it was
    scheduler.load_state_dict(rest["scheduler"])
    # the same numbers, unless the run now ends elsewhere: the saved rate is that of the old schedule, at its end 0
    for group, lr, factor in zip(optimizer.param_groups, scheduler.base_lrs, scheduler.lr_lambdas, strict=True):
        group["lr"] = lr * factor(scheduler.last_epoch)
    restore_generators(rest["generators"])


@torch.no_grad()
def restore_tensors(tuner: Any, trained: dict[str, torch.Tensor]) -> None:
    """Copies what `capture` gave back into the model. Raises: EfftuneError, before any copy, if anything misfits."""
    delta = tuner.named_delta()
    targets = {**delta, **{BUFFER + name: b for name, b in tuner.model.named_buffers()}}
    with room_for(tuner.model, trained):
        wrong = [
            n
            for n, t in trained.items()
            if n not in targets or targets[n].shape != t.shape or targets[n].dtype != t.dtype
        ]
        wrong += [n for n in delta if n not in trained]
        if wrong:
            raise EfftuneError(f"The checkpoint does not fit this model (first at '{wrong[0]}'); nothing was changed.")
        for name, tensor in trained.items():
            targets[name].copy_(tensor)
