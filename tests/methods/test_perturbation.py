"""The forward passes of MeZO's family: which weights are perturbed in them, and that all are themselves after."""

import copy

import pytest
import torch
from torch import nn

import efftune
from efftune.ops.perturb import perturb
from efftune.optim.directions import stream_of
from tests.methods.perturbed import perturbed


def test_weights_are_restored_bit_for_bit_and_seen_perturbed():
    model = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2))
    tuner = efftune.apply(model, "mezo")
    optimizer = tuner.optimizer(lr=1.0)
    before = [p.clone() for p in model.parameters()]
    x = torch.randn(5, 4)
    with perturbed(model, optimizer, 0.5, seed=3) as used:
        y = model(x)
    assert len(used) == 4
    assert all(torch.equal(p, b) for p, b in zip(model.parameters(), before, strict=True))
    w = {n: perturb(p.data, 0.5, seed=3, stream=stream_of(n)) for n, p in model.named_parameters()}
    assert torch.equal(y, torch.func.functional_call(model, w, (x,)))


class Block(nn.Module):
    """Layers, one of which rests unless asked for, and one whose weight is used without calling it."""

    def __init__(self, shared):
        super().__init__()
        self.first, self.norm, self.second = nn.Linear(6, 8), nn.LayerNorm(8), nn.Linear(8, 6)
        self.rests, self.uncalled, self.shared = nn.Linear(6, 6), nn.Linear(6, 6), shared

    def forward(self, x, also=False):
        x = x + self.second(self.norm(self.first(x)).tanh())
        x = self.shared(nn.functional.linear(x, self.uncalled.weight))
        return self.rests(x) if also else x


class Blocks(nn.Module):
    def __init__(self):
        super().__init__()
        shared = nn.Linear(6, 6)
        self.before, self.blocks = nn.Linear(6, 6), nn.ModuleList([Block(shared), Block(shared)])

    def forward(self, x, also=False):
        x = self.before(x)
        for block in self.blocks:
            x = block(x, also)
        return self.blocks[0].second(self.blocks[0].first(x))  # outside their block's call


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("small, calls", [(2**24, 5), (0, 11)])
def test_blocks_are_perturbed_in_one_call_to_the_same_bits(dtype, small, calls, monkeypatch):
    """If they are no larger than `SMALL`, or than what one module needs; in every step alike, whatever was used."""
    monkeypatch.setattr("efftune.methods.zeroth_order._perturbation.SMALL", small)
    torch.manual_seed(0)
    model = Blocks().to(dtype)
    optimizer = efftune.apply(model, "mezo").optimizer(lr=1.0)
    before, pointers = [p.clone() for p in model.parameters()], [p.data_ptr() for p in model.parameters()]
    x = torch.randn(5, 6, dtype=dtype)
    made, own = [], optimizer.directions.perturbed
    monkeypatch.setattr(optimizer.directions, "perturbed", lambda names, *args: made.append(names) or own(names, *args))
    largest = max(p.nbytes for p in model.parameters())
    for also in (False, False, True, False):
        made.clear()
        with torch.no_grad(), perturbed(model, optimizer, 0.5, seed=3) as used:
            y = model(x, also)
        trains = {n for n, p in model.named_parameters() if id(p) in used}
        assert not any("uncalled" in n for n in trains) and any("rests" in n for n in trains) == also
        moved = {n for names in made for n in names}
        assert trains <= moved and any("uncalled" in n for n in moved) == bool(small)
        other = copy.deepcopy(model)
        for n in moved:
            p = other.get_parameter(n)
            p.data = perturb(p.data, 0.5, seed=3, stream=stream_of(n))
        with torch.no_grad():
            assert torch.equal(y, other(x, also))
        assert all(torch.equal(p, b) for p, b in zip(model.parameters(), before, strict=True))
        assert [p.data_ptr() for p in model.parameters()] == pointers
        assert len(made) == calls + (0 if small else 2 * also)
        if not small:
            size = {n: p.nbytes for n, p in model.named_parameters()}
            assert max(sum(map(size.get, names)) for names in made) <= largest + 8 * dtype.itemsize  # with its bias


