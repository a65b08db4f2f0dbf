"""What the tests against the real PEFT share: models, trained parts that are not as they began, and a comparison."""

import torch

from tests.methods.models import logits


def randomize(model):
    torch.manual_seed(9)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(torch.randn_like(p) * 0.1)


def gpt2():
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(vocab_size=96, n_embd=32, n_layer=2, n_head=2, bos_token_id=1, eos_token_id=2))


def agree(model, theirs):
    torch.testing.assert_close(logits(model), logits(theirs), rtol=1e-5, atol=1e-5)
