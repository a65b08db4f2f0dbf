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


class Beside(nn.Module):
    """A module, and beside it what models also have: a layer that is called twice, and one of few features."""

    def __init__(self, inner, d=32, few=5):
        super().__init__()
        self.inner = inner
        self.twice, self.narrow, self.wide = nn.Linear(d, d), nn.Linear(d, few), nn.Linear(few, d)

    def forward(self, x):
        return self.inner(x) + self.wide(self.narrow(self.twice(torch.tanh(self.twice(x)))))


class BatchNorm(nn.BatchNorm1d):
    def forward(self, x):  # (B, T, D)
        return super().forward(x.transpose(1, 2)).transpose(1, 2)


def contract_model(tie=False, seed=0, layers=3):
    """`llama()`, whose MLPs have a layer that is called twice and one of 5 features beside them, and with a batch norm
    before the head."""
    model = llama(tie, seed, layers)
    for block in model.model.layers:
        block.mlp = Beside(block.mlp)
    model.model.norm = nn.Sequential(model.model.norm, BatchNorm(32))
    return model


def batch(seed=0, rows=4, length=12, device="cpu"):
    g = torch.Generator().manual_seed(seed)
    return torch.randint(0, 96, (rows, length), generator=g).to(device)


def loss_fn(model, ids):
    return model(input_ids=ids, labels=ids).loss


def prepared(model, recipe, device="cpu", **settings):
    """The tuner of the recipe on the model, the same draws whatever it is."""
    torch.manual_seed(1)
    return efftune.apply(model.to(device), recipe, **settings)


def logits(model):
    model.eval()
    with torch.no_grad():
        return model(input_ids=batch(seed=5, device=next(model.parameters()).device)).logits


def train(tuner, optimizer, steps, data):
    losses = []
    tuner.model.train()
    for _ in range(steps):
        optimizer.zero_grad()
        losses.append(float(tuner.backward(data, loss_fn)))
        optimizer.step()
    return losses


class Perceptron(nn.Module):
    def __init__(self, layers=3):
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(8, 8) for _ in range(layers)])

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
