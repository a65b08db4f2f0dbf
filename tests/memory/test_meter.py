"""The meter: once per storage, parameters apart, by module, and nothing left behind."""

import pytest
import torch
from torch import nn

from efftune import EfftuneError
from efftune.memory import meter


def test_once_per_storage_by_module_and_parameters_apart():
    net = nn.Sequential(nn.Linear(8, 16, bias=False), nn.Tanh(), nn.Linear(16, 4, bias=False))
    x = torch.randn(5, 8)
    kept = meter.saved_for_backward(net, lambda: net(x).sum())
    # x for the first weight; tanh keeps its output, which the last layer reads: one storage, seen first in Tanh
    assert kept.by_module == {"0": 5 * 8 * 4, "1": 5 * 16 * 4}
    assert kept.owned == 16 * 4 * 4 and kept.total == 5 * 24 * 4
    assert kept.by_kind(net) == {"Tanh": (1, 320), "Linear": (1, 160)}


def test_it_leaves_nothing_behind_even_if_the_forward_fails():
    class Fails(nn.Module):
        def forward(self, x):
            raise ArithmeticError

    net = nn.Sequential(nn.Linear(2, 2), Fails())
    for _ in range(2):
        with pytest.raises(ArithmeticError):
            meter.saved_for_backward(net, lambda: net(torch.ones(1, 2)))
    linear = net[0]
    kept = meter.saved_for_backward(linear, lambda: linear(torch.ones(3, 2)).sum())
    assert kept.by_module == {"": 24}


def test_a_loss_without_gradient_is_refused():
    net = nn.Linear(2, 2).requires_grad_(False)
    with pytest.raises(EfftuneError, match="nothing is saved"):
        meter.saved_for_backward(net, lambda: net(torch.ones(1, 2)).sum())


def test_allocated():
    made = []
    live, peak = meter.allocated(lambda: made.append(torch.ones(1000) + torch.ones(1000)))
    assert live == 4000 and peak == 12000


def test_what_a_step_holds():
    net = nn.Sequential(nn.Linear(8, 16), nn.Linear(16, 4)).requires_grad_(True)
    net[0].requires_grad_(False)
    optimizer = torch.optim.AdamW(net.parameters())
    kept = []
    meter.counting(lambda model, x: model(x).sum(), kept)(net, torch.ones(5, 8)).backward()
    optimizer.step()
    trained = 4 * (16 * 4 + 4)
    assert kept == [4 * 5 * 16]  # of a frozen layer's input nothing is needed
    step = 2 * 4  # AdamW's step count of each of the two parameters
    assert meter.held(net, optimizer, kept[0]) == meter.Held(
        4 * 8 * 16 + 4 * 16 + trained, trained, 2 * trained + step, 320
    )


def test_tied_weights_are_held_once():
    net = nn.Sequential(nn.Linear(8, 8, bias=False), nn.Linear(8, 8, bias=False))
    net[1].weight = net[0].weight
    plain = meter.held_by_plain(net, {"input": torch.ones(5, 8)}, lambda call: call().sum())
    assert plain == meter.Held(256, 256, 512, 2 * 160)


@pytest.mark.parametrize("kind", ["Llama", "GPT2", "Bert"])
def test_fake_tensors_save_what_real_ones_do(kind):
    import transformers

    sizes = dict(vocab_size=64, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=48)
    head = "ForMaskedLM" if kind == "Bert" else "LMHeadModel" if kind == "GPT2" else "ForCausalLM"
    config = getattr(transformers, f"{kind}Config")(**sizes, pad_token_id=0, bos_token_id=1, eos_token_id=1)
    net = getattr(transformers, kind + head)(config).train()
    ids, mask = torch.randint(2, 64, (3, 10)), torch.ones(3, 10, dtype=torch.long)
    mask[1, 6:] = 0
    inputs = {"input_ids": ids, "attention_mask": mask, "labels": ids}
    before, state = torch.get_rng_state(), {name: t.clone() for name, t in net.state_dict().items()}
    plain = meter.held_by_plain(net, inputs, lambda call: call().loss)
    assert torch.equal(before, torch.get_rng_state())
    assert all(torch.equal(t, state[name]) for name, t in net.state_dict().items())
    real = meter.saved_for_backward(net, lambda: net(**inputs).loss)
    assert plain.saved == real.total and plain.weights == meter.size((*net.parameters(), *net.buffers()))
