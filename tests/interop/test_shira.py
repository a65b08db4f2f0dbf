"""PEFT's SHiRA: entries and columns that train load into the real PEFT with our bits, and its adapters load here."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import efftune
from efftune import EfftuneError
from efftune.interop.peft import CONFIG, WEIGHTS
from efftune.interop.shira import ENTRIES
from efftune.interop.sparse import FILE, metadata
from efftune.linear.picks import repick
from tests.interop.both_ways import assert_both_ways, gpt2
from tests.interop.test_sparse import trained
from tests.methods.models import llama, logits

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`", "ignore:Sparse invariant checks")
NAME = "model.layers.0.self_attn.q_proj"


@pytest.mark.parametrize(
    "recipe, dtype, steps",
    [
        ("shira(density=0.02, modules_to_save=['lm_head'])", torch.float32, 2),
        ("lift(rank=4, every=2)", torch.bfloat16, 3),
        ("spiel(every=2, accumulate=1)", torch.float64, 3),
        ("saft(density=0.01) + full(target_modules='norm')", torch.float16, 0),
        ("s2ft(ratio=0.2)", torch.bfloat16, 2),
    ],
)
def test_peft_gives_our_logits(recipe, dtype, steps, tmp_path):
    peft = pytest.importorskip("peft")
    tuner = trained(recipe, dtype, steps)
    if not steps:  # torch has no AdamW of float16 on every CPU
        with torch.no_grad():
            for p in tuner.named_trained().values():
                p.add_(torch.randn(p.shape, dtype=p.dtype) / 30)
    tuner.save(tmp_path, format="shira")
    again = efftune.load(llama(dtype=dtype), tmp_path)
    assert again.recipe == tuner.recipe
    for (name, a), b in zip(again.named_saved().items(), tuner.named_saved().values(), strict=True):
        assert torch.equal(a, b), name
    ours = logits(tuner.merge())
    theirs = peft.PeftModel.from_pretrained(llama(dtype=dtype), tmp_path)
    assert torch.equal(logits(theirs), ours)
    assert (ours - logits(llama(dtype=dtype))).abs().max() > 0.01
    theirs.save_pretrained(tmp_path / "back")
    assert torch.equal(logits(efftune.load(llama(dtype=dtype), tmp_path / "back").merge()), ours)


def test_pefts_adapter_here_and_back(tmp_path):
    peft = pytest.importorskip("peft")
    config = peft.ShiraConfig(r=2, target_modules=["q_proj", "up_proj"], modules_to_save=["lm_head"], random_seed=1)
    keys = assert_both_ways(peft, llama, config, tmp_path, format="shira")
    assert f"base_model.model.{NAME}.shira_indices" in keys
    tuner = efftune.load(llama(), tmp_path / "theirs")
    layer = tuner.model.get_submodule(NAME)
    assert len(layer.indices) == 2 * sum(layer.weight.shape) and "r=2)" in tuner.recipe
    tuner.save(tmp_path / "sparse")
    assert (tmp_path / "sparse" / FILE).exists() and not (tmp_path / "sparse" / WEIGHTS).exists()


def test_what_has_left_the_picks_is_in_the_file(tmp_path):
    tuner = trained("shira(density=0.02)", steps=1)
    layer = tuner.model.get_submodule(NAME)
    repick(layer, torch.arange(7, 7 + len(layer.indices)))
    assert len(layer.left)
    tuner.save(tmp_path / "sparse")
    efftune.load(llama(dtype=torch.bfloat16), tmp_path / "sparse").save(tmp_path / "shira", format="shira")
    again = efftune.load(llama(dtype=torch.bfloat16), tmp_path / "shira").model.get_submodule(NAME)
    assert all(torch.equal(a, b) for a, b in zip(again.added(), layer.added(), strict=True))


def test_zeros_go_where_nothing_trains_to_the_smallest_r(tmp_path):
    model = nn.Sequential(nn.Linear(30, 20), nn.Linear(20, 30))
    tuner = efftune.apply(model, "shira(density=0.1, target_modules=['0']) + shira(density=0.5, target_modules=['1'])")
    for layer in model:
        layer.values.detach().fill_(1.0)
    tuner.save(tmp_path, format="shira")
    assert json.loads((tmp_path / CONFIG).read_text())["r"] == 6  # 300 of 50 r
    tensors = load_file(tmp_path / WEIGHTS)
    for i, picked in enumerate([60, 300]):
        indices, weight = (tensors[f"base_model.model.{i}.shira_{part}"] for part in ("indices", "weight"))
        assert indices.shape == (2, 300) and len(indices.unique(dim=1)[0]) == 300
        assert weight.tolist() == [1.0] * picked + [0.0] * (300 - picked)


@pytest.mark.parametrize("case", ["conv1d", "too many", "lora"])
def test_what_peft_cannot_take_is_named(case, tmp_path):
    model, recipe, lost = {
        "conv1d": (gpt2(), "shira(target_modules='c_attn')", "transformer.h.0.attn.c_attn.indices"),
        "too many": (nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 1)), "shira(density=0.5)", "1.indices"),
        "lora": (nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)),
                 "shira(density=0.1, target_modules=['0']) + lora(r=2, target_modules=['1'])", "1.lora_a"),
    }[case]  # fmt: skip
    with pytest.raises(EfftuneError, match=f"^The format 'shira' would lose {lost}"):
        efftune.apply(model, recipe).save(tmp_path / "out", format="shira")
    assert not (tmp_path / "out").exists()


def test_who_asks_for_a_peft_adapter_of_entries_is_told_of_this_one(tmp_path):
    tuner = efftune.apply(nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)), "shira(density=0.1)")
    with pytest.raises(EfftuneError, match="would lose 0.indices.* in all that it takes or with format='shira'.$"):
        tuner.save(tmp_path / "out", format="peft")


def _outside(pair, about):
    pair["indices"][1, 0] = 999


def _negative(pair, about):
    pair["indices"][0, 0] = -1


def _twice(pair, about):
    pair["indices"][:, 1] = pair["indices"][:, 0]


def _fewer(pair, about):
    pair["weight"] = pair["weight"][1:].clone()


def _nan(pair, about):
    pair["weight"][0] = torch.nan


def _none(pair, about):
    del pair["indices"]


def _counts(pair, about):
    about[NAME]["counts"]["entries"] = 10**6


def _other_shape(pair, about):
    about[NAME]["shape"] = [16, 17]


def _other_base(pair, about):
    about[NAME]["sha256"] = "0"


@pytest.mark.parametrize(
    "change, words, of_peft",
    [
        (_outside, "an index is outside", False), (_outside, "an index is outside", True),
        (_negative, "an index is outside", True), (_twice, "an entry is in it twice", False),
        (_twice, "an entry is in it twice", True), (_fewer, "not of one adapter", True),
        (_nan, "no finite numbers", True), (_none, "no shira_indices", True),
        (_counts, "fewer entries than it says", False), (_other_shape, r"of a weight of \(16, 17\)", False),
        (_other_base, "trained on other weights", False),
    ],
)  # fmt: skip
def test_a_damaged_file_is_refused(change, words, of_peft, tmp_path):
    """Nothing is written: the layer of another model is as it was."""
    trained("shira(density=0.02, target_modules='q_proj|k_proj')", steps=0).save(tmp_path, format="shira")
    tensors, about = load_file(tmp_path / WEIGHTS), json.loads(metadata(tmp_path / WEIGHTS)[ENTRIES])
    key = f"base_model.model.{NAME}.shira_"
    pair = {part: tensors.pop(key + part) for part in ("indices", "weight")}
    change(pair, about)
    if of_peft:
        (tmp_path / "efftune_config.json").unlink()
    metadata_ = {} if of_peft else {ENTRIES: json.dumps(about)}
    save_file(tensors | {key + part: t for part, t in pair.items()}, tmp_path / WEIGHTS, metadata=metadata_)
    model = llama(dtype=torch.bfloat16)
    with pytest.raises(EfftuneError, match=words) as raised:
        efftune.load(model, tmp_path)
    assert NAME in str(raised.value)
    before = llama(dtype=torch.bfloat16).state_dict()
    assert all(
        torch.equal(t, before[n.replace(".base_layer", "")]) for n, t in model.state_dict().items() if n in before
    )
