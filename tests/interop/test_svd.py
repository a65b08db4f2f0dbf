"""Sparse deltas as LoRA: as near as the exact SVD comes, the error is what it says, and PEFT computes just that."""

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import efftune
from efftune import EfftuneError
from efftune.interop.peft import PREFIX, WEIGHTS
from efftune.interop.sparse import flat, parts_of
from efftune.interop.svd import save_lora
from efftune.memory.meter import allocated
from efftune.methods.sparse import _scores
from tests.budget import assert_within_budget
from tests.interop.both_ways import gpt2, randomize
from tests.methods.models import llama, logits

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`")


def moved(recipe, model):
    tuner = efftune.apply(model, recipe)
    randomize(tuner.model)
    return tuner


def changed(layer):
    """ΔW, float64."""
    changes = flat(layer, parts_of(layer))
    dense = torch.zeros(changes.shape, dtype=torch.float64)
    dense.view(-1)[changes.where] = changes.change
    return dense


@pytest.mark.parametrize("recipe", ["shira(density=0.1)", "s2ft(ratio=0.5)", "shira(density=0.9)"])
@pytest.mark.parametrize("r", [1, 5])
def test_the_error_is_what_it_says_and_as_small_as_can_be(recipe, r, tmp_path):
    tuner = moved(recipe, llama())
    errors = save_lora(tuner, tmp_path, r)
    tensors, lost, whole = load_file(tmp_path / WEIGHTS), 0.0, 0.0
    for name in errors.keys() - {""}:
        dense = changed(tuner.model.get_submodule(name))
        a, b = (tensors[f"{PREFIX}{name}.lora_{part}.weight"].double() for part in "AB")
        assert a.shape == (r, dense.shape[1]) and b.shape == (dense.shape[0], r)
        rest = (dense - b @ a).square().sum()
        assert errors[name] == pytest.approx(float(rest / dense.square().sum()) ** 0.5, rel=1e-9)
        assert rest <= 1.02 * torch.linalg.svdvals(dense)[r:].square().sum()
        lost, whole = lost + float(rest), whole + float(dense.square().sum())
    assert errors[""] == pytest.approx((lost / whole) ** 0.5, rel=1e-9) and errors[""] > 0.1


@pytest.mark.parametrize("make, recipe", [(llama, "shira(density=0.05, modules_to_save=['lm_head'])"),
                                          (llama, "s2ft(ratio=0.3) + full(target_modules='norm')"),
                                          (gpt2, "shira(density=0.05, target_modules='c_attn')")])  # fmt: skip
def test_peft_computes_the_nearest_matrix(make, recipe, tmp_path):
    peft = pytest.importorskip("peft")
    tuner = moved(recipe, make())
    save_lora(tuner, tmp_path, 3)
    theirs = logits(peft.PeftModel.from_pretrained(make(), tmp_path))
    ours = logits(efftune.load(make(), tmp_path).model)
    right = efftune.load(make(), tmp_path).merge().double()  # W + B·A, rounded once
    assert_within_budget(theirs, logits(right), ours)
    assert not torch.allclose(theirs, logits(tuner.model), atol=1e-3)


def test_columns_are_exact_where_the_rank_is_their_number(tmp_path):
    for recipe in ("s2ft(ratio=0.1)", "shira(density=0.001)"):
        tuner = moved(recipe, llama())
        errors = save_lora(tuner, tmp_path, 8)
        assert set(errors.values()) == {0.0}
        tensors = load_file(tmp_path / WEIGHTS)
        for name in errors.keys() - {""}:
            dense = changed(tuner.model.get_submodule(name))
            a, b = (tensors[f"{PREFIX}{name}.lora_{part}.weight"].double() for part in "AB")
            assert torch.equal(b @ a, dense) and len(a) < 8


def test_no_matrix_of_the_weights_size_is_made(tmp_path, monkeypatch):
    monkeypatch.setattr(_scores, "TILE", 2**14)
    n = 1500
    tuner = moved("shira(density=0.01)", nn.Sequential(nn.Linear(n, n, bias=False)))
    _, peak = allocated(lambda: save_lora(tuner, tmp_path, 2))
    assert peak < n * n * 4 / 2, peak


@pytest.mark.parametrize(
    "recipe, r, words",
    [
        ("shira(density=0.1)", 0, "has a rank of at least 1, not 0"),
        ("lora(r=2)", 2, "No entries and no columns train in this model"),
        (
            "shira(density=0.1, target_modules=['0']) + lora(r=2, target_modules=['1'])",
            2,
            "would lose 1.lora_a, 1.lora_b",
        ),
    ],
)
def test_what_cannot_be_such_an_adapter_is_refused(recipe, r, words, tmp_path):
    tuner = efftune.apply(nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)), recipe)
    with pytest.raises(EfftuneError, match=words):
        save_lora(tuner, tmp_path / "out", r)
    assert not (tmp_path / "out").exists()
