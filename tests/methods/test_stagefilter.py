"""StageFilter: what each stage runs, what trains, and what the predictor learns."""

import math

import pytest
import torch

import efftune
from efftune import EfftuneError
from efftune.methods.loss.stagefilter import BUCKETS, Seen, StageFilter, features, learn, probability, row_loss, take
from efftune.train.task import CAUSAL_LM
from tests.methods.models import batch, llama


def hugging_face(model, data):
    return model(**data).loss


def rows(seed, count=4):
    ids = batch(seed, rows=count)
    return {"input_ids": ids, "labels": ids}


def tuned(settings="window=2", recipe="lora(r=4)"):
    torch.manual_seed(0)
    tuner = efftune.apply(llama(), f"{recipe} + stagefilter({settings})")
    return tuner, tuner.optimizer(lr=1e-2)


def test_the_first_stage_trains_whole_and_the_second_the_hard_rows_alone():
    for loss in (hugging_face, CAUSAL_LM.loss):
        tuner, optimizer = tuned()
        plain = efftune.apply(llama(), "lora(r=4)")
        torch.manual_seed(0)
        plain.model.load_state_dict(tuner.model.state_dict())
        for step in range(2):
            tuner.backward(rows(step), loss)
            plain.backward(rows(step), loss)
        for p, q in zip(tuner.named_trained().values(), plain.named_trained().values(), strict=True):
            assert torch.equal(p.grad, q.grad)
        seen = tuner.run.states["stagefilter"]
        threshold = sum(seen.losses) / 2
        each = row_loss(loss, tuner.model)
        data = rows(2)
        losses = [each(take(data, [i]))[0] for i in range(4)]
        hard = [i for i, value in enumerate(losses) if value >= threshold]
        assert 0 < len(hard) < 4
        for t in (tuner, plain):
            for p in t.named_trained().values():
                p.grad = None
        value = tuner.backward(data, loss)
        expected = plain.backward(take(data, hard), loss)
        whole = float(loss(plain.model, data).detach())  # what is shown is of all rows, whatever trains
        assert float(value) == pytest.approx(whole, rel=1e-5) and float(expected) != pytest.approx(whole, rel=1e-3)
        for p, q in zip(tuner.named_trained().values(), plain.named_trained().values(), strict=True):
            assert torch.equal(p.grad, q.grad)
        assert seen.done == [8 + len(hard), 4 - len(hard), 0] and seen.losses[-1] == pytest.approx(sum(losses) / 4)


def test_the_loss_of_a_row_is_the_mean_over_its_tokens_and_leaves_no_trace():
    model, data = llama().train(), rows(0)
    before, state = {n: b.clone() for n, b in model.named_buffers()}, torch.get_rng_state()
    logits = model(input_ids=data["input_ids"]).logits[:, :-1].detach().double()
    terms = torch.nn.functional.cross_entropy(logits.flatten(0, 1), data["labels"][:, 1:].flatten(), reduction="none")
    for loss in (hugging_face, CAUSAL_LM.loss):
        for i in range(4):
            mean, value = row_loss(loss, model)(take(data, [i]))
            assert mean == pytest.approx(float(terms.view(4, -1)[i].mean()), rel=1e-5)
            assert value == pytest.approx(mean * (1 if loss is hugging_face else 11), rel=1e-5)
    assert row_loss(lambda m, b: torch.tensor(3.0), model)(data) == (3.0, 3.0)
    assert torch.equal(state, torch.get_rng_state()) and model.training
    assert all(torch.equal(b, before[n]) for n, b in model.named_buffers())


