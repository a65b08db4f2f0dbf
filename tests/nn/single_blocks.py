"""Single blocks of transformers' models, of torch and of a user, with the arguments that their models give them."""

import pytest
import torch
from torch import nn

B, T, D = 6, 5, 16


def transformer_block(kind, dropout=0.0, seed=0):
    """(block, arguments, keyword arguments) as the model of that kind calls its layers."""
    import transformers

    torch.manual_seed(seed)
    sizes = dict(vocab_size=40, hidden_size=D, num_hidden_layers=1, num_attention_heads=2, intermediate_size=24)
    if kind in ("Llama", "Qwen2", "Mistral", "Gemma"):
        config = getattr(transformers, f"{kind}Config")(
            **sizes, num_key_value_heads=1, head_dim=8, attention_dropout=dropout
        )
        model = getattr(transformers, f"{kind}Model")(config)
        stack = model.layers
    elif kind == "GPT2":
        config = transformers.GPT2Config(
            vocab_size=40, n_embd=D, n_layer=1, n_head=2, n_inner=24, attn_pdrop=dropout, resid_pdrop=dropout
        )
        model = transformers.GPT2Model(config)
        stack = model.h
    else:
        config = transformers.BertConfig(**sizes, hidden_dropout_prob=dropout, attention_probs_dropout_prob=dropout)
        model = transformers.BertModel(config)
        stack = model.encoder.layer
    for p in model.parameters():  # attention that matters: at initialisation it is nearly uniform
        if p.dim() > 1:
            nn.init.normal_(p, std=0.4)
    seen = {}

    class Seen(Exception):
        pass

    def catch(module, args, kwargs):
        seen.update(args=args, kwargs=kwargs)
        raise Seen

    ids = torch.randint(0, 40, (B, T))
    padding = torch.ones(B, T, dtype=torch.long)
    padding[1, 3:] = 0
    handle = stack[0].register_forward_pre_hook(catch, with_kwargs=True)
    with pytest.raises(Seen):
        model(input_ids=ids, attention_mask=padding, use_cache=False)
    handle.remove()
    x, *rest = seen["args"]
    return stack[0].train(), (torch.randn_like(x), *rest), seen["kwargs"]


class Plain(nn.Module):
    """A user's block: keywords, a nested argument, a tuple out, one output without a gradient."""

    def __init__(self, dropout=0.0):
        super().__init__()
        self.attention = nn.MultiheadAttention(D, 2, batch_first=True, dropout=dropout)
        self.linear = nn.Linear(D, D)
        self.drop = nn.Dropout(dropout)

    def forward(self, x, *, extra, mask=None, flag=True):
        y, _ = self.attention(x, x, x, attn_mask=mask, need_weights=False)
        y = torch.tanh(self.linear(self.drop(y) * extra["scale"])) + x
        return y, {"longest": y.argmax(-1), "flag": flag}


def plain_block(dropout=0.0, seed=0):
    torch.manual_seed(seed)
    block = Plain(dropout)
    mask = torch.zeros(T, T).masked_fill(torch.ones(T, T).triu(1).bool(), -torch.inf)
    return block, (torch.randn(B, T, D),), {"extra": {"scale": torch.rand(B, 1, 1, requires_grad=True)}, "mask": mask}


def encoder_block(dropout=0.0, seed=0):
    torch.manual_seed(seed)
    block = nn.TransformerEncoderLayer(D, 2, 24, dropout, batch_first=True)
    padding = torch.zeros(B, T, dtype=torch.bool)
    padding[2, 4] = True
    return block, (torch.randn(B, T, D),), {"src_key_padding_mask": padding}


KINDS = ["Llama", "Qwen2", "Mistral", "Gemma", "GPT2", "Bert"]
BLOCKS = {kind: lambda dropout=0.0, kind=kind: transformer_block(kind, dropout) for kind in KINDS}
BLOCKS |= {"plain": plain_block, "encoder": encoder_block}
