"""VCAS: its variances are what they are said to be, its controller goes the right way, and at the start it is exact."""

import itertools
import warnings

import pytest
import torch

import efftune
from efftune.linear import Exact, Linear
from efftune.methods._base import Micro, autograd
from efftune.methods._gradients import distance, inverse_share, sampled_gradients
from efftune.methods.sampled import vcas
from efftune.methods.sampled.vcas import (
    Sampled,
    Window,
    row_variance,
    smallest_share,
)
from efftune.nn.subbatch import Recompute, probabilities
from tests.methods.models import batch, llama, loss_fn


def tuned(recipe, **how):
    tuner = efftune.apply(llama(**how), recipe)
    tuner.model.train()
    return tuner, tuner.optimizer(lr=1e-3), tuner.model.model.layers


def ratios(stack):
    return [block.forward.ratio for block in stack]


def layers(stack):
    return {n: m for n, m in stack.named_modules() if isinstance(m, Linear)}


def gradients(tuner):
    return {n: p.grad.clone() for n, p in tuner.named_trained().items() if p.grad is not None}


# Variances


def test_the_variance_of_drawn_rows_is_its_formula_by_enumeration():
    torch.manual_seed(0)
    g, x = torch.randn(6, 3).double(), torch.randn(6, 4).double()
    g[2] = 0
    score = g.norm(dim=1) * x.norm(dim=1)
    for ratio in (0.2, 0.5, 0.9):
        q = probabilities(score, max(1.0, ratio * 6))
        exact, variance = g.t() @ x, 0.0
        for drawn in itertools.product((0.0, 1.0), repeat=6):
            b = torch.tensor(drawn, dtype=torch.float64)
            chance = torch.where(b > 0, q, 1 - q).prod()
            weight = torch.where(q > 0, b / q, 0.0)
            variance += chance * ((g * weight[:, None]).t() @ x - exact).square().sum()
        torch.testing.assert_close(row_variance(score, ratio), variance)


def test_the_variance_of_the_gradient_and_its_mean_by_welford():
    torch.manual_seed(0)
    window, drawn = Window(), [torch.randn(50) + 1e3 for _ in range(5)]
    for g in drawn:
        window.add({"w": g}, [], {})
    expected = torch.stack(drawn).double().var(0).sum()
    assert abs(window.spread["w"] / 4 - expected) < 1e-3 * expected


def test_the_smallest_share():
    norms = torch.tensor([1.0, 5.0, 3.0, 1.0])
    assert [smallest_share(norms, s) for s in (0.0, 0.5, 0.51, 0.8, 0.81, 0.999, 1.0)] == [
        0.25, 0.25, 0.5, 0.5, 0.75, 1.0, 1.0,
    ]  # fmt: skip
    assert smallest_share(torch.zeros(4), 0.9) == 0.25 and smallest_share(torch.zeros(4), 1.0) == 1.0


# The controller


@pytest.mark.parametrize("act, share", [(0.0, 0.4), (1e6, 0.6), (0.025, 0.5)])
def test_more_variance_than_allowed_keeps_more(act, share):
    """V_act above tau_act·V_s raises s, below lowers it."""
    tuner, _, stack = tuned("vcas(alpha=0.1)")
    controller = tuner.run.states["vcas"]
    controller.share = 0.5
    v_s = 8.0
    window = Window(count=2, act=act * v_s * 4, norms=[[torch.ones(4)] * 3] * 2)
    first, second = list(dict(stack.named_parameters()))[:2]
    p = dict(stack.named_parameters())
    window.spread = {n: torch.tensor(v_s / 2 / inverse_share(p[n]), dtype=torch.float64) for n in (first, second)}
    tuner.methods[-1]._adapt(stack, controller, window)
    assert abs(controller.share - share) < 1e-9


@pytest.mark.parametrize("factor, expected", [(0.5, 0.7 * 0.95), (2.0, 0.7 / 0.95), (1e9, 0.7 / 0.95)])
def test_more_variance_of_rows_than_allowed_keeps_more_rows(factor, expected):
    tuner, _, stack = tuned("vcas")
    name, layer = next(iter(layers(stack).items()))
    others = [m.keep.ratio for m in layers(stack).values()][1:]
    layer.keep = Sampled(0.7, min_rows=1, at="backward")
    scale = inverse_share(layer.weight)
    window = Window(count=2, act=0.0, norms=[[None] * 3] * 2)
    window.spread = {f"{name}.weight": torch.tensor(4.0 / scale)}
    window.weight = {name: torch.tensor(2 * factor * 0.025 * 4.0)}
    tuner.methods[-1]._adapt(stack, tuner.run.states["vcas"], window)
    assert layer.keep.ratio == pytest.approx(expected) and ratios(stack) == [1.0] * 3
    assert [m.keep.ratio for m in layers(stack).values()][1:] == others
    layer.keep = Sampled(0.99, min_rows=1, at="backward")
    window.weight = {name: torch.tensor(1e9)}
    tuner.methods[-1]._adapt(stack, tuner.run.states["vcas"], window)
    assert layer.keep.ratio == 1.0


