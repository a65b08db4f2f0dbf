"""A delta that W holds: whatever else touches W or the delta's tensors, the layer computes with what they are now, and
the weight that was stored comes back bit for bit."""

import copy
from dataclasses import dataclass

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import efftune
from efftune import EfftuneError, Linear
from efftune.linear import Dense, Int8, LoRA
from efftune.linear.delta.columns import AddedColumns, Columns
from efftune.linear.delta.entries import AddedEntries, Entries
from efftune.linear.keep.quantized import Quantized
from efftune.linear.picks import repick
from efftune.methods._base import TRAINS, Method
from efftune.methods.zeroth_order.mezo import Mezo
from efftune.plan import ALL_LINEAR
from efftune.recipe import parse
from tests.linear.toys import Codebook, FourBits, Rotated

M, K, N = 24, 32, 16
COUNT = 40 / (N * K)


@dataclass(frozen=True)
class Picks(Method):
    added: bool = False
    target_modules: str | tuple[str, ...] = ALL_LINEAR

    name = "picks"
    phase = TRAINS

    def plan(self, plan):
        delta = AddedEntries(COUNT) if self.added else Entries(COUNT)
        plan.wish(self, plan.targets(self, self.target_modules), delta=delta)


def plain_layer(dtype=torch.float64, bias=True):
    torch.manual_seed(0)
    return nn.Linear(K, N, bias=bias, dtype=dtype).requires_grad_(False)


def made(delta=None, base=None, dtype=torch.float64, bias=True):
    layer = Linear.from_linear(plain_layer(dtype, bias), base=base, delta=delta or Entries(COUNT))
    return trained(layer)


def trained(layer, seed=1):
    with torch.no_grad():
        layer.values.copy_(torch.randn(layer.values.shape, generator=torch.Generator().manual_seed(seed)))
    return layer


def inputs(dtype=torch.float64):
    return torch.randn(M, K, dtype=dtype, generator=torch.Generator().manual_seed(2))


def picks(seed, count=40):
    return torch.randperm(N * K, generator=torch.Generator().manual_seed(seed))[:count].sort().values


def close(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-12)


# What trains changes


class Hand:
    """An optimizer of ten lines, as papers publish them: it writes through `.data`."""

    def __init__(self, parameters, lr):
        self.parameters, self.lr = parameters, lr

    def step(self):
        for p in self.parameters:
            p.data.sub_(self.lr * p.grad)

    def zero_grad(self):
        for p in self.parameters:
            p.grad = None


OPTIMIZERS = {
    "fused": lambda p: torch.optim.AdamW(p, lr=0.1, fused=True),  # does not raise a version
    "foreach": lambda p: torch.optim.AdamW(p, lr=0.1, foreach=True),
    "for": lambda p: torch.optim.SGD(p, lr=0.1, foreach=False),
    "hand": lambda p: Hand(p, lr=0.1),
}


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_every_call_sees_what_the_optimizer_wrote(optimizer):
    """Forward passes without gradients before a step, after it and after zero_grad; once with no forward between."""
    x, seen = inputs(), []
    for delta in (Entries(COUNT), AddedEntries(COUNT)):
        layer = made(delta)
        steps, outputs = OPTIMIZERS[optimizer]([layer.values]), []

        def look(layer=layer, outputs=outputs):
            with torch.no_grad() if len(outputs) % 3 else torch.inference_mode():
                outputs.append(layer(x).clone())

        for step in range(4):
            outputs.append(layer(x).detach())
            layer(x).square().mean().backward()
            if step != 2:
                look()
                look()
            steps.step()
            if step != 1:
                look()
            steps.zero_grad()
            look()
        layer.values.data.mul_(0.5)  # as an average of weights is swapped in for an evaluation
        look()
        outputs.append(layer.merge()(x))
        seen.append(outputs)
    assert len({float(y.sum()) for y in seen[1]}) > 5
    for actual, expected in zip(*seen, strict=True):
        close(actual, expected)


def network(dtype=torch.float64):
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(K, N), nn.Tanh(), nn.Linear(N, K), nn.Tanh(), nn.Linear(K, N)).to(dtype)


def loss(model, batch):
    return model(batch).square().mean()