class PerTask(nn.Module):
    """One layer and a weight for each task, put into it by forward."""

    def __init__(self):
        super().__init__()
        self.weights = nn.ParameterList([nn.Parameter(torch.randn(6, 6)) for _ in range(2)])
        self.layer = nn.Linear(6, 6, bias=False)
        self.layer.weight = self.weights[0]

    def forward(self, x, task):
        self.layer.weight = self.weights[task]
        return self.layer(x)


@pytest.mark.parametrize("in_blocks", [False, True])
def test_what_a_module_holds_when_it_is_called_is_perturbed(in_blocks):
    torch.manual_seed(0)
    model = PerTask()
    whole = nn.ModuleList([model, None]) if in_blocks else model
    tuner = efftune.apply(whole, "mezo")
    optimizer, x = tuner.optimizer(lr=1e-2), torch.randn(5, 6)
    for task in (0, 1, 0, 1):
        before = [p.detach().clone() for p in model.weights]
        tuner.backward(x, lambda _, x, task=task: model(x, task).square().mean())
        optimizer.step()
        optimizer.zero_grad()
        moved = [not torch.equal(p, b) for p, b in zip(model.weights, before, strict=True)]
        assert moved == [task == 0, task == 1]


class Tied(nn.Module):
    """A weight that its layer uses, and its block besides."""

    def __init__(self):
        super().__init__()
        self.encode = nn.Linear(6, 3)

    def forward(self, x):
        return x + torch.tanh(self.encode(x)) @ self.encode.weight


def test_a_resumed_run_goes_on_with_the_same_losses():
    def started():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(6, 6), nn.Module())
        model[1].blocks = nn.ModuleList([Tied(), Tied()])
        model[1].forward = lambda x: model[1].blocks[1](model[1].blocks[0](x))
        tuner = efftune.apply(model, "mezo")
        return model, tuner, tuner.optimizer(lr=1e-2)

    def losses(cut):
        torch.manual_seed(1)
        at, x, found = started(), torch.randn(5, 6), []
        for step in range(4):
            if step == cut:
                new = started()
                for old, fresh in zip((at[0], at[2], at[1]), (new[0], new[2], new[1]), strict=True):
                    fresh.load_state_dict(old.state_dict())
                at = new
            found.append(float(at[1].backward(x, lambda m, x: m(x).square().mean())))
            at[2].step()
            at[2].zero_grad()
        return found

    assert losses(None) == losses(2)


def test_an_exception_inside_a_block_restores_the_weights():
    torch.manual_seed(0)
    model = Blocks()
    optimizer = efftune.apply(model, "mezo").optimizer(lr=1.0)
    optimizer.used = frozenset(map(id, model.parameters()))
    before, x = [p.data_ptr() for p in model.parameters()], torch.randn(5, 6)
    for fails in (model.blocks[1].norm, model.blocks[1], model.before):
        handle = fails.register_forward_pre_hook(lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError), perturbed(model, optimizer, 0.5, seed=3):
            model(x)
        handle.remove()
        assert [p.data_ptr() for p in model.parameters()] == before
        assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_an_exception_in_forward_restores_the_weights():
    class Fails(nn.Linear):
        def forward(self, x):
            raise RuntimeError("in forward")

    model = nn.Sequential(nn.Linear(4, 3), Fails(3, 2))
    tuner = efftune.apply(model, "mezo")
    tuner.optimizer(lr=1.0)
    before = [p.data_ptr() for p in model.parameters()]
    with pytest.raises(RuntimeError, match="in forward"):
        tuner.backward(torch.randn(2, 4), lambda m, x: m(x).sum())
    assert [p.data_ptr() for p in model.parameters()] == before
