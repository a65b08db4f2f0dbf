"""The command from end to end, on a tiny model."""

import json
import random
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import efftune
from efftune import cli
from efftune.train import checkpoint, default_job, models, rundir
from efftune.train.config import TrainConfig
from efftune.train.run import train

from .conftest import WORDS, llama

PNG = b"\x89PNG"


def sentence(k):
    draw = random.Random(k)
    return " ".join(draw.choice(WORDS) for _ in range(6))


@pytest.fixture
def qa(write):
    return write("qa.jsonl", [{"question": sentence(i), "answer": sentence(i + 99)} for i in range(30)])


@pytest.fixture
def options(model_folder, qa, tmp_path):
    return {
        "model": str(model_folder), "data": str(qa), "out": str(tmp_path / "run"), "seq_len": 64, "batch_size": 2,
        "steps": 6, "lr": 1e-2, "save_every": 2, "sample_tokens": 5, "recipe": "lora(r=4)",
    }  # fmt: skip


def arguments(options):
    return ["train", *(part for name, value in options.items() for part in (f"--{name.replace('_', '-')}", str(value)))]


def test_a_run_leaves_its_directory(options, tmp_path, capsys):
    assert cli.main(arguments(options | {"eval_every": 3})) == 0
    run = tmp_path / "run"
    assert {p.name for p in run.iterdir()} >= {"config.json", "metrics.jsonl", "loss.png", "memory.png", "report.html"}
    assert (run / "loss.png").read_bytes()[:4] == (run / "memory.png").read_bytes()[:4] == PNG
    assert {p.name for p in (run / "adapter").iterdir()} >= {"adapter_config.json", "adapter_model.safetensors"}
    assert len(checkpoint.steps_in(run / "checkpoints")) == 2
    page = (run / "report.html").read_text()
    assert page.count("data:image/png;base64,") == 2 and "http" not in page.replace("http-equiv", "")
    assert "held-out loss" in page and "A sample after" in page and "lora(r=4)" in page
    printed = capsys.readouterr().out
    assert "held-out loss" in printed and "a sample before" in printed and "recipe     lora(r=4)" in printed
    held = {r["when"]: r for r in rundir.RunDir(run, False).records() if r.get("when") in ("memory", "plain")}
    parts = ("weights", "gradients", "optimizer", "saved")
    assert all(0 < held["memory"][part] < held["plain"][part] for part in parts if part != "weights")
    assert held["plain"]["weights"] < held["memory"]["weights"] < 1.2 * held["plain"]["weights"]  # the adapters


def test_a_directory_with_something_in_it_is_refused(options, tmp_path, capsys):
    (tmp_path / "run").mkdir()
    (tmp_path / "run/precious.txt").write_text("x")
    assert cli.main(arguments(options)) == 1
    error = capsys.readouterr().err
    assert "is not empty; add --resume" in error and error.count("\n") == 1
    assert [p.name for p in (tmp_path / "run").iterdir()] == ["precious.txt"]


def test_resume_goes_on_with_the_settings_of_the_run(options, tmp_path):
    train(options | {"steps": 3})
    result = train({"out": options["out"], "resume": True, "steps": 6})
    assert result["after"]["step"] == 6 and result["after"]["eval_loss"] < result["before"]["eval_loss"]
    assert json.loads((tmp_path / "run/config.json").read_text())["model"] == options["model"]
    again = train({"out": options["out"], "resume": True})
    assert again["after"]["eval_loss"] == result["after"]["eval_loss"]