@torch.no_grad()
def test_a_swap_of_data_is_seen():
    """Two tensors that come and go at one address, under one version."""
    layer, x, scratch = made(), inputs(), torch.empty(40, dtype=torch.float64)
    clean, z = layer.values.data, torch.randn(40, dtype=torch.float64)
    seen, outputs = [], []
    for eps in (0.5, -0.5, 0):
        layer.values.data = torch.add(clean, z, alpha=eps, out=scratch) if eps else clean
        seen.append((layer.values.data_ptr(), layer.values._version))
        outputs.append((layer(x), made_again(layer)(x)))
        layer.values.data = clean
    assert seen[0] == seen[1]
    for actual, expected in outputs:
        close(actual, expected)


def test_mezo_perturbs_what_the_weight_holds():
    batch, runs = inputs(), []
    for added in (False, True):
        model = network()
        tuner = efftune.apply(model, [Picks(added), Mezo(eps=1e-2)])
        optimizer = tuner.optimizer(lr=1e-2)
        losses = []
        for _ in range(5):
            losses.append(tuner.backward(batch, loss))
            with torch.no_grad():
                losses.append(loss(model, batch))
            optimizer.step()
            optimizer.zero_grad()
        with torch.no_grad():
            losses.append(loss(model, batch))
        runs.append(torch.stack([t.detach().double() for t in losses]))
        assert runs[-1].unique().numel() > 9
    close(*runs)


def test_two_calls_in_one_graph_a_recomputed_one_and_one_between_forward_and_backward():
    x, grads = inputs(), []
    for delta in (Entries(COUNT), AddedEntries(COUNT)):
        layer = made(delta)
        y = layer(x).sum() + 2 * layer(x.flip(0)).square().sum() + checkpoint(layer, x, use_reentrant=False).sum()
        with torch.no_grad():
            layer(x)
        layer.state_dict()
        y.backward()
        grads.append(layer.values.grad)
    close(*grads)


def test_gradients_by_functional_call():
    layer, x = made(), inputs()[:3]

    def f(values):
        return torch.func.functional_call(layer, {"values": values}, (x,))

    assert torch.autograd.gradcheck(f, (torch.randn(40, dtype=torch.float64, requires_grad=True),))


def test_no_gradient_as_large_as_the_weight():
    layer = Linear.from_linear(nn.Linear(64, 64).requires_grad_(False), delta=Entries(COUNT))
    y = layer(torch.randn(8, 64, requires_grad=True))

    class Large(TorchDispatchMode):
        seen = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            out = function(*args, **kwargs or {})
            if isinstance(out, torch.Tensor) and out.untyped_storage()._cdata != layer.weight.untyped_storage()._cdata:
                self.seen = max(self.seen, out.numel())
            return out

    with Large() as large:
        y.backward(torch.ones(8, 64))
    assert layer.values.grad.any() and large.seen < 64 * 64


# The weight comes back


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("base", [Dense(), Dense(transposed=True)], ids=str)
def test_picks_move_and_the_stored_weight_comes_back(base, dtype):
    layer, x, before = made(base=base, dtype=dtype), inputs(dtype), plain_layer(dtype).weight
    reference = made(AddedEntries(COUNT))
    for seed in range(5):
        trained(layer, seed)
        trained(reference, seed)
        y = layer(x).detach()
        moved, old, values = picks(seed), layer.indices.clone(), layer.values.detach().clone()
        if seed == 3:
            moved = torch.cat([old[::2], moved]).unique(sorted=False)[:40].sort().values  # some stay
        place = repick(layer, moved)
        repick(reference, moved)
        stays = place >= 0
        assert torch.equal(old[place[stays]], layer.indices[stays])
        assert torch.equal(values[place[stays]], layer.values.detach()[stays])
        assert 1 < int(stays.sum()) < 40 or seed != 3
        # What left stays as it was trained, also in the weight's own rounding.
        torch.testing.assert_close(layer(x).detach(), y, rtol=1e-6, atol=0 if dtype == torch.bfloat16 else 1e-6)
        if dtype == torch.float64:
            close(layer(x), reference(x))
    assert len(layer.left) > 40
    layer(x)
    assert not torch.equal(layer.merge().weight, before)
    assert torch.equal(layer.remove().weight, before)


