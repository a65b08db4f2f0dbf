"""The answers that a recipe and the training loop ask of an optimizer."""

import dataclasses

import pytest
import torch
from torch import nn

import efftune
from efftune import EfftuneError
from efftune.methods._base import Method
from efftune.optim.contract import Optimizer, move
from efftune.recipe import parse
from tests.methods.models import batch, llama, loss_fn
from tests.train.conftest import trainer


class InBackward(Optimizer):
    """SGD that takes each gradient as backward has it, and keeps none."""

    in_backward = True

    def __init__(self, params, lr, clips=False):
        super().__init__(params, dict(lr=lr))
        self.clips = clips
        self.last, self.most = True, 0
        for group in self.param_groups:
            for p in group["params"]:
                p.register_post_accumulate_grad_hook(self.take)

    def begin(self, last):
        self.last = last

    @torch.no_grad()
    def take(self, p):
        parameters = [p for group in self.param_groups for p in group["params"]]
        self.most = max(self.most, sum(q.grad is not None for q in parameters))
        if self.last:
            p -= self.param_groups[0]["lr"] * p.grad
            p.grad = None

    def step(self, closure=None):
        pass


@dataclasses.dataclass(frozen=True)
class Own(Method):
    clips: bool = False

    name = "own"

    def optimizer(self, groups, lr, weight_decay=0.0):
        return InBackward(groups, lr, self.clips)


def weights(recipe, micro_batches):
    tuner = efftune.apply(llama(), recipe)
    optimizer = tuner.optimizer(0.1) if any(isinstance(m, Own) for m in tuner.methods) else None
    optimizer = optimizer or tuner.attach(torch.optim.SGD(tuner.param_groups(), lr=0.1))
    for step in range(2):
        optimizer.zero_grad()
        for i in range(micro_batches):
            tuner.backward(batch(10 * step + i), loss_fn, 1 / micro_batches, last=i == micro_batches - 1)
        optimizer.step()
    return tuner, optimizer


@pytest.mark.parametrize("recipe", ["full", "lora(r=4)", "full + recompute", "full + lisa(layers=1, interval=1)"])
@pytest.mark.parametrize("micro_batches", [1, 3])
def test_an_optimizer_in_backward_does_what_one_after_it_does(recipe, micro_batches):
    plain, _ = weights(parse(recipe), micro_batches)
    tuner, optimizer = weights([*parse(recipe), Own()], micro_batches)
    for (name, p), q in zip(plain.named_trained().items(), tuner.named_trained().values(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-7, msg=name)
    assert tuner.step == 2
    if micro_batches == 1:
        assert optimizer.most == 1  # never two gradients at once


@pytest.mark.parametrize("recipe", ["full + vcas", "full + mesa(max_error=0.1)"])
def test_what_goes_through_backward_several_times_is_refused(recipe):
    tuner = efftune.apply(llama(), [*parse(recipe), Own()])
    with pytest.raises(EfftuneError, match="several times for one gradient, and InBackward"):
        tuner.optimizer(lr=0.1)


@pytest.mark.parametrize("make", [torch.optim.AdamW, torch.optim.SGD, torch.optim.RMSprop])
def test_state_follows_the_entries(make):
    """After a move, the next step is that of the same entries in their old places, and a new entry starts afresh."""
    settings = dict(lr=0.1, momentum=0.9) if make is torch.optim.SGD else dict(lr=0.1)
    p, q = nn.Parameter(torch.randn(6)), nn.Parameter(torch.randn(4))
    optimizer, other = make([p], **settings), make([q], **settings)
    for _ in range(3):
        p.grad = torch.randn(6)
        optimizer.step()
    index = torch.tensor([4, -1, 0, 2])
    with torch.no_grad():
        moved = p[index.clamp(min=0)].clone()
    for key, value in optimizer.state[p].items():
        other.state[q][key] = value.clone() if isinstance(value, torch.Tensor) else value
    with torch.no_grad():
        q.copy_(moved)
    move(other, q, index, before=6)
    for name, value in optimizer.state[p].items():
        if isinstance(value, torch.Tensor) and value.ndim:
            assert torch.equal(other.state[q][name][[0, 2, 3]], value[[4, 0, 2]]) and other.state[q][name][1] == 0
    alone = nn.Parameter(q.detach()[1:2].clone())
    first = make([alone], **settings)
    p.grad = torch.randn(6)
    q.grad = p.grad[index.clamp(min=0)].clone()
    alone.grad = q.grad[1:2].clone()
    optimizer.step()
    other.step()
    first.step()
    torch.testing.assert_close(q[[0, 2, 3]], p[[4, 0, 2]])
    torch.testing.assert_close(q[1:2], alone)
    assert other.state[q].keys() == optimizer.state[p].keys()


@pytest.mark.parametrize("settings", [dict(), dict(maximize=True), dict(fused=True), dict(amsgrad=True)], ids=str)
def test_new_entries_begin_with_a_first_step_of_adams(settings):
    """However old the others are; where two moves come before a gradient; not where a GradScaler skips the step."""
    p = nn.Parameter(torch.randn(5))
    optimizer = torch.optim.AdamW([p], lr=0.1, weight_decay=0.0, **settings)
    for _ in range(20):
        p.grad = torch.randn(5)
        optimizer.step()
    move(optimizer, p, torch.tensor([0, -1, 2, 3, -1]))
    move(optimizer, p, torch.tensor([1, 0, -1, 3, 2]))  # the new ones: 0, at which one came before, and 2
    before = p.detach().clone()
    if "fused" in settings:
        p.grad = torch.full((5,), torch.inf)
        optimizer.grad_scale, optimizer.found_inf = torch.tensor(2.0), torch.tensor(1.0)
        optimizer.step()
        assert torch.equal(p, before)
        optimizer.found_inf = torch.tensor(0.0)
        p.grad = torch.tensor([2.0, 1.0, -4.0, 1.0, 1.0])
    else:
        p.grad = torch.tensor([1.0, 1.0, -2.0, 1.0, 1.0])
    optimizer.step()
    sign = -1 if "maximize" in settings else 1
    expected = torch.tensor([-0.1, 0.1]) * sign
    torch.testing.assert_close((p - before).detach()[[0, 2]], expected, rtol=1e-5, atol=1e-6)
    assert not torch.allclose((p - before).detach()[[1, 3]].abs(), torch.tensor(0.1), rtol=1e-2)


def test_an_optimizer_that_moves_its_own_way_is_asked():
    class Mine(Optimizer):
        asked = None

        def move(self, p, index, before):
            self.asked = index

        def step(self, closure=None):
            pass

    p = nn.Parameter(torch.zeros(3))
    optimizer = Mine([p], {})
    move(optimizer, p, torch.tensor([2, 1, 0]))
    assert optimizer.asked.tolist() == [2, 1, 0]


def test_a_limit_of_the_gradients_norm_is_the_optimizers_or_refused():
    with pytest.raises(EfftuneError, match="--clip 1.0 needs the gradient of all .* InBackward .* use --clip 0"):
        trainer([*parse("full"), Own()], clip=1.0)
    assert trainer([*parse("full"), Own(clips=True)], clip=0.5).optimizer.max_norm == 0.5
    t = trainer([*parse("full"), Own()], clip=0.0, steps=1, grad_accum=2)
    before = {name: p.detach().clone() for name, p in t.tuner.named_trained().items()}
    t.fit()
    assert any(not torch.equal(p, before[name]) for name, p in t.tuner.named_trained().items())
