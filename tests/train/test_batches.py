import types

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from efftune import EfftuneError
from efftune.train.batches import Data, check_packing, collate_packed, collate_padded, pack, separates_documents
from efftune.train.data import IGNORED
from efftune.train.task import CAUSAL_LM, causal_lm_loss

from .conftest import examples, llama, packed


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_packed_logits_equal_separate_logits(attention):
    model = llama(attn_implementation=attention).eval()
    made = examples(6)
    batch = collate_packed(1)([made[:4], made[4:]])
    with torch.no_grad():
        logits = model(input_ids=batch["input_ids"], position_ids=batch["position_ids"], use_cache=False).logits
        for row, inside in ((0, made[:4]), (1, made[4:])):
            at = 0
            for example in inside:
                alone = model(input_ids=torch.tensor([example.input_ids])).logits[0]
                torch.testing.assert_close(logits[row, at : at + len(alone)], alone, rtol=1e-5, atol=1e-5)
                at += len(alone)


def test_packed_and_padded_losses_and_terms_agree():
    model = llama()
    made = examples(6)
    one = collate_packed(1)([made])
    padded = collate_padded(1)([[e] for e in made])
    torch.testing.assert_close(causal_lm_loss(model, one), causal_lm_loss(model, padded))
    assert CAUSAL_LM.terms(one) == CAUSAL_LM.terms(padded) == sum(len(e.input_ids) - 1 for e in made)


def test_the_loss_is_the_models_own():
    model = llama()
    batch = collate_padded(1)([[e] for e in examples(5)])
    own = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], labels=batch["labels"]).loss
    torch.testing.assert_close(causal_lm_loss(model, batch) / CAUSAL_LM.terms(batch), own)


def test_the_loss_copies_only_the_logits_that_count():
    logits = torch.randn(3, 5, 50)
    labels = torch.full((3, 5), IGNORED)
    labels[:, 4] = labels[1, 0] = 7  # the first of a row is predicted by nothing
    large = []

    class Sizes(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor) and out.data_ptr() != logits.data_ptr() and out.numel() >= 3 * 4 * 50:
                large.append(str(func))
            return out

    def model(input_ids):
        return types.SimpleNamespace(logits=logits)

    with Sizes():
        loss = causal_lm_loss(model, {"input_ids": labels, "labels": labels})
    assert large == []
    torch.testing.assert_close(loss, -logits[:, 3].log_softmax(-1)[:, 7].sum())


def test_a_model_that_mixes_documents_is_refused(monkeypatch):
    from transformers import BertConfig, BertLMHeadModel, GPT2Config, GPT2LMHeadModel

    assert separates_documents(llama()) is None
    assert separates_documents(llama().to(torch.bfloat16)) is None
    gpt2 = GPT2LMHeadModel(GPT2Config(vocab_size=50, n_embd=16, n_layer=2, n_head=2, n_positions=32))
    assert separates_documents(gpt2) is None
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 16}
    both_ways = BertLMHeadModel(BertConfig(vocab_size=50, initializer_range=0.2, **sizes))
    with pytest.raises(EfftuneError, match="use --no-packing"):
        check_packing(both_ways)


def test_the_position_is_enough_to_go_on():
    data = packed(count=30, row_tokens=24)
    assert data.rows(0) == packed(count=30, row_tokens=24).rows(0) != data.rows(1)
    assert sorted(sum(data.rows(3), [])) == list(range(30))
    stream = data.from_position(0, 0, 3)
    taken = [next(stream) for _ in range(12)]
    for i in (0, 4, 9):
        epoch, row, _ = taken[i]
        again = data.from_position(epoch, row, 3)
        assert [next(again) for _ in range(2)] == taken[i + 1 : i + 3]


def test_steps_are_those_that_the_epochs_have():
    data = packed(count=30, row_tokens=24)
    stream = data.from_position(0, 0, 4)
    seen = 0
    while next(stream)[0] < 2:
        seen += 1
    assert data.steps(4, 2.0) == seen
    assert data.steps(4, 0.5) == -(-(len(data.rows(0)) // 2) // 4)


def test_packing_fills_rows_and_keeps_within_them():
    lengths = [7, 3, 9, 1, 5, 5, 2, 8, 4, 6]
    rows = pack(list(range(10)), lengths, 10)
    assert sorted(sum(rows, [])) == list(range(10))
    assert all(sum(lengths[i] for i in row) <= 10 for row in rows) and len(rows) <= 6


def test_sample_ids_are_the_examples_in_their_order():
    made = examples(5)
    rows = [[made[3], made[0]], [made[4]]]
    batch = collate_packed(1)(rows)
    assert batch["sample_ids"].tolist() == [3, 0, 4]
    assert int((batch["position_ids"] == 0).sum()) == 3  # padding begins no document
    first = sum(len(made[i].input_ids) for i in (3, 0))
    assert (batch["labels"][1, len(made[4].input_ids) :] == IGNORED).all() and batch["input_ids"].shape[1] >= first
    classes = collate_padded(1, classes=True)([[made[1]], [made[2]]])
    assert classes["labels"].tolist() == [made[1].labels[0], made[2].labels[0]]
    assert classes["attention_mask"].sum(1).tolist() == [len(made[1].input_ids), len(made[2].input_ids)]


def test_any_sequence_will_do_with_a_collate_of_its_own():
    data = Data(list(range(10)), lambda rows: torch.tensor([row[0] for row in rows]), seed=3)
    (batch,) = data.batches(data.rows(0), 10)
    assert sorted(batch.tolist()) == list(range(10))
