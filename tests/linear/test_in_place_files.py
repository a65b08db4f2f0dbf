"""A delta that W holds, in state dicts, files and runs: tensors whose length a run decides, and W in or out of them."""

import copy
from dataclasses import dataclass

import pytest
import torch
from torch import nn

import efftune
from efftune import EfftuneError, Linear
from efftune.linear.picks import repick
from efftune.methods import available
from efftune.optim import seed_log
from efftune.optim.contract import move
from efftune.train.state import base_fingerprint, restore_tensors
from tests.linear.test_in_place import (
    K,
    N,
    Picks,
    close,
    inputs,
    loss,
    made,
    made_again,
    network,
    picks,
    plain_layer,
    trained,
)
from tests.train.conftest import llama, trainer


@dataclass(frozen=True)
class Moving(Picks):
    """Other entries every second step, and the optimizer's state goes with those that stay."""

    name = "moving"

    def before_step(self, run):
        for index, layer in enumerate(m for m in run.model.modules() if isinstance(m, Linear)):
            draw = torch.Generator().manual_seed(100 * (run.step // 2) + index)
            chosen = torch.randperm(layer.weight.numel(), generator=draw)[: len(layer.indices)].sort().values
            if not torch.equal(chosen, layer.indices):  # `seek` calls it again for the step that a run goes on with
                move(run.optimizer, layer.values, repick(layer, chosen))


def test_a_state_dict_is_of_now():
    layer, x = made(), inputs()
    net = nn.Sequential(layer)
    layer(x).sum().backward()
    torch.optim.AdamW([layer.values], lr=0.1, fused=True).step()
    state = net.state_dict()
    plain = plain_layer()
    plain.load_state_dict({"weight": state["0.weight"], "bias": state["0.bias"]})
    close(plain(x), made_again(layer)(x))
    assert torch.equal(layer.state_dict()["weight"], state["0.weight"])


@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize("partly", [False, True])
def test_a_state_dict_with_other_picks_is_loaded(assign, partly):
    """`partly`: without W, as a recipe's own files are."""
    x, before = inputs(), plain_layer().weight
    there, here = made(), made()
    for layer, seeds in ((there, (1, 2, 3)), (here, (4,))):
        for seed in seeds:
            repick(layer, picks(seed))
            trained(layer, seed)
            layer(x)
    y, state = there(x), copy.deepcopy(there.state_dict())
    if partly:
        del state["weight"]
    here.load_state_dict(state, strict=not partly, assign=assign)
    assert len(here.left) == len(there.left)
    assert torch.equal(here(x), y)
    assert torch.equal(here.remove().weight, before)


def test_a_weight_that_comes_without_what_was_written_into_it_is_refused():
    layer, x = made(), inputs()
    y = layer(x)
    with pytest.raises(RuntimeError, match="weight comes without indices, original, .* before the recipe is applied"):
        layer.load_state_dict({"weight": torch.zeros(N, K)}, strict=False)
    assert torch.equal(layer(x), y)


@pytest.mark.parametrize("name", ["indices", "original", "values", "left", "left_original", "left_values"])
def test_a_part_that_does_not_fit_the_rest_is_refused(name):
    layer, x = made(), inputs()
    y = layer(x)
    part = torch.arange(3, dtype=torch.int32) if name in ("indices", "left") else torch.zeros(3, dtype=torch.float64)
    with pytest.raises(EfftuneError, match="is not one for each of"):
        layer.load_state_dict({name: part}, strict=False)
    assert torch.equal(layer(x), y)


def repicked(model):
    for seed, layer in enumerate(m for m in model.modules() if isinstance(m, Linear)):
        repick(layer, picks(seed, len(layer.indices)))
        trained(layer, seed)
    return model


def test_a_checkpoint_is_restored():
    batch = inputs()
    tuner = efftune.apply(network(), [Picks()])
    repicked(tuner.model)
    loss(tuner.model, batch).backward()
    y = tuner.model(batch)
    held = {name: t.detach().clone() for name, t in tuner.named_delta().items()}
    fresh = efftune.apply(network(), [Picks()])
    for layer in fresh.model[::2]:
        repick(layer, picks(11, 40))
        repick(trained(layer, 12), picks(13, 40))
    assert not torch.equal(fresh.model(batch), y)
    restore_tensors(fresh, held)
    assert torch.equal(fresh.model(batch), y)
    for layer, before in zip(fresh.remove()[::2], network()[::2], strict=True):
        assert torch.equal(layer.weight, before.weight)


def test_a_run_whose_entries_move_goes_on_bit_for_bit(tmp_path):
    """Trained by fused AdamW in 16 bits, interrupted, resumed in a fresh model, and taken out again."""
    before = llama().bfloat16()
    straight = trainer([Moving()], model=llama().bfloat16(), run=tmp_path / "a")
    straight.fit()
    stopped = trainer([Moving()], model=llama().bfloat16(), run=tmp_path / "b")
    stopped.on_step = lambda record: (_ for _ in ()).throw(KeyboardInterrupt) if record["step"] == 5 else None
    with pytest.raises(KeyboardInterrupt):
        stopped.fit()
    resumed = trainer([Moving()], model=llama().bfloat16(), run=tmp_path / "b", resumed=True)
    resumed.fit()
    assert resumed.step == 8
    expected, state = straight.model.state_dict(), resumed.model.state_dict()
    assert sum(t.numel() for n, t in state.items() if n.endswith(".left")) > 1000
    assert state.keys() == expected.keys() and all(torch.equal(state[n], t) for n, t in expected.items())
    merged = copy.deepcopy(resumed.tuner).merge().state_dict()
    assert all(torch.equal(t, expected[n]) for n, t in merged.items())
    plain = resumed.tuner.remove().state_dict()
    assert all(torch.equal(t, plain[n]) for n, t in before.state_dict().items())
    changed = {n for n, t in plain.items() if not torch.equal(t, merged[n])}
    assert changed == {n.removesuffix("values") + "weight" for n in state if n.endswith(".values")}


@pytest.mark.parametrize("of", [seed_log.fingerprint, lambda model: base_fingerprint(model, set())])
def test_the_base_of_a_run_is_the_stored_weight(of):
    """Whether or not the model has been called since what trains was loaded, or since it was stepped."""
    model = efftune.apply(network(), [Picks()]).model
    repicked(model)
    first = of(model)
    model(inputs())
    assert of(model) == first
    with torch.no_grad():
        model[0].original.add_(1)
    assert of(model) != first


def test_a_checkpoint_that_does_not_fit_changes_nothing():
    batch = inputs()
    tuner, other = (efftune.apply(network(), [Picks()]) for _ in range(2))
    repicked(tuner.model)
    held = dict(tuner.named_delta())
    held["4.values"] = held["4.values"][:-1]
    repick(other.model[0], picks(8))
    y, names = other.model(batch), {n: t.clone() for n, t in other.named_delta().items()}
    with pytest.raises(EfftuneError, match=r"^4: values \(39,\) is not one for each of 40 indices"):
        restore_tensors(other, held)
    assert torch.equal(other.model(batch), y)
    assert all(torch.equal(t, names[n]) for n, t in other.named_delta().items())


def test_what_is_saved_is_loaded(tmp_path, monkeypatch):
    monkeypatch.setitem(available(), "picks", Picks)
    batch = inputs()
    tuner = efftune.apply(network(), [Picks()])
    repicked(tuner.model)
    tuner.save(tmp_path)
    loaded = efftune.load(network(), tmp_path)
    assert torch.equal(loaded.model(batch), tuner.model(batch))
    merged = tuner.merge()
    close(merged(batch), loaded.model(batch))
    for layer, before in zip(loaded.remove()[::2], network()[::2], strict=True):
        assert torch.equal(layer.weight, before.weight)
