"""Picks by what another run changed, and what becomes of files that are no such run."""

import pytest
import torch
from safetensors.torch import load_file, save_file

import efftune
from efftune import EfftuneError
from efftune.methods.sparse import _scores
from efftune.methods.sparse._file import Weights
from tests.methods import test_sparse as shared
from tests.methods.models import batch, llama, loss_fn

Q, DOWN = "model.layers.0.self_attn.q_proj", "model.layers.2.mlp.down_proj"


@pytest.fixture(scope="module")
def full(tmp_path_factory):
    """The folder of a run of `full`, and its model."""
    path = tmp_path_factory.mktemp("full")
    tuner = efftune.apply(llama(), "full")
    shared.run(tuner, tuner.optimizer(lr=1e-3), range(2))
    tuner.save(path)
    return path, tuner.merge()


def largest_changes(model, start, density):
    changed = {}
    for name, w in start.named_parameters():
        if w.ndim == 2 and "embed" not in name and "lm_head" not in name:
            change = (model.get_parameter(name).detach() - w.detach()).abs()
            changed[name.removesuffix(".weight")] = shared.largest(change, round(density * w.numel()))
    return changed


def recipe(path, name="shira"):
    return f"{name}(density=0.03, scorer='file', file='{path}')"


def assert_picks(tuner, right):
    found = shared.layers(tuner.model)
    assert found.keys() == right.keys()
    assert all(torch.equal(layer.indices, right[name]) for name, layer in found.items())


def shards(path, folder):
    """A checkpoint of the model in two files, as transformers writes them."""
    tensors = load_file(path / "trained.safetensors")
    for i in range(2):
        save_file(dict(list(tensors.items())[i::2]), folder / f"model-{i}.safetensors")
    return folder


def run_folder(path, folder):
    (folder / "adapter").symlink_to(path)
    return folder


@pytest.mark.parametrize(
    "place",
    [lambda p, t: p, lambda p, t: p / "trained.safetensors", run_folder, shards],
    ids=["folder", "file", "run", "shards"],
)
def test_picks_what_the_run_changed_most(place, full, tmp_path, monkeypatch):
    """Read by tiles of rows: none is larger, and no weight is read whole."""
    path, model = full
    monkeypatch.setattr(_scores, "TILE", 200)
    seen, rows = [], Weights.rows
    monkeypatch.setattr(Weights, "rows", lambda *a: seen.append(rows(*a)) or seen[-1])
    tuner = efftune.apply(llama(), recipe(place(path, tmp_path)))
    assert_picks(tuner, largest_changes(model, llama(), 0.03))
    assert max(map(torch.numel, seen)) <= 200
    before = llama().get_submodule(Q).weight
    assert torch.equal(tuner.model.get_submodule(Q).stored().tensors[0], before)


@pytest.mark.parametrize("of", ["lift", "spiel", "saft"])
def test_other_methods_take_it(of, full):
    path, model = full
    assert_picks(efftune.apply(llama(), recipe(path, of)), largest_changes(model, llama(), 0.03))


