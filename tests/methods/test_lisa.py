import pytest

import efftune
from efftune import EfftuneError
from tests.methods.models import batch, llama, loss_fn
from tests.methods.test_contract import train


def active(model):
    return [i for i, layer in enumerate(model.model.layers) if all(p.requires_grad for p in layer.parameters())]


def test_the_draw_changes_with_the_interval_and_covers_all_layers():
    tuner = efftune.apply(llama(layers=4), "lisa(layers=2, interval=3)")
    optimizer = tuner.optimizer(lr=1e-3)
    drawn = []
    for _ in range(60):
        drawn.append(tuple(active(tuner.model)))
        train(tuner, optimizer, 1, batch())
    assert all(len(d) == 2 for d in drawn)
    assert all(drawn[i] == drawn[i - i % 3] for i in range(60))
    assert {i for d in drawn for i in d} == {0, 1, 2, 3}
    model = tuner.model
    assert model.model.embed_tokens.weight.requires_grad and model.lm_head.weight.requires_grad
    assert model.model.norm.weight.requires_grad


def test_layers_that_rest_have_no_gradient_and_no_state():
    tuner = efftune.apply(llama(layers=4), "lisa(layers=1, interval=1)")
    optimizer = tuner.optimizer(lr=1e-3)
    for _ in range(5):
        train(tuner, optimizer, 1, batch())
        for i, layer in enumerate(tuner.model.model.layers):
            for p in layer.parameters():
                if i not in active(tuner.model):
                    assert p.grad is None and p not in optimizer.state


def test_over_lora_only_adapters_take_turns():
    tuner = efftune.apply(llama(layers=3), "lora(r=4) + lisa(layers=1)")
    tuner.optimizer(lr=1e-3)
    training = [n for n, p in tuner.model.named_parameters() if p.requires_grad]
    assert training and all("lora_" in n for n in training)
    assert len({n.split(".")[2] for n in training}) == 1


def test_a_resting_layer_backs_no_weight_gradient():
    """Layers below the lowest that trains run no backward at all: their inputs need no gradient."""
    model = llama(layers=3)
    tuner = efftune.apply(model, "lora(r=4) + lisa(layers=1, interval=1)")
    tuner.optimizer(lr=1e-3)
    while active_adapters(model) != [2]:
        tuner.seek(tuner.step + 1)
    seen = []
    for layer in model.model.layers:
        layer.register_full_backward_hook(lambda module, *_: seen.append(module))
    tuner.backward(batch(), loss_fn)
    assert seen == [model.model.layers[2]]


def active_adapters(model):
    return sorted({int(n.split(".")[2]) for n, p in model.named_parameters() if p.requires_grad and "lora_" in n})


def test_seek_repeats_the_draw():
    tuner = efftune.apply(llama(layers=4), "lisa(layers=2, interval=1)")
    tuner.optimizer(lr=1e-3)
    drawn = []
    for step in (0, 5, 9, 5, 0):
        tuner.load_state_dict({"step": step})
        drawn.append(active(tuner.model))
    assert drawn[0] == drawn[4] and drawn[1] == drawn[3]


def test_only_blocks_that_train_are_drawn():
    tuner = efftune.apply(
        llama(layers=4), "lora(r=4, target_modules='layers.[13].*q_proj') + lisa(layers=1, interval=1)"
    )
    optimizer = tuner.optimizer(lr=1e-3)
    drawn = set()
    for _ in range(20):
        training = {n.split(".")[2] for n, p in tuner.model.named_parameters() if p.requires_grad}
        assert len(training) == 1
        drawn |= training
        train(tuner, optimizer, 1, batch())
    assert drawn == {"1", "3"}


def test_more_blocks_than_train_are_refused():
    with pytest.raises(EfftuneError, match="blocks of model.layers that train, which are 2; draw fewer"):
        efftune.apply(llama(layers=4), "full(target_modules='layers.[13]') + lisa(layers=3)")
