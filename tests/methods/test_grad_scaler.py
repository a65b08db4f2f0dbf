"""The recipe's clock under torch.amp.GradScaler, which lets a fused optimizer skip a step by itself."""

from dataclasses import dataclass, field

import pytest
import torch
from torch import nn

import efftune
from efftune import EfftuneError, Linear
from efftune.methods import Method
from efftune.methods._base import State
from efftune.recipe import parse
from efftune.tuner import CLOCK
from tests.devices import devices
from tests.methods.models import batch, llama, loss_fn


@dataclass
class Notes(State):
    _told: list = field(default_factory=list)


@dataclass(frozen=True)
class Told(Method):
    """Notes which steps it is told of."""

    name = "told"
    State = Notes

    def before_step(self, run):
        run.state(self)._told.append(run.step)

    def after_step(self, run):
        run.state(self)._told.append(f"after {run.step}")


@pytest.mark.parametrize("device", devices("cpu", "cuda"))
@pytest.mark.parametrize("unscaled", [False, True])
@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("kind", [torch.optim.AdamW, torch.optim.Adam, torch.optim.SGD, torch.optim.Adagrad])
def test_a_step_that_is_skipped_is_none(kind, fused, unscaled, device):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4)).to(device)
    tuner = efftune.apply(net, [*parse("lora(r=2)"), Told()])
    optimizer = tuner.attach(kind(tuner.param_groups(), lr=1e-2, fused=fused))
    scaler = torch.amp.GradScaler(device, init_scale=2.0)
    told = tuner.run.states["told"]._told
    del told[:]
    taken = 0
    for overflows in (True, False, True, True, False):
        optimizer.zero_grad()
        scaler.scale(net(torch.randn(4, 8, device=device)).square().mean()).backward()
        if overflows:
            for p in tuner.named_trained().values():
                p.grad.fill_(float("inf"))
        before = [p.detach().clone() for p in net.parameters()]
        if unscaled:
            scaler.unscale_(optimizer)
        scaler.step(optimizer)
        scaler.update()
        taken += not overflows
        assert all(torch.equal(a, b) for a, b in zip(before, net.parameters(), strict=True)) == overflows
        assert tuner.step == taken
    assert told == ["after 0", 1, "after 1", 2]
    assert optimizer.state_dict()[CLOCK]["step"] == 2


@pytest.mark.parametrize(
    "recipe",
    [
        "shira(density=0.05, scorer='gradient')", "saft(density=0.02)", "s2ft(ratio=0.2, scorer='gradient')",
        "spiel(density=0.05, every=4, accumulate=2)",
    ],
)  # fmt: skip
def test_picks_by_a_gradient_that_overflows_wait_for_one_that_does_not(recipe):
    picks = []
    for overflows in (False, True):
        tuner = efftune.apply(llama(layers=1), recipe)
        optimizer = tuner.optimizer(lr=1e-3)
        for step in range(2):
            if overflows:  # a scaler takes no step
                tuner.backward(batch(7), lambda model, data: loss_fn(model, data) * 2.0**126, scale=2.0**127)
                optimizer.zero_grad()
            tuner.backward(batch(step), loss_fn, scale=8.0)
            optimizer.step()
            optimizer.zero_grad()
        picks.append([layer.added()[0] for layer in tuner.model.modules() if isinstance(layer, Linear)])
    assert all(map(torch.equal, *picks))
    with pytest.raises(EfftuneError, match="NaN or Inf"):
        fresh = efftune.apply(llama(layers=1), recipe)
        fresh.backward(batch(7), lambda model, data: loss_fn(model, data) * torch.inf)