def test_shares_of_samples_do_not_grow_with_depth_below_the_loss():
    """The lowest block's own share is the least that holds s; the ones above keep at least as many."""
    tuner, _, stack = tuned("vcas(alpha=0.3)")
    controller = tuner.run.states["vcas"]
    controller.share = 0.9
    even, one = torch.ones(4), torch.tensor([100.0, 1.0, 1.0, 1.0])
    p = dict(stack.named_parameters())
    for own, expected in [([one, even, one], [0.25, 0.75, 0.75]), ([even, one, one], [0.75] * 3)]:
        controller.share = 0.9
        for r in stack:
            r.forward.ratio = 1.0
        window = Window(count=2, act=0.0, norms=[own, own])
        window.spread = {n: torch.tensor(1.0) for n in p}
        tuner.methods[-1]._adapt(stack, controller, window)  # s = 0.6
        assert ratios(stack) == pytest.approx([0.6 + 0.4 * e for e in expected])


def test_a_run_lowers_its_shares_while_the_variance_allows_and_keeps_them_in_order():
    tuner, optimizer, stack = tuned("full + vcas(interval=1, tau_act=1e9, tau_w=1e9, alpha=0.1)")
    for step in range(10):
        optimizer.zero_grad()
        tuner.backward(batch(seed=step, rows=8), loss_fn)
        optimizer.step()
    found = ratios(stack)
    assert tuner.run.states["vcas"].share == pytest.approx(0.5) and found == sorted(found) and found[-1] < 0.9
    assert all(m.keep.ratio == pytest.approx(0.95**5) for m in layers(stack).values())
    tuner, optimizer, stack = tuned("full + vcas(interval=1, tau_act=0.0, tau_w=0.0, alpha=0.1)")
    tuner.run.states["vcas"].share = 0.3
    for block in stack:
        block.forward.ratio = 0.5
    for layer in layers(stack).values():
        layer.keep = Sampled(0.5, min_rows=1, at="backward")
    for step in range(4):
        optimizer.zero_grad()
        tuner.backward(batch(seed=step, rows=8), loss_fn)
        optimizer.step()
    assert tuner.run.states["vcas"].share == pytest.approx(0.5)
    assert all(m.keep.ratio == pytest.approx(0.5 / 0.95**2) for m in layers(stack).values())


# Measuring


@pytest.mark.parametrize("recipe", ["full", "lora(r=4)"])
def test_the_step_that_measures_trains_on_the_exact_gradient(recipe):
    """Also on top of gradients that are already there, and with shares below 1; nothing of the repeats stays."""
    plain, _, _ = tuned(recipe)
    tuner, optimizer, stack = tuned(f"{recipe} + vcas(interval=4, batches=2)")
    for block in stack:
        block.forward.ratio = 0.5
    for layer in layers(stack).values():
        if isinstance(layer.keep, Sampled):
            layer.keep = Sampled(0.5, min_rows=1, at="backward")
    for chunk in batch(rows=8).chunk(2):
        torch.manual_seed(0)
        expected_loss = plain.backward(chunk, loss_fn, scale=0.5)
        expected_state = torch.get_rng_state()
        torch.manual_seed(0)
        loss = tuner.backward(chunk, loss_fn, scale=0.5)
        assert torch.equal(loss, expected_loss)
    expected, found = gradients(plain), gradients(tuner)
    assert expected.keys() == found.keys()
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], rtol=1e-5, atol=1e-7)
    assert expected_state.shape == torch.get_rng_state().shape
    controller = tuner.run.states["vcas"]
    assert controller.window is None and controller.share == 1.0  # half the samples add more than is allowed
    assert all(r.record is False and r.by_row is False and r.repeat == 0 for r in (b.forward for b in stack))
    before = gradients(tuner)
    tuner.backward(batch(rows=8), loss_fn)  # the same step again: measured already
    after = gradients(tuner)
    assert any(not torch.equal(before[n], after[n]) for n in before) and controller.window is None


