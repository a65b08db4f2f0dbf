"""SM3 against its formula in float64, of tensors of any dimensions and of a few entries of a matrix; and SpIEL-MA,
whose entries grow by what it holds."""

import copy

import pytest
import torch
from torch import nn

import efftune
from efftune import EfftuneError, Linear
from efftune.optim.contract import move, refuse_move
from efftune.optim.sm3 import SM3
from efftune.train.state import restore_tensors
from tests.budget import assert_within_budget
from tests.methods.models import batch, llama, loss_fn


class Plain:
    """SM3-II of a matrix by loops over its covers, in the dtype of its numbers: entries outside `mask` are in none."""

    def __init__(self, p, mask=None, lr=0.1, momentum=0.0, weight_decay=0.0):
        self.p, self.mask = p.clone(), torch.ones_like(p, dtype=torch.bool) if mask is None else mask
        self.lr, self.momentum, self.weight_decay = lr, momentum, weight_decay
        self.m = torch.zeros_like(p)
        self.bounds = [p.new_zeros(size) for size in p.shape]

    def step(self, g):
        v = torch.zeros_like(self.p)
        for place in self.mask.nonzero().tolist():
            v[*place] = min(b[i] for b, i in zip(self.bounds, place, strict=True)) + g[*place] ** 2
        for dim, bound in enumerate(self.bounds):
            for i in range(len(bound)):
                of_cover = v.select(dim, i)[self.mask.select(dim, i)]
                bound[i] = of_cover.max() if of_cover.numel() else bound[i]
        update = torch.where(v > 0, g / v.sqrt(), 0)
        if self.momentum:
            update = self.m = self.momentum * self.m + (1 - self.momentum) * update
        new = self.p * (1 - self.lr * self.weight_decay) - self.lr * update
        self.p = torch.where(self.mask, new, self.p)


SETTINGS = [dict(), dict(momentum=0.9, weight_decay=0.1)]


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
@pytest.mark.parametrize("shape", [(5, 7), (4,), (2, 3, 4), (3, 1)])
def test_steps_are_those_of_the_formula(shape, settings):
    torch.manual_seed(0)
    start = torch.randn(shape)
    p = nn.Parameter(start.clone())
    optimizer, oracle, single = SM3([p], 0.1, **settings), Plain(start.double(), **settings), Plain(start, **settings)
    for _ in range(6):
        p.grad = torch.randn(shape) * torch.rand(shape[-1]).square()
        p.grad[0] = 0  # a cover that has seen nothing divides by nothing
        for plain in (oracle, single):
            plain.step(p.grad.to(plain.p.dtype))
        optimizer.step()
    assert_within_budget(p.detach(), oracle.p, single.p)
    for bound, right, alone in zip(optimizer.bounds(p), oracle.bounds, single.bounds, strict=True):
        assert_within_budget(bound, right, alone)
    assert sum(t.numel() for t in optimizer.state[p].values()) == sum(shape) + ("momentum" in settings) * p.numel()


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_a_few_entries_of_a_matrix_and_others_later(settings):
    """Rows and columns are the matrix's own; momentum goes with its entry, and new ones begin with none."""
    torch.manual_seed(0)
    n, k = 6, 8
    mask = torch.rand(n, k) < 0.3
    mask[2], mask[:, 5] = False, False  # a row and a column without entries
    picks = mask.flatten().nonzero().flatten().int()
    p, dense = nn.Parameter(torch.randn(len(picks), dtype=torch.float64)), torch.zeros(n, k, dtype=torch.float64)
    dense.view(-1)[picks] = p.detach()
    optimizer, oracle = SM3([p], 0.1, **settings), Plain(dense, mask, **settings)
    optimizer.cover(p, picks, (n, k))

    def step():
        g = torch.randn(n, k, dtype=torch.float64)
        g[0] *= 9  # whose columns have smaller bounds once it has no entries
        p.grad = g.view(-1)[picks]
        oracle.step(torch.where(oracle.mask, g, 0))
        optimizer.step()
        torch.testing.assert_close(p.detach(), oracle.p.view(-1)[picks], rtol=1e-12, atol=1e-14)
        for bound, right in zip(optimizer.bounds(p), oracle.bounds, strict=True):
            torch.testing.assert_close(bound, right, rtol=1e-12, atol=0)

    for _ in range(3):
        step()
    assert optimizer.bounds(p)[0][2] == 0
    other = mask.clone()
    other[0], other[2, 3], other[2, 7], other[4, 5] = False, True, True, True
    moved = other.flatten().nonzero().flatten().int()
    at = torch.searchsorted(picks, moved).clamp(max=len(picks) - 1)
    index, before = torch.where(picks[at] == moved, at, -1), len(picks)
    assert len(moved) != before and int((index < 0).sum()) == 3 and mask[0].any()
    oracle.mask, oracle.m = other, torch.where(other & mask, oracle.m, 0)
    oracle.p = torch.where(other & ~mask, 0, oracle.p)
    with torch.no_grad():
        p.data = oracle.p.view(-1)[moved].clone()
    refuse_move(optimizer, p)
    move(optimizer, p, index, before)
    picks = moved
    optimizer.cover(p, picks, (n, k))
    for _ in range(3):
        step()  # row 0 has lost its entries, and keeps what it had
    assert optimizer.bounds(p)[0][2] > 0


