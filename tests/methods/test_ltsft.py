"""LT-SFT: the first phase, what it picks, and that all begins anew after it."""

import pytest
import torch
from torch import nn

import efftune
from efftune import EfftuneError
from efftune.interop.changes import compose
from efftune.optim.contract import restart
from efftune.train.state import base_fingerprint
from tests.methods import test_sparse as shared
from tests.methods.models import batch, llama, loss_fn


def test_two_phases_are_full_training_and_masked_adamw_from_the_start():
    """In float64. The moments and the age of the first phase would be seen in the second."""
    after, steps = 3, 6
    dense = efftune.apply(llama(dtype=torch.float64), "full(target_modules='mlp|self_attn')", blocks=False)
    shared.run(dense, dense.optimizer(lr=1e-2), range(after))
    tuner = efftune.apply(llama(dtype=torch.float64), f"ltsft(density=0.05, after={after})", blocks=False)
    optimizer = tuner.optimizer(lr=1e-2, weight_decay=0.0)
    shared.run(tuner, optimizer, range(after - 1))
    assert all(len(layer.indices) == layer.weight.numel() for layer in shared.layers(tuner.model).values())
    shared.run(tuner, optimizer, [after - 1])
    start = llama(dtype=torch.float64)
    for name, layer in shared.layers(tuner.model).items():
        w0, w1 = start.get_submodule(name).weight.detach(), dense.model.get_submodule(name).weight.detach()
        count = round(0.05 * w0.numel())
        assert len(layer.indices) == count and not layer.values.any() and not len(layer.left)
        assert torch.isin(layer.indices, shared.largest((w1 - w0).abs(), count)).sum() >= count - 1, name
        assert torch.equal(layer.stored().tensors[0], w0)
        assert layer.values not in optimizer.state
    picks = {0: {name: shared.picked(layer) for name, layer in shared.layers(tuner.model).items()}}
    for step in range(steps):
        optimizer.zero_grad()
        tuner.backward(batch(step), loss_fn)
        optimizer.step()
    for name, right in shared.masked_adamw("ltsft", picks, steps, decay=0.0).items():
        found = tuner.model.get_submodule(name).stored().tensors[0]
        torch.testing.assert_close(found, right, rtol=1e-9, atol=1e-11)


def test_exactly_as_many_under_ties():
    tuner = efftune.apply(llama(), "ltsft(density=0.05, after=1)")
    shared.run(tuner, tuner.optimizer(lr=0.0), range(1))  # nothing moves
    for layer in shared.layers(tuner.model).values():
        assert torch.equal(layer.indices, torch.arange(round(0.05 * layer.weight.numel()), dtype=torch.int32))


def test_a_density_of_one_is_rewound_once():
    tuner = efftune.apply(llama(), "ltsft(density=1.0, after=2)")
    optimizer = tuner.optimizer(lr=1e-2)
    shared.run(tuner, optimizer, range(2))
    assert not any(layer.values.any() for layer in shared.layers(tuner.model).values())
    shared.run(tuner, optimizer, range(2, 4))
    assert all(layer.values.any() for layer in shared.layers(tuner.model).values())


OPTIMIZERS = [
    lambda p: torch.optim.AdamW(p, lr=0.1, fused=True), lambda p: torch.optim.NAdam(p, lr=0.1),
    lambda p: torch.optim.Adagrad(p, lr=0.1, initial_accumulator_value=0.3), lambda p: torch.optim.Rprop(p, lr=0.1),
    lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, dampening=0.5),
]  # fmt: skip


@pytest.mark.parametrize("make", OPTIMIZERS)
def test_a_parameter_is_new_to_the_optimizer_again(make):
    old, new, other = (nn.Parameter(torch.linspace(-1, 1, 7)) for _ in range(3))
    first, second = make([old, other]), make([new])
    for _ in range(3):
        old.grad = torch.cos(old.detach())
        first.step()
    with torch.no_grad():
        old.copy_(new)
    restart(first, old)
    for _ in range(3):
        for p, optimizer in ((old, first), (new, second)):
            p.grad = torch.sin(p.detach() + 1)
            optimizer.step()
    assert torch.equal(old, new)


def test_a_run_that_ends_in_its_first_phase_says_so():
    tuner = efftune.apply(llama(), "ltsft(density=0.05, after=3)")
    optimizer, said = tuner.optimizer(lr=1e-3), []
    for step in range(5):
        shared.run(tuner, optimizer, [step])
        said.append(tuner.reports())
    assert all("which is rewound; train longer" in reports[0] for reports in said[:3]) and not said[4]