def test_repeats_see_the_dropout_of_the_exact_pass_and_draw_other_samples():
    """With dropout on and all samples kept, repeats equal the exact gradient; with half of them they differ from it and
    from each other."""
    from transformers import BertConfig, BertForSequenceClassification

    torch.manual_seed(0)
    config = BertConfig(vocab_size=40, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24)
    model = BertForSequenceClassification(config).train()
    tuner = efftune.apply(model, "full + vcas(interval=1, batches=3)")
    tuner.optimizer(lr=0.0)
    stack = model.bert.encoder.layer
    ids, labels = torch.randint(0, 40, (8, 6)), torch.randint(0, 2, (8,))
    loss = lambda m, b: m(input_ids=ids, labels=labels).loss  # noqa: E731
    tuner.backward(None, loss)
    assert float(tuner.run.states["vcas"].window.act) < 1e-10
    for block in stack:
        block.forward.ratio = 0.5
    acts = []
    monitor = vcas.distance
    vcas.distance = lambda a, b, p: acts.append(a) or monitor(a, b, p)
    try:
        tuner.backward(None, loss)
    finally:
        vcas.distance = monitor
    per = len(acts) // 3
    assert float(tuner.run.states["vcas"].window.act) > 1e-8
    assert not torch.equal(acts[0], acts[per]) and not torch.equal(acts[per], acts[2 * per])


def test_the_measured_variance_of_drawn_samples_is_the_real_one():
    """V_act from repeats against the mean over many independent draws, on the same coordinates."""
    tuner, _, stack = tuned("full + vcas(interval=1, batches=12)", layers=2)
    for block in stack:
        block.forward.ratio = 0.5
    data = batch(rows=8)
    torch.manual_seed(0)
    tuner.backward(data, loss_fn)
    measured = float(tuner.run.states["vcas"].window.act) / 12
    tuner.run.states["vcas"].window = None
    watched = dict(stack.named_parameters())

    def drawn():
        tuner.model.zero_grad()
        with sampled_gradients(watched) as seen:
            autograd(Micro(tuner.run, data, loss_fn))
        return seen

    with tuner.exactly():
        exact = drawn()
    real = []
    for _ in range(60):
        found = drawn()
        real.append(sum(distance(found[n], exact[n], p) for n, p in watched.items()))
    real = torch.stack(real)
    assert abs(measured - real.mean()) < 4 * (1 / 12 + 1 / 60) ** 0.5 * real.std()


def test_a_window_over_two_steps_and_one_over_two_micro_batches():
    tuner, optimizer, stack = tuned("full + vcas(interval=5)")
    controller = tuner.run.states["vcas"]
    for chunk in batch(rows=6).chunk(3):
        tuner.backward(chunk, loss_fn, scale=1 / 3)
    assert controller.window is None and controller.share == 0.99
    tuner, optimizer, stack = tuned("full + vcas(interval=5)")
    controller = tuner.run.states["vcas"]
    shares = []
    for step in range(7):
        optimizer.zero_grad()
        tuner.backward(batch(seed=step), loss_fn)
        shares.append((controller.share, controller.window is not None))
        optimizer.step()
    assert shares == [(1.0, True), *[(0.99, False)] * 4, (0.99, True), (0.98, False)]


# Where it stands


@pytest.mark.parametrize("recipe", ["full", "lora(r=4)"])
def test_shares_of_1_are_bit_for_bit_the_unsampled_model(recipe):
    """And so they are under the model's own checkpointing, which vcas replaces."""
    plain, _, _ = tuned(recipe)
    tuner, _, _ = tuned(f"{recipe} + vcas(interval=0)")
    for t in (plain, tuner):
        with torch.no_grad():
            for i, (_, p) in enumerate(sorted(t.named_trained().items())):
                p.copy_(torch.randn(p.shape, generator=torch.Generator().manual_seed(i)) / 8)
    assert torch.equal(plain.backward(batch(), loss_fn), tuner.backward(batch(), loss_fn))
    expected = gradients(plain)
    for _ in range(2):
        found = gradients(tuner)
        assert all(torch.equal(found[n], expected[n]) for n in expected)
        tuner.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        tuner.model.zero_grad()
        tuner.backward(batch(), loss_fn)