def contents(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_refused_resume_touches_nothing(options, tmp_path, write, capsys):
    other = str(write("other.jsonl", [{"question": sentence(i), "answer": sentence(i)} for i in range(30)]))
    assert cli.main(arguments(options | {"steps": 2})) == 0
    run = tmp_path / "run"
    before = contents(run)
    resume = ["train", "--resume", "--out", str(run), "--steps", "4"]
    for change, said in (
        (["--recipe", "lora(r=2)"], "the recipe is another one ('lora(r=4)', now 'lora(r=2)')"),
        (["--data", other], "the training data is another one;"),
        (["--eval-data", other], "the held-out data is another one;"),
        (["--batch-size", "4"], "--batch-size is another one (2, now 4)"),
        (["--grad-accum", "2"], "--grad-accum is another one"),
        (["--seq-len", "60"], "--seq-len is another one"),
        (["--seed", "1"], "--seed is another one"),
        (["--no-packing"], "--packing is another one"),
        (["--too-long", "drop"], "--too-long is another one"),
        (["--eval-fraction", "0.2"], "--eval-fraction is another one"),
        (["--lr", "1e-3"], "--lr is another one"),
        (["--tensorboard", "--clip", "2"], "--clip is another one"),
    ):
        assert cli.main([*resume, *change]) == 1
        error = capsys.readouterr().err
        assert said in error and error.count("\n") == 1, error
        assert contents(run) == before
    assert cli.main([*resume, "--eval-every", "1", "--save-every", "1"]) == 0
    assert [p.name for p in checkpoint.steps_in(run / "checkpoints")] == ["step-00000003", "step-00000004"]


def test_paths_are_kept_absolute(options, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    train(options | {"data": "qa.jsonl", "out": "run", "steps": 1})
    monkeypatch.chdir("/")
    saved = json.loads((tmp_path / "run/config.json").read_text())
    assert saved["data"] == str(tmp_path / "qa.jsonl") and saved["out"] == str(tmp_path / "run")
    assert train({"out": str(tmp_path / "run"), "resume": True, "steps": 2})["after"]["step"] == 2


def test_settings_that_were_altered_are_a_sentence(options, tmp_path, capsys):
    train(options | {"steps": 1})
    file = tmp_path / "run/config.json"
    saved = json.loads(file.read_text())
    for altered, said in (
        ({k: v for k, v in saved.items() if k != "batch_size"}, "config.json lacks 'batch_size'"),
        ({k: v for k, v in saved.items() if k != "labels"}, "config.json lacks 'labels'"),
        (saved | {"lr": "fast"}, "--lr is 'fast'; it must be of type float"),
        (saved | {"batch_size": None}, "--batch-size is None; it must be of type int"),
        ([], "holds no JSON object"),
    ):
        file.write_text(json.dumps(altered))
        for command in (["train", "--resume", "--out", options["out"]], ["merge", options["out"], "--out", "x"]):
            assert cli.main(command) == 1
            error = capsys.readouterr().err
            assert said in error and error.count("\n") == 1


def test_runs_that_start_together_take_different_directories(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    chosen = [rundir.choose(None, resume=False) for _ in range(2)]
    made = [rundir.create(path, numbered=True).as_posix() for path in chosen]
    assert made == ["runs/train-001", "runs/train-002"]
    Path("file").write_text("")
    with pytest.raises(efftune.EfftuneError, match="cannot be written"):
        rundir.create(Path("file"), numbered=False)


def test_a_finished_run_can_be_exported_and_merged(options, tmp_path):
    result = train(options)
    run = str(result["out"])
    Path(options["data"]).unlink()  # neither needs it
    assert cli.main(["export", run, "--out", str(tmp_path / "adapter")]) == 0
    ours = load_file(tmp_path / "adapter/adapter_model.safetensors")
    theirs = load_file(result["out"] / "adapter/adapter_model.safetensors")
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[n], theirs[n]) for n in ours)
    assert cli.main(["merge", run, "--out", str(tmp_path / "merged")]) == 0
    merged, _ = models.load_model(str(tmp_path / "merged"), "float32", None, 1)
    ids = torch.arange(3, 20)[None]
    for folder in (tmp_path / "adapter", run):  # the run's own stands for its adapter
        base, _ = models.load_model(options["model"], "float32", None, 1)
        efftune.load(base, folder)
        with torch.no_grad():
            torch.testing.assert_close(merged(ids).logits, base(ids).logits, rtol=1e-4, atol=1e-4)
    assert cli.main(["merge", run, "--out", str(tmp_path / "merged")]) == 1


@pytest.mark.parametrize("recipe", ["full", "lora(r=4)"])
def test_classification(write, tmp_path, tokenizer, recipe):
    from transformers import BertConfig, BertModel

    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    torch.manual_seed(0)
    BertModel(BertConfig(vocab_size=300, max_position_embeddings=32, initializer_range=0.1, **sizes)).save_pretrained(
        tmp_path / "bert"
    )
    tokenizer.save_pretrained(tmp_path / "bert")
    rows = [f"{sentence(i)} {('red', 'blue')[i % 2]}\t{i % 2}" for i in range(64)]
    path = write("a.tsv", "\n".join(rows) + "\n")
    how = {"recipe": recipe, "seq_len": 32, "steps": 60, "batch_size": 16, "lr": 1e-2, "eval_fraction": 0.2}
    result = train({"model": str(tmp_path / "bert"), "data": str(path), "out": str(tmp_path / "run"), **how})
    assert (
        result["after"]["eval_accuracy"] >= 0.75
        and result["after"]["eval_accuracy"] > result["before"]["eval_accuracy"]
    )
    assert "held-out accuracy" in (tmp_path / "run/report.html").read_text()
    path.unlink()
    assert cli.main(["merge", str(tmp_path / "run"), "--out", str(tmp_path / "merged")]) == 0
    merged, new = models.load_model(str(tmp_path / "merged"), "float32", ["0", "1"], 1)
    assert new == [] and json.loads((tmp_path / "merged/config.json").read_text())["id2label"] == {"0": "0", "1": "1"}


@pytest.mark.parametrize("recipe", ["mezo", "lora(r=4) + mezo(momentum=0.5)"])
def test_a_zeroth_order_run_is_shipped_as_seeds(options, recipe, tmp_path, capsys):
    assert cli.main(arguments(options | {"recipe": recipe, "lr": 1e-3, "weight_decay": 0.01})) == 0
    run, log, out = str(tmp_path / "run"), str(tmp_path / "log"), str(tmp_path / "again")
    assert cli.main(["export", run, "--seed-log", "--out", log]) == 0
    assert Path(log).stat().st_size < 2000
    assert cli.main(["replay", options["model"], log, out]) == 0
    command, file = ("export", "adapter_model.safetensors") if "lora" in recipe else ("merge", "model.safetensors")
    assert cli.main([command, run, "--out", str(tmp_path / "expected")]) == 0
    expected, found = load_file(tmp_path / "expected" / file), load_file(tmp_path / "again" / file)
    assert expected.keys() == found.keys() and all(torch.equal(expected[n], found[n]) for n in expected)
    assert "after 12 directions" in capsys.readouterr().out  # and a decay for each

    assert cli.main(["export", run, "--seed-log", "--out", log]) == 1
    assert "exists already" in capsys.readouterr().err
    data = Path(log).read_bytes()
    Path(log).write_bytes(data[:-40])
    assert cli.main(["replay", options["model"], log, str(tmp_path / "cut")]) == 0
    assert "after 9 directions" in (printed := capsys.readouterr().out) and "cut short: it had 12" in printed
    assert cli.main(["replay", "", log, str(tmp_path / "x")]) == 1
    assert "model that the run began with" in capsys.readouterr().err
    other = llama(seed=5)
    shutil.copytree(options["model"], tmp_path / "other", ignore=shutil.ignore_patterns("*.safetensors"))
    other.save_pretrained(tmp_path / "other")
    assert cli.main(["replay", str(tmp_path / "other"), log, str(tmp_path / "x")]) == 1
    assert "is not the model that" in capsys.readouterr().err and not (tmp_path / "x").exists()


def test_a_run_with_gradients_has_no_seeds(options, tmp_path, capsys):
    assert cli.main(arguments(options | {"steps": 1})) == 0
    assert cli.main(["export", str(tmp_path / "run"), "--seed-log", "--out", str(tmp_path / "log")]) == 1
    assert "leaves no seeds" in capsys.readouterr().err
    assert cli.main(["replay", options["model"], str(tmp_path / "qa.jsonl"), str(tmp_path / "x")]) == 1
    assert "is no seed log" in capsys.readouterr().err


def test_tensorboard_on_request(options, tmp_path):
    pytest.importorskip("tensorboard")
    train(options | {"tensorboard": True, "steps": 2})
    assert list((tmp_path / "run/tensorboard").glob("events*"))


@pytest.mark.parametrize("task", [{}, {"dtype": "bf16"}, {"packing": False}, {"recipe": "mezo", "lr": 1e-4}])
def test_other_ways_to_run(options, task):
    after = train(options | task | {"steps": 2})["after"]
    assert after["eval_loss"] > 0 and "sample" in after


@pytest.mark.parametrize(
    "change, sentence",
    [
        ({"data": "nothing.jsonl"}, "nothing.jsonl does not exist"),
        ({"seq_len": 100}, "--seq-len 100 is more than this model allows; use --seq-len 64 or less"),
        ({"seq_len": 12}, "raise --seq-len"),
        ({"recipe": "lroa(r=4)"}, "did you mean 'lora'"),
        ({"model": "./nowhere"}, "--model ./nowhere is not a folder"),
        ({"lr": -1}, "--lr is -1.0; it must be above 0"),
        ({"eval_fraction": 1.5}, "--eval-fraction is 1.5"),
        ({"device": "nonsense"}, "--device nonsense cannot be used"),
        ({"task": "classification"}, "no column 'label'"),
    ],
)
def test_bad_settings_are_one_sentence(options, change, sentence, capsys):
    assert cli.main(arguments(options | change)) == 1
    error = capsys.readouterr().err
    assert sentence in error and error.count("\n") == 1 and error.startswith("efftune: ")
    assert not Path(options["out"]).exists()  # so that the corrected command can be given as it is


def test_a_model_without_data_and_a_resume_without_a_run(options, tmp_path, capsys, monkeypatch):
    assert cli.main(["train", "--model", options["model"], "--out", str(tmp_path / "x")]) == 1
    assert "--model needs --data" in capsys.readouterr().err
    assert cli.main(["train", "--resume", "--out", str(tmp_path / "y")]) == 1
    assert "finds no run" in capsys.readouterr().err
    monkeypatch.chdir(tmp_path)
    assert cli.main(["train", "--resume"]) == 1
    assert "finds no run in runs/" in capsys.readouterr().err


def test_a_model_of_pickles_is_refused(options, tmp_path, model_folder, capsys):
    shutil.copytree(model_folder, tmp_path / "old", ignore=shutil.ignore_patterns("*.safetensors"))
    torch.save(llama().state_dict(), tmp_path / "old/pytorch_model.bin")
    assert cli.main(arguments(options | {"model": tmp_path / "old"})) == 1
    assert "is a pickle" in capsys.readouterr().err


def test_a_tokenizer_without_padding(options, tmp_path, model_folder, tokenizer, capsys):
    import copy

    other = copy.deepcopy(tokenizer)
    other.pad_token = None
    shutil.copytree(model_folder, tmp_path / "m")
    other.save_pretrained(tmp_path / "m")
    assert models.load_tokenizer(str(tmp_path / "m")).pad_token == "<end>"
    other.eos_token = None
    other.save_pretrained(tmp_path / "m")
    assert cli.main(arguments(options | {"model": tmp_path / "m"})) == 1
    assert "neither a padding nor an end token" in capsys.readouterr().err


def test_a_new_head_that_the_recipe_freezes_is_refused(write, tmp_path, model_folder, capsys):
    path = write("a.tsv", "".join(f"{sentence(i)}\t{i % 2}\n" for i in range(20)))
    command = [
        "train",
        "--model",
        str(model_folder),
        "--data",
        str(path),
        "--out",
        str(tmp_path / "r"),
        "--seq-len",
        "64",
    ]
    assert cli.main([*command, "--recipe", "full(target_modules='q_proj')"]) == 1
    assert "does not train it; add full(target_modules='score')" in capsys.readouterr().err


def test_a_damaged_newest_checkpoint_is_reported_and_the_one_before_taken(options, tmp_path, capsys):
    train(options)
    newest = checkpoint.steps_in(tmp_path / "run/checkpoints")[-1]
    file = newest / "trained.safetensors"
    file.write_bytes(file.read_bytes()[:100])
    assert train({"out": options["out"], "resume": True})["after"]["step"] == 6
    printed = capsys.readouterr().out
    assert "step-00000006 is damaged (trained.safetensors" in printed and "Resuming from" in printed
    checkpoint.verify(newest)


def test_the_default_job_at_a_small_size(tmp_path, monkeypatch):
    monkeypatch.setattr(default_job, "PRETRAINING", default_job.PRETRAINING | {"steps": 2, "rows": 2, "tokens": 32})
    monkeypatch.setattr(default_job, "MODEL", default_job.MODEL | {"hidden_size": 32, "num_hidden_layers": 1})
    monkeypatch.setattr(default_job, "sources", lambda: ["def f(x):\n    return x + 1\n" * 50] * 4)
    monkeypatch.chdir(tmp_path)
    result = train({"steps": 2, "eval_rows": 4})
    assert result["out"].as_posix() == "runs/train-001" and result["after"]["sample"].startswith("The try statement")
    assert TrainConfig.load_settings(result["out"] / "config.json")[0]["recipe"] == default_job.SETTINGS["recipe"]
    monkeypatch.setattr(default_job, "pretrain", None)  # cached
    assert train({"steps": 1, "eval_rows": 4})["out"].as_posix() == "runs/train-002"
    assert train({"resume": True, "steps": 2})["out"].as_posix() == "runs/train-002"


def test_a_cache_that_fails_half_way_leaves_nothing(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))

    def half(folder):
        (folder / "x").write_text("x")
        raise OSError(28, "No space left on device")

    with pytest.raises(efftune.EfftuneError, match="No space left on device.*set XDG_CACHE_HOME"):
        default_job.cached("thing", {}, half)
    assert list((tmp_path / "efftune").iterdir()) == []


def test_a_cache_that_another_process_filled_first_is_taken(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))

    def make(folder):
        (folder / "x").write_text("ours")
        rename = Path.rename

        def late(self, target):
            Path(target).mkdir()
            (Path(target) / "x").write_text("theirs")
            return rename(self, target)

        monkeypatch.setattr(Path, "rename", late)

    assert (default_job.cached("thing", {}, make) / "x").read_text() == "theirs"
    assert len(list((tmp_path / "efftune").iterdir())) == 1


def test_the_other_commands(capsys):
    assert cli.main(["methods"]) == 0 and "lora(r=16" in capsys.readouterr().out
    assert cli.main(["info"]) == 0 and "torch" in capsys.readouterr().out
    assert cli.main(["bench", "nothing-like-this"]) == 1
    assert cli.main(["merge", "nowhere", "--out", "elsewhere"]) == 1
    assert "nowhere is no run directory" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        cli.main(["train", "--help"])
    assert "--too-long {error,truncate,drop}" in capsys.readouterr().out


def test_importing_efftune_imports_none_of_the_trainers_libraries():
    code = "import sys, efftune; print({'transformers', 'datasets', 'matplotlib', 'tokenizers'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"
