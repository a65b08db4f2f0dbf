"""What a tuned model is saved as: everything that it needs comes back, or is named before anything is written."""

import json

import pytest
import torch
from torch import nn

import efftune
from efftune import EfftuneError
from efftune.interop import formats
from efftune.interop.peft import Adapter
from tests.interop import written_before
from tests.interop.toys import register
from tests.linear.toys import Rotated
from tests.methods.models import batch, contract_model

RECIPES = [
    "full",
    "lora(r=2)",
    "lora(r=2, freeze_a=True, bias='all') + full(target_modules='norm')",
    "lora(r=2, target_modules='q_proj', modules_to_save=['embed_tokens'])",
    "int8 + lora(r=2, target_modules='q_proj|narrow') + peqa(target_modules='k_proj')",
    "int8 + peqa",
    "hadamard(r=2, target_modules='q_proj') + lora(r=2, target_modules='v_proj|k_proj')",
    "magnitude(r=2, target_modules='q_proj') + lora(r=3, target_modules='v_proj')",
]


def trained(model, recipe, seed=3):
    """The tuner of `recipe`, nothing of which is as it was."""
    torch.manual_seed(1)
    tuner = efftune.apply(model, recipe)
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for t in tuner.named_saved().values():
            t.add_(1 if not t.is_floating_point() else torch.rand(t.shape, generator=g))
    return tuner


def assert_equal(tuner, other):
    saved, expected = tuner.named_saved(), other.named_saved()
    assert saved.keys() == expected.keys()
    assert [n for n in saved if not torch.equal(saved[n], expected[n])] == []


@pytest.mark.filterwarnings("ignore:PEFT has no place")
@pytest.mark.parametrize("only", [None, "safetensors"])
@pytest.mark.parametrize("tie", [False, True])
@pytest.mark.parametrize("recipe", RECIPES)
def test_all_that_is_no_longer_the_base_models_comes_back(recipe, tie, only, tmp_path, monkeypatch):
    register(monkeypatch)
    tuner = trained(contract_model(tie), recipe)
    tuner.save(tmp_path, only)
    torch.manual_seed(2)  # other draws than the first time
    again = efftune.load(contract_model(tie), tmp_path)
    assert again.recipe == tuner.recipe
    assert_equal(again, tuner)
    ids = batch(seed=5)
    assert torch.equal(again.model.eval()(input_ids=ids).logits, tuner.model.eval()(input_ids=ids).logits)


@pytest.mark.parametrize("name", written_before.RECIPES)
def test_what_an_earlier_version_wrote_is_read(name):
    from safetensors.torch import load_file

    folder = written_before.FOLDER / name
    tuner = efftune.load(written_before.network(), folder)
    y, expected = tuner.model.eval()(written_before.inputs()), load_file(folder / "expected.safetensors")["y"]
    torch.testing.assert_close(y, expected, rtol=1e-6, atol=1e-6)
    assert not torch.allclose(y, written_before.network().eval()(written_before.inputs()), atol=1e-2)


@pytest.mark.parametrize(
    "recipe, lost",
    [
        ("full", "0.bias, 0.weight, 1.bias, 1.num_batches_tracked, 1.running_mean and 6 more"),
        ("lora(r=2)", "1.num_batches_tracked, 1.running_mean, 1.running_var"),
        ("int8(group=4) + lora(r=2, target_modules=['0']) + peqa(target_modules=['2'])", "1.num.*, 2.scales"),
        ("magnitude(r=2, target_modules=['0'])", "0.began, 0.lora_a, 0.lora_b, 0.magnitude, 1.num.*"),
    ],
)
def test_a_format_that_cannot_carry_the_plan_names_what_it_would_lose(recipe, lost, tmp_path, monkeypatch):
    register(monkeypatch, carried=False)
    model = nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Linear(8, 8), nn.Linear(8, 4))
    tuner = efftune.apply(model, recipe)
    with pytest.raises(EfftuneError, match=f"^The format 'peft' would lose {lost}; save without format="):
        tuner.save(tmp_path / "out", format="peft")
    assert not (tmp_path / "out").exists()
    with pytest.raises(EfftuneError, match="no format 'gguf'; the formats are: peft, sparse, safetensors"):
        tuner.save(tmp_path / "out", format="gguf")


