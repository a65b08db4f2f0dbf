"""Methods that train entries or columns of each weight: which ones, what their steps are, and what becomes of those
that change."""

import copy

import pytest
import torch
from torch import nn

import efftune
from efftune import EfftuneError, Linear
from efftune.linear.delta.columns import Columns
from efftune.linear.picks import choose, columns_of, entries_of
from efftune.methods.sparse._scores import truncated
from efftune.train.state import restore_tensors
from tests.methods.models import batch, contract_model, llama, loss_fn
from tests.saved import saved_bytes


def layers(model):
    return {name: m for name, m in model.named_modules() if entries_of(m) or columns_of(m)}


def dense_gradients(model, data):
    """Of the weights of all linear layers but the head, by autograd."""
    model = copy.deepcopy(model).requires_grad_(True)
    loss_fn(model, data).backward()
    return {n: m.weight.grad for n, m in model.named_modules() if isinstance(m, nn.Linear) and n != "lm_head"}


def picked(layer):
    mask = torch.zeros(layer.out_features, layer.in_features, dtype=torch.bool)
    mask.view(-1)[layer.indices.long()] = True
    return mask


def largest(scores, count):
    """The smallest index first, of equal scores."""
    order = scores.flatten().sort(descending=True, stable=True).indices[:count]
    return order.sort().values.int()


# Scorers


@pytest.mark.parametrize("scorer, score", [("magnitude", torch.abs), ("small", lambda w: -w.abs())])
def test_picks_by_the_weight(scorer, score):
    plain = llama()
    for name, layer in layers(efftune.apply(llama(), f"shira(density=0.03, scorer='{scorer}')").model).items():
        w = plain.get_submodule(name).weight
        assert torch.equal(layer.indices, largest(score(w), round(0.03 * w.numel())))


