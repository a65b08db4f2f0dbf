"""Changes of sparse deltas, thinned out, reduced to signs and added up; and what of a file is refused."""

import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

import efftune
from efftune import EfftuneError
from efftune.interop.changes import compose, masked, ternary, total
from efftune.interop.sparse import FILE, Changes
from efftune.linear import Linear, NoDelta
from efftune.train.deltas import Edit, tuned
from efftune.train.state import restore_tensors
from tests.interop.test_sparse import trained
from tests.methods.models import llama

NAME = "model.layers.0.self_attn.q_proj"


def changes(*sizes):
    layer = Linear.from_linear(nn.Linear(8, 5), delta=NoDelta())
    where = torch.arange(0, 3 * len(sizes), 3)
    return Changes(layer, where, torch.ones(len(sizes)), torch.tensor(sizes, dtype=torch.float64))


@pytest.mark.parametrize(
    "keep, drop_largest, left",
    [
        (None, 0.0, range(10)), (0.3, 0.0, (3, 7, 9)), (0.3, 0.1, (3, 6, 9)), (None, 0.2, (0, 1, 2, 4, 5, 6, 8, 9)),
        (0.01, 0.0, (7,)), (None, 0.99, (0,)), (0.8, 0.2, (0, 1, 2, 4, 5, 6, 8, 9)),
    ],
)  # fmt: skip
def test_the_largest_and_the_negligible_are_masked(keep, drop_largest, left):
    of = changes(0.0, 0.1, -0.2, -6.0, 0.3, -0.4, 0.5, 8.0, -0.45, 5.0)
    found = masked(of, keep, drop_largest)
    assert torch.equal(found.where, of.where[list(left)]) and torch.equal(found.change, of.change[list(left)])
    assert torch.equal(found.original, of.original[list(left)])


def test_signs_of_one_size():
    of = changes(3.0, -1.0, 0.0, 2.0, -4.0)
    size = 2 * (30 / 5) ** 0.5  # the mean is 0
    found = ternary(of, alpha=2.0)
    assert found.where.tolist() == [0, 3, 9, 12]
    torch.testing.assert_close(found.change, size * torch.tensor([1.0, -1, 1, -1], dtype=torch.float64))
    thin = ternary(masked(of, 0.4), alpha=2.0, of=of)
    torch.testing.assert_close(thin.change, size * torch.tensor([1.0, -1], dtype=torch.float64))
    assert len(ternary(changes(0.0, 0.0)).where) == 1


@pytest.mark.parametrize(
    "settings, words",
    [
        ({"keep": 0}, "Shares of changes lie between 0 and 1 and leave some, not keep=0"),
        ({"keep": 1.5}, "Shares of changes lie"), ({"drop_largest": 1.0}, "Shares of changes lie"),
        ({"drop_largest": -0.1}, "Shares of changes lie"), ({"keep": float("nan")}, "Shares of changes lie"),
        ({"keep": 0.9, "drop_largest": 0.2}, "are more than there is"),
        ({"alpha": 0.0}, "a positive number, not alpha=0"), ({"alpha": float("inf")}, "a positive number"),
    ],
)  # fmt: skip
def test_shares_and_scales_that_are_none_are_refused(settings, words):
    with pytest.raises(EfftuneError, match=words):
        Edit(**settings)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("recipe", ["lift(rank=4, density=0.1)", "s2ft(ratio=0.2)"])
