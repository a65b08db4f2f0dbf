from collections import Counter

import pytest
import torch
from torch import nn

import efftune
from efftune.hooks import called, on_parameters, unhooked, watched
from efftune.interop.transformers.lm_head import lm_head_why_not
from efftune.ops.perturb import perturb
from efftune.optim.directions import stream_of
from efftune.train.task import causal_lm_loss
from tests.methods.models import batch, llama
from tests.methods.perturbed import perturbed


def logged(log, name):
    @on_parameters
    def hook(module, *_):
        log.append(name)

    return hook


def test_a_call_computed_another_way_runs_the_hooks():
    layer, log = nn.Linear(2, 2), []
    layer.register_forward_pre_hook(logged(log, "before"))
    layer.register_forward_hook(logged(log, "after"), always_call=True)
    assert not watched(layer)
    assert called(layer, lambda: log.append("inside") or 7) == 7
    assert log == ["before", "inside", "after"]
    with unhooked(layer):
        layer(torch.ones(2))
    assert len(log) == 3 and "forward" not in vars(layer)
    layer(torch.ones(2))
    assert log[3:] == ["before", "after"]
    layer.register_forward_hook(lambda *_: None)
    assert watched(layer)


def test_a_hook_that_raises_leaves_the_module_as_it_was():
    layer = nn.Linear(2, 2)

    def fails(module, args):
        raise RuntimeError("in a hook")

    handle = layer.register_forward_pre_hook(on_parameters(fails))
    with pytest.raises(RuntimeError, match="in a hook"):
        called(layer, lambda: 7)
    handle.remove()
    assert layer(torch.ones(2)).shape == (2,)


@pytest.mark.parametrize("recipe", ["mezo", "lora(r=4, target_modules='lm_head|q_proj') + mezo"])
@pytest.mark.parametrize("tie", [False, True])
def test_the_loss_in_tiles_sees_the_heads_perturbation_once(recipe, tie, monkeypatch):
    """A perturbed head's loss is that of the perturbed weights, without the model's logits, drawn once."""
    monkeypatch.setattr("efftune.nn.linear_cross_entropy.TILE", 96 * 5)  # several tiles of a head with an adapter
    model, data = llama(tie), {"input_ids": batch(), "labels": batch()}
    tuner = efftune.apply(model, recipe)
    optimizer = tuner.optimizer(lr=1.0)
    with torch.no_grad():
        for p in tuner.named_trained().values():
            p.add_(torch.randn(p.shape, generator=torch.Generator().manual_seed(1)) * 0.05)  # lora_b is no longer 0
    drawn = []
    own = optimizer.directions.perturbed
    monkeypatch.setattr(
        optimizer.directions, "perturbed", lambda names, *args: drawn.extend(names) or own(names, *args)
    )
    for _ in range(2):  # the first call also compares the logits
        drawn.clear()
        with torch.no_grad(), perturbed(model, optimizer, 0.1, seed=3):
            loss = causal_lm_loss(model, data)
            assert lm_head_why_not(model) is None
        shared = {"model.embed_tokens.weight": 2} if tie and recipe == "mezo" else {}  # as embedding, and as head
        assert Counter(drawn) == dict.fromkeys(tuner.named_trained(), 1) | shared
    moved = {n: perturb(p.data, 0.1, seed=3, stream=stream_of(n)) for n, p in tuner.named_trained().items()}

    with torch.no_grad():
        logits = torch.func.functional_call(model, moved, (data["input_ids"],)).logits
    expected = nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), batch()[:, 1:].flatten(), reduction="sum")
    torch.testing.assert_close(loss, expected, rtol=2e-6, atol=0)