def test_random_picks_are_those_of_the_seed_and_differ_between_layers():
    first, again, other = (layers(efftune.apply(llama(), f"shira(seed={s})").model) for s in (0, 0, 1))
    assert all(torch.equal(first[n].indices, again[n].indices) for n in first)
    assert not any(torch.equal(first[n].indices, other[n].indices) for n in first)
    q, k = (first[f"model.layers.{i}.self_attn.q_proj"].indices for i in (0, 1))
    assert not torch.equal(q, k)
    rows = torch.cat([layer.indices // layer.in_features / layer.out_features for layer in first.values()])
    assert abs(float(rows.mean()) - 0.5) < 5 * (1 / 12 / len(rows)) ** 0.5


@pytest.mark.parametrize("gap", [True, False])
def test_low_rank_picks_are_those_of_the_svd(gap):
    """Without a gap in the spectrum, too, which is where plain power steps miss a third."""
    n, k, r = 192, 160, 16
    g = torch.Generator().manual_seed(0)
    u, v = (torch.linalg.qr(torch.randn(d, k, generator=g)).Q for d in (n, k))
    s = torch.arange(1.0, k + 1) ** -0.5
    s[r:] *= 0.2 if gap else 1.0
    layer = nn.Linear(k, n)
    with torch.no_grad():
        layer.weight.copy_(u * s @ v.t())
    tuner = efftune.apply(nn.Sequential(layer), f"lift(rank={r}, density=0.05)")
    right = largest(((u * s)[:, :r] @ v.t()[:r]).abs(), round(0.05 * n * k))
    overlap = torch.isin(tuner.model[0].indices, right).float().mean()
    assert overlap >= (0.995 if gap else 0.96)


def test_the_approximation_has_the_rank_and_the_error_of_the_svd():
    from efftune.methods.sparse._scores import Matrix

    layer = efftune.apply(nn.Sequential(nn.Linear(96, 64)), "shira").model[0]
    w = layer.weight.detach()
    u, v = truncated(Matrix(layer, 8, 0))
    s = torch.linalg.svdvals(w.double())
    assert u.shape == (64, 8) and v.shape == (8, 96)
    assert (w - u @ v).norm() <= 1.01 * s[8:].norm()


@pytest.mark.parametrize("recipe", ["", " + recompute", " + mesa", " + wtacrs(ratio=0.3)", " + lisa(layers=1)"])
def test_gradients_pick_what_dense_ones_would(recipe):
    """Whatever backward keeps, whatever runs again, and whatever is frozen for the time being."""
    data, plain = batch(), llama()
    tuner = efftune.apply(llama(), f"shira(density=0.03, scorer='gradient'){recipe}")
    tuner.optimizer(lr=1e-3)
    state = torch.get_rng_state()
    frozen = [p for p in tuner.named_trained().values() if not p.requires_grad]
    tuner.backward(data, loss_fn)
    assert all(p.grad is None and not p.requires_grad for p in frozen)
    torch.set_rng_state(state)
    for name, gradient in dense_gradients(plain, data).items():
        layer, count = tuner.model.get_submodule(name), round(0.03 * gradient.numel())
        right = largest(gradient.abs(), count)
        assert torch.isin(layer.indices, right).sum() >= count - 1, name  # float32 sums in another order


def test_gradients_of_a_layer_that_is_called_twice_are_summed_up():
    data, plain = batch(), contract_model()
    tuner = efftune.apply(contract_model(), "shira(density=0.03, scorer='gradient')")
    tuner.optimizer(lr=1e-3)
    tuner.backward(data, loss_fn)
    for name, gradient in dense_gradients(plain.train(), data).items():
        if name.endswith("twice"):
            layer, count = tuner.model.get_submodule(name), round(0.03 * gradient.numel())
            assert torch.isin(layer.indices, largest(gradient.abs(), count)).sum() >= count - 1


def test_saft_picks_among_all_layers():
    data, plain = batch(), llama()
    tuner = efftune.apply(llama(), "saft(density=0.02)")
    tuner.optimizer(lr=1e-3)
    tuner.backward(data, loss_fn)
    gradients = dense_gradients(plain, data)
    count = sum(layer.values.numel() for layer in layers(tuner.model).values())
    assert count == sum(round(0.02 * g.numel()) for g in gradients.values())
    bound = torch.cat([g.abs().flatten() for g in gradients.values()]).sort(descending=True).values[count]
    lengths, missed = [], 0
    for name, layer in layers(tuner.model).items():
        scores = gradients[name].abs().flatten()
        if len(layer.indices) > 1:
            assert scores[layer.indices.long()].min() >= bound * (1 - 1e-4)
        missed += int((scores > bound * (1 + 1e-4))[~picked(layer).flatten()].sum())
        lengths.append(len(layer.indices))
    assert missed <= lengths.count(1) and min(lengths) >= 1  # for the one entry of a layer that would have none
    assert len(set(lengths)) > 3  # no share of each layer


# Steps


def masked_adamw(recipe, picks_at, steps, lr=1e-2, decay=0.1):
    """Dense AdamW in float64 on masks of picks: decay acts on what was learnt, moments go on where a pick goes on, and
    a new one begins as in a first step."""
    model = llama(dtype=torch.float64).requires_grad_(False)
    weights = {name: model.get_submodule(name).weight for name in picks_at[0]}
    start = {name: w.detach().clone() for name, w in weights.items()}
    m, v = ({name: torch.zeros_like(w) for name, w in weights.items()} for _ in range(2))
    mask = dict.fromkeys(weights)
    for w in weights.values():
        w.requires_grad_(True)
    for step in range(steps):
        fresh = {}
        if step in picks_at:
            for name, now in picks_at[step].items():
                fresh[name] = now if mask[name] is None else now & ~mask[name]
                gone = ~now
                m[name][gone], v[name][gone] = 0, 0
                mask[name] = now
        loss_fn(model, batch(step)).backward()
        with torch.no_grad():
            for name, w in weights.items():
                g = torch.where(mask[name], w.grad, 0)
                if name in fresh and step:
                    m[name] = torch.where(fresh[name], (1 - 0.9**step) * g, m[name])
                    v[name] = torch.where(fresh[name], (1 - 0.999**step) * g * g, v[name])
                m[name] = 0.9 * m[name] + 0.1 * g
                v[name] = 0.999 * v[name] + 0.001 * g * g
                change = m[name] / (1 - 0.9 ** (step + 1)) / ((v[name] / (1 - 0.999 ** (step + 1))).sqrt() + 1e-8)
                decayed = w - lr * decay * (w - start[name])
                w.copy_(torch.where(mask[name], decayed - lr * change, w))
                w.grad = None
    return {name: w.detach() for name, w in weights.items()}


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize(
    "recipe", ["shira(density=0.05)", "lift(rank=4, every=3)", "lift(scorer='gradient', every=3, density=0.02)"]
)
def test_steps_are_those_of_masked_adamw(recipe, fused):
    """In float64: the picks are the same, and nothing but the order of sums differs."""
    tuner = efftune.apply(llama(dtype=torch.float64), recipe, blocks=False)  # which turn by angles in float64
    optimizer = tuner.optimizer(lr=1e-2, weight_decay=0.1, fused=fused)
    picks_at = {}
    for step in range(8):
        optimizer.zero_grad()
        tuner.backward(batch(step), loss_fn)
        now = {name: picked(layer) for name, layer in layers(tuner.model).items()}
        if step == 0 or any(not torch.equal(now[n], picks_at[max(picks_at)][n]) for n in now):
            picks_at[step] = now
        optimizer.step()
    assert len(picks_at) == (1 if "shira" in recipe else 3)
    for name, right in masked_adamw(recipe, picks_at, 8).items():
        found = tuner.model.get_submodule(name).stored().tensors[0]
        torch.testing.assert_close(found, right, rtol=1e-9, atol=1e-11)


def test_16_bit_weights_lose_no_update():
    """At a learning rate below half an ulp of most weights."""
    tuner = efftune.apply(llama(dtype=torch.bfloat16), "shira(density=0.05)")
    optimizer = tuner.optimizer(lr=1e-5)
    before = {name: layer.values.detach().clone() for name, layer in layers(tuner.model).items()}
    for step in range(3):
        optimizer.zero_grad()
        tuner.backward(batch(step), loss_fn)
        optimizer.step()
    for name, layer in layers(tuner.model).items():
        moved = layer.values.detach() != before[name]
        assert moved[layer.values.grad != 0].all() and layer.values.dtype == torch.float32


def test_spiel_replaces_what_moved_least_by_what_would_move_most():
    torch.manual_seed(0)
    tuner = efftune.apply(llama(), "spiel(density=0.05, every=4, accumulate=2, rate=0.5, until=12)")
    optimizer = tuner.optimizer(lr=1e-2)
    original = {name: layer.weight.detach().clone() for name, layer in layers(llama_applied()).items()}
    gradients = []
    for step in range(13):
        held = {n: (m.indices.clone(), m.values.detach().clone()) for n, m in layers(tuner.model).items()}
        now = copy.deepcopy(tuner.model)
        for layer in layers(now).values():
            layer.stored()
        optimizer.zero_grad()
        tuner.backward(batch(step), loss_fn)
        gradients.append(full_gradients(now, batch(step)))
        optimizer.step()  # which begins the next step, and replaces
        share = {1: 1.0, 3: 0.5 * (1 - 4 / 12), 7: 0.5 * (1 - 8 / 12)}.get(step, 0.0)
        for name, layer in layers(tuner.model).items():
            old, _ = held[name]
            gone, new = ~torch.isin(old, layer.indices), ~torch.isin(layer.indices, old)
            assert gone.sum() == new.sum() <= int(share * len(old)) and len(layer.indices) == len(old)
            assert layer.left.numel() == 0
            w = layer.stored().tensors[0].detach().flatten()
            assert torch.equal(w[old[gone].long()], original[name].flatten()[old[gone].long()])
            if share and share < 1:
                window = [g[name] for g in gradients[step - 1 : step + 1]]
                total, at_first = sum(window).flatten().abs(), window[0].abs()
                among = largest(at_first, len(old))
                among = among[~torch.isin(among, old)]
                count = min(int(share * len(old)), len(among))
                assert new.sum() == count
                right = among[total[among.long()].sort(descending=True).indices[:count]]
                assert torch.isin(layer.indices[new], right).sum() >= count - 1
    assert "fresh" not in next(iter(optimizer.state.values()))


def test_two_spiels_replace_the_entries_of_their_own_layers():
    settings = "density=0.05, every=2, accumulate=1"
    recipe = f"spiel({settings}, target_modules='q_proj') + spiel({settings}, target_modules='down_proj')"
    tuner = efftune.apply(llama(), recipe)
    before = {name: layer.indices.clone() for name, layer in layers(tuner.model).items()}
    run(tuner, tuner.optimizer(lr=1e-3), range(1))
    for name, layer in layers(tuner.model).items():
        assert not torch.equal(layer.indices, before[name]), name


def llama_applied():
    return efftune.apply(llama(), "shira").model


def full_gradients(model, data):
    """dW of the layers of which entries train, as they are."""
    plain = llama()
    for name, layer in layers(model).items():
        plain.get_submodule(name).weight.data.copy_(layer.weight)
    return dense_gradients(plain, data)


# What changes, stays and comes back

RECIPES = [
    "shira(density=0.05)", "lift(rank=4, every=3)", "lift(rank=4, every=3) + wtacrs(ratio=0.5)", "saft(density=0.05)",
    "spiel(density=0.05, every=3, accumulate=1)", "s2ft(ratio=0.2)", "s2ft(ratio=0.2, scorer='magnitude') + mesa",
]  # fmt: skip


def run(tuner, optimizer, steps):
    for step in steps:
        optimizer.zero_grad()
        torch.manual_seed(step)
        tuner.backward(batch(step), loss_fn)
        optimizer.step()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("recipe", RECIPES)
def test_what_is_saved_loaded_removed_and_merged(recipe, dtype, tmp_path):
    model = llama(dtype=dtype)
    tuner = efftune.apply(model, recipe)
    run(tuner, tuner.optimizer(lr=1e-2), range(7))
    trained = tuner.model(batch(9)).logits
    assert not torch.equal(trained, llama(dtype=dtype)(batch(9)).logits)
    tuner.save(tmp_path)
    loaded = efftune.load(llama(dtype=dtype), tmp_path)
    assert torch.equal(loaded.model(batch(9)).logits, trained)
    merged = copy.deepcopy(loaded)
    merged.merge()
    assert not layers(merged.model)
    for name, layer in layers(loaded.model).items():
        assert torch.equal(merged.model.get_submodule(name).weight, layer.stored().tensors[0])
    loaded.remove()
    for name, p in llama(dtype=dtype).named_parameters():
        assert torch.equal(loaded.model.get_parameter(name), p), name


@pytest.mark.parametrize(
    "recipe",
    [
        "shira(density=0.05, scorer='gradient')", "lift(rank=4, every=2)", "saft(density=0.05)",
        "spiel(density=0.05, every=4, accumulate=2, rate=0)",
        "spiel(density=0.05, every=4, accumulate=2, rate=0, criterion='ma')", "sara(density=0.2, again=2)",
        "ltsft(after=2)", "s2ft(ratio=0.2, scorer='gradient')", "s2ft(ratio=0.2, scorer='activation')", "mft",
    ],
)  # fmt: skip
def test_what_is_loaded_goes_on_from_what_it_has_learnt(recipe, tmp_path):
    tuner = efftune.apply(llama(layers=2), recipe)
    run(tuner, tuner.optimizer(lr=1e-2), range(3))
    tuner.save(tmp_path)
    y = tuner.model(batch(9)).logits
    loaded = efftune.load(llama(layers=2), tmp_path)
    run(loaded, loaded.optimizer(lr=0.0), range(3))
    assert torch.equal(loaded.model(batch(9)).logits, y)


@pytest.mark.parametrize(
    "recipe",
    [
        "shira(scorer='magnitude')", "lift(rank=4)", "lift(scorer='small')", "sara", "mft",
        "s2ft(scorer='low_rank', rank=4)",
    ],
)  # fmt: skip
def test_a_weight_that_is_not_finite_is_refused_before_the_model_is_touched(recipe):
    model = llama()
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight[3, 5] = torch.inf
    with pytest.raises(EfftuneError, match="layers.1.mlp.down_proj: its weight has NaN or Inf, by which"):
        efftune.apply(model, recipe)
    assert not layers(model) and all(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("recipe", ["lift(rank=4, every=2)", "sara(renew=1)"])
def test_a_run_that_diverges_is_refused_in_words(recipe):
    tuner = efftune.apply(llama(layers=1), recipe)
    optimizer = tuner.optimizer(lr=1e-3)
    with torch.no_grad(), pytest.raises(EfftuneError, match="has NaN or Inf, and no approximation of rank"):
        for layer in layers(tuner.model).values():
            layer.values[0] = torch.nan
        with torch.enable_grad():
            run(tuner, optimizer, range(2))


def goes_on(recipe, steps):
    """Whether a run goes on bit for bit from the states that it has before these steps."""
    whole = efftune.apply(llama(), recipe)
    optimizer, held = whole.optimizer(lr=1e-2), {}
    for step in range(8):
        if step in steps:
            held[step] = copy.deepcopy((whole.named_saved(), optimizer.state_dict()))
        run(whole, optimizer, [step])
    for at, (tensors, state) in held.items():
        again = efftune.apply(llama(), recipe)
        resumed = again.optimizer(lr=1e-2)
        restore_tensors(again, tensors)
        resumed.load_state_dict(state)
        run(again, resumed, range(at, 8))
        for name, tensor in whole.named_saved().items():
            assert torch.equal(tensor, again.named_saved()[name]), (at, name)


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_run_goes_on_bit_for_bit_across_new_picks(recipe):
    goes_on(recipe, (2, 3, 4, 6))


# Columns


def test_heads_are_picked_whole_where_the_ratio_is_half_a_head():
    tuner = efftune.apply(llama(), "s2ft(ratio=0.3)")
    o, down = (tuner.model.get_submodule(f"model.layers.0.{n}") for n in ("self_attn.o_proj", "mlp.down_proj"))
    heads = o.columns.view(-1, 8)  # head_dim is 8
    assert len(heads) == 1 and torch.equal(heads - heads[:, :1], torch.arange(8)[None]) and int(heads[0, 0]) % 8 == 0
    assert len(down.columns) == round(0.3 * 48)
    single = efftune.apply(llama(), "s2ft(ratio=0.1)").model.get_submodule("model.layers.0.self_attn.o_proj")
    assert len(single.columns) == 3
    assert len(layers(tuner.model)) == 6


def test_columns_of_the_largest_weights():
    tuner, plain = efftune.apply(llama(), "s2ft(ratio=0.1, scorer='magnitude')"), llama()
    name = "model.layers.1.mlp.down_proj"
    sums = plain.get_submodule(name).weight.abs().sum(0)
    assert torch.equal(tuner.model.get_submodule(name).columns, largest(sums, 5))


def test_columns_keep_their_part_of_the_input():
    torch.manual_seed(0)
    layer = Linear.from_linear(nn.Linear(256, 64), delta=Columns(8))
    choose(layer, torch.arange(3, 256, 32))
    x = torch.randn(100, 256, requires_grad=True)
    assert saved_bytes(lambda: layer(x), nn.ModuleList([layer])) == 100 * 8 * 4


@pytest.mark.parametrize("blocks", [True, False])
def test_columns_cost_no_bytes_where_backward_makes_the_input_again(blocks):
    data, kept = batch(), {}
    for recipe in ("s2ft(ratio=0.3)", "lisa(layers=3) + s2ft(ratio=0.3)", "full(target_modules='o_proj|down_proj')"):
        tuner = efftune.apply(llama(), recipe, blocks=blocks)
        tuner.model.train()
        kept[recipe.partition("(")[0]] = saved_bytes(lambda model=tuner.model: loss_fn(model, data), tuner.model)
    tokens = data.numel()
    own = 3 * tokens * (8 + 14) * 4  # o_proj and down_proj of three layers, float32
    if blocks:
        assert kept["s2ft"] <= kept["full"]
    else:
        # sdpa keeps its output itself, but in the first layer, which nothing trains below.
        assert kept["full"] - kept["s2ft"] == tokens * (3 * 48 + 32) * 4 - own


# Refusals


@pytest.mark.parametrize(
    "recipe, words",
    [
        ("shira(density=0)", r"density of entries that train lies in \(0, 1\], not 0"),
        ("lift(density=1.5)", r"lies in \(0, 1\], not 1.5"),
        ("shira(r=0)", "r of at least 1"),
        (
            "shira(r=17)",
            r"r=17 asks for more entries, r·\(N \+ K\), than the 32 x 32 that there are; choose a smaller r",
        ),
        ("s2ft(ratio=1e-3)", "ratio=0.001 is less than one of its 32 columns; use a larger ratio"),
        ("shira(density=1e-5)", "self_attn.q_proj: density=1e-05 is less than one entry of 32 x 32; use a larger"),
        ("lift(rank=33)", r"rank=33 exceeds min\(N, K\) = 32 of a layer of \(32, 32\); choose a smaller rank"),
        ("shira(scorer='best')", "scorer is one of magnitude, small, random, low_rank, gradient, file, not 'best'"),
        ("s2ft(ratio=0)", r"share of columns that train lies in \(0, 1\], not 0"),
        ("s2ft(head_dim=5)", "o_proj: its 32 inputs are no whole number of heads of 5; give head_dim"),
        ("lift(every=-1)", "not every=-1; 0 means never"),
        ("spiel(accumulate=0)", "accumulate lies in 1..every"),
        ("spiel(rate=2)", r"lies in \[0, 1\], not 2"),
        ("saft + mezo", "mezo trains without backward; use shira or lift"),
        ("spiel + ferret", "ferret"),
        ("lift + ferret", r"compares those of now with those that a round began with; use shira, or lift\(every=0\)"),
    ],
)
def test_refusals(recipe, words):
    model = llama()
    with pytest.raises(EfftuneError, match=words):
        efftune.apply(model, recipe)
    assert not any(entries_of(m) for m in model.modules())


@pytest.mark.parametrize("columns, words", [([1, 1], "sorted"), ([3, 2], "sorted"), ([0, 16], "outside")])
def test_columns_from_outside_are_checked(columns, words):
    layer = Linear.from_linear(nn.Linear(16, 4), delta=Columns(2))
    held = copy.deepcopy(layer.state_dict())
    with pytest.raises(ValueError):
        choose(layer, torch.tensor(columns))
    assert all(torch.equal(t, held[n]) for n, t in layer.state_dict().items())


@pytest.mark.parametrize("recipe", ["saft", "spiel", "lift(scorer='gradient')"])
def test_a_loop_of_ones_own_that_shows_no_gradient_is_told(recipe):
    tuner = efftune.apply(llama(), recipe)
    optimizer = tuner.optimizer(lr=1e-3)
    loss_fn(tuner.model, batch()).backward()
    with pytest.warns(UserWarning, match="which this loop does not call: those that it began with go on training"):
        optimizer.step()


def test_no_warning_where_gradients_are_seen(recwarn):
    tuner = efftune.apply(llama(), "spiel(every=4, accumulate=1)")
    run(tuner, tuner.optimizer(lr=1e-3), range(2))
    assert not [w for w in recwarn if "does not call" in str(w.message)]
