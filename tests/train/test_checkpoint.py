import errno
import json
import os
import subprocess
import sys
import textwrap

import pytest
import torch

from efftune import EfftuneError
from efftune.train import checkpoint, state
from efftune.train.checkpoint import Damaged, newest_intact, save, steps_in
from efftune.train.loop import learning_rate_factor

from .conftest import llama, packed, trainer

IDENTITY = {"recipe": "full", "base": "b"}


def put(root, step, value=1.0, keep=3, size=4):
    return save(root, step, {"w": torch.full((size,), value)}, {"x": [1, (2, None)]}, IDENTITY, keep)


def test_nested_state_survives_exactly(tmp_path):
    shared = torch.arange(6.0)
    rest = {
        "state": {
            0: {"step": torch.tensor(3.0), "m": shared.view(2, 3)[:, 1:], "codes": torch.ones(3, dtype=torch.uint8)}
        },
        "groups": [{"lr": 0.1, "betas": (0.9, 0.999), "params": [0], "fused": None}],
        "again": shared,
        "inf": float("inf"),
    }
    path = save(tmp_path, 1, {"w": torch.ones(2, dtype=torch.bfloat16)}, rest, IDENTITY, 1)
    step, trained, back = checkpoint.load(path, IDENTITY)
    assert step == 1 and trained["w"].dtype == torch.bfloat16
    assert back["groups"] == rest["groups"] and back["inf"] == float("inf") and list(back["state"]) == [0]
    assert torch.equal(back["state"][0]["m"], rest["state"][0]["m"]) and torch.equal(back["again"], shared)
    assert back["state"][0]["codes"].dtype == torch.uint8
    with pytest.raises(EfftuneError, match="'/odd' in the training state is a object"):
        save(tmp_path, 2, {}, {"odd": object()}, IDENTITY, 1)
    assert [p.name for p in steps_in(tmp_path)] == ["step-00000001"]


def test_the_last_n_are_kept(tmp_path):
    for step in (1, 2, 10, 100):
        put(tmp_path, step, keep=2)
    assert [p.name for p in steps_in(tmp_path)] == ["step-00000010", "step-00000100"]


@pytest.mark.parametrize("name", ["trained.safetensors", "optimizer.safetensors", "state.json"])
@pytest.mark.parametrize("damage", ["truncated", "altered", "deleted"])
def test_damage_is_found_and_the_one_before_is_taken(tmp_path, name, damage):
    put(tmp_path, 1)
    file = put(tmp_path, 2) / name
    content = bytearray(file.read_bytes())
    if damage == "truncated":
        file.write_bytes(content[:-3])
    elif damage == "altered":
        content[-4] ^= 1
        file.write_bytes(content)
    else:
        file.unlink()
    with pytest.raises(Damaged, match="is damaged"):
        checkpoint.load(tmp_path / "step-00000002", IDENTITY)
    path, damaged = newest_intact(tmp_path)
    assert path.name == "step-00000001" and len(damaged) == 1 and "step-00000002" in damaged[0]


def test_a_damaged_later_one_does_not_count_among_the_last(tmp_path, monkeypatch):
    put(tmp_path, 10, keep=1)
    (put(tmp_path, 20, keep=2) / "trained.safetensors").write_bytes(b"")
    put(tmp_path, 12, keep=1)
    path, damaged = newest_intact(tmp_path)
    assert path.name == "step-00000012" and len(damaged) == 1
    assert [p.name for p in steps_in(tmp_path)] == ["step-00000012", "step-00000020"]

    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(checkpoint, "save_file", full)
    with pytest.raises(EfftuneError, match="step-00000012, is intact"):
        put(tmp_path, 14)


def test_keys_that_look_alike_keep_their_tensors(tmp_path):
    rest = {"state": {1: torch.zeros(2), "1": torch.ones(2), "a/b": torch.full((2,), 2.0), "a": {"b": torch.zeros(1)}}}
    _, _, back = checkpoint.load(save(tmp_path, 1, {}, rest, IDENTITY, 1), IDENTITY)
    state = back["state"]
    assert [float(state[key][0]) for key in (1, "1", "a/b")] == [0, 1, 2] and state["a"]["b"].numel() == 1


def sign(path, change):
    content = json.loads((path / "state.json").read_text())
    del content["sha256"]
    change(content)
    (path / "state.json").write_text(json.dumps(content | {"sha256": checkpoint._digest(content)}))


@pytest.mark.parametrize("key", ["step", "identity", "files", "tree"])
def test_a_state_without_an_expected_key_is_a_sentence(tmp_path, key):
    path = put(tmp_path, 1)
    sign(path, lambda content: content.pop(key))
    with pytest.raises(Damaged, match="is damaged"):
        checkpoint.load(path, IDENTITY)