def test_a_format_that_carries_the_whole_plan_is_written_alone(tmp_path):
    tuner = trained(nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8)), "lora(r=2, modules_to_save=['1'])")
    tuner.save(tmp_path, format="peft")
    assert not (tmp_path / "trained.safetensors").exists()
    assert_equal(efftune.load(nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8)), tmp_path), tuner)


def test_what_no_format_carries_is_refused(tmp_path, monkeypatch):
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    tuner = efftune.apply(model, "full")
    with pytest.raises(EfftuneError, match="^No format can carry 0.bias, 0.weight, 1.bias, 1.weight; bring it"):
        tuner.save(tmp_path / "out")
    monkeypatch.setattr(formats, "FORMATS", [Adapter()])
    tuner = efftune.apply(nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8)), "lora(r=2)")
    with pytest.raises(EfftuneError, match="^No format can carry 1.num_batches_tracked, 1.running_mean"):
        tuner.save(tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "recipe, beside",
    [
        ("int8(group=4) + lora(r=2, target_modules=['0']) + peqa(target_modules=['2'])", "2.scales"),
        ("hadamard(r=2, target_modules=['0']) + lora(r=2, target_modules=['2', '3'])", "0.hira_a, 0.hira_b"),
        ("hadamard(r=2, target_modules=['0']) + hadamard(r=3, target_modules=['2', '3'])", "0.hira_a, 0.hira_b"),
    ],
)
def test_what_trains_and_peft_will_not_see_is_named(recipe, beside, tmp_path, monkeypatch, recwarn):
    register(monkeypatch)
    net = nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Linear(8, 8), nn.Linear(8, 4))
    efftune.apply(net, recipe).save(tmp_path)
    (warning,) = recwarn
    assert str(warning.message).startswith(f"PEFT has no place for {beside}, and gives other outputs")
    assert warning.filename == __file__


def test_a_module_whose_tensors_mean_something_else_in_peft_is_not_saved_whole(tmp_path):
    """A turned weight under the name of a plain one."""
    net = nn.Sequential(nn.Linear(8, 8), efftune.Linear.from_linear(nn.Linear(8, 8), base=Rotated(None)))
    tuner = efftune.apply(net, "lora(r=2, target_modules=['0']) + full(target_modules=['1'])")
    with pytest.warns(UserWarning, match="PEFT has no place for 1.weight"):
        tuner.save(tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["modules_to_save"] is None


def test_a_tensor_with_two_names_needs_a_place_for_both(tmp_path):
    """Of a module that is saved whole, and of one whose other tensors stay as they are."""
    net = nn.ModuleDict({"first": nn.Linear(8, 8), "table": nn.Embedding(8, 8), "other": nn.Linear(8, 8)})
    net["other"].weight = net["table"].weight
    tuner = efftune.apply(net, "lora(r=2, target_modules='first') + full(target_modules='table')")
    with pytest.warns(UserWarning, match="PEFT has no place for table.weight"):
        tuner.save(tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["modules_to_save"] is None


def as_before(folder):
    """efftune_config.json as earlier versions wrote it, which did not name the formats."""
    config = json.loads((folder / "efftune_config.json").read_text())
    del config["formats"]
    (folder / "efftune_config.json").write_text(json.dumps(config))


@pytest.mark.parametrize("before", [False, True])
def test_files_of_an_earlier_save_to_the_same_folder_are_not_read(before, tmp_path):
    def network():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))

    for recipe, only in (("full", None), ("lora(r=2)", "safetensors"), ("lora(r=2)", None), ("full", None)):
        if only and before:
            continue
        tuner = trained(network(), recipe, seed=len(recipe))
        tuner.save(tmp_path, only)
        if before:
            as_before(tmp_path)
        assert_equal(efftune.load(network(), tmp_path), tuner)


class Numbers:
    """A format of somebody else: tensors of one dimension, as JSON."""

    name, file, reader = "numbers", "numbers.json", None

    def carries(self, tuned):
        return {name for name, t in tuned.named_saved().items() if t.ndim == 1}

    def write(self, tuned, names, path):
        saved = tuned.named_saved()
        (path / self.file).write_text(json.dumps({name: saved[name].tolist() for name in names}))

    def read(self, tuned, path):
        return {name: torch.tensor(value) for name, value in json.loads((path / self.file).read_text()).items()}


