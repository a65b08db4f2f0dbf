"""Folders that `Tuner.save` wrote before formats were a list, and what the models that were saved there gave.

Made by `python tests/interop/written_before.py`, run with efftune as it was then (before efftune/interop/formats.py).
"""

from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import nn

import efftune

FOLDER = Path(__file__).parent / "before"
RECIPES = {
    "adapter": "lora(r=2, target_modules=['0'], bias='lora_only') + "
    "lora(r=3, lora_alpha=5.0, target_modules=['2'], modules_to_save=['4'])",
    "scales": "int8(group=4, target_modules=['0', '2', '4']) + lora(r=2, target_modules=['0', '2']) + "
    "peqa(target_modules=['4'])",
    "tied": "lora(r=2, target_modules=['0']) + full(target_modules=['5'])",
    "full": "full",
}


def network():
    """Numbers that no generator draws; the last two layers share a weight."""
    net = nn.Sequential(
        nn.Linear(8, 8),
        nn.Tanh(),
        nn.Linear(8, 8),
        nn.BatchNorm1d(8),
        nn.Linear(8, 4),
        nn.Linear(4, 4),
        nn.Linear(4, 4),
    )
    net[6].weight = net[5].weight
    fill(net.parameters(), 1.0)
    return net


def fill(tensors, frequency):
    with torch.no_grad():
        for t in tensors:
            t.copy_(torch.sin(frequency * (1 + torch.arange(t.numel())).double()).view(t.shape) / 2)


def inputs():
    return torch.cos(torch.arange(48).double()).view(6, 8).float()


if __name__ == "__main__":
    for name, recipe in RECIPES.items():
        tuner = efftune.apply(network(), recipe)
        fill(tuner.named_trained().values(), 0.7)
        tuner.model(inputs())  # moves the running statistics
        tuner.save(FOLDER / name)
        save_file({"y": tuner.model.eval()(inputs()).detach()}, FOLDER / name / "expected.safetensors")