@pytest.mark.parametrize("kind", ["llama", "bert", "gpt2"])
def test_unbiased_over_many_seeds_with_samples_and_rows_drawn(kind):
    from transformers import BertConfig, BertForSequenceClassification, GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    sizes = dict(vocab_size=96, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24)
    ids = batch(rows=4, length=6)
    if kind == "llama":
        model, labels = llama(layers=2), ids
    elif kind == "bert":
        off = dict(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, classifier_dropout=0.0)
        model, labels = BertForSequenceClassification(BertConfig(**sizes, **off)), torch.tensor([0, 1, 0, 1])
    else:
        off = dict(attn_pdrop=0.0, resid_pdrop=0.0, embd_pdrop=0.0)
        model = GPT2LMHeadModel(GPT2Config(vocab_size=96, n_embd=16, n_layer=2, n_head=2, **off))
        labels = ids
    model.train()
    call = lambda m, b: m(input_ids=ids, labels=labels).loss  # noqa: E731
    call(model, None).backward()
    tuner = efftune.apply(model, "full + vcas(interval=0, sample_ratio=0.5, row_ratio=0.5)")
    exact = {n: p.grad.clone() for n, p in tuner.named_trained().items()}
    assert (
        sum(isinstance(m.keep, Sampled) for m in layers(model).values()) == {"llama": 14, "bert": 12, "gpt2": 8}[kind]
    )
    scale = max(g.abs().max() for g in exact.values())
    directions = {n: torch.randn(g.shape, generator=torch.Generator().manual_seed(1)) for n, g in exact.items()}
    values = {n: [] for n in exact}
    for seed in range(60):
        torch.manual_seed(seed)
        model.zero_grad()
        tuner.backward(None, call)
        for n, g in gradients(tuner).items():
            values[n].append(float((g * directions[n]).sum()))
    for n, drawn in values.items():
        drawn = torch.tensor(drawn)
        off = abs(drawn.mean() - (exact[n] * directions[n]).sum())
        assert off < 4.5 * drawn.std() / len(drawn) ** 0.5 + 1e-5 * scale, n


def test_blocks_below_the_lowest_trained_layer_run_no_backward():
    tuner, optimizer, stack = tuned("lora(r=4, target_modules='layers.2.*proj') + vcas(interval=2, alpha=0.2)")
    runs = []
    for block in stack[:2]:
        block.register_full_backward_hook(lambda *_: runs.append(1))
    for step in range(4):
        optimizer.zero_grad()
        tuner.backward(batch(seed=step, rows=8), loss_fn)
        optimizer.step()
    assert not runs and ratios(stack)[:2] == [1.0, 1.0]
    assert set(gradients(tuner)) == set(tuner.named_trained())


def test_only_layers_that_train_keep_rows_to_draw_from():
    _, _, stack = tuned("int8 + lora(r=4, target_modules='q_proj') + full(target_modules='layers.1.*norm') + vcas")
    kinds = {n: type(m.keep) for n, m in layers(stack).items()}
    assert all(kind is (Sampled if n.endswith("q_proj") else Exact) for n, kind in kinds.items()) and len(kinds) == 21
    _, _, stack = tuned("lora(r=4, freeze_a=True) + vcas")
    assert not any(isinstance(m.keep, Sampled) for m in layers(stack).values())


def test_state_goes_through_the_tuner_and_merge_takes_it_all_out():
    tuner, optimizer, stack = tuned("lora(r=4) + vcas(interval=1, alpha=0.2)")
    for step in range(3):
        optimizer.zero_grad()
        tuner.backward(batch(seed=step, rows=8), loss_fn)
        optimizer.step()
    saved = tuner.state_dict()
    other, _, twin = tuned("lora(r=4) + vcas(interval=1, alpha=0.2)")
    other.load_state_dict(saved)
    assert other.step == 3 and ratios(twin) == ratios(stack) and other.run.states["vcas"].window.count == 1
    assert [m.keep for m in layers(twin).values()] == [m.keep for m in layers(stack).values()]
    model = tuner.merge()
    assert not any(isinstance(vars(m).get("forward"), Recompute) for m in model.modules())


def test_applied_twice_and_an_earlier_override_is_replaced_not_nested():
    model = llama()
    efftune.apply(model, "lora(r=4) + vcas(interval=0, sample_ratio=0.5)").merge()
    tuner = efftune.apply(model, "full + vcas")
    again = efftune.apply(model, "full + vcas")
    assert again.model.model.layers[0].forward.own is None and tuner.model is again.model


def test_a_loop_of_its_own_is_told_that_nothing_adapts():
    tuner, optimizer, _ = tuned("lora(r=4) + vcas")
    loss_fn(tuner.model, batch()).backward()
    with pytest.warns(UserWarning, match="vcas adapts in tuner.backward"):
        optimizer.step()
    tuner, optimizer, _ = tuned("lora(r=4) + vcas")
    tuner.backward(batch(), loss_fn)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimizer.step()
