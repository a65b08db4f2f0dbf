"""The loss of Hugging Face models through head and loss in one: the model's own, or None with the reason."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import efftune
from efftune.interop.transformers.lm_head import lm_head_loss, lm_head_why_not
from efftune.linear import Int8, LoRA, NoDelta
from efftune.train.task import causal_lm_loss
from tests.budget import assert_within_budget

transformers = pytest.importorskip("transformers")

SIZES = dict(
    vocab_size=211, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2,
    num_key_value_heads=2, max_position_embeddings=64, initializer_range=0.3, pad_token_id=0, bos_token_id=0,
    eos_token_id=0,
)  # fmt: skip


def llama(**changes):
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES | changes))


def gemma2():
    config = transformers.Gemma2Config(**SIZES, head_dim=16, final_logit_softcapping=2.0, sliding_window=16)
    return transformers.Gemma2ForCausalLM(config)


def qwen2():
    return transformers.Qwen2ForCausalLM(transformers.Qwen2Config(**SIZES, tie_word_embeddings=True))


def gpt2():
    sizes = dict(vocab_size=211, n_embd=32, n_layer=2, n_head=2, n_positions=64, initializer_range=0.3)
    dropout = dict(embd_pdrop=0.0, resid_pdrop=0.0, attn_pdrop=0.0)
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes, **dropout))


def granite():
    return transformers.GraniteForCausalLM(transformers.GraniteConfig(**SIZES, logits_scaling=4.0))


def cohere():
    return transformers.CohereForCausalLM(transformers.CohereConfig(**SIZES, logit_scale=0.0625))


def made(build, seed=0):
    torch.manual_seed(seed)
    return build()


def batch(seed=0):
    g = torch.Generator().manual_seed(seed)
    ids = torch.randint(1, 211, (3, 13), generator=g)
    labels = ids.clone()
    labels[0, :6] = labels[2, 9:] = -100
    mask = torch.ones_like(ids)
    mask[2, 9:] = 0
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def own_loss(model, batch):
    """As the model and torch compute it, logits and all."""
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, :-1]
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return F.cross_entropy(logits.flatten(0, 1), batch["labels"][:, 1:].flatten(), reduction="sum")


def gradients(model, loss):
    model.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def check_like_own(model, data):
    """Loss and gradients in float32 against the model's own path in float64."""
    oracle = copy.deepcopy(model).double()
    expected = own_loss(oracle, data)
    yardstick = own_loss(model, data)
    loss = causal_lm_loss(model, data)
    assert lm_head_why_not(model) is None
    torch.testing.assert_close(loss.double(), expected, rtol=2e-6, atol=0)
    exact, single, got = (gradients(m, x) for m, x in ((oracle, expected), (model, yardstick), (model, loss)))
    assert got.keys() == exact.keys() == single.keys()
    for name in exact:
        assert_within_budget(got[name], exact[name].double(), single[name])
    return got


@pytest.mark.parametrize("build", [llama, gemma2, qwen2, gpt2])
@pytest.mark.parametrize("head_trains", [True, False])
def test_loss_and_gradients_are_the_models_own(build, head_trains):
    model = made(build)
    head = model.get_output_embeddings()
    head.weight.requires_grad_(head_trains)
    got = check_like_own(model, batch())
    tied = head.weight is model.get_input_embeddings().weight
    name = "lm_head.weight" if not tied else next(n for n, p in model.named_parameters() if p is head.weight)
    assert (name in got) == head_trains


def test_a_bias_of_the_head_trains():
    model = made(llama)
    model.lm_head.bias = nn.Parameter(torch.randn(211))
    assert "lm_head.bias" in check_like_own(model, batch())


@pytest.mark.parametrize("base", [None, Int8(group=16)])
def test_an_adapter_on_the_head_trains(base, monkeypatch):
    monkeypatch.setattr("efftune.nn.linear_cross_entropy.TILE", 211 * 5)  # several tiles
    model = made(llama).requires_grad_(False)
    model.lm_head = efftune.Linear.from_linear(model.lm_head, base=base, delta=LoRA(r=4))
    nn.init.normal_(model.lm_head.lora_b)
    got = check_like_own(model, batch())
    assert set(got) == {"lm_head.lora_a", "lm_head.lora_b"}
    assert all(g.abs().max() > 0 for g in got.values())


def test_a_quantised_frozen_head():
    model = made(llama)
    model.lm_head = efftune.Linear.from_linear(model.lm_head, base=Int8(group=16), delta=NoDelta())
    assert "model.embed_tokens.weight" in check_like_own(model, batch())


@pytest.mark.parametrize("build", [granite, cohere])
def test_scaled_logits_fall_back(build):
    model, data = made(build), batch()
    for _ in range(2):  # found, then remembered
        torch.testing.assert_close(causal_lm_loss(model, data), own_loss(model, data))
        assert "scale" in lm_head_why_not(model)


