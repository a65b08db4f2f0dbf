"""Masks: entries that scores switch off, what a file has of them, and which gradients ramt drops."""

import copy

import pytest
import torch

import efftune
from efftune import EfftuneError
from efftune.linear.picks import repick
from tests.methods import test_sparse as shared
from tests.methods.models import batch, llama, loss_fn

UP = "model.layers.1.mlp.up_proj"


def masks_of_adamw(picks, steps, threshold, init, lr):
    """Dense AdamW in float64 on a score for each entry, through a mask that hands the gradient on as it is."""
    model = llama(dtype=torch.float64).requires_grad_(False)
    start = {name: model.get_submodule(name).weight.clone() for name in picks}
    scores = {name: torch.full_like(w, init).requires_grad_() for name, w in start.items()}
    optimizer = torch.optim.AdamW(scores.values(), lr=lr, weight_decay=0.1)
    for step in range(steps):
        changed = {}
        for name, s in scores.items():
            on = (s > threshold).double() + s - s.detach()
            changed[f"{name}.weight"] = torch.where(picks[name], start[name] * on, start[name])
        optimizer.zero_grad()

        def call(input_ids, labels, changed=changed):
            return torch.func.functional_call(model, changed, kwargs=dict(input_ids=input_ids, labels=labels))

        loss_fn(call, batch(step)).backward()
        optimizer.step()
    return {
        name: (s.detach(), torch.where(picks[name] & (s <= threshold), 0, start[name])) for name, s in scores.items()
    }


def test_steps_are_those_of_adamw_through_a_straight_mask():
    tuner = efftune.apply(llama(dtype=torch.float64), "mft(density=0.2)", blocks=False)
    picks = {name: shared.picked(layer) for name, layer in shared.layers(tuner.model).items()}
    shared.run(tuner, tuner.optimizer(lr=2e-3, weight_decay=0.1), range(6))
    off = 0
    for name, (scores, weight) in masks_of_adamw(picks, 6, 5e-3, 1e-2, 2e-3).items():
        layer = tuner.model.get_submodule(name)
        torch.testing.assert_close(layer.values.detach(), scores.flatten()[layer.indices], rtol=1e-9, atol=1e-11)
        assert torch.equal(layer.stored().tensors[0], weight), name
        off += int((weight == 0).sum())
    assert off > 100


