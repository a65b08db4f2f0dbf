"""Methods of other packages: found by their entry points, written and read by name as our own are."""

import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch

import efftune
from efftune import EfftuneError
from efftune.methods import available
from efftune.methods._base import TRAINS, Method
from efftune.methods.adapters.lora import LoraMethod
from efftune.recipe import parse
from tests.methods.models import batch, llama, loss_fn

SOURCE = """
from dataclasses import dataclass
from efftune.methods._base import TRAINS, Method

@dataclass(frozen=True)
class Norms(Method):
    \"\"\"Trains the last norm.\"\"\"
    scale: float = 1.0
    name = "outside_norm"
    phase = TRAINS

    def plan(self, plan):
        plan.train_modules(self, ["model.norm"])

class Other:
    name = "other"
"""


@pytest.fixture
def package(tmp_path, monkeypatch):
    """Writes a package that registers these entry points, and lets it be found."""

    def register(entries: str):
        (tmp_path / "outside_methods.py").write_text(SOURCE)
        info = tmp_path / "outside_methods-1.0.dist-info"
        info.mkdir()
        (info / "METADATA").write_text("Metadata-Version: 2.1\nName: outside-methods\nVersion: 1.0\n")
        (info / "entry_points.txt").write_text(f"[efftune.methods]\n{entries}\n")
        monkeypatch.syspath_prepend(tmp_path)
        available.cache_clear()

    yield register
    available.cache_clear()
    sys.modules.pop("outside_methods", None)


def test_a_registered_method_is_applied_saved_and_loaded_by_name(package, tmp_path):
    package("outside_norm = outside_methods:Norms")
    tuner = efftune.apply(llama(), "outside_norm(scale=2.0)")
    optimizer = tuner.optimizer(lr=1e-2)
    tuner.backward(batch(), loss_fn)
    optimizer.step()
    assert list(tuner.named_trained()) == ["model.norm.weight"]
    tuner.save(tmp_path / "saved")
    again = efftune.load(llama(), tmp_path / "saved")
    assert again.recipe == "outside_norm(scale=2.0)"
    assert torch.equal(again.model.model.norm.weight, tuner.model.model.norm.weight)


@pytest.mark.parametrize(
    "entry, why",
    [
        ("lora = outside_methods:Norms", r"'lora' .* efftune.methods.adapters.lora has the name already"),
        ("gone = outside_methods:Gone", r"'gone' .* does not load \(AttributeError"),
        ("other = outside_methods:Other", r"'other' .* no subclass of efftune.methods.Method with name = 'other'"),
        ("renamed = outside_methods:Norms", r"'renamed' .* with name = 'renamed'"),
    ],
)
def test_what_cannot_be_used_is_left_out_and_said(package, entry, why):
    package(entry)
    with pytest.warns(UserWarning, match=why):
        found = available()
    assert found["lora"].__module__ == "efftune.methods.adapters.lora"
    with warnings.catch_warnings(action="error"):  # said once
        assert entry.split()[0] == "lora" or entry.split()[0] not in available()


def test_an_uninstalled_method_is_missed_by_name(package, tmp_path):
    with pytest.raises(EfftuneError, match="There is no method 'outside_norm'"):
        efftune.apply(llama(), "outside_norm")


@dataclass(frozen=True)
class Norms(Method):
    """As the package has it, and it may have a setting that no literal writes."""

    scale: float = 1.0
    chosen: Callable[[str], bool] | None = None

    name = "outside_norm"
    phase = TRAINS

    def plan(self, plan):
        chosen = self.chosen or (lambda name: name == "model.norm")
        plan.train_modules(self, [name for name, _ in plan.model.named_modules() if chosen(name)])


@dataclass(frozen=True)
class OtherLora(LoraMethod):
    """What has the name of another class."""


def first_norm(name):
    return name == "model.layers.0.input_layernorm"


BY_HAND = [
    ([Norms(scale=2.0)], "outside_norm(scale=2.0)"),
    ([Norms(chosen=first_norm)], "outside_norm(chosen=...)"),
    ([OtherLora(r=2)], "lora(r=2)"),
    ([*parse("lora(r=2, target_modules=['q_proj']) + lisa(layers=1)"), Norms()], "outside_norm"),
]


@pytest.mark.parametrize("methods, named", BY_HAND, ids=[named for _, named in BY_HAND])
def test_a_method_that_its_name_does_not_bring_back_is_said_and_given(methods, named, tmp_path):
    tuner = efftune.apply(llama(), methods)
    with torch.no_grad():
        for p in tuner.named_trained().values():
            p.add_(1)
    with pytest.warns(UserWarning) as said:
        tuner.save(tmp_path)
    (warning,) = [str(w.message) for w in said if "PEFT has no place" not in str(w.message)]
    assert warning.startswith(f"{named} cannot be made again") and "efftune.methods" in warning
    assert {w.filename for w in said} == {__file__}
    name = named.partition("(")[0]
    with pytest.raises(EfftuneError, match=f"was saved with .*{name}.*recipe=") as refused:
        efftune.load(llama(), tmp_path)
    assert str(tmp_path) in str(refused.value)
    for recipe in (methods, reversed(methods)):
        again = efftune.load(llama(), tmp_path, recipe=recipe)
        assert sorted(map(str, again.methods)) == sorted(map(str, tuner.methods))
        saved, expected = again.named_saved(), tuner.named_saved()
        assert saved.keys() == expected.keys() and all(torch.equal(saved[n], expected[n]) for n in saved)


def test_one_method_by_hand_and_what_is_implied(tmp_path):
    @dataclass(frozen=True)
    class Nothing(Method):
        name = "nothing"

    efftune.apply(llama(), Nothing()).save(tmp_path / "implied")
    assert efftune.load(llama(), tmp_path / "implied", recipe=Nothing()).recipe == "full + nothing"


@pytest.mark.filterwarnings("ignore:outside_norm cannot be made again")
def test_another_recipe_than_was_saved_is_refused(tmp_path):
    efftune.apply(llama(), [Norms(scale=2.0)]).save(tmp_path)
    before = llama()
    for recipe in ([Norms()], [Norms(scale=2.0), *parse("recompute")], "lora(r=2)"):
        with pytest.raises(EfftuneError, match="the recipe 'outside_norm.scale=2.0.', and recipe= is"):
            efftune.load(before, tmp_path, recipe=recipe)
    assert all(p.requires_grad for p in before.parameters())
    efftune.apply(llama(), [OtherLora(r=2)]).save(tmp_path)
    with pytest.raises(EfftuneError, match="was saved with a OtherLora as 'lora', which is a LoraMethod here"):
        efftune.load(llama(), tmp_path, recipe="lora(r=2)")


@pytest.mark.filterwarnings("ignore:outside_norm cannot be made again")
def test_a_method_that_is_registered_after_all_is_found(package, tmp_path):
    efftune.apply(llama(), [Norms(scale=2.0)]).save(tmp_path / "saved")
    package("outside_norm = outside_methods:Norms")
    assert efftune.load(llama(), tmp_path / "saved").recipe == "outside_norm(scale=2.0)"


def test_methods_that_can_be_named_are_saved_without_a_word(tmp_path):
    with warnings.catch_warnings(action="error"):
        efftune.apply(llama(), [LoraMethod(r=2, target_modules=["q_proj"], lora_alpha=4)]).save(tmp_path)
    assert efftune.load(llama(), tmp_path).recipe == "lora(r=2, lora_alpha=4.0, target_modules=('q_proj',))"