def test_16_bit_parameters_have_state_in_float32_and_are_rounded_once():
    torch.manual_seed(0)
    p = nn.Parameter(torch.randn(4, 3).bfloat16())
    optimizer, start = SM3([p], 1e-3, weight_decay=0.1, momentum=0.5), p.detach().float()
    p.grad = torch.randn(4, 3).bfloat16()
    plain = Plain(start, lr=1e-3, weight_decay=0.1, momentum=0.5)
    plain.step(p.grad.float())
    optimizer.step()
    assert torch.equal(p, plain.p.bfloat16())
    state = copy.deepcopy(optimizer.state_dict())
    other = SM3([nn.Parameter(p.detach().clone())], 1e-3)
    other.load_state_dict(state)
    for name, value in other.state[other.param_groups[0]["params"][0]].items():
        assert value.dtype == torch.float32 and torch.equal(value, optimizer.state[p][name])


def test_momentum_out_of_range():
    with pytest.raises(EfftuneError, match=r"momentum lies in \[0, 1\), and is not 1.0"):
        SM3([nn.Parameter(torch.zeros(1))], 0.1, momentum=1.0)


# SpIEL-MA

RECIPE = "spiel(density=0.05, criterion='ma', every=3, accumulate=2, rate=0.5, until=12)"


def layers(model):
    return {name: m for name, m in model.named_modules() if isinstance(m, Linear) and m.delta.in_place}


def run(tuner, optimizer, steps):
    for step in steps:
        optimizer.zero_grad()
        torch.manual_seed(step)
        tuner.backward(batch(step), loss_fn)
        optimizer.step()


def test_entries_grow_where_row_times_column_is_largest():
    tuner, plain = efftune.apply(llama(layers=2), RECIPE), llama(layers=2)
    optimizer = tuner.optimizer(lr=1e-2, momentum=0.9)
    assert isinstance(optimizer, SM3)
    moved = []
    for step in range(10):
        old = {n: m.indices.clone() for n, m in layers(tuner.model).items()}
        optimizer.zero_grad()
        tuner.backward(batch(step), loss_fn)
        optimizer.step()
        share = {1: 1.0, 2: 0.5 * 9 / 12, 5: 0.5 * 6 / 12, 8: 0.5 * 3 / 12}.get(step, 0.0)
        for name, layer in layers(tuner.model).items():
            before = old[name]
            new = ~torch.isin(layer.indices, before)
            row, column = (b.double() for b in optimizer.bounds(layer.values))
            scores = (row[:, None] * column).flatten()
            scores[before.long()] = -1
            count = min(int(share * len(before)), int((scores > 0).sum()))
            assert int(new.sum()) == count and len(layer.indices) == len(before)
            if count:
                edge = scores.sort(descending=True).values[count - 1]
                assert (scores[layer.indices[new].long()] >= edge * (1 - 1e-5)).all()
                # What is dropped is what it was, and momentum is still that of its entry.
                gone = before[~torch.isin(before, layer.indices)].long()
                w = layer.stored().tensors[0].detach().flatten()
                assert torch.equal(w[gone], plain.get_submodule(name).weight.detach().flatten()[gone])
                buffer = optimizer.state[layer.values]["momentum_buffer"]
                assert (buffer[new] == 0).all() and (layer.values.detach()[new] == 0).all()
                moved.append(share)
    assert set(moved) == {1.0, 0.375, 0.25, 0.125}