def test_what_is_left_is_a_sparse_folder_again(recipe, dtype, tmp_path):
    trained(recipe, dtype).save(tmp_path / "all")
    left = total(llama(dtype=dtype), [tmp_path / "all"], edit=Edit(keep=0.1, drop_largest=0.01))
    tuned(llama(dtype=dtype), left).save(tmp_path / "left")
    again = efftune.load(llama(dtype=dtype), tmp_path / "left")
    base, plain = llama(dtype=dtype).state_dict(), compose(llama(dtype=dtype), [tmp_path / "left"]).state_dict()
    merged, moved = again.merge().state_dict(), 0
    for name, w in merged.items():
        assert torch.equal(w, plain[name])
        layer = name.removesuffix(".weight")
        assert layer in left or torch.equal(w, base[name])
        moved += int((w != base[name]).sum())
    entries = sum(len(of.where) for of in left.values())
    assert 0.5 * entries < moved <= entries
    assert (tmp_path / "left" / FILE).stat().st_size < (tmp_path / "all" / FILE).stat().st_size


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_signs_take_a_bit_each(dtype, tmp_path):
    trained("shira(density=0.1)", dtype).save(tmp_path / "all")
    signs = total(llama(dtype=dtype), [tmp_path / "all"], edit=Edit(alpha=1.0))
    tuned(llama(dtype=dtype), signs).save(tmp_path / "signs")
    tensors = load_file(tmp_path / "signs" / FILE)
    entries = sum(len(of.where) for of in signs.values())
    assert sum(t.nbytes for t in tensors.values()) <= 1.2 * entries
    weights = efftune.load(llama(dtype=dtype), tmp_path / "signs").merge().state_dict()
    for name, of in signs.items():
        assert torch.equal(of.change.abs(), of.change[0].abs().expand(len(of.change)))
        right = (of.original + of.change.float()).to(dtype)
        assert torch.equal(weights[name + ".weight"].view(-1)[of.where], right)
    again = total(llama(dtype=dtype), [tmp_path / "signs"])
    assert all(torch.equal(again[name].change.float(), of.change.float()) for name, of in signs.items())


def test_a_sum_of_what_is_left(tmp_path):
    """Of several that were thinned out each for itself, whatever the order."""
    edit = Edit(keep=0.2)
    for i in range(2):
        trained("shira(density=0.1)", seed=i).save(tmp_path / str(i))
    a, b = tmp_path / "0", tmp_path / "1"
    one, other = (compose(llama(dtype=torch.bfloat16), folders, edit=edit).state_dict() for folders in ([a, b], [b, a]))
    base = llama(dtype=torch.bfloat16).state_dict()
    parts = [total(llama(dtype=torch.bfloat16), [folder], edit=edit)[NAME] for folder in (a, b)]
    right = base[NAME + ".weight"].double().flatten()
    for of in parts:
        right[of.where] += of.change
    assert torch.equal(one[NAME + ".weight"].flatten(), right.bfloat16())
    assert all(torch.equal(w, other[name]) for name, w in one.items())


def test_a_weight_that_others_read_is_left_as_it_is(tmp_path):
    """An adapter beside a tied head says nothing of the embedding."""
    tuner = efftune.apply(llama(tie=True), "shira(density=0.05, target_modules='lm_head|q_proj')")
    tuner.save(tmp_path)
    model = llama(tie=True)
    before = {name: w.clone() for name, w in model.state_dict().items()}
    with pytest.raises(EfftuneError, match="lm_head shares its weight .*embed_tokens.weight"):
        compose(model, [tmp_path])
    assert all(torch.equal(model.state_dict()[name], w) for name, w in before.items())
    assert len(tuned(model, total(model, [tmp_path])).model.lm_head.indices)


def _left(tensors):
    tensors[f"{NAME}.left.gaps"] = tensors[f"{NAME}.entries.gaps"].clone()
    tensors[f"{NAME}.left.values"] = torch.zeros(int((tensors[f"{NAME}.left.gaps"] < 255).sum()), dtype=torch.bfloat16)


def _integers(tensors):
    tensors[f"{NAME}.entries.values"] = tensors[f"{NAME}.entries.values"].int()


def _half(tensors):
    tensors[f"{NAME}.entries.values"] = tensors[f"{NAME}.entries.values"].half()


def _signs(tensors):
    del tensors[f"{NAME}.entries.values"]
    tensors |= {f"{NAME}.entries.signs": torch.zeros(1, dtype=torch.uint8), f"{NAME}.entries.scale": torch.ones(1)}


