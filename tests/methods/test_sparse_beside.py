"""Methods that train entries or columns over weights that cannot be written to: quantised ones, and ones that others
read."""

import copy

import pytest
import torch
from torch import nn

import efftune
from efftune.interop.changes import compose
from efftune.linear.delta.columns import AddedColumns
from efftune.linear.delta.entries import AddedEntries, Entries
from efftune.linear.picks import repick
from tests.methods.models import batch, llama
from tests.methods.test_sparse import goes_on, layers, run

INT8 = "int8(group=16) + "
RECIPES = [
    "shira(density=0.05)", "lift(rank=4, every=3)", "spiel(density=0.05, every=3, accumulate=1)", "s2ft(ratio=0.2)",
]  # fmt: skip


def rounded(dtype=torch.float32):
    """The model whose linear layers have what 8-bit codes stand for."""
    return efftune.apply(llama(dtype=dtype), INT8 + "lora(r=2)").remove()


def loss64(model, ids):
    logits = model(input_ids=ids).logits
    return nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())


@pytest.mark.parametrize(
    "recipe", ["shira(density=0.05)", "saft(density=0.02)", "spiel(density=0.05, every=3, accumulate=1)", RECIPES[-1]]
)
def test_steps_over_codes_are_those_in_place_over_what_they_stand_for(recipe):
    """In float64; entries that come and go among them. (Of weights with 8 bits many are equal, so that what is picked
    by W follows from rounding: lift is not here.)"""
    runs = []
    for base, prefix in ((rounded(torch.float64), ""), (llama(dtype=torch.float64), INT8)):
        tuner = efftune.apply(base, prefix + recipe)
        optimizer = tuner.optimizer(lr=1e-2)
        for step in range(7):
            optimizer.zero_grad()
            tuner.backward(batch(step), loss64)
            optimizer.step()
        runs.append((tuner, tuner.model(batch(9)).logits))
    (in_place, one), (beside, other) = runs
    torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-10)
    assert all(layer.delta.in_place for layer in layers(in_place.model).values())
    kinds = {type(layer.delta) for layer in layers(beside.model).values()}
    assert kinds <= {AddedEntries, AddedColumns} and len(layers(beside.model)) == len(layers(in_place.model))
    assert not torch.equal(one, rounded(torch.float64)(batch(9)).logits)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("recipe", RECIPES)
def test_what_is_saved_merged_and_removed(recipe, dtype, tmp_path):
    tuner = efftune.apply(llama(dtype=dtype), INT8 + recipe)
    run(tuner, tuner.optimizer(lr=1e-2), range(7))
    trained = tuner.model(batch(9)).logits
    tuner.save(tmp_path)
    loaded = efftune.load(llama(dtype=dtype), tmp_path)
    assert torch.equal(loaded.model(batch(9)).logits, trained)
    for name, layer in layers(loaded.model).items():
        for part in layer.delta.names:
            assert torch.equal(getattr(layer, part), getattr(tuner.model.get_submodule(name), part)), (name, part)
    merged = copy.deepcopy(loaded).merge()
    assert not layers(merged)
    if dtype == torch.float32:
        torch.testing.assert_close(merged(batch(9)).logits, trained, rtol=1e-4, atol=1e-5)
    for (name, p), plain in zip(loaded.remove().named_parameters(), rounded(dtype).parameters(), strict=True):
        assert torch.equal(p, plain), name


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_run_goes_on_bit_for_bit(recipe):
    goes_on(INT8 + recipe, (2, 4))


def test_what_left_the_picks_is_in_the_file_and_stays_what_it_became(tmp_path):
    tuner = efftune.apply(llama(dtype=torch.bfloat16), INT8 + "shira(density=0.02)")
    run(tuner, tuner.optimizer(lr=1e-2), range(2))
    layer = tuner.model.model.layers[1].mlp.up_proj
    before, change = tuner.model(batch(9)).logits, layer.values.detach().clone()
    old = layer.indices.clone()
    repick(layer, torch.arange(7, 7 + len(old)))
    assert torch.equal(tuner.model(batch(9)).logits, before) and len(layer.left) > len(old) // 2
    tuner.save(tmp_path)
    again = efftune.load(llama(dtype=torch.bfloat16), tmp_path)
    other = again.model.model.layers[1].mlp.up_proj
    assert all(torch.equal(getattr(other, name), getattr(layer, name)) for name in layer.delta.names)
    assert torch.equal(again.model(batch(9)).logits, before)
    for made in (layer, other):
        repick(made, old)
        assert torch.equal(made.values, change) and not len(made.left)
    repick(layer, torch.arange(7, 7 + len(old)), forget=True)
    assert not len(layer.left) and not layer.values[~torch.isin(layer.indices, old)].any()


def test_a_file_of_codes_is_not_summed_up_with_weights(tmp_path):
    efftune.apply(llama(), INT8 + "shira(density=0.02)").save(tmp_path)
    with pytest.raises(efftune.EfftuneError, match=r"trained over Int8\(group=16\), and this is a dense weight; merge"):
        compose(llama(), [tmp_path])


@pytest.mark.parametrize("recipe", ["shira(density=0.05, target_modules='lm_head')", "s2ft(target_modules='lm_head')"])
def test_a_weight_that_others_read_stays_what_it_is(recipe, tmp_path):
    """The head's entries train, and the embedding that is tied to it has none of them."""
    model = llama(tie=True)
    embedding = model.model.embed_tokens.weight
    before = embedding.clone()
    tuner = efftune.apply(model, recipe)
    run(tuner, tuner.optimizer(lr=1e-2), range(3))
    trained = tuner.model(batch(9)).logits
    assert not torch.equal(trained, llama(tie=True)(batch(9)).logits)
    assert torch.equal(embedding, before) and model.lm_head.weight is embedding
    tuner.save(tmp_path)
    assert torch.equal(efftune.load(llama(tie=True), tmp_path).model(batch(9)).logits, trained)
    assert torch.equal(tuner.remove()(batch(9)).logits, llama(tie=True)(batch(9)).logits)


def test_a_file_of_a_weight_that_others_read_fits_one_that_nobody_else_does(tmp_path):
    tuner = efftune.apply(llama(tie=True), "shira(density=0.05, target_modules='lm_head')")
    run(tuner, tuner.optimizer(lr=1e-2), range(3))
    repick(tuner.model.lm_head, torch.arange(len(tuner.model.lm_head.indices)))
    tuner.save(tmp_path)
    untied = llama()
    untied.lm_head.weight.data.copy_(untied.model.embed_tokens.weight)
    loaded = efftune.load(untied, tmp_path)
    assert type(loaded.model.lm_head.delta) is Entries and len(loaded.model.lm_head.left)
    torch.testing.assert_close(loaded.model(batch(9)).logits, tuner.model(batch(9)).logits, rtol=1e-5, atol=1e-5)