def test_rows_that_are_predicted_easy_do_not_run():
    """Rows with token 1 are easy and rows with token 2 hard: the predictor finds out, and then looks at a few."""
    seen = Seen()
    tokens = [torch.tensor([1, 7]), torch.tensor([2, 7])]
    for turn in range(400):
        learn(seen, tokens[turn % 2], probability(seen, tokens[turn % 2]), turn % 2 == 1)
    assert seen.log_loss < 0.1 and probability(seen, tokens[0]) < 0.05 and probability(seen, tokens[1]) > 0.95
    method, calls = StageFilter(look=0.25), []

    def loss(model, data):
        calls.append(len(data["input_ids"]))
        return model.weight.sum() * 0 + (10.0 if bool((data["input_ids"] == 2).any()) else 0.0)

    model = torch.nn.Linear(2, 2)
    tuner = efftune.apply(torch.nn.Sequential(model), [method])
    tuner.optimizer(lr=0.1)
    vars(tuner.run.states["stagefilter"]).update(vars(seen), losses=[5.0] * 16, done=[0, 0, 0])
    data = {"input_ids": torch.tensor([[1, 7]] * 200 + [[2, 7]] * 4)}
    tuner.backward(data, lambda m, b: loss(m[0], b))
    trained, forward, skipped = tuner.run.states["stagefilter"].done
    assert trained == 4 and calls[-1] == 4 and len(calls) == 4 + forward + 1
    assert skipped == 200 - forward and 30 < forward < 70  # a quarter is looked at


def test_a_run_trains_fewer_rows_and_its_loss_falls():
    tuner, optimizer = tuned("window=4", "full")
    losses = []
    for step in range(40):
        optimizer.zero_grad()
        tuner.backward(rows(step % 5), hugging_face)
        optimizer.step()
        losses.append(tuner.run.states["stagefilter"].losses[-1])
    trained, forward, skipped = tuner.run.states["stagefilter"].done
    assert trained + forward + skipped == 160 and trained < 120 and losses[-1] < 0.95 * losses[0]
    assert f"{trained} rows trained, {forward} forward only" in tuner.summary()


def test_a_resumed_run_goes_on_as_it_was():
    tuner, optimizer = tuned()
    for step in range(5):
        tuner.backward(rows(step), hugging_face)
        optimizer.step()
    again, resumed = tuned()
    again.model.load_state_dict(tuner.model.state_dict())
    resumed.load_state_dict(optimizer.state_dict())
    for t in (tuner, again):
        for p in t.named_trained().values():
            p.grad = None
    assert torch.equal(tuner.backward(rows(9), hugging_face), again.backward(rows(9), hugging_face))
    first, second = tuner.state_dict()["methods"]["stagefilter"], again.state_dict()["methods"]["stagefilter"]
    assert torch.equal(first.pop("tokens"), second.pop("tokens")) and first == second


def test_packed_rows_take_their_samples_with_them():
    data = {
        "input_ids": torch.arange(12).view(3, 4),
        "labels": torch.arange(12).view(3, 4),
        "sample_ids": torch.tensor([5, 6, 7, 8]),
        "sample_spans": torch.tensor([[0, 0, 4], [1, 0, 2], [1, 2, 2], [2, 0, 3]]),
        "note": "kept",
    }
    taken = take(data, [1, 2])
    assert taken["input_ids"].tolist() == [[4, 5, 6, 7], [8, 9, 10, 11]] and taken["note"] == "kept"
    assert taken["sample_ids"].tolist() == [6, 7, 8]
    assert taken["sample_spans"].tolist() == [[0, 0, 2], [0, 2, 2], [1, 0, 3]]
    assert data["sample_spans"][1, 0] == 1
    assert [row.tolist() for row in features({"input_ids": torch.tensor([[3, 3, BUCKETS + 1]])})] == [[1, 3]]


def test_bad_settings_and_batches_are_refused():
    for settings in ("window=0", "look=1.5", "confident=-1.0"):
        with pytest.raises(EfftuneError, match="needs window >= 1"):
            efftune.apply(llama(), f"lora + stagefilter({settings})")
    tuner, _ = tuned()
    for data in (torch.randn(3, 4), {"x": batch()}, None):
        with pytest.raises(EfftuneError, match="stagefilter takes token ids"):
            tuner.backward(data, hugging_face)
    assert math.isclose(Seen().log_loss, math.log(2))


def test_a_loop_of_its_own_is_told():
    tuner, optimizer = tuned()
    hugging_face(tuner.model, rows(0)).backward()
    with pytest.warns(UserWarning, match="every sample trains"):
        optimizer.step()
