"""A CPU trains with one thread or with all, whichever is faster, and a resumed run with as many as it began with."""

import json
import time

import pytest
import torch

from efftune.train import run as runs
from efftune.train.threads import use_faster


@pytest.fixture(autouse=True)
def three_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("fast", [1, 3])
def test_the_faster_number_stays(fast):
    seconds = use_faster(lambda: time.sleep(0.001 if torch.get_num_threads() == fast else 0.02))
    assert torch.get_num_threads() == fast and set(seconds) == {1, 3}
    assert min(seconds, key=seconds.get) == fast


@pytest.mark.parametrize("calls", range(3))
def test_a_call_that_fails_leaves_the_number(calls):
    """The first with all threads, the second with one."""
    left = iter(range(calls))
    with pytest.raises(StopIteration):
        use_faster(lambda: next(left))
    assert torch.get_num_threads() == 3


def test_one_thread_is_not_timed():
    torch.set_num_threads(1)
    assert use_faster(lambda: pytest.fail("called")) == {} and torch.get_num_threads() == 1


def test_a_run_keeps_its_number(model_folder, write, tmp_path, monkeypatch, capsys):
    data = write("qa.jsonl", [{"question": "the cat", "answer": "sat on the mat"}] * 8)
    given = {
        "model": str(model_folder), "data": str(data), "out": str(tmp_path / "run"), "seq_len": 64, "batch_size": 2,
        "steps": 1, "sample_tokens": 0,
    }  # fmt: skip
    draws = []

    def choose(call):
        before = torch.get_rng_state()
        call()
        draws.append(torch.equal(before, torch.get_rng_state()))
        torch.set_num_threads(1)
        return {1: 0.01, 3: 0.02}

    monkeypatch.setattr(runs, "use_faster", choose)
    runs.train(given)
    assert "CPU threads: 1 (a batch takes 10 ms with 1, 20 ms with 3" in capsys.readouterr().out
    assert draws == [True]  # timing draws nothing
    torch.set_num_threads(3)
    monkeypatch.setattr(runs, "use_faster", lambda call: pytest.fail("a resumed run is not timed"))
    runs.train({"out": given["out"], "resume": True, "steps": 2})
    assert torch.get_num_threads() == 1
    runs.train(given | {"out": str(tmp_path / "other"), "threads": 2})
    assert torch.get_num_threads() == 2 and json.loads((tmp_path / "other" / "config.json").read_text())["threads"] == 2