def test_the_models_own_weights_pick_nothing(tmp_path):
    llama().save_pretrained(tmp_path)
    with pytest.raises(efftune.EfftuneError, match="has the very weights that the model has; give a run that changed"):
        efftune.apply(llama(), f"ltsft(file='{tmp_path}')")


def test_a_run_goes_on_bit_for_bit_from_either_phase():
    shared.goes_on("ltsft(density=0.05, after=3)", (2, 3, 5))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_saved_loaded_removed_and_merged(dtype, tmp_path):
    shared.test_what_is_saved_loaded_removed_and_merged("ltsft(density=0.05, after=2)", dtype, tmp_path)


def test_what_is_loaded_has_no_first_phase(tmp_path):
    tuner = efftune.apply(llama(), "ltsft(density=0.05, after=1)")
    shared.run(tuner, tuner.optimizer(lr=1e-2), range(2))
    tuner.save(tmp_path)
    model = llama()
    before = sum(t.numel() for t in model.parameters())
    efftune.load(model, tmp_path)
    assert sum(t.numel() for t in (*model.parameters(), *model.buffers())) < 1.3 * before


def test_the_base_of_a_run_is_the_same_in_both_phases():
    """Whoever exports a run has not made an optimizer, with which the first phase begins."""
    tuner = efftune.apply(llama(), "ltsft(density=0.05, after=1)")
    bases = [base_fingerprint(tuner.model, set(tuner.named_delta()))]
    optimizer = tuner.optimizer(lr=1e-2)
    for step in range(2):
        bases.append(base_fingerprint(tuner.model, set(tuner.named_delta())))
        shared.run(tuner, optimizer, [step])
    assert len(set(bases)) == 1


def test_several_compose(tmp_path):
    """What two runs learnt is added up, whatever the order; subtracted, it is gone."""
    paths, merged = [tmp_path / "a", tmp_path / "b"], []
    for i, path in enumerate(paths):
        tuner = efftune.apply(llama(), "ltsft(density=0.05, after=2)")
        shared.run(tuner, tuner.optimizer(lr=1e-2), range(3 * i, 3 * i + 4))
        tuner.save(path)
        merged.append(tuner.merge().state_dict())
    one, other, start = (
        compose(llama(), paths).state_dict(),
        compose(llama(), paths[::-1]).state_dict(),
        llama().state_dict(),
    )
    moved = 0
    for name, w0 in start.items():
        assert torch.equal(one[name], other[name])
        right = w0.double() + sum(m[name].double() - w0.double() for m in merged)
        torch.testing.assert_close(one[name].double(), right, rtol=2**-22, atol=1e-8)
        moved += int((merged[0][name] != w0).logical_and(merged[1][name] != w0).sum())
    assert moved > 50  # entries that both trained
    back = compose(llama(), paths, paths[1:]).state_dict()
    assert all(torch.allclose(back[n], t, rtol=2**-21, atol=1e-8) for n, t in merged[0].items())


@pytest.mark.parametrize(
    "recipe, words",
    [
        ("ltsft(after=0)", "train for at least one step before they are picked, not after=0"),
        ("ltsft(file='')", "There is no safetensors file in ; give the folder that a run of full"),
        ("ltsft(density=0)", r"density of entries that train lies in \(0, 1\], not 0"),
        ("ltsft(scorer='random')", "ltsft has no setting 'scorer'"),
        ("ltsft + mezo", "directions point; give ltsft the file of a run of full"),
        ("ltsft + ferret", "other entries train as time goes on"),
        ("ltsft(density=1e-5)", "q_proj: density=1e-05 is less than one entry"),
    ],
)
def test_refusals(recipe, words):
    with pytest.raises(EfftuneError, match=words):
        efftune.apply(llama(), recipe)


@pytest.mark.parametrize(
    "recipe", ["ltsft(density=0.05, after=2)", "sara(density=0.2, again=2)", "lift(rank=4, every=2)"]
)
def test_a_gradient_of_entries_that_were_is_gone(recipe):
    """A loop may set gradients to 0 instead of None, and what is left has to fit."""
    tuner = efftune.apply(llama(), recipe)
    optimizer = tuner.optimizer(lr=1e-2)
    for step in range(3):
        optimizer.zero_grad(set_to_none=False)
        tuner.backward(batch(step), loss_fn)
        optimizer.step()
        layers = shared.layers(tuner.model).values()
        assert all(m.values.grad is None for m in layers) if step == 1 else any(m.values.grad.any() for m in layers)
