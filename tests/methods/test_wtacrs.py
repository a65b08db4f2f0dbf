"""wtacrs: where its scores come from, that the user can see it, and what it refuses."""

import pytest
import torch

import efftune
from efftune import EfftuneError
from efftune.linear import Linear
from efftune.linear.keep.sampled import Sampled
from efftune.methods.sampled._scores import FLOOR, TokenScores
from tests.methods.models import Perceptron, batch, llama, loss_fn


def dict_loss(model, data):
    return loss_fn(model, data["input_ids"])


def test_scores_are_remembered_by_sample():
    scores = TokenScores()
    ids = torch.zeros(2, 3, dtype=torch.int64)
    first = {"input_ids": ids, "sample_ids": torch.tensor([7, 9])}
    scores.begin(first)
    assert scores.of_rows(torch.zeros(2, 3, 4)) is None  # nothing is known
    dh = torch.zeros(2, 3, 4)
    dh[0, 1, 0], dh[1, 2, 0] = 3.0, 1.0
    scores.observe(dh)
    scores.observe(dh)  # of two blocks
    scores.end()
    mean = 2**0.5 * 4 / 6
    scores.begin({"input_ids": ids, "sample_ids": torch.tensor([9, 5])})  # 5 is new and counts as the mean
    expected = torch.tensor([0, 0, 2**0.5 / mean, 1, 1, 1]) + FLOOR
    torch.testing.assert_close(scores.of_rows(torch.zeros(2, 3, 4)), expected, rtol=1e-3, atol=1e-3)
    assert scores.of_rows(torch.zeros(2, 4)) is None  # one row a sample: not tokens
    assert scores.batches == {"scored": 1, "new": 1, "without_ids": 0}


def test_packed_rows_have_spans():
    scores = TokenScores()
    spans = torch.tensor([[0, 0, 2], [0, 2, 3], [1, 0, 4]])
    data = {"input_ids": torch.zeros(2, 5), "sample_ids": torch.tensor([1, 2, 3]), "sample_spans": spans}
    scores.begin(data)
    scores.observe(torch.arange(10.0).view(2, 5, 1))
    scores.end()
    mean = 4.5
    assert [t.tolist() for t in scores.table.values()] == [
        pytest.approx([x / mean for x in values], rel=1e-3) for values in ([0, 1], [2, 3, 4], [5, 6, 7, 8])
    ]
    again = TokenScores()
    again.load_state_dict(scores.state_dict(), torch.device("cpu"))
    assert all(torch.equal(again.table[i], scores.table[i]) for i in (1, 2, 3)) and again.batches == scores.batches


def test_scores_lower_the_variance_of_what_is_drawn_in_forward():
    """Without rebuilt inputs, so that rows are drawn before the gradient is known."""
    ids = batch(rows=8, length=16)
    data = {"input_ids": ids, "sample_ids": torch.arange(8)}

    def weighted(model, data):  # a loss that only few tokens have
        logits = model(input_ids=data["input_ids"]).logits
        weight = torch.zeros(8, 16)
        weight[:, ::8] = 1.0
        return (logits.logsumexp(-1) * weight).sum()

    errors = {}
    for known in (False, True):
        model = llama()
        tuner = efftune.apply(model, "full + wtacrs(ratio=0.3)", blocks=False)
        scores = model.model.layers[0].mlp.down_proj.scores
        with tuner.exactly():
            tuner.backward(data, weighted)
        exact = {n: p.grad.clone() for n, p in model.named_parameters() if "proj" in n}
        assert len(scores.table) == 8
        total = 0.0
        for seed in range(40):
            torch.manual_seed(seed)
            model.zero_grad()
            if known:
                tuner.backward(data, weighted)
            else:
                weighted(model, data).backward()
            total += sum(float((p.grad - exact[n]).square().sum()) for n, p in model.named_parameters() if n in exact)
        errors[known] = total
    assert errors[True] < 0.6 * errors[False]


def test_summary_says_which_scores_are_in_force():
    tuner = efftune.apply(llama(), "full + wtacrs")
    assert "token scores: norms of inputs (no batch seen yet)" in tuner.summary()
    data = {"input_ids": batch(), "sample_ids": torch.arange(4)}
    tuner.backward(data, dict_loss)
    tuner.backward(data, dict_loss)
    tuner.backward(batch(), loss_fn)  # works, and says what it falls back to
    text = tuner.summary()
    assert "remembered norms of gradients in 1 batches, norms of inputs alone in 1 (samples not seen before)" in text
    assert "and in 1 without sample_ids" in text
    counted = tuner.summary(data, dict_loss)
    assert "backward keeps" in counted and "MiB of this batch" in counted


def test_a_model_without_blocks_has_the_norms_of_its_inputs():
    tuner = efftune.apply(Perceptron(), "full + wtacrs(ratio=0.5, min_rows=2)")
    x = torch.randn(16, 8)
    loss = tuner.backward(x, lambda model, x: model(x).square().sum())
    assert loss > 0 and all(p.grad is not None for p in tuner.model.parameters())
    assert all(isinstance(m.keep, Sampled) for m in tuner.model.modules() if isinstance(m, Linear))


def test_remove_leaves_no_hooks():
    model = llama()
    hooks = [dict(layer._forward_hooks) for layer in model.model.layers]
    efftune.apply(model, "full + wtacrs").remove()
    assert [dict(layer._forward_hooks) for layer in model.model.layers] == hooks == [{}] * len(hooks)


@pytest.mark.parametrize(
    "recipe, sentence",
    [
        ("wtacrs(ratio=0)", r"lies in \(0, 1\], not 0"),
        ("wtacrs(ratio=1.2)", "not 1.2"),
        ("wtacrs(sampler='topk')", "biased; add biased=True"),
        ("lora(r=4, freeze_a=True) + wtacrs", "none of the .* layers that it means keeps its input"),
        ("full(target_modules='embed_tokens') + wtacrs", "add a method that trains them"),
    ],
)
def test_what_refuses_refuses_in_words(recipe, sentence):
    with pytest.raises(EfftuneError, match=sentence):
        efftune.apply(llama(), recipe)


def test_topk_by_name():
    efftune.apply(llama(), "full + wtacrs(sampler='topk', biased=True)")
