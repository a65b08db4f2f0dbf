"""S²FT by what a batch shows: which columns train, when they are picked, and what is refused."""

import copy

import pytest
import torch

import efftune
from efftune import EfftuneError, Linear
from efftune.memory.meter import saved_for_backward
from efftune.methods.sparse import _scores, _watch
from efftune.train.state import restore_tensors
from tests.methods.models import batch, contract_model, llama, loss_fn
from tests.methods.test_sparse import masked_adamw

HEAD = 8  # columns, in `llama()`


def layers(model):
    return {name: m for name, m in model.named_modules() if isinstance(m, Linear) and m.delta.in_place}


def scores_of(model, data, names):
    """By autograd on a plain model: of each column the sum of x² over all calls, and the squared norm of dW's."""
    model = copy.deepcopy(model).train().requires_grad_(True)
    squares = dict.fromkeys(names, 0)

    def see(name):
        def hook(module, args):
            squares[name] = squares[name] + args[0].detach().double().square().flatten(0, -2).sum(0)

        return hook

    for name in names:
        model.get_submodule(name).register_forward_pre_hook(see(name))
    loss_fn(model, data).backward()
    gradients = {name: model.get_submodule(name).weight.grad.double().square().sum(0) for name in names}
    return {"activation": squares, "gradient": gradients}