def test_state_is_a_number_for_each_row_and_column():
    tuner = efftune.apply(llama(), RECIPE)
    run(tuner, tuner.optimizer(lr=1e-2), range(4))
    for layer in layers(tuner.model).values():
        sizes = [t.numel() for t in tuner.run.optimizer.state[layer.values].values()]
        assert sizes == [layer.out_features, layer.in_features]


@pytest.mark.parametrize("at, momentum", [(1, 0.9), (2, 0.0), (2, 0.9), (3, 0.9)])
def test_a_run_goes_on_bit_for_bit_across_replacements(at, momentum):
    recipe = RECIPE.replace(")", ", modules_to_save=['up_proj'])")
    whole = efftune.apply(llama(layers=1), recipe)
    run(whole, whole.optimizer(lr=1e-2, momentum=momentum), range(6))
    first = efftune.apply(llama(layers=1), recipe)
    optimizer = first.optimizer(lr=1e-2, momentum=momentum)
    run(first, optimizer, range(at))
    tensors, state = copy.deepcopy((first.named_saved(), optimizer.state_dict()))
    copied = copy.deepcopy(first)
    again = efftune.apply(llama(layers=1), recipe)
    resumed = again.optimizer(lr=1e-2, momentum=momentum)
    restore_tensors(again, tensors)
    resumed.load_state_dict(state)
    run(again, resumed, range(at, 6))
    run(copied, copied.run.optimizer, range(at, 6))
    for other in (again, copied):
        for name, tensor in whole.named_saved().items():
            assert torch.equal(tensor, other.named_saved()[name]), name
    optimizer.load_state_dict(state)  # onto itself: what has been replaced is not replaced again
    assert all(torch.equal(t, tensors[n]) for n, t in first.named_saved().items())


def test_a_loop_without_tuner_backward_grows_entries_too(recwarn):
    runs = []
    for own in (False, True):
        tuner = efftune.apply(llama(), RECIPE)
        optimizer = tuner.optimizer(lr=1e-2)
        for step in range(4):
            optimizer.zero_grad()
            loss_fn(tuner.model, batch(step)).backward() if own else tuner.backward(batch(step), loss_fn)
            optimizer.step()
        runs.append(tuner.named_saved())
    assert all(torch.equal(t, runs[1][n]) for n, t in runs[0].items())
    assert not [w for w in recwarn if "does not call" in str(w.message)]


@pytest.mark.parametrize(
    "recipe, words",
    [
        ("spiel(criterion='sm3')", r"criterion is 'ag' \(accumulated gradients\) or 'ma'"),
        ("spiel(until=0)", "replacements end at a step after the first, not until=0; None: they do not"),
        ("spiel(scorer='gradient')", "scorer is one of magnitude, small, random, low_rank, file, not 'gradient'"),
        ("spiel(criterion='ma') + mezo", "each bring their own optimizer; a recipe takes one of them"),
        ("spiel(criterion='ma') + ferret", "other entries train as time goes on, and ferret"),
    ],
)
def test_refusals(recipe, words):
    with pytest.raises(EfftuneError, match=words):
        efftune.apply(llama(), recipe)


def test_another_optimizer_is_refused():
    tuner = efftune.apply(llama(), RECIPE)
    with pytest.raises(EfftuneError, match=r"grows entries by the state of SM3, and the optimizer is AdamW; take the"):
        tuner.attach(torch.optim.AdamW(tuner.param_groups(), lr=1e-3))
    run(tuner, tuner.optimizer(lr=1e-3), range(3))


def test_state_of_other_rows_and_columns_is_refused():
    tuner = efftune.apply(llama(), RECIPE)
    optimizer = tuner.optimizer(lr=1e-3)
    run(tuner, optimizer, range(1))
    state = copy.deepcopy(optimizer.state_dict())
    state["state"][0]["bound_0"] = torch.zeros(31)
    with pytest.raises(EfftuneError, match=r"state has bound_0 \(31,\) for a parameter"):
        optimizer.load_state_dict(state)