def test_a_state_with_less_in_it_is_a_sentence(tmp_path):
    trainer(run=tmp_path / "run", steps=2).fit()
    (path,) = steps_in(tmp_path / "run/checkpoints")
    sign(path, lambda content: content["identity"].pop("batch_size"))
    with pytest.raises(EfftuneError, match="--batch-size is another one"):
        trainer(run=tmp_path / "run", steps=2, resumed=True).fit()
    sign(path, lambda content: content["identity"].update(batch_size=2))
    sign(path, lambda content: content["tree"]["dict"].pop(0))
    with pytest.raises(EfftuneError, match="lacks 'requires_grad'"):
        trainer(run=tmp_path / "run", steps=2, resumed=True).fit()
    sign(path, lambda content: content.update(tree={"dict": [["a", {"tensor": "none"}]]}))
    with pytest.raises(EfftuneError, match="was altered"):
        trainer(run=tmp_path / "run", steps=2, resumed=True).fit()


def test_another_recipe_or_model_is_refused(tmp_path):
    path = put(tmp_path, 1)
    with pytest.raises(EfftuneError, match=r"the recipe is another one \('full', now 'lora'\)"):
        checkpoint.load(path, IDENTITY | {"recipe": "lora"})
    with pytest.raises(EfftuneError, match="the base model is another one"):
        checkpoint.load(path, IDENTITY | {"base": "c"})


def test_nothing_is_overwritten_when_a_resume_is_refused(tmp_path):
    trainer("lora(r=4)", run=tmp_path / "run").fit()
    other = trainer("lora(r=4)", run=tmp_path / "run", model=llama(seed=5), resumed=True)
    before = {n: t.clone() for n, t in other.model.state_dict().items()}
    with pytest.raises(EfftuneError, match="the base model is another one"):
        other.fit()
    assert all(torch.equal(t, before[n]) for n, t in other.model.state_dict().items())
    with pytest.raises(EfftuneError, match="the recipe is another one"):
        trainer("lora(r=2)", run=tmp_path / "run", resumed=True).fit()


def test_tensors_that_do_not_fit_are_refused_before_any_copy():
    t = trainer("full")
    trained, _ = state.capture(t.tuner, t.optimizer, t.scheduler, t.watch)
    first, last = list(trained)[0], list(trained)[-1]
    trained = {n: torch.zeros_like(x) for n, x in trained.items()}
    trained[last] = torch.zeros(1)
    with pytest.raises(EfftuneError, match="nothing was changed"):
        state.restore_tensors(t.tuner, trained)
    assert t.tuner.named_trained()[first].abs().sum() > 0


def test_a_pickle_is_refused(tmp_path):
    path = put(tmp_path, 1)
    file = path / "trained.safetensors"
    torch.save({"w": torch.ones(4)}, file)
    with pytest.raises(EfftuneError, match="is a pickle"):
        newest_intact(tmp_path)
    file.rename(path / "trained.bin")
    with pytest.raises(EfftuneError, match=r"trained.bin is a pickle"):
        newest_intact(tmp_path)


def test_when_all_are_damaged_the_run_says_so(tmp_path):
    trainer(run=tmp_path / "run").fit()
    for path in steps_in(tmp_path / "run/checkpoints"):
        (path / "state.json").write_text("{}")
    with pytest.raises(EfftuneError, match="No checkpoint in .* is intact"):
        trainer(run=tmp_path / "run", resumed=True).fit()


# A full disk


def test_no_space_left_keeps_the_previous_checkpoint(tmp_path, monkeypatch):
    put(tmp_path, 1)

    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    for module, function in ((checkpoint.os, "fsync"), (checkpoint, "save_file"), (checkpoint.Path, "rename")):
        with monkeypatch.context() as patch:
            patch.setattr(module, function, full)
            with pytest.raises(EfftuneError, match=r"step 2 .*No space left on device.*step-00000001, is intact"):
                put(tmp_path, 2)
    assert [p.name for p in tmp_path.iterdir()] == ["step-00000001"]
    assert newest_intact(tmp_path)[0].name == "step-00000001"
    put(tmp_path, 2)
    assert newest_intact(tmp_path)[0].name == "step-00000002"


