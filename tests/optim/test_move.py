"""State of optimizers that follows entries as others train, or is refused before anything moves."""

import copy

import pytest
import torch
from torch import nn

import efftune
from efftune import EfftuneError, Linear
from efftune.optim.contract import move, refuse_move
from tests.methods.models import batch, llama, loss_fn

BLOCK = 8


class BlockWise(torch.optim.Optimizer):
    """SGD with momentum in 8 bits: a code for each entry and a scale for each block of BLOCK."""

    def __init__(self, params, lr):
        super().__init__(params, dict(lr=lr))

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for p in (p for p in group["params"] if p.grad is not None):
                state, blocks = self.state[p], -(-p.numel() // BLOCK)
                codes = state.get("codes", torch.zeros(p.numel(), dtype=torch.int8))
                scales = state.get("scales", torch.ones(blocks))
                of_entry = scales.repeat_interleave(BLOCK)[: p.numel()]
                m = (0.9 * codes * of_entry).view(p.shape) + p.grad
                padded = nn.functional.pad(m.flatten(), (0, blocks * BLOCK - p.numel())).view(blocks, BLOCK)
                state["scales"] = padded.abs().amax(1).clamp(min=1e-12) / 127
                state["codes"] = (padded / state["scales"][:, None]).round().to(torch.int8).flatten()[: p.numel()]
                p -= group["lr"] * m


class Wrapped(torch.Tensor):
    """Codes that look like the numbers they stand for, as torchao's are."""


def stepped(make, count=20, **settings):
    torch.manual_seed(0)
    p = nn.Parameter(torch.randn(count))
    optimizer = make([p], lr=0.01, **settings)
    for _ in range(2):
        p.grad = torch.randn(count)
        optimizer.step()
    return p, optimizer


OF_ENTRIES = {
    torch.optim.Adadelta: {}, torch.optim.Adafactor: {}, torch.optim.Adagrad: {}, torch.optim.Adam: {"amsgrad": True},
    torch.optim.Adamax: {}, torch.optim.AdamW: {"fused": True}, torch.optim.ASGD: {}, torch.optim.NAdam: {},
    torch.optim.RAdam: {}, torch.optim.RMSprop: {"momentum": 0.9, "centered": True}, torch.optim.Rprop: {},
    torch.optim.SGD: {"momentum": 0.9},
}  # fmt: skip


@pytest.mark.parametrize("make", OF_ENTRIES, ids=lambda make: make.__name__)
def test_all_of_torchs_follow(make):
    """To fewer entries and to more, from none and to none."""
    p, optimizer = stepped(make, **OF_ENTRIES[make])
    before, index = copy.deepcopy(optimizer.state[p]), torch.tensor([3, -1, 19, 0])
    refuse_move(optimizer, p)
    move(optimizer, p, index, before=20)
    moved = [name for name, value in before.items() if isinstance(value, torch.Tensor) and value.ndim]
    assert moved
    for name in moved:
        assert torch.equal(optimizer.state[p][name], torch.tensor([1, 0, 1, 1]) * before[name][[3, 0, 19, 0]])
    assert all(optimizer.state[p][name] == value for name, value in before.items() if name not in moved)
    move(optimizer, p, index[:0], before=4)
    move(optimizer, p, torch.tensor([-1, -1]), before=0)
    assert all(optimizer.state[p][name].tolist() == [0, 0] for name in moved)


def test_moments_without_two_betas_begin_at_0():
    """They are not Adam's, though they have its names."""
    from transformers.optimization import Adafactor

    p, optimizer = stepped(Adafactor, beta1=0.9, relative_step=False, scale_parameter=False)
    move(optimizer, p, torch.tensor([3, -1, 19]), before=20)
    assert optimizer.state[p]["exp_avg"][1] == optimizer.state[p]["exp_avg_sq"][1] == 0
    p.data, p.grad = p.data[:3], torch.ones(3)
    optimizer.step()
    assert p.isfinite().all()


def block_wise():
    return stepped(BlockWise)


def by_closure():
    p = nn.Parameter(torch.randn(20))
    optimizer = torch.optim.LBFGS([p], lr=0.01)

    def closure():
        optimizer.zero_grad()
        loss = p.square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    return p, optimizer


def wrapped():
    p, optimizer = stepped(torch.optim.AdamW)
    optimizer.state[p]["exp_avg"] = optimizer.state[p]["exp_avg"].as_subclass(Wrapped)
    return p, optimizer


def packed():
    p, optimizer = stepped(torch.optim.SGD, momentum=0.9)
    optimizer.state[p]["momentum_buffer"] = torch.zeros(10, dtype=torch.uint8)  # two to a byte
    return p, optimizer


def codes():
    p, optimizer = stepped(torch.optim.SGD, momentum=0.9)
    optimizer.state[p]["momentum_buffer"] = torch.zeros(20, dtype=torch.uint8)
    return p, optimizer


@pytest.mark.parametrize(
    "made, words",
    [
        (block_wise, r"of 20 entries it has 'scales', \(3,\) torch.float32, which is not a number for each; use an"),
        (by_closure, "of 20 entries it has 'al', a list"),
        (wrapped, "of 20 entries it has 'exp_avg', a Wrapped"),
        (packed, r"of 20 entries it has 'momentum_buffer', \(10,\) torch.uint8"),
        (codes, r"of 20 entries it has 'momentum_buffer', \(20,\) torch.uint8"),
    ],
    ids=["block_wise", "by_closure", "wrapped", "packed", "codes"],
)
def test_what_cannot_follow_is_refused_before_anything_moves(made, words):
    p, optimizer = made()
    before = [v.clone() if isinstance(v, torch.Tensor) else str(v) for v in optimizer.state[p].values()]
    for ask in (lambda: refuse_move(optimizer, p), lambda: move(optimizer, p, torch.arange(20).flip(0))):
        with pytest.raises(EfftuneError, match=f"^The state of {type(optimizer).__name__} cannot follow .*{words}"):
            ask()
    for value, held in zip(optimizer.state[p].values(), before, strict=True):
        assert torch.equal(value, held) if isinstance(value, torch.Tensor) else str(value) == held


def in_place(model):
    return {name: m for name, m in model.named_modules() if isinstance(m, Linear) and m.delta.in_place}


@pytest.mark.parametrize("recipe", ["lift(rank=4, every=2)", "spiel(every=2, accumulate=1)"])
def test_a_recipe_whose_entries_move_says_so_in_its_first_step(recipe):
    """And not when they first move, which may be hours later."""
    tuner = efftune.apply(llama(layers=1), recipe)
    optimizer = tuner.attach(BlockWise(tuner.param_groups(), lr=1e-3))
    before = {name: m.indices.clone() for name, m in in_place(tuner.model).items()}
    tuner.backward(batch(), loss_fn)
    with pytest.raises(EfftuneError, match="The state of BlockWise cannot follow entries that move"):
        optimizer.step()
    assert all(torch.equal(m.indices, before[name]) for name, m in in_place(tuner.model).items())


@pytest.mark.parametrize("recipe", ["shira", "lift(rank=4, every=0)", "saft(density=0.01)", "s2ft(scorer='gradient')"])
def test_entries_that_are_picked_once_go_with_any_optimizer(recipe):
    tuner = efftune.apply(llama(layers=1), recipe)
    optimizer = tuner.attach(BlockWise(tuner.param_groups(), lr=0.1))
    losses = []
    for _ in range(3):
        optimizer.zero_grad()
        losses.append(float(tuner.backward(batch(), loss_fn)))
        optimizer.step()
    assert losses[-1] < losses[0]


def test_layers_that_have_no_state_yet_move():
    """As a schedule leaves them, which trains others at first."""
    tuner = efftune.apply(llama(), "lift(rank=4, every=2) + lisa(layers=1, interval=2)")
    optimizer = tuner.optimizer(lr=1e-2)
    for step in range(5):
        optimizer.zero_grad()
        tuner.backward(batch(step), loss_fn)
        optimizer.step()
    assert any(m.left.numel() for m in in_place(tuner.model).values())
