"""Tiny models of the families whose blocks are swapped, as transformers builds them."""

import torch

import efftune
from efftune.linear import Linear

HIDDEN, LAYERS, VOCAB = 32, 2, 64
DECODER = dict(
    vocab_size=VOCAB, hidden_size=HIDDEN, intermediate_size=48, num_hidden_layers=LAYERS, num_attention_heads=4,
    num_key_value_heads=2, head_dim=8, max_position_embeddings=64, use_cache=False, pad_token_id=0,
)  # fmt: skip
DECODERS = {
    "Llama": {}, "Qwen2": {"sliding_window": None}, "Qwen3": {}, "Mistral": {"sliding_window": 6}, "Gemma": {},
    "Gemma3": {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 5},
}  # fmt: skip
FAMILIES = [*DECODERS, "GPT2", "Bert"]


def model(family, dtype=torch.float32, dropout=0.0, seed=0, attention="sdpa"):
    import transformers

    torch.manual_seed(seed)
    if family == "GPT2":
        config = transformers.GPT2Config(
            vocab_size=VOCAB, n_embd=HIDDEN, n_layer=LAYERS, n_head=4, n_positions=64, use_cache=False,
            resid_pdrop=dropout, embd_pdrop=dropout, attn_pdrop=dropout,
        )  # fmt: skip
        made = transformers.GPT2LMHeadModel(config)
    elif family == "Bert":
        config = transformers.BertConfig(
            vocab_size=VOCAB, hidden_size=HIDDEN, num_hidden_layers=LAYERS, num_attention_heads=4, intermediate_size=48,
            max_position_embeddings=64, hidden_dropout_prob=dropout, attention_probs_dropout_prob=dropout,
        )  # fmt: skip
        made = transformers.BertForMaskedLM(config)
    else:
        name = family + "Text" if family == "Gemma3" else family
        config = getattr(transformers, f"{name}Config")(**DECODER, **DECODERS[family])
        made = getattr(transformers, f"{family}ForCausalLM")(config)
    for name, parameter in made.named_parameters():  # norms that do something
        if "norm" in name.lower() or "ln_" in name:
            torch.nn.init.normal_(parameter, 0.5, 0.2)
    made.set_attn_implementation(attention)
    return made.to(dtype).train()


def batch(padded=False, rows=3, length=14):
    ids = torch.randint(1, VOCAB, (rows, length), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    if padded:
        mask[0, -5:] = 0
        mask[1, -2:] = 0
    return {"input_ids": ids, "attention_mask": mask}


def loss(model, inputs):
    """A function of the logits that is not stationary anywhere, over the tokens that are not padding."""
    logits = model(**inputs).logits
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    weight = torch.linspace(-1, 1, logits.shape[-1], dtype=logits.dtype)
    return ((logits * weight).tanh().sum(-1) * inputs["attention_mask"]).sum()


def gradients(model, inputs):
    value = loss(model, inputs)
    value.backward()
    found = {name: p.grad.detach().clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return value.detach(), found


def assert_same_when_checkpointed(make, recipe, reentrant):
    """Loss and gradients of make()'s model under the recipe, with gradient checkpointing and without."""
    results = []
    for checkpointing in (False, True):
        plain = make()
        torch.manual_seed(3)
        tuner = efftune.apply(plain, recipe)
        for layer in (m for m in plain.modules() if isinstance(m, Linear) and hasattr(m, "lora_b")):
            torch.nn.init.normal_(layer.lora_b)
        if checkpointing:
            plain.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
            plain.enable_input_require_grads()
        torch.manual_seed(4)
        results.append(gradients(tuner.model, batch()))
    (a, first), (b, second) = results
    assert torch.equal(a, b) and first.keys() <= second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)