def test_a_real_limit_on_the_size_of_files(tmp_path):
    put(tmp_path, 1)
    script = f"""
        import resource, sys
        from pathlib import Path
        import torch
        from efftune import EfftuneError
        from efftune.train.checkpoint import save
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
        try:
            save(Path({str(tmp_path)!r}), 2, {{"w": torch.ones(1_000_000)}}, {{}}, {IDENTITY!r}, 3)
        except EfftuneError as error:
            print(error)
            sys.exit(7)
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(script)], capture_output=True, text=True)
    assert done.returncode == 7, done.stderr
    assert "step 2 could not be written (" in done.stdout and "step-00000001, is intact" in done.stdout
    assert [p.name for p in tmp_path.iterdir()] == ["step-00000001"] and newest_intact(tmp_path)[0] is not None


# Resuming

RECIPES = [
    "full",
    "lora(r=4, lora_dropout=0.3)",
    "lora(r=4, freeze_a=True)",
    "lora(r=4) + lisa(layers=1, interval=2)",
    "lisa(layers=1, interval=3)",
    "int8(group=16) + lora(r=4, lora_dropout=0.1)",
    "mezo",
    "vcas(interval=2, alpha=0.3)",  # a window of two steps is open at the checkpoint
    "lora(r=4) + vcas(interval=0, sample_ratio=0.5, row_ratio=0.5)",
]


def outcome(t, run):
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    kept = ("step", "loss", "lr", "grad_norm", "terms", "epoch")
    metrics = [{key: r[key] for key in kept if key in r} for r in records]
    tensors, rest = state.capture(t.tuner, t.optimizer, t.scheduler, t.watch)
    flat = {}
    tree = checkpoint.to_tree(rest, flat)
    return metrics, {n: x.clone() for n, x in tensors.items()}, {n: x.clone() for n, x in flat.items()}, tree


def same(a, b):
    assert a[0] == b[0] and a[3] == b[3]
    for left, right in zip(a[1:3], b[1:3], strict=True):
        assert left.keys() == right.keys()
        assert all(torch.equal(left[n], right[n]) for n in left)


@pytest.mark.parametrize("recipe", RECIPES)
def test_resumed_equals_uninterrupted_bit_for_bit(tmp_path, recipe):
    straight = trainer(recipe, run=tmp_path / "a")
    straight.fit()
    stopped = trainer(recipe, run=tmp_path / "b")

    def stop(record):
        if record["step"] == 5:
            raise KeyboardInterrupt

    stopped.on_step = stop
    with pytest.raises(KeyboardInterrupt):
        stopped.fit()
    torch.manual_seed(12345)
    torch.rand(3)
    resumed = trainer(recipe, run=tmp_path / "b", resumed=True)
    torch.rand(17)
    resumed.fit()
    assert resumed.step == 8
    same(outcome(straight, tmp_path / "a"), outcome(resumed, tmp_path / "b"))


def test_buffers_that_change_are_part_of_the_state(tmp_path):
    from efftune.train.batches import Data
    from efftune.train.task import Task

    x = torch.randn(32, 4)
    data = Data(list(range(32)), lambda rows: torch.tensor([row[0] for row in rows]))
    task = Task(lambda m, b: m(x[b]).square().sum(), terms=len)

    def make(**how):
        torch.manual_seed(1)
        model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.BatchNorm1d(4), torch.nn.Dropout(0.5))
        return trainer("full", model=model, data=data, task=task, **how)

    make(run=tmp_path / "a").fit()
    straight = make(run=tmp_path / "a", resumed=True)
    straight.fit()
    half = make(run=tmp_path / "b")
    half.on_step = lambda record: (_ for _ in ()).throw(KeyboardInterrupt) if record["step"] == 4 else None
    with pytest.raises(KeyboardInterrupt):
        half.fit()
    resumed = make(run=tmp_path / "b", resumed=True)
    resumed.fit()
    assert torch.equal(straight.model[1].running_mean, resumed.model[1].running_mean)
    assert straight.model[1].running_mean.abs().sum() > 0 and int(resumed.model[1].num_batches_tracked) == 8


def test_the_fingerprint_sees_frozen_weights_and_not_trained_ones():
    model = llama()
    names = {n for n, _ in model.named_parameters() if "q_proj" in n}
    first = state.base_fingerprint(model, names)
    with torch.no_grad():
        model.model.layers[0].self_attn.q_proj.weight.add_(1)
    assert state.base_fingerprint(model, names) == first
    with torch.no_grad():
        model.model.layers[0].self_attn.k_proj.weight.add_(1e-3)
    assert state.base_fingerprint(model, names) != first


def test_metrics_after_the_checkpoint_and_half_lines_are_cut(tmp_path):
    run = tmp_path / "run"
    t = trainer(run=run, data=packed())
    t.fit()
    for path in steps_in(run / "checkpoints"):
        if path.name > "step-00000006":
            checkpoint._remove(path)
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 9, "lo')
    again = trainer(run=run, resumed=True)
    again.resume(again.run)
    steps = [json.loads(line)["step"] for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert again.step == 6 and max(steps) == 6 and steps.count(6) == 1


def test_a_longer_run_follows_its_longer_schedule_at_once(tmp_path):
    rates = []
    trainer(run=tmp_path / "a", steps=4).fit()
    longer = trainer(run=tmp_path / "a", steps=8, resumed=True)
    longer.on_step = lambda record: rates.append(record.get("lr"))
    longer.fit()
    unbroken = learning_rate_factor("cosine", 2, 8)
    assert [r for r in rates if r is not None] == [1e-2 * unbroken(step) for step in range(4, 8)]