def test_weights_that_are_stored_transposed(tmp_path):
    transformers = pytest.importorskip("transformers")

    def gpt2():
        torch.manual_seed(0)
        sizes = dict(vocab_size=40, n_embd=16, n_layer=1, n_head=2, n_positions=16)
        return transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes))

    tuner = efftune.apply(gpt2(), "full")
    name, moved = "transformer.h.0.mlp.c_fc", torch.tensor([3, 40, 1000])
    with torch.no_grad():
        tuner.model.get_submodule(name).weight.t()[moved // 16, moved % 16] += 1
    tuner.save(tmp_path)
    layer = efftune.apply(gpt2(), f"shira(density={3 / 1024}, scorer='file', file='{tmp_path}')").model.get_submodule(
        name
    )
    assert torch.equal(layer.indices.long(), moved)


def test_what_was_picked_by_a_file_is_loaded_without_it(full, tmp_path):
    path, _ = full
    (tmp_path / "run").mkdir()
    tuner = efftune.apply(llama(), recipe(shards(path, tmp_path / "run")))
    shared.run(tuner, tuner.optimizer(lr=1e-2), range(2))
    tuner.save(tmp_path / "saved")
    for file in (tmp_path / "run").glob("*"):
        file.unlink()
    again = efftune.load(llama(), tmp_path / "saved")
    assert torch.equal(again.model(batch(9)).logits, tuner.model(batch(9)).logits)
    assert again.recipe == tuner.recipe


def test_a_run_in_more_bits_is_read_and_one_in_fewer_is_refused(full, tmp_path):
    path, model = full
    start = llama(dtype=torch.bfloat16).float()
    assert_picks(efftune.apply(llama(dtype=torch.bfloat16), recipe(path)), largest_changes(model, start, 0.03))
    save_file({n: t.bfloat16() for n, t in load_file(path / "trained.safetensors").items()}, tmp_path / "a.safetensors")
    with pytest.raises(EfftuneError, match=f"^{Q}: .* has bfloat16 for a weight in float32, and what that rounds away"):
        efftune.apply(llama(), recipe(tmp_path))


# Refusals


def _gone(tensors):
    del tensors[f"{DOWN}.weight"]


def _shape(tensors):
    tensors[f"{DOWN}.weight"] = tensors[f"{DOWN}.weight"][:, :-1].clone()


def _nan(tensors):
    tensors[f"{DOWN}.weight"][7, 5] = torch.nan


def _codes(tensors):
    tensors[f"{DOWN}.weight"] = tensors[f"{DOWN}.weight"].to(torch.int8)


@pytest.mark.parametrize("name", ["shira", "ltsft"])
@pytest.mark.parametrize(
    "change, words",
    [
        (_gone, "has no weight of it; give a run of full"),
        (_shape, r"has a weight of \(32, 47\), and this one is \(32, 48\); give a run of the same model"),
        (_nan, "has NaN or Inf in its weight"), (_codes, "has int8 for a weight in float32"),
    ],
)  # fmt: skip
def test_another_model_is_refused_before_anything_is_changed(change, words, name, full, tmp_path):
    tensors = load_file(full[0] / "trained.safetensors")
    change(tensors)
    save_file(tensors, tmp_path / "trained.safetensors")
    model = llama()
    with pytest.raises(EfftuneError, match=f"^{DOWN}: .*{words}") as raised:
        efftune.apply(model, recipe(tmp_path) if name == "shira" else f"ltsft(file='{tmp_path}')")
    assert str(raised.value).count(". ") == 0
    assert not shared.layers(model) and all(
        type(m).__name__ != "Linear" or m.weight.requires_grad for m in model.modules()
    )


def test_what_is_no_run_is_refused(tmp_path):
    with pytest.raises(EfftuneError, match="There is no safetensors file in .*/nothing; give the folder"):
        efftune.apply(llama(), recipe(tmp_path / "nothing"))
    (tmp_path / "model.safetensors").write_bytes(b"12345678{nothing")
    with pytest.raises(EfftuneError, match="model.safetensors is damaged"):
        efftune.apply(llama(), recipe(tmp_path))
    (tmp_path / "model.safetensors").unlink()
    torch.save({}, tmp_path / "model.bin")
    with pytest.raises(EfftuneError, match="is a pickle"):
        efftune.apply(llama(), recipe(tmp_path))


def test_a_run_of_adapters_is_told_what_to_give(tmp_path):
    tuner = efftune.apply(llama(), "lora(r=2)")
    tuner.save(tmp_path)
    with pytest.raises(EfftuneError, match="has no weight of it; give a run of full, or the merged checkpoint"):
        efftune.apply(llama(), recipe(tmp_path))


@pytest.mark.parametrize(
    "recipe, words",
    [
        ("shira(scorer='file')", "no run is given; add file='runs/full'"),
        ("lift(scorer='file', file='')", "no run is given; add file='runs/full'"),
        ("shira(file='runs/full')", "scorer='random' reads no file; use scorer='file', or leave file='runs/full' out"),
        ("mft(file='runs/full')", "scorer='magnitude' reads no file"),
        ("saft(file='runs/full')", "scorer='gradient' reads no file"),
    ],
)  # fmt: skip
def test_a_file_and_a_scorer_that_do_not_go_together(recipe, words):
    with pytest.raises(EfftuneError, match=words):
        efftune.apply(llama(), recipe)


def test_loss_is_taken_of_the_model_that_it_began_with(full):
    tuner = efftune.apply(llama(), recipe(full[0]))
    torch.testing.assert_close(loss_fn(tuner.model, batch()), loss_fn(llama(), batch()))
