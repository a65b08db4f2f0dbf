"""SaRA: the norm's gradient and when it is renewed, which entries train, and which of them leave."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import efftune
from efftune import EfftuneError, Linear
from efftune.linear.delta.entries import Entries
from efftune.linear.picks import repick
from efftune.methods.sparse._scores import Picked, polar
from tests.budget import assert_within_budget
from tests.methods import test_sparse as shared
from tests.methods.models import batch, llama, loss_fn


def made(n=48, k=37, density=0.2, dtype=torch.float64):
    """A layer of which some entries were trained, and others have left."""
    torch.manual_seed(0)
    layer = Linear.from_linear(torch.nn.Linear(k, n, dtype=dtype).requires_grad_(False), delta=Entries(density))
    for _ in range(2):
        repick(layer, torch.randperm(n * k)[: len(layer.indices)].sort().values)
        with torch.no_grad():
            layer.values.normal_(std=0.1)
    return layer


def sparse(layer):
    """W⊙M as a matrix."""
    w = layer.stored().tensors[0].detach()
    return torch.where(shared.picked(layer), w, 0)


def norm_gradient(w, r):
    u, _, vh = torch.linalg.svd(w, full_matrices=False)
    return u[:, :r] @ vh[:r]


def test_the_gradient_is_that_of_the_nuclear_norm():
    """By autograd, through torch's own decomposition, in float64; where the rank is all of it."""
    layer = made()
    w = sparse(layer).requires_grad_()
    torch.linalg.matrix_norm(w, "nuc").backward()
    found = polar(Picked(layer, 37, 3))
    torch.testing.assert_close(found, w.grad.flatten()[layer.indices], rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("r", [3, 37, 64])
def test_in_float32_it_is_as_good_as_a_whole_decomposition(r):
    """Of a lower rank, where the spectrum has a gap; of all, where it is asked for more than there is."""
    layer = made(density=1.0, dtype=torch.float32)
    with torch.no_grad():
        u, s, vh = torch.linalg.svd(layer.original.view(48, 37), full_matrices=False)
        s[r:] *= 0.1
        layer.values.copy_((u * s @ vh).flatten() - layer.original)
    w = sparse(layer)
    q = torch.linalg.qr(w @ torch.randn(37, 37)).Q  # W is given by products alone, so that it is turned by one first
    single = q @ norm_gradient(q.t() @ w, r)
    assert_within_budget(polar(Picked(layer, r, 3)), norm_gradient(w.double(), r).flatten(), single.flatten())


def test_entries_of_a_matrix_of_lower_rank_have_no_share_of_what_is_zero():
    layer = made(density=1.0)
    with torch.no_grad():
        a, b = torch.randn(48, 2, dtype=torch.float64), torch.randn(2, 37, dtype=torch.float64)
        layer.values.copy_((a @ b).flatten() - layer.original)
    torch.testing.assert_close(polar(Picked(layer, 37, 0)), norm_gradient(a @ b, 2).flatten(), rtol=1e-7, atol=1e-9)


def test_no_matrix_as_large_as_the_weight_is_made():
    layer, seen = made(300, 280, 0.01, torch.float32), []
    weight = layer.weight.untyped_storage()._cdata

    class Sizes(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            out = function(*args, **kwargs or {})
            tensors = [t for t in (out if isinstance(out, tuple) else (out,)) if isinstance(t, torch.Tensor)]
            seen.extend(t.numel() for t in tensors if t.untyped_storage()._cdata != weight)
            return out

    matrix = Picked(layer, 4, 0)
    assert matrix.times(torch.eye(280)).shape == (300, 280)
    with Sizes():
        polar(matrix)
    assert 0 < max(seen) < 300 * 280 / 4


@pytest.mark.parametrize("parts", [1, 4])
def test_it_is_added_once_a_step_and_renewed_every_so_many(parts):
    with_norm, without = (
        efftune.apply(llama(dtype=torch.float64), f"sara(density=0.2, again=0, renew=3, nuclear={w})", blocks=False)
        for w in (0.1, 0.0)
    )
    optimizer = with_norm.optimizer(lr=1e-2)
    name, factors = "model.layers.1.mlp.up_proj", []
    one, other = (tuner.model.get_submodule(name) for tuner in (with_norm, without))
    for step in range(5):
        for tuner in (with_norm, without):
            tuner.model.zero_grad()
            for chunk in batch(step).chunk(parts):
                tuner.backward(chunk, loss_fn, scale=1 / parts)
        if step % 3 == 0:
            right = norm_gradient(sparse(one), 32).flatten()[one.indices]
        added = one.values.grad - other.values.grad
        torch.testing.assert_close(added, 0.1 * right, rtol=1e-7, atol=1e-9)
        factors.append(with_norm.run.states["sara"].factors[name])
        optimizer.step()
        for a, b in zip(shared.layers(with_norm.model).values(), shared.layers(without.model).values(), strict=True):
            b.values.data.copy_(a.values)
    assert (
        factors[0] is factors[1] is factors[2] and factors[3] is factors[4] and not torch.equal(factors[2], factors[3])
    )


def test_steps_are_those_of_masked_adamw_with_the_norm(monkeypatch):
    """In float64, across the step at which entries leave, with a decomposition in every step."""
    recipe, again = "sara(density=0.2, again=3, renew=1, nuclear=0.02)", 3
    tuner = efftune.apply(llama(dtype=torch.float64), recipe, blocks=False)
    optimizer, picks_at = tuner.optimizer(lr=1e-2, weight_decay=0.1), {}
    for step in range(6):
        if step in (0, again):
            picks_at[step] = {name: shared.picked(layer) for name, layer in shared.layers(tuner.model).items()}
        shared.run(tuner, optimizer, [step])
    assert sum(int(m.sum()) for m in picks_at[again].values()) < sum(int(m.sum()) for m in picks_at[0].values())

    steps = iter(range(6))

    def penalised(model, data):
        step = next(steps)
        mask = picks_at[again if step >= again else 0]
        norms = [
            torch.linalg.matrix_norm(model.get_submodule(n).weight * mask[n], "nuc") for n in mask if mask[n].any()
        ]
        return loss_fn(model, data) + 0.02 * sum(norms)

    monkeypatch.setattr(shared, "loss_fn", penalised)
    for name, right in shared.masked_adamw(recipe, picks_at, 6).items():
        found = tuner.model.get_submodule(name).stored().tensors[0]
        torch.testing.assert_close(found, right, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("setting", ["density=0.2", "threshold=0.004"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_entries_that_grow_out_of_the_bound_leave_as_they_were_trained(setting, dtype):
    tuner = efftune.apply(llama(dtype=dtype), f"sara({setting}, again=4)")
    optimizer, plain = tuner.optimizer(lr=1e-3), llama(dtype=dtype)
    bounds = {}
    for name, layer in shared.layers(tuner.model).items():
        w = plain.get_submodule(name).weight.detach().abs()
        if setting == "density=0.2":
            assert torch.equal(layer.indices, shared.largest(-w, round(0.2 * w.numel())))
            bounds[name] = w[shared.picked(layer)].max()
        else:
            assert torch.equal(shared.picked(layer), w.double() < 0.004)
    shared.run(tuner, optimizer, range(3))
    held = {n: (m.indices.clone(), dict(optimizer.state[m.values])) for n, m in shared.layers(tuner.model).items()}
    step, optimizer.step = optimizer.step, lambda: None
    shared.run(tuner, optimizer, [3])
    step()
    left = 0
    for name, layer in shared.layers(tuner.model).items():
        old, state = held[name]
        w = layer.stored().tensors[0].detach().flatten()
        now = w[old.long()].abs()
        stay = now <= bounds[name] if bounds else now.double() < 0.004
        assert torch.equal(layer.indices, old[stay])
        assert len(layer.left) + len(layer.indices) == len(old)  # all have moved, so that all are remembered
        after = optimizer.state[layer.values]
        assert len(after["exp_avg"]) == len(layer.indices) and after["step"] == 4
        assert after["exp_avg"].any() and state["exp_avg"].shape == old.shape
        left += len(layer.left)
    assert left > 300
    shared.run(tuner, optimizer, range(4, 6))
    before = {n: m.indices.clone() for n, m in shared.layers(tuner.model).items()}
    shared.run(tuner, optimizer, range(6, 7))
    assert all(torch.equal(m.indices, before[n]) for n, m in shared.layers(tuner.model).items())  # never again


def test_a_layer_may_have_no_entry_at_all():
    """None below the threshold, or none that stays; files and merging too."""
    tuner = efftune.apply(llama(), "sara(threshold=1e-5, again=2)")
    lengths = [len(layer.indices) for layer in shared.layers(tuner.model).values()]
    assert 0 in lengths and sum(lengths) > 0
    shared.run(tuner, tuner.optimizer(lr=1e-2), range(4))
    assert not any(len(layer.indices) for layer in shared.layers(tuner.model).values())
    assert sum(len(layer.left) for layer in shared.layers(tuner.model).values()) == sum(lengths)
    tuner.merge()


def test_a_run_goes_on_bit_for_bit_across_the_step_at_which_entries_leave():
    shared.goes_on("sara(density=0.2, again=4, renew=3, nuclear=0.05, rank=4)", (3, 4, 5))


def test_over_codes_the_entries_that_train_are_codes_and_what_was_learnt():
    """Their norm, and who leaves, are of both together."""
    tuner = efftune.apply(llama(), "int8(group=16) + sara(density=0.2, again=2, renew=1, nuclear=0.05, rank=4)")
    layer = tuner.model.model.layers[0].mlp.up_proj
    with torch.no_grad():
        layer.values[:5] = 10.0
    whole = layer.merge().weight.detach().flatten()[layer.indices]
    torch.testing.assert_close(Picked(layer, 4, 0).values, whole)
    grown = layer.indices[:5].clone()
    shared.run(tuner, tuner.optimizer(lr=1e-4), range(3))
    assert torch.isin(grown, layer.left).all() and not torch.isin(layer.indices, grown).any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_saved_loaded_removed_and_merged(dtype, tmp_path):
    shared.test_what_is_saved_loaded_removed_and_merged("sara(threshold=0.005, again=3)", dtype, tmp_path)


def test_a_loop_of_ones_own_is_told_that_there_is_no_norm():
    tuner = efftune.apply(llama(), "sara")
    optimizer = tuner.optimizer(lr=1e-3)
    loss_fn(tuner.model, batch()).backward()
    with pytest.warns(UserWarning, match="adds its nuclear norm in tuner.backward.* does not call: there is none"):
        optimizer.step()


@pytest.mark.parametrize(
    "recipe, words",
    [
        ("sara(threshold=0)", "which is above 0, not threshold=0"),
        ("sara(threshold=1e-12)", "none of 21 layers has a weight below threshold=1e-12; use a larger one"),
        ("sara(density=1.5)", r"lies in \(0, 1\], not 1.5"),
        ("sara(again=-1)", "again=-1 and nuclear=0.0005 are 0 or more"),
        ("sara(nuclear=-1.0)", "nuclear=-1.0 are 0 or more"),
        ("sara(renew=0)", "at least 1, not renew=0"),
        ("sara(rank=0)", "rank of the approximation is at least 1, not 0"),
        ("sara(scorer='random')", "sara has no setting 'scorer'"),
        ("sara(nuclear=0) + mezo", r"does not follow entries that leave; use sara\(nuclear=0, again=0\)"),
        ("sara(again=0) + mezo", r"has no gradients that a nuclear norm is added to.*; use sara\(nuclear=0, again=0\)"),
        ("sara + ferret", "other entries train as time goes on"),
    ],
)
def test_refusals(recipe, words):
    with pytest.raises(EfftuneError, match=words):
        efftune.apply(llama(), recipe)