def test_remove_after_everything():
    """Between a step and the next call, before any, in the middle of a graph, twice."""
    layer, x, before = made(), inputs(), plain_layer().weight
    assert torch.equal(made().remove().weight, before)
    layer(x).sum().backward()
    torch.optim.AdamW([layer.values], lr=0.1, fused=True).step()
    assert torch.equal(layer.remove().weight, before)
    layer(x)
    repick(layer, picks(4))
    layer.values.data.fill_(float("nan"))
    layer(x)
    assert torch.equal(layer.remove().weight, before) and torch.equal(layer.remove().weight, before)


def test_replace_takes_what_the_layer_has_itself():
    """Other values for the same entries; what left stays, given as it is or as a part of it."""
    layer = made()
    for seed in range(3):
        repick(layer, picks(seed))
    chosen, original, values, *left = layer.added()
    expected = [t.detach().clone() for t in (chosen, original, 2 * values, *(t[5:] for t in left))]
    layer.replace((chosen, original, 2 * values, *(t[5:] for t in left)))
    assert all(torch.equal(a, b) for a, b in zip(layer.added(), expected, strict=True))
    layer.replace(layer.added())
    assert all(torch.equal(a, b) for a, b in zip(layer.added(), expected, strict=True))
    held = layer.left.clone()
    with pytest.raises(EfftuneError, match=r"values \(39,\) is not one for each of 40 indices"):
        layer.replace((chosen, original, values[1:], *left))
    assert torch.equal(layer.left, held)


def test_merged_is_apart_from_the_layer():
    layer, x = made(), inputs()
    merged = layer.merge()
    y = merged(x)
    close(y, layer(x).detach())
    trained(layer, 5)
    layer(x)
    layer.remove()
    assert torch.equal(merged(x), y)


def test_other_axes_for_a_layer():
    layer, x, before = made(), inputs(), plain_layer().weight
    y = layer(x).detach()
    kept = Linear.from_linear(layer, keep=Quantized(8, 8))
    assert kept.weight is layer.weight and kept.values is layer.values and torch.equal(kept(x), y)
    other = Linear.from_linear(layer, base=Dense(transposed=True))
    close(other(x), y)
    assert torch.equal(other.remove().weight, before)
    lora = Linear.from_linear(layer, delta=LoRA(r=2))
    assert lora.weight is layer.weight and torch.equal(lora.weight, before)
    with pytest.raises(EfftuneError, match="hooks or a state dict of its own"):
        layer.register_state_dict_pre_hook(lambda *_: None)
        Linear.from_linear(layer, keep=Quantized(8, 8))


# Copies


def test_a_copy_has_a_weight_and_a_delta_of_its_own():
    layer, x, before = made(), inputs(), plain_layer().weight
    y = layer(x).detach()
    twin = copy.deepcopy(layer)
    trained(twin, 7)
    repick(twin, picks(1))
    assert not torch.equal(twin(x), y)
    assert torch.equal(layer(x), y)
    assert torch.equal(twin.remove().weight, before)


@pytest.mark.parametrize("seen", [True, False])
def test_another_dtype(seen):
    layer, x, before = made(), inputs(), plain_layer().weight
    repick(layer, picks(1))
    trained(layer, 8)  # after it, no call before `.to`
    if seen:
        layer(x)
    y = made_again(layer)(x)
    half = layer.to(torch.float32)
    torch.testing.assert_close(half(x.float()).double(), y, rtol=1e-5, atol=1e-5)
    half.to(torch.bfloat16)
    assert half.stored().dtype == torch.bfloat16
    assert torch.equal(half.remove().weight, before.float().bfloat16())


@pytest.mark.parametrize("delta", [Entries(COUNT), AddedEntries(COUNT), Columns(3), AddedColumns(3)], ids=str)
def test_a_narrower_dtype_leaves_the_differences_wide(delta):
    """An update far below an ulp of bfloat16 is not lost after `.to`."""
    layer = made(delta, dtype=torch.float32)
    trained(layer, 8)
    layer(inputs(torch.float32)).sum().backward()
    before, grad = layer.values.detach().clone(), layer.values.grad.clone()
    layer.to(torch.bfloat16)
    assert layer.stored().dtype == torch.bfloat16 and all(layer._parameters[n].dtype.itemsize == 4 for n in delta.wide)
    assert torch.equal(layer.values, before) and torch.equal(layer.values.grad, grad)
    with torch.no_grad():
        layer.values.add_(1e-6)
    assert (layer.values != before).all()
    layer(inputs(torch.bfloat16)).sum().backward()