def test_a_fallback_leaves_random_numbers_as_they_were():
    """Else a resumed run, which compares anew, would differ from one that was not interrupted."""
    model, data = made(lambda: transformers.GraniteForCausalLM(
        transformers.GraniteConfig(**SIZES, logits_scaling=4.0, attention_dropout=0.5)
    )), batch()  # fmt: skip
    model.train()
    losses = []
    for _ in range(2):
        torch.manual_seed(3)
        losses.append(causal_lm_loss(model, data).item())
    assert losses[0] == losses[1]


class Doubled(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


def replaced(module, make):
    for parent in module.modules():
        for name, child in parent.named_children():
            if name == "lm_head":
                setattr(parent, name, make(child))
    return module


def hooked(head):
    head.register_forward_hook(lambda module, args, out: out * 3)
    return head


def subclass(head):
    new = Doubled(head.in_features, head.out_features, bias=False)
    new.weight = head.weight
    return new


def adapter(**settings):
    return lambda head: efftune.Linear.from_linear(head, delta=LoRA(r=4, **settings))


@pytest.mark.parametrize(
    "change, sentence",
    [
        (hooked, "hooks"),
        (subclass, "Doubled"),
        (adapter(lora_dropout=0.5), "random"),
        (adapter(dtype="bfloat16"), "16 bits"),
    ],
)
def test_what_is_not_handled_takes_the_models_logits(change, sentence):
    model, data = replaced(made(llama), change), batch()
    torch.manual_seed(0)
    loss = causal_lm_loss(model, data)
    assert sentence in lm_head_why_not(model)
    torch.manual_seed(0)
    torch.testing.assert_close(loss, own_loss(model, data))


def test_a_head_that_starts_at_zero():
    """Its logits say nothing about a scale; once they do, they are compared."""
    for build, scaled in ((llama, False), (granite, True)):
        model, data = made(build), batch()
        nn.init.zeros_(model.lm_head.weight)
        for _ in range(2):
            loss = causal_lm_loss(model, data)
            torch.testing.assert_close(loss, own_loss(model, data))
            loss.backward()
            with torch.no_grad():
                model.lm_head.weight -= 0.1 * model.lm_head.weight.grad
        torch.testing.assert_close(causal_lm_loss(model, data), own_loss(model, data))
        assert (lm_head_why_not(model) is not None) == scaled


def test_another_head_is_compared_anew():
    model, data = made(llama), batch()
    causal_lm_loss(model, data)
    assert lm_head_why_not(model) is None
    model.lm_head = subclass(model.lm_head)
    assert "Doubled" in lm_head_why_not(model)
    torch.testing.assert_close(causal_lm_loss(model, data), own_loss(model, data))
    assert "not a Hugging Face model" in lm_head_why_not(nn.Linear(2, 2))


def test_no_counted_position_gives_zero_and_zero_gradients():
    model, data = made(llama), batch()
    data["labels"].fill_(-100)
    loss = causal_lm_loss(model, data)
    assert loss.item() == 0
    assert all(g.abs().max() == 0 for g in gradients(model, loss).values())


def test_autocast():
    model, data = made(llama), batch()
    with torch.autocast("cpu", torch.bfloat16):
        own, loss = own_loss(model, data), causal_lm_loss(model, data)
    assert lm_head_why_not(model) is None and loss.dtype == torch.float32
    torch.testing.assert_close(loss, own, rtol=3e-3, atol=0)
    expected, got = gradients(model, own), gradients(model, loss)
    assert got.keys() == expected.keys()
    for name in got:
        assert got[name].dtype == torch.float32
        assert (got[name] - expected[name]).norm() <= 0.05 * expected[name].norm(), name


def test_gradients_accumulate_as_one_batch():
    model, data = made(llama), batch()
    whole = gradients(model, causal_lm_loss(model, data))
    model.zero_grad()
    for row in range(3):
        causal_lm_loss(model, {name: t[row : row + 1] for name, t in data.items()}).backward()
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.grad, whole[name], rtol=1e-4, atol=1e-5 * whole[name].abs().max().item())


def test_no_logits_of_all_positions():
    """The head sees the last position, and the loss never makes what has the size of all logits."""
    from torch.utils._python_dispatch import TorchDispatchMode

    model, data = made(llama), batch()
    sizes = []

    class Sizes(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            sizes.extend(t.shape for t in (out if isinstance(out, tuple) else (out,)) if isinstance(t, torch.Tensor))
            return out

    with Sizes():
        causal_lm_loss(model, data).backward()
    assert (3, 1, 211) in sizes
    assert not [s for s in sizes if 211 in s and s.numel() >= 39 * 211]


def test_counted_positions_are_the_callers_choice():
    model, data = made(llama), batch()
    inputs = {"input_ids": data["input_ids"]}
    counted, targets = torch.tensor([5, 0, 17]), torch.tensor([3, 210, 0])
    logits = model(**inputs).logits.flatten(0, 1)[counted]
    expected = F.cross_entropy(logits, targets, reduction="sum")
    torch.testing.assert_close(lm_head_loss(model, inputs, counted, targets), expected)
