"""Small real models for the tests of methods: a Llama with tied or untied head, and a plain module."""

import torch
from torch import nn

import efftune


def llama(tie=False, seed=0, layers=3, dtype=torch.float32):
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=96, hidden_size=32, intermediate_size=48, num_hidden_layers=layers, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, tie_word_embeddings=tie,
    )  # fmt: skip
    return LlamaForCausalLM(config).to(dtype)


def batch(seed=0, rows=4, length=12):
    g = torch.Generator().manual_seed(seed)
    return torch.randint(0, 96, (rows, length), generator=g)


def loss_fn(model, ids):
    return model(input_ids=ids, labels=ids).loss


class Perceptron(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(8, 8) for _ in range(3)])

    def forward(self, x):
        for layer in self.layers:
            x = torch.tanh(layer(x))
        return x


def trained(recipe, steps=6, dtype=torch.float32, lr=1e-3, weight_decay=0.0, resume_at=None):
    """Some zeroth-order steps on `llama()` at a falling learning rate; returns (tuner, optimizer)."""
    tuner = efftune.apply(llama(dtype=dtype), recipe)
    optimizer = tuner.optimizer(lr=lr, weight_decay=weight_decay)
    for step in range(steps):
        if step == resume_at:  # as the trainer does: the optimizer is made on the base model
            old, state = tuner, optimizer.state_dict()
            tuner = efftune.apply(llama(dtype=dtype), recipe)
            optimizer = tuner.optimizer(lr=lr, weight_decay=weight_decay)
            with torch.no_grad():
                for name, p in tuner.named_trained().items():
                    p.copy_(old.named_trained()[name])
            optimizer.load_state_dict(state)
            tuner.load_state_dict(old.state_dict())
        for group in optimizer.param_groups:
            group["lr"] = lr / (1 + step)
        optimizer.zero_grad()
        tuner.backward(batch(step), loss_fn)
        optimizer.step()
    return tuner, optimizer
