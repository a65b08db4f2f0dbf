"""The sparse file: the bytes between places, what it costs, and that it fits the weights that it was made of alone."""

import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import efftune
from efftune import EfftuneError
from efftune.interop.changes import compose
from efftune.interop.sparse import FILE, gaps, places
from efftune.linear.picks import repick
from tests.methods.models import batch, llama, loss_fn


@pytest.mark.parametrize("case", [[], [0], [254], [255], [256], [509], [510], [511], [0, 1, 2], [5, 260, 261, 1041]])
def test_places_come_back(case):
    where = torch.tensor(case, dtype=torch.int32)
    data = gaps(where)
    assert torch.equal(places(data), where.long())
    assert len(data) == sum((b - a - 1) // 255 + 1 for a, b in zip([-1, *case], case))


@pytest.mark.parametrize("density", [0.001, 0.01, 0.1, 0.9])
def test_random_places_come_back_in_few_bytes(density):
    g = torch.Generator().manual_seed(0)
    where = (torch.rand(2**20, generator=g) < density).nonzero().flatten()
    data = gaps(where)
    assert torch.equal(places(data), where)
    if density >= 0.01:
        assert len(data) <= 1.1 * len(where)


def test_bytes_that_end_within_a_gap_are_refused():
    with pytest.raises(ValueError, match="cut"):
        places(gaps(torch.tensor([3, 600]))[:-1])


def trained(recipe, dtype=torch.bfloat16, steps=4, lr=1e-2, seed=0):
    tuner = efftune.apply(llama(dtype=dtype), recipe)
    optimizer = tuner.optimizer(lr=lr)
    for step in range(steps):
        optimizer.zero_grad()
        tuner.backward(batch(step + seed), loss_fn)
        optimizer.step()
    return tuner


@pytest.mark.parametrize("density", [0.01, 0.1])
def test_bytes_an_entry(density, tmp_path):
    tuner = efftune.apply(llama(dtype=torch.bfloat16).to(torch.bfloat16), f"shira(density={density})")
    tuner.save(tmp_path)
    entries = sum(p.numel() for p in tuner.named_trained().values())
    held = sum(t.numel() * t.element_size() for t in load_file(tmp_path / FILE).values())
    assert held <= 3.2 * entries
    assert not (tmp_path / "trained.safetensors").exists()


@pytest.mark.parametrize("density", [0.01, 0.1])
def test_bytes_an_entry_of_the_whole_file(density, tmp_path):
    """Of a layer of ordinary size, with the file's header and the checksum."""
    layer = torch.nn.Linear(1024, 1024, bias=False, dtype=torch.bfloat16)
    tuner = efftune.apply(torch.nn.Sequential(layer), f"shira(density={density})")
    (values,) = tuner.named_trained().values()
    with torch.no_grad():
        values.copy_(torch.randn(len(values)) / 100)
    tuner.save(tmp_path)
    assert (tmp_path / FILE).stat().st_size <= 3.2 * len(values)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("recipe", ["lift(rank=4, every=2)", "s2ft(ratio=0.2)", "shira + full(target_modules='norm')"])
def test_the_weights_of_the_run_come_back_bit_for_bit(recipe, dtype, tmp_path):
    if dtype == torch.float16:
        tuner = efftune.apply(llama(dtype=dtype), recipe)
        with torch.no_grad():
            for p in tuner.named_trained().values():
                p.add_(torch.randn(p.shape, dtype=p.dtype) / 30)
    else:
        tuner = trained(recipe, dtype)
    tuner.save(tmp_path)
    again = efftune.load(llama(dtype=dtype), tmp_path)
    expected = tuner.merge().state_dict()
    for name, t in again.merge().state_dict().items():
        assert torch.equal(t, expected[name]), name


def test_weights_that_shrink_to_nothing_come_back(tmp_path):
    """1 - 1 + 2⁻⁴⁰ is no difference of float32 from 1."""
    tuner = efftune.apply(llama(dtype=torch.bfloat16), "shira")
    layer = tuner.model.model.layers[0].self_attn.q_proj
    with torch.no_grad():
        layer.take_back()
        layer.original[0] = 1.0
        layer.weight.view(-1)[int(layer.indices[0])] = 1.0
        layer.values[0] = 2.0**-40 - 1
    base = llama(dtype=torch.bfloat16)
    with torch.no_grad():
        base.model.layers[0].self_attn.q_proj.weight.view(-1)[int(layer.indices[0])] = 1.0
    tuner.save(tmp_path)
    again = efftune.load(base, tmp_path).model.model.layers[0].self_attn.q_proj
    assert torch.equal(again.stored().tensors[0], layer.stored().tensors[0])


def test_what_has_left_the_picks_is_in_the_file(tmp_path):
    tuner = trained("shira(density=0.02)")
    layer = tuner.model.model.layers[1].mlp.up_proj
    repick(layer, torch.arange(7, 7 + len(layer.indices)))
    assert len(layer.left)
    tuner.save(tmp_path)
    again = efftune.load(llama(dtype=torch.bfloat16), tmp_path).model.model.layers[1].mlp.up_proj
    assert torch.equal(again.left, layer.left) and torch.equal(again.indices, layer.indices)
    assert torch.equal(again.stored().tensors[0], layer.stored().tensors[0])
    before = llama(dtype=torch.bfloat16).model.layers[1].mlp.up_proj.weight
    assert torch.equal(again.take_back().tensors[0], before)


# Bad input: the sentence names the layer, and nothing is written.


def altered(path, change):
    tensors = load_file(path / FILE)
    with safe_open(path / FILE, "pt") as opened:
        metadata = opened.metadata()
    about = json.loads(metadata["layers"])
    change(tensors, about)
    save_file(tensors, path / FILE, metadata={**metadata, "layers": json.dumps(about)})


NAME = "model.layers.0.self_attn.q_proj"


def _outside(tensors, about):
    tensors[f"{NAME}.entries.gaps"][-1] = 254
    tensors[f"{NAME}.entries.gaps"] = torch.cat(
        [torch.full((9,), 255, dtype=torch.uint8), tensors[f"{NAME}.entries.gaps"]]
    )


def _cut(tensors, about):
    tensors[f"{NAME}.entries.gaps"] = torch.full((3,), 255, dtype=torch.uint8)


def _fewer(tensors, about):
    tensors[f"{NAME}.entries.values"] = tensors[f"{NAME}.entries.values"][1:].clone()


def _nan(tensors, about):
    tensors[f"{NAME}.entries.values"][0] = torch.nan


def _shape(tensors, about):
    about[NAME]["shape"] = [32, 16]


def _gone(tensors, about):
    del about[NAME]


def _empty(tensors, about):
    del tensors[f"{NAME}.entries.gaps"]


@pytest.mark.parametrize(
    "change, words",
    [
        (_outside, "outside of a weight"), (_cut, "gaps are cut"), (_fewer, "are not those of"), (_nan, "q_proj"),
        (_shape, r"a weight of \(32, 16\)"), (_gone, "do not train the same layers"), (_empty, "has no entries"),
    ],
)  # fmt: skip
def test_a_damaged_file_is_refused(change, words, tmp_path):
    trained("shira(density=0.02)").save(tmp_path)
    altered(tmp_path, change)
    model = llama(dtype=torch.bfloat16)
    with pytest.raises(EfftuneError, match=words) as raised:
        efftune.load(model, tmp_path)
    assert NAME in str(raised.value)


def test_another_base_is_named(tmp_path):
    trained("shira(density=0.02)").save(tmp_path)
    other = llama(dtype=torch.bfloat16)
    with torch.no_grad():
        other.model.layers[2].mlp.down_proj.weight.mul_(1.01)
    with pytest.raises(EfftuneError, match="layers.2.mlp.down_proj: it was trained on other weights than these"):
        efftune.load(other, tmp_path)
    with pytest.raises(EfftuneError, match="q_proj: it is of weights in bfloat16, and these are torch.float32"):
        efftune.load(llama(), tmp_path)


# Composition


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_deltas_are_added_and_subtracted_in_any_order(dtype, tmp_path):
    base = llama(dtype=dtype).state_dict()
    recipes = ["lift(rank=4, density=0.1)", "spiel(every=2, accumulate=1, density=0.1)", "s2ft(ratio=0.2)"]
    merged = []
    for i, recipe in enumerate(recipes):
        tuner = trained(recipe, dtype, seed=i)
        tuner.save(tmp_path / str(i))
        merged.append(tuner.merge().state_dict())
    a, b, c = (tmp_path / str(i) for i in range(3))
    one, other = compose(llama(dtype=dtype), [a, b], [c]), compose(llama(dtype=dtype), [b, a], [c])
    moved = 0
    for name, w in one.state_dict().items():
        assert torch.equal(w, other.state_dict()[name])
        w0 = base[name].double()
        right = w0 + (merged[0][name] - w0) + (merged[1][name] - w0) - (merged[2][name] - w0)
        # Of 32-bit weights a file has the differences, and a run's own weights are rounded.
        torch.testing.assert_close(w.double(), right, rtol=2 * torch.finfo(dtype).eps, atol=1e-8)
        moved += not torch.equal(w, base[name])
    assert moved >= 21
    assert all(torch.equal(t, merged[0][n]) for n, t in compose(llama(dtype=dtype), [a]).state_dict().items())


def test_what_cannot_be_composed_changes_nothing(tmp_path):
    trained("shira(density=0.02)").save(tmp_path / "a")
    trained("shira(density=0.02) + full(target_modules='norm')").save(tmp_path / "more")
    model = llama(dtype=torch.bfloat16)
    other = llama(dtype=torch.bfloat16, seed=1)
    before = {n: t.clone() for n, t in other.state_dict().items()}
    with pytest.raises(EfftuneError, match="trained on other weights"):
        compose(other, [tmp_path / "a"])
    assert all(torch.equal(t, before[n]) for n, t in other.state_dict().items())
    with pytest.raises(EfftuneError, match="trained.safetensors as well"):
        compose(model, [tmp_path / "a", tmp_path / "more"])
    with pytest.raises(EfftuneError, match="give a folder that a recipe like"):
        compose(model, [tmp_path])
    with pytest.raises(EfftuneError, match="has not"):
        compose(torch.nn.Linear(2, 2), [tmp_path / "a"])