def test_a_format_is_an_object_in_the_list(tmp_path, monkeypatch):
    tuner = trained(nn.Sequential(nn.Linear(8, 8)), "full")
    with monkeypatch.context() as put:
        put.setattr(formats, "FORMATS", [Numbers(), *formats.FORMATS])
        with pytest.raises(EfftuneError, match="'numbers' would lose 0.weight"):
            tuner.save(tmp_path, format="numbers")
        tuner.save(tmp_path)
        assert {p.name for p in tmp_path.iterdir()} == {"numbers.json", "trained.safetensors", "efftune_config.json"}
        assert_equal(efftune.load(nn.Sequential(nn.Linear(8, 8)), tmp_path), tuner)
    with pytest.raises(EfftuneError, match="There is no format 'numbers'"):
        efftune.load(nn.Sequential(nn.Linear(8, 8)), tmp_path)


@pytest.mark.parametrize("formats", [3, {"a": 1}, ["gguf"], [None]])
def test_a_list_of_formats_that_is_none_is_refused(formats, tmp_path):
    efftune.apply(nn.Sequential(nn.Linear(8, 8)), "full").save(tmp_path)
    (tmp_path / "efftune_config.json").write_text(json.dumps({"recipe": "full", "formats": formats}))
    with pytest.raises(EfftuneError, match="There is no format"):
        efftune.load(nn.Sequential(nn.Linear(8, 8)), tmp_path)


@pytest.mark.parametrize("before", [False, True])
def test_files_that_are_gone_are_missed(before, tmp_path):
    network = lambda: nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8))  # noqa: E731
    for file in ("adapter_model.safetensors", "trained.safetensors"):
        efftune.apply(network(), "lora(r=2)").save(tmp_path)
        if before:
            as_before(tmp_path)
        (tmp_path / file).unlink()
        with pytest.raises(EfftuneError, match=f"There is no .*{file}"):
            efftune.load(network(), tmp_path)


@pytest.mark.parametrize("change", [lambda t: t.to(torch.int8), lambda t: t + 0j, lambda t: t / 0, lambda t: t[:1]])
def test_tensors_of_another_sort_are_refused(change, tmp_path):
    from safetensors.torch import load_file, save_file

    model = nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8))
    efftune.apply(model, "full").save(tmp_path)
    file, before = tmp_path / "trained.safetensors", [p.clone() for p in model.parameters()]
    save_file({n: change(t) if n == "0.weight" else t for n, t in load_file(file).items()}, file)
    with pytest.raises(EfftuneError, match="does not fit Sequential .first at 0.weight.: nothing was loaded"):
        efftune.load(model, tmp_path)
    assert all(torch.equal(p, b) for p, b in zip(model.parameters(), before, strict=True))


@pytest.mark.parametrize("recipe", [3, None, ["lora"]])
def test_a_recipe_that_is_no_text_is_refused(recipe, tmp_path):
    efftune.apply(nn.Sequential(nn.Linear(8, 8)), "full").save(tmp_path)
    (tmp_path / "efftune_config.json").write_text(json.dumps({"recipe": recipe}))
    with pytest.raises(EfftuneError, match="says recipe=.*save or fetch it again"):
        efftune.load(nn.Sequential(nn.Linear(8, 8)), tmp_path)


def test_the_folder_of_a_run_stands_for_its_adapter(tmp_path):
    def network():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))

    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "checkpoints").mkdir()
    with pytest.raises(EfftuneError, match="is a run that has not come to its end, .*/adapter; continue it .*--resume"):
        efftune.load(network(), tmp_path)
    tuner = trained(network(), "lora(r=2)")
    tuner.save(tmp_path / "adapter")
    assert_equal(efftune.load(network(), tmp_path), tuner)
    (tmp_path / "adapter" / "efftune_config.json").unlink()  # as PEFT has it
    assert_equal(efftune.load(network(), tmp_path), tuner)


def test_a_folder_of_several_adapters_names_them(tmp_path):
    for name in ("checkpoint-1", "checkpoint-2"):
        efftune.apply(nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)), "lora(r=2)").save(tmp_path / name)
    with pytest.raises(
        EfftuneError, match="itself holds nothing .* give a folder in it: .*/checkpoint-1, .*checkpoint-2"
    ):
        efftune.load(nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)), tmp_path)


def test_an_adapter_of_pefts_says_its_own_recipe(tmp_path):
    efftune.apply(nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)), "lora(r=2)").save(tmp_path)
    (tmp_path / "efftune_config.json").unlink()
    with pytest.raises(EfftuneError, match="load it without recipe="):
        efftune.load(nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)), tmp_path, recipe="lora(r=2)")