def made_again(layer):
    """The function of the layer's tensors, by the delta that writes nowhere."""
    other = Linear.from_linear(plain_layer(), delta=AddedEntries(COUNT))
    other.replace((layer.indices, layer.values, layer.left, layer.left_values - layer.left_original))
    return other


def test_moved_to_the_meta_device_and_back():
    layer, x = made(), inputs()
    assert layer.state_dict().keys() == copy.deepcopy(layer).to("meta").state_dict().keys()
    empty = copy.deepcopy(layer).to("meta")
    assert empty.stored().tensors[0].is_meta and empty.take_back().shape == (N, K)
    empty.load_state_dict(layer.state_dict(), assign=True)
    assert torch.equal(empty(x), layer(x))


# What is refused


@pytest.mark.parametrize("base", [Int8(group=8), FourBits(), Codebook(), Rotated()], ids=str)
def test_a_base_that_is_not_written_to(base):
    with pytest.raises(EfftuneError, match=r"writes entries of the stored weight, and those of .* add an adapter"):
        made(base=base)


def test_a_recipe_that_stores_the_weight_otherwise_is_refused_before_the_model_is_touched():
    model = network()
    with pytest.raises(EfftuneError, match=r"^0: Entries\(.*\) writes entries of the stored weight"):
        efftune.apply(model, [Picks(), *parse("int8(group=8)")])
    assert type(model[0]) is nn.Linear


def test_a_weight_that_others_read_is_refused():
    model = network()
    model[4].weight = model[0].weight
    with pytest.raises(EfftuneError, match=r"would write Entries\(.*\) into a weight that others read \(4.weight\)"):
        efftune.apply(model, [Picks()])
    with pytest.raises(EfftuneError, match=r"^0 would write .* choose target_modules without it"):
        efftune.apply(model, [Picks(target_modules=("0",))])
    assert type(model[0]) is nn.Linear  # before the model is touched
    efftune.apply(model, [Picks(target_modules=("2",))])


@pytest.mark.parametrize("tie", ["data", "buffer", "expanded", "columns"])
def test_a_tie_that_only_the_addresses_tell_of(tie):
    model = network()
    if tie == "data":
        model[4].weight.data = model[0].weight.data
    elif tie == "buffer":
        model[2].register_buffer("seen", model[0].weight.data[3:5])
    elif tie == "expanded":
        model[0].weight = nn.Parameter(torch.randn(1, K).double().expand(N, K))
    else:  # they interleave, and have no entry in common: left alone as well
        both = torch.randn(N, 2 * K, dtype=torch.float64)
        model[0].weight, model[4].weight = (nn.Parameter(part) for part in both.split(K, 1))
    with pytest.raises(EfftuneError, match=r"would write Entries\(.*\) into a weight that others read"):
        efftune.apply(model, [Picks()])
    efftune.apply(model, [Picks(target_modules=("2",))])
    tuner = efftune.apply(model, parse("shira(density=0.1, target_modules=['0'])"))
    assert isinstance(tuner.model[0].delta, AddedEntries)


@pytest.mark.parametrize("name", ["values", "original"])
def test_a_part_of_the_weight_itself_is_refused(name):
    """torch's fused AdamW writes beside a strided tensor, and W would take its own original along."""

    class Alias(Entries):
        def begin(self, weight):
            weight, p = super().begin(weight)
            p = dict(zip(self.names, p, strict=True))
            p[name] = weight.flatten()[: self.count(weight.shape)]
            return weight, tuple(p.values())

    with pytest.raises(EfftuneError, match=f"{name} of .* shares memory with the weight that it writes to"):
        made(Alias())


def test_a_compiled_graph_leaves_the_layer_out():
    """Inside the graph, W would be a second tensor that backward keeps."""
    torch._dynamo.reset()
    layer, x = made(bias=False), inputs()
    net = nn.Sequential(nn.Tanh(), layer)
    compiled = torch.compile(net, backend="aot_eager")
    for seed in range(3):
        trained(layer, seed)
        y = compiled(x)
        y.sum().backward()
        gradient, layer.values.grad = layer.values.grad, None
        expected = net(x)
        expected.sum().backward()
        assert torch.equal(y, expected) and torch.equal(gradient, layer.values.grad)
        layer.values.grad = None
    torch._dynamo.reset()
    with pytest.raises(Exception, match="Entries writes into the stored weight, of which a compiled graph would keep"):
        torch.compile(net, fullgraph=True, backend="aot_eager")(x)
