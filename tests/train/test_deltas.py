"""`efftune delta` and `efftune export --as`: what sparse runs trained, thinned out, added up, written anew."""

import re
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import efftune
from efftune import cli
from efftune.interop.changes import compose
from efftune.interop.sparse import FILE
from tests.budget import assert_within_budget

from .test_run import arguments, options, qa  # noqa: F401  (fixtures)


def load(folder, dtype=torch.bfloat16):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)


@torch.no_grad()
def logits(model):
    return model.eval()(input_ids=torch.arange(3, 15)[None]).logits


@pytest.fixture
def folder(model_folder, tmp_path):
    """Makes a folder of entries that have moved."""

    def make(name, seed, dtype=torch.bfloat16, recipe="shira(density=0.1)"):
        tuner = efftune.apply(load(model_folder, dtype), recipe)
        draw = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for p in tuner.named_trained().values():
                p.add_(torch.randn(p.shape, generator=draw, dtype=torch.float32) / 10)
        tuner.save(tmp_path / name)
        return str(tmp_path / name)

    return make


def test_a_sparse_run_is_exported_and_thinned_out(options, model_folder, tmp_path, capsys):  # noqa: F811
    peft = pytest.importorskip("peft")
    run, base = str(tmp_path / "run"), str(model_folder)
    assert cli.main(arguments(options | {"recipe": "shira(density=0.1)", "steps": 2, "dtype": "float32"})) == 0
    merged = efftune.load(load(base, torch.float32), run).merge()
    ours = logits(merged)
    for kind, settings in (("shira", []), ("lora", ["--rank", "32"])):
        capsys.readouterr()
        assert cli.main(["export", run, "--as", kind, *settings, "--out", str(tmp_path / kind)]) == 0
        printed = capsys.readouterr().out
        theirs = logits(peft.PeftModel.from_pretrained(load(base, torch.float32), tmp_path / kind))
        if kind == "shira":
            assert torch.equal(theirs, ours)
        else:
            assert "‖ΔW - BA‖ / ‖ΔW‖" in printed and "  0.0000  of all layers together" in printed
            assert_within_budget(theirs, logits(merged.double()), ours)
    thin = ["delta", run, "--model", base, "--keep", "0.1", "--drop-largest", "0.01", "--ternary", "--out"]
    assert cli.main([*thin, str(tmp_path / "thin")]) == 0
    assert "as a sparse folder; efftune.load takes it" in capsys.readouterr().out
    small, whole = (f.stat().st_size for f in (tmp_path / "thin" / FILE, tmp_path / "run" / "adapter" / FILE))
    assert small < whole and not torch.equal(
        logits(efftune.load(load(base, torch.float32), tmp_path / "thin").merge()), ours
    )


def test_folders_are_added_and_subtracted(folder, model_folder, tmp_path, capsys):
    base, out = str(model_folder), str(tmp_path / "merged")
    a, b, c = (folder(name, seed) for seed, name in enumerate("abc"))
    assert cli.main(["delta", a, b, "--subtract", c, "--model", base, "--out", out]) == 0
    assert "as a whole model; from_pretrained takes it" in capsys.readouterr().out
    right = compose(load(base), [b, a], [c]).state_dict()
    assert all(torch.equal(w, right[name]) for name, w in load(out).state_dict().items())
    assert (tmp_path / "merged" / "tokenizer.json").exists()
    assert cli.main(["delta", a, b, "--model", base, "--as", "sparse", "--out", str(tmp_path / "sum")]) == 0
    right = compose(load(base), [a, b]).state_dict()
    for name, w in efftune.load(load(base), tmp_path / "sum").merge().state_dict().items():
        torch.testing.assert_close(w, right[name], rtol=torch.finfo(w.dtype).eps, atol=1e-7)


@pytest.mark.parametrize(
    "changed, words",
    [
        ("nowhere", "There is no nowhere/sparse.safetensors; give a folder"),
        ("F32", "are of weights in bfloat16, float32, and a model is loaded here in one dtype"),
        ("--keep 0", "Shares of changes lie"),
        ("--keep 0.9 --drop-largest 0.2", "more than there is"),
        ("--ternary --alpha 0", "a positive number, not alpha=0"),
        ("--model ./nowhere", "nowhere"),
        ("--model OTHER", "_proj: it was trained on other weights"),
        ("--as lora --rank 0", "a rank of at least 1, not 0"),
        ("--alpha 2", "--alpha is a setting of --ternary; add that"),
        ("--rank 4", "--rank is a setting of --as lora; add that"),
        ("--out A", "is not empty; give another folder."),
    ],
)
def test_bad_input_is_one_sentence_and_nothing_is_written(changed, words, folder, model_folder, tmp_path, capsys):
    names = {"A": folder("a", 0), "OTHER": str(tmp_path / "other")}
    if "F32" in changed:
        names["F32"] = folder("f", 0, torch.float32)
    if "OTHER" in changed:
        shutil.copytree(model_folder, tmp_path / "other")
        file = tmp_path / "other" / "model.safetensors"
        save_file({name: w * 1.5 for name, w in load_file(file).items()}, file, metadata={"format": "pt"})
    given = [names.get(word, word) for word in changed.split()]
    out = tmp_path / "out"
    files, settings = ([], given) if given[0].startswith("--") else (given, [])
    capsys.readouterr()
    line = ["delta", names["A"], *files, "--model", str(model_folder), "--out", str(out), *settings]
    assert cli.main(line) == 1
    error = capsys.readouterr().err
    assert re.search(words, error) and error.count("\n") == 1
    assert not out.exists()
