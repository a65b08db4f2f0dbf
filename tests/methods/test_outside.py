"""Methods of other packages: found by their entry points, written and read by name as our own are."""

import sys
import warnings

import pytest
import torch

import efftune
from efftune import EfftuneError
from efftune.methods import available
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