def _truth(tensors):
    size = len(tensors.pop(f"{NAME}.entries.values"))
    tensors[f"{NAME}.entries.signs"] = torch.zeros(-(-size // 8), dtype=torch.uint8)
    tensors[f"{NAME}.entries.scale"] = torch.ones(1, dtype=torch.bool)


def _many(tensors):
    tensors[f"{NAME}.entries.gaps"] = torch.full((2**31 // 255 + 2,), 255, dtype=torch.uint8)
    tensors[f"{NAME}.entries.gaps"][-1] = 0  # beyond what int32 holds


@pytest.mark.parametrize(
    "change, words",
    [(_left, "an entry is in it twice"), (_integers, "values are torch.int32"), (_half, "values are torch.float16"),
     (_signs, "its signs are not those of 20 entries"), (_truth, "its signs are not those of 20 entries"),
     (_many, "place 2147483775 is outside of a weight")],
)  # fmt: skip
@pytest.mark.parametrize("use", ["load", "compose"])
def test_a_damaged_file_is_refused(change, words, use, tmp_path):
    trained("shira(density=0.02)", steps=1).save(tmp_path)
    tensors = load_file(tmp_path / FILE)
    with safe_open(tmp_path / FILE, "pt") as opened:
        metadata = opened.metadata()
    change(tensors)
    save_file(tensors, tmp_path / FILE, metadata=metadata)
    model = llama(dtype=torch.bfloat16)
    before = {name: w.clone() for name, w in model.state_dict().items()}
    with pytest.raises(EfftuneError, match=words) as raised:
        efftune.load(model, tmp_path) if use == "load" else compose(model, [tmp_path])
    assert NAME in str(raised.value)
    after = {name.replace(".base_layer", ""): w for name, w in model.state_dict().items()}
    assert all(torch.equal(after[name], w) for name, w in before.items())


@pytest.mark.parametrize(
    "change, words",
    [
        (lambda indices: indices + 10**6, "lies outside of a matrix"),
        (lambda indices: -1 - indices, "lies outside of a matrix"),
        (lambda indices: indices * 0, "sorted"), (lambda indices: indices.flip(0), "sorted"),
        (lambda indices: indices.float(), "int32 or int64"), (lambda indices: indices[1:].clone(), "not one for each"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("resume", [False, True])
def test_damaged_indices_of_a_plain_file_or_a_checkpoint_are_refused(change, words, resume, tmp_path):
    trained("shira(density=0.02)", steps=1).save(tmp_path, format="safetensors")
    tensors = load_file(tmp_path / "trained.safetensors")
    tensors[f"{NAME}.indices"] = change(tensors[f"{NAME}.indices"])
    save_file(tensors, tmp_path / "trained.safetensors")
    model = llama(dtype=torch.bfloat16)
    before = {name: w.clone() for name, w in model.state_dict().items()}
    with pytest.raises(EfftuneError, match=words) as raised:
        if resume:
            restore_tensors(efftune.apply(model, "shira(density=0.02)"), tensors)
        else:
            efftune.load(model, tmp_path)
    assert NAME in str(raised.value)
    after = model.state_dict()
    assert all(torch.equal(after[name], w) for name, w in before.items())


def test_files_of_different_bases_do_not_compose(tmp_path):
    trained("shira(density=0.02)", steps=1).save(tmp_path / "a")
    other = llama(dtype=torch.bfloat16)
    with torch.no_grad():
        other.get_submodule("model.layers.1.mlp.up_proj").weight.mul_(1.01)
    efftune.apply(other, "shira(density=0.02)").save(tmp_path / "b")
    for add, subtract in (("ab", ""), ("ba", ""), ("a", "b")):
        model = llama(dtype=torch.bfloat16)
        with pytest.raises(EfftuneError, match="/b/.*layers.1.mlp.up_proj: it was trained on other weights"):
            compose(model, [tmp_path / name for name in add], [tmp_path / name for name in subtract])
        assert all(torch.equal(w, llama(dtype=torch.bfloat16).state_dict()[n]) for n, w in model.state_dict().items())


def test_a_file_does_not_say_more_layers_than_the_model_has(tmp_path):
    trained("shira(density=0.02)", steps=0).save(tmp_path)
    with safe_open(tmp_path / FILE, "pt") as opened:
        about = json.loads(opened.metadata()["layers"])
    save_file(load_file(tmp_path / FILE), tmp_path / FILE, metadata={"layers": json.dumps({**about, NAME: [1, 2]})})
    for use in (efftune.load, lambda model, folder: compose(model, [folder])):
        with pytest.raises(EfftuneError, match="q_proj"):
            use(llama(dtype=torch.bfloat16), tmp_path)
