"""A run of ferret from end to end: trained, resumed within a round, shipped as numbers and made again."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from efftune import cli
from efftune.optim.seed_log import SeedLog
from efftune.train.run import train

from .test_run import arguments, options, qa  # noqa: F401  (fixtures)

FERRET = " + ferret(k=2, block=64, local_steps=2)"


@pytest.mark.parametrize(
    "recipe, dtype", [("full", "float32"), ("full", "bf16"), ("lora(r=4)", "float32"), ("lora(r=4)", "bf16")]
)
def test_a_run_is_shipped_as_numbers(options, recipe, dtype, tmp_path, capsys):  # noqa: F811
    settings = options | {"recipe": recipe + FERRET, "dtype": dtype, "save_every": 1}
    train(settings | {"steps": 3})
    run, log, out = str(tmp_path / "run"), str(tmp_path / "log"), str(tmp_path / "again")
    assert cli.main(["export", run, "--seed-log", "--out", log]) == 0
    assert "The last 1 steps are not in it" in capsys.readouterr().out
    Path(log).unlink()

    assert cli.main(["train", "--out", run, "--resume", "--steps", "6"]) == 0  # from within a round
    assert "Resuming from" in capsys.readouterr().out
    assert cli.main(["export", run, "--seed-log", "--out", log]) == 0
    assert "are not in it" not in capsys.readouterr().out
    assert cli.main(["replay", options["model"], log, out]) == 0
    command, file = ("export", "adapter_model.safetensors") if "lora" in recipe else ("merge", "model.safetensors")
    assert cli.main([command, run, "--out", str(tmp_path / "expected")]) == 0
    expected, found = load_file(tmp_path / "expected" / file), load_file(tmp_path / "again" / file)
    assert expected.keys() == found.keys() and all(torch.equal(expected[n], found[n]) for n in expected)


def test_a_log_that_is_longer_than_the_weights_is_refused(options, tmp_path, capsys):  # noqa: F811
    train(options | {"recipe": "lora(r=4) + ferret(k=32, block=64, local_steps=1)"})
    assert cli.main(["export", str(tmp_path / "run"), "--seed-log", "--out", str(tmp_path / "log")]) == 1
    assert "would be longer than the weights" in capsys.readouterr().err and not (tmp_path / "log").exists()


def test_a_log_of_another_recipe_is_refused(options, tmp_path, capsys):  # noqa: F811
    train(options | {"recipe": "full" + FERRET, "steps": 2})
    log = tmp_path / "log"
    assert cli.main(["export", str(tmp_path / "run"), "--seed-log", "--out", str(log)]) == 0
    found, about = SeedLog.load(log)
    for other in ("mezo", "full"):
        found.save(log, about | {"recipe": other})
        assert cli.main(["replay", options["model"], str(log), str(tmp_path / "x")]) == 1
        assert f"its recipe '{other}' leaves no such log" in capsys.readouterr().err
