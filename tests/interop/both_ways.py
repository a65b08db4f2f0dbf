"""What the tests against the real PEFT share: models, trained parts that are not as they began, and a comparison."""

import torch

import efftune
from efftune.interop import peft as files
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


def bert(kind="ForSequenceClassification"):
    import transformers

    torch.manual_seed(0)
    sizes = dict(vocab_size=96, hidden_size=32, num_hidden_layers=1, num_attention_heads=4, intermediate_size=48)
    return getattr(transformers, f"Bert{kind}")(transformers.BertConfig(**sizes))


def roberta():
    import transformers

    torch.manual_seed(0)
    sizes = dict(vocab_size=96, hidden_size=32, num_hidden_layers=1, num_attention_heads=4, intermediate_size=48)
    return transformers.RobertaForSequenceClassification(transformers.RobertaConfig(**sizes))


def assert_both_ways(peft, make, config, folder, format=None):
    """What PEFT trains by `config` gives here the same outputs, and what is then saved here gives them in PEFT. Returns
    the keys that PEFT wrote."""
    from safetensors.torch import load_file

    theirs = peft.get_peft_model(make(), config)
    randomize(theirs)
    theirs.save_pretrained(folder / "theirs")
    tuner = efftune.load(make(), folder / "theirs")
    agree(tuner.model, theirs)
    assert (logits(theirs) - logits(make())).norm() > 0.1
    tuner.save(folder / "ours", format)
    agree(peft.PeftModel.from_pretrained(make(), folder / "ours"), theirs)
    agree(efftune.load(make(), folder / "ours").model, theirs)
    return set(load_file(folder / "theirs" / files.WEIGHTS))