@pytest.mark.parametrize("recipe", ["mft(density=0.05)", "ramt(density=0.2, drop=0.3)"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_saved_loaded_removed_and_merged(recipe, dtype, tmp_path):
    shared.test_what_is_saved_loaded_removed_and_merged(recipe, dtype, tmp_path)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_file_has_what_is_on_and_not_the_scores(dtype, tmp_path):
    """0 or the weight itself, bit for bit; what is loaded trains on from the threshold, or from the beginning."""
    tuner = efftune.apply(llama(dtype=dtype), "mft(density=0.2)")
    shared.run(tuner, tuner.optimizer(lr=2e-3), range(6))
    tuner.save(tmp_path)
    start, loaded = llama(dtype=dtype), efftune.load(llama(dtype=dtype), tmp_path)
    for name, layer in shared.layers(loaded.model).items():
        w, w0 = layer.stored().tensors[0].detach(), start.get_submodule(name).weight.detach()
        assert torch.equal(w, tuner.model.get_submodule(name).stored().tensors[0])
        off = w.flatten()[layer.indices.long()] == 0
        assert torch.equal(w, torch.where(w == 0, 0, w0)) and off.any() and not off.all()
        assert torch.equal(layer.values.detach(), torch.where(off, 0.005, 0.01))
    held = {name: layer.values.detach() <= 0.005 for name, layer in shared.layers(loaded.model).items()}
    shared.run(loaded, loaded.optimizer(lr=2e-3), range(1))
    again = [(layer.values > 0.005)[held[name]].any() for name, layer in shared.layers(loaded.model).items()]
    assert any(again)  # of those at the threshold, one step is enough


@pytest.mark.parametrize("recipe", ["mft(density=0.2) + lisa(layers=2, interval=3)", "ramt(density=0.2, drop=0.5)"])
def test_a_run_goes_on_bit_for_bit(recipe):
    """With the very scores, which a checkpoint has, and the draws of each step."""
    shared.goes_on(recipe, (4, 6))


def test_entries_that_leave_stay_off_and_come_back_off():
    tuner = efftune.apply(llama(), "mft(density=0.1)")
    layer, w0 = tuner.model.get_submodule(UP), llama().get_submodule(UP).weight.detach()
    first = layer.indices.clone()
    with torch.no_grad():
        layer.values[::3] = 0.0
        layer.values[1::3] = 0.3
    other = torch.arange(0, 2 * len(first), 2, dtype=torch.int32)
    repick(layer, other)
    w = layer.stored().tensors[0].detach().flatten()
    new = ~torch.isin(other, first)
    assert (layer.values[new] == 0.01).all() and new.sum() > 10
    assert not w[first[::3].long()].any()
    assert len(layer.left) == (~torch.isin(first[::3], other)).sum()  # those that are on are as they were
    both = torch.isin(other, first)
    place = torch.searchsorted(first, other[both])
    assert torch.equal(layer.values[both], torch.tensor([0.0, 0.3, 0.01])[place % 3])  # with the scores that they had
    repick(layer, first)
    was = torch.isin(first, other)
    assert torch.equal((layer.values[~was] > 0.005), (torch.arange(len(first)) % 3 != 0)[~was])
    assert (layer.values[~was][::1].unique() == torch.tensor([0.005, 0.01])).all()
    assert torch.equal(layer.take_back().tensors[0], w0)


def test_ramt_masks_attention_alone():
    named = set(shared.layers(efftune.apply(llama(layers=1), "ramt").model))
    assert named == {f"model.layers.0.self_attn.{n}_proj" for n in "qkvo"}


@pytest.mark.parametrize(
    "kind, count", [("Bert", 4), ("GPT2", 2), ("T5", 12), ("GPTNeoX", 2), ("OPT", 4), ("Bloom", 2), ("Mamba", 0)]
)
def test_projections_of_attention_are_told_by_their_names(kind, count):
    import transformers

    from efftune.methods.sparse.ramt import Ramt
    from efftune.structure import linear_layers, matches

    few = {"num_hidden_layers": 1}
    config = getattr(transformers, f"{kind}Config")(**({"num_layers": 1} if kind == "T5" else few))
    with torch.device("meta"):
        model = getattr(transformers, f"{kind}Model")(config)
    found = [name for name in linear_layers(model) if matches(name, Ramt().target_modules)]
    assert len(found) == count, found


@pytest.mark.parametrize("drop", [0.0, 0.3])
def test_ramt_drops_a_share_of_the_gradients_the_same_in_all_of_a_step(drop):
    tuner, whole = (efftune.apply(llama(), f"ramt(density=0.5, drop={p})") for p in (drop, 0.0))
    optimizer, kept = tuner.optimizer(lr=1e-3), []
    for step in range(2):
        for t in (tuner, whole):
            t.model.zero_grad()
            for chunk in batch(step).chunk(2):
                t.backward(chunk, loss_fn, scale=0.5)
        pairs = zip(shared.layers(tuner.model).values(), shared.layers(whole.model).values(), strict=True)
        kept.append([a.values.grad != 0 for a, _ in pairs])
        for (a, b), on in zip(zip(shared.layers(tuner.model).values(), shared.layers(whole.model).values()), kept[-1]):
            assert torch.equal(a.values.grad, torch.where(on, b.values.grad, 0))
        optimizer.step()
    share = 1 - torch.cat(kept[0]).float().mean()
    assert abs(share - drop) < 5 * (drop * (1 - drop) / sum(map(len, kept[0]))) ** 0.5 + 1e-3
    assert torch.equal(kept[0][0], kept[1][0]) == (drop == 0) and torch.equal(kept[0][0], kept[0][4]) == (drop == 0)


def test_a_loop_of_ones_own_is_told_that_nothing_is_dropped():
    tuner = efftune.apply(llama(), "ramt")
    optimizer = tuner.optimizer(lr=1e-3)
    loss_fn(tuner.model, batch()).backward()
    with pytest.warns(
        UserWarning, match="ramt drops gradients in tuner.backward.* does not call: all of them are used"
    ):
        optimizer.step()


def test_copies_have_scores_of_their_own():
    tuner = efftune.apply(llama(), "mft(density=0.2)")
    copied = copy.deepcopy(tuner)
    with torch.no_grad():
        copied.model.get_submodule(UP).values.zero_()
    assert (copied.model.get_submodule(UP).stored().tensors[0] == 0).any()
    assert not (tuner.model.get_submodule(UP).stored().tensors[0] == 0).any()


@pytest.mark.parametrize(
    "recipe, words",
    [
        ("mft(init=0.005)", "give an init above 0.005, not 0.005"),
        ("ramt(threshold=1)", "give an init above 1.0, not 0.01"),
        ("mft(scorer='gradient')", "scorer is one of magnitude, small, random, low_rank, file, not 'gradient'"),
        ("mft(scorer='best')", "scorer is one of .*, not 'best'"),
        ("mft(density=0)", r"lies in \(0, 1\], not 0"),
        ("mft(density=1e-5)", "q_proj: density=1e-05 is less than one entry"),
        ("ramt(drop=1)", r"a probability in \[0, 1\), not drop=1"),
        ("mft + mezo", "mezo takes do not see; use shira, or leave mezo out"),
        ("ramt + fedkseed", "fedkseed takes do not see"),
        ("int8 + mft", "writes entries of the stored weight, and those of Int8"),
    ],
)
def test_refusals(recipe, words):
    with pytest.raises(EfftuneError, match=words):
        efftune.apply(llama(), recipe)


def test_a_weight_that_others_read_is_refused():
    with pytest.raises(EfftuneError, match="into a weight that others read"):
        efftune.apply(llama(tie=True), "mft(target_modules='lm_head')")