def best(scores, count, size=1):
    order = scores.view(-1, size).sum(1).sort(descending=True, stable=True).indices[: count // size]
    return (order[:, None] * size + torch.arange(size)).flatten().sort().values.int()


OTHERS = ["", " + recompute", " + mesa", " + wtacrs(ratio=0.3)", " + lisa(layers=1)", " + vcas(interval=0)"]


@pytest.mark.parametrize("scorer, other", [("gradient", o) for o in OTHERS] + [("activation", o) for o in OTHERS[1:]])
def test_the_batch_picks_what_a_plain_model_would(scorer, other):
    """Whatever backward keeps, whatever runs again, and whatever is frozen for the time being; heads as a whole."""
    data, plain = batch(), llama()
    tuner = efftune.apply(llama(), f"s2ft(ratio=0.3, scorer='{scorer}'){other}")
    optimizer = tuner.optimizer(lr=1e-3)
    training = {name for name, p in tuner.named_trained().items() if p.requires_grad}
    tuner.backward(data, loss_fn)
    assert training == {name for name, p in tuner.named_trained().items() if p.requires_grad}
    scores, differ = scores_of(plain, data, layers(tuner.model))[scorer], []
    for name, layer in layers(tuner.model).items():
        size = HEAD if name.endswith("o_proj") else 1
        count = {"o_proj": HEAD, "down_proj": round(0.3 * 48)}[name.rpartition(".")[2]]
        assert torch.equal(layer.columns, best(scores[name], count, size)), name
        differ.append(not torch.equal(layer.columns, torch.arange(count)))
        before = plain.get_submodule(name).weight.detach()
        assert torch.equal(layer.original, before[:, layer.columns.long()])
    assert any(differ)
    picked = {name: layer.columns.clone() for name, layer in layers(tuner.model).items()}
    optimizer.step()
    optimizer.zero_grad()
    tuner.backward(batch(1), loss_fn)  # which picks no more
    assert all(torch.equal(layer.columns, picked[name]) for name, layer in layers(tuner.model).items())


@pytest.mark.parametrize("scorer", ["activation", "gradient"])
def test_a_layer_that_is_called_twice_is_scored_by_both_calls(scorer):
    data, plain = batch(), contract_model()
    tuner = efftune.apply(contract_model(), f"s2ft(ratio=0.1, scorer='{scorer}', target_modules='twice')")
    tuner.optimizer(lr=1e-3)
    tuner.model.train()
    tuner.backward(data, loss_fn)
    scores = scores_of(plain, data, layers(tuner.model))[scorer]
    for name, layer in layers(tuner.model).items():
        assert torch.equal(layer.columns, best(scores[name], 3)), name
    statistics = tuner.model.model.norm[1]
    assert int(statistics.num_batches_tracked) == 1


def test_gradients_are_made_by_tiles_of_rows(monkeypatch):
    """A tile more or less does not change the picks, and none is larger than it may be."""
    picks, seen = [], []
    product_t = _watch.product_t
    monkeypatch.setattr(_watch, "product_t", lambda g, z: seen.append(g.shape[1] * z.shape[1]) or product_t(g, z))
    for tile in (_scores.TILE, 5 * 48):
        monkeypatch.setattr(_scores, "TILE", tile)
        seen.clear()
        tuner = efftune.apply(llama(), "s2ft(ratio=0.1, scorer='gradient')")
        tuner.optimizer(lr=1e-3)
        tuner.backward(batch(), loss_fn)
        assert seen and max(seen) <= tile
        picks.append([layer.columns for layer in layers(tuner.model).values()])
    assert all(map(torch.equal, *picks))


def test_no_dense_gradient_is_left_and_the_first_micro_batch_decides():
    tuner = efftune.apply(llama(), "s2ft(ratio=0.1, scorer='gradient')")
    tuner.optimizer(lr=1e-3)
    tuner.backward(batch(), loss_fn, 0.5, last=False)
    picked = {name: layer.columns.clone() for name, layer in layers(tuner.model).items()}
    first = {name: p.grad.clone() for name, p in tuner.named_trained().items()}
    tuner.backward(batch(1), loss_fn, 0.5)
    for name, layer in layers(tuner.model).items():
        assert torch.equal(layer.columns, picked[name]) and layer.weight.grad is None
        assert not torch.equal(layer.values.grad, first[f"{name}.values"])
    alone = efftune.apply(llama(), "s2ft(ratio=0.1, scorer='gradient')")
    alone.optimizer(lr=1e-3)
    alone.backward(batch(), loss_fn, 0.5)
    for name, p in alone.named_trained().items():  # once, and not of the pass that looked
        assert torch.equal(p.grad, first[name])


def run(tuner, optimizer, steps):
    for step in steps:
        optimizer.zero_grad()
        torch.manual_seed(step)
        tuner.backward(batch(step), loss_fn)
        optimizer.step()


@pytest.mark.parametrize(
    "recipe", ["s2ft(ratio=0.2, scorer='activation')", "s2ft(ratio=0.2, scorer='gradient') + mesa"]
)
def test_a_run_goes_on_bit_for_bit(recipe, tmp_path):
    whole = efftune.apply(llama(), recipe)
    run(whole, whole.optimizer(lr=1e-2), range(4))
    for at in (0, 1, 2):
        first = efftune.apply(llama(), recipe)
        optimizer = first.optimizer(lr=1e-2)
        run(first, optimizer, range(at))
        tensors, state = copy.deepcopy((first.named_saved(), optimizer.state_dict()))
        again = efftune.apply(llama(), recipe)
        resumed = again.optimizer(lr=1e-2)
        restore_tensors(again, tensors)
        resumed.load_state_dict(state)
        run(again, resumed, range(at, 4))
        for name, tensor in whole.named_saved().items():
            assert torch.equal(tensor, again.named_saved()[name]), name
    trained = whole.model(batch(9)).logits
    whole.save(tmp_path)
    loaded = efftune.load(llama(), tmp_path)
    assert torch.equal(loaded.model(batch(9)).logits, trained)
    loaded.remove()
    assert all(torch.equal(loaded.model.get_parameter(n), p) for n, p in llama().named_parameters())


@pytest.mark.parametrize("scorer", ["random", "activation", "gradient"])
def test_steps_are_those_of_masked_adamw(scorer):
    tuner = efftune.apply(llama(dtype=torch.float64), f"s2ft(ratio=0.2, scorer='{scorer}')", blocks=False)
    optimizer = tuner.optimizer(lr=1e-2, weight_decay=0.1)
    for step in range(4):
        optimizer.zero_grad()
        tuner.backward(batch(step), loss_fn)
        optimizer.step()
    masks = {name: torch.zeros_like(layer.weight, dtype=torch.bool) for name, layer in layers(tuner.model).items()}
    for name, layer in layers(tuner.model).items():
        masks[name][:, layer.columns.long()] = True
    for name, right in masked_adamw("s2ft", {0: masks}, 4).items():
        found = tuner.model.get_submodule(name).stored().tensors[0]
        torch.testing.assert_close(found, right, rtol=1e-9, atol=1e-11)


def test_two_of_a_kind_pick_for_themselves():
    """Of one count of columns, or of entries, and of different scorers."""
    recipe = (
        "s2ft(ratio=0.1, scorer='magnitude', target_modules='gate_proj') + s2ft(ratio=0.1, target_modules='up_proj')"
    )
    tuner, plain = efftune.apply(llama(), recipe), llama()
    for name, layer in layers(tuner.model).items():
        of_weight = torch.equal(layer.columns, best(plain.get_submodule(name).weight.detach().abs().sum(0), 3))
        assert of_weight == name.endswith("gate_proj"), name
    recipe = "shira(scorer='magnitude', target_modules='gate_proj') + shira(target_modules='up_proj')"
    for name, layer in layers(efftune.apply(llama(), recipe).model).items():
        magnitudes = plain.get_submodule(name).weight.detach().abs().flatten()
        of_weight = torch.equal(layer.indices, best(magnitudes, len(layer.indices)))
        assert of_weight == name.endswith("gate_proj"), name


def test_a_module_that_trains_whole_beside_the_columns():
    tuner = efftune.apply(llama(), "s2ft(ratio=0.1, modules_to_save=['layers.0.mlp.up_proj'])")
    optimizer = tuner.optimizer(lr=1e-2)
    before = tuner.model.model.layers[0].mlp.up_proj.weight.detach().clone()
    run(tuner, optimizer, range(1))
    assert not torch.equal(tuner.model.model.layers[0].mlp.up_proj.weight, before)
    assert len(layers(tuner.model)) == 6


# Bytes


def kept_by_trained_layers(recipe, blocks):
    """Elements a token and layer of the model that o_proj and down_proj keep for backward, in units of the width."""
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = dict(hidden_size=256, intermediate_size=704, num_hidden_layers=3, num_attention_heads=4)
    model = LlamaForCausalLM(LlamaConfig(vocab_size=96, **sizes)).train()
    tuner = efftune.apply(model, recipe, blocks=blocks)
    by_module = saved_for_backward(model, lambda: loss_fn(tuner.model, batch())).by_module
    kept = sum(size for name, size in by_module.items() if name.endswith(("o_proj", "down_proj")))
    return kept / (4 * 3 * 256 * batch().numel())


def test_of_the_inputs_of_its_layers_next_to_nothing_is_kept():
    """With blocks nothing but a part of the first layer's attention output, which nobody else holds; without, the part
    that the columns read."""
    whole = kept_by_trained_layers("full(target_modules='o_proj|down_proj')", blocks=False)
    assert 0 < kept_by_trained_layers("s2ft(ratio=0.03)", blocks=True) <= 0.02
    assert 0 < kept_by_trained_layers("s2ft(ratio=0.03)", blocks=False) <= whole / 20


# What is refused, or said


@pytest.mark.parametrize("scorer", ["activation", "gradient"])
def test_a_loop_of_ones_own_that_shows_no_batch_is_told(scorer):
    tuner = efftune.apply(llama(), f"s2ft(scorer='{scorer}')")
    optimizer = tuner.optimizer(lr=1e-3)  # before any data
    loss_fn(tuner.model, batch()).backward()
    with pytest.warns(UserWarning, match=r"s2ft picks columns in tuner.backward\(.*those that it began with go on"):
        optimizer.step()


@pytest.mark.parametrize(
    "recipe, words",
    [
        (
            "s2ft(scorer='best')",
            "scorer is one of magnitude, small, random, low_rank, activation, gradient, not 'best'",
        ),
        (
            "s2ft(scorer='gradient') + mezo",
            "it picks columns by their gradients, and mezo trains without backward; use",
        ),
        ("s2ft(scorer='activation') + mezo", "picks columns by their activations, and mezo trains without backward"),
        (
            "s2ft(scorer='gradient') + ferret",
            "other columns train as time goes on, and ferret .* a scorer of the weight",
        ),
        ("s2ft(ratio=1.5)", r"share of columns that train lies in \(0, 1\], not 1.5"),
        ("s2ft(rank=0, scorer='low_rank')", "rank of the approximation is at least 1, not 0"),
        ("s2ft(rank=33, scorer='low_rank')", r"rank=33 exceeds min\(N, K\) = 32"),
    ],
)
def test_refusals(recipe, words):
    model = llama()
    with pytest.raises(EfftuneError, match=words):
        efftune.apply(model, recipe)
    assert not layers(model)


@pytest.mark.parametrize("scorer", ["activation", "gradient"])
def test_a_batch_that_shows_no_number_is_refused_before_columns_move(scorer):
    model = llama()
    with torch.no_grad():
        model.model.layers[0].mlp.gate_proj.weight[3] = torch.nan
    tuner = efftune.apply(model, f"s2ft(ratio=0.1, scorer='{scorer}')")
    tuner.optimizer(lr=1e-3)
    before = {name: layer.columns.clone() for name, layer in layers(model).items()}
    with pytest.raises(EfftuneError, match=f"a column's score by '{scorer}' is NaN or Inf; look for it in the weights"):
        tuner.backward(batch(), loss_fn)
    assert all(torch.equal(layer.columns, before[name]) for name, layer in layers(model).items())
