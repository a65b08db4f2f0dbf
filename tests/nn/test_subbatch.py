"""Block recompute: at ratio 1 it is checkpointing bit for bit, below 1 unbiased, and it refuses what it cannot cut."""

import copy
import inspect
import itertools

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from efftune import EfftuneError
from efftune.nn import subbatch
from efftune.nn.subbatch import Recompute, install, probabilities, uninstall
from tests.nn.single_blocks import BLOCKS, B, D, T, plain_block


@pytest.fixture(params=BLOCKS)
def make(request):
    return BLOCKS[request.param]


def hidden(out):
    return out[0] if isinstance(out, tuple) else out


def gradients(block, args, kwargs, call=None, seed=3, weight=None):
    """Output, and the gradients of input and parameters, of a loss that weighs samples very differently."""
    x = args[0].detach().clone().requires_grad_()
    torch.manual_seed(seed)
    y = hidden((call or block)(x, *args[1:], **kwargs))
    if weight is None:
        weight = torch.linspace(0.2, 3, B).view(B, 1, 1) * torch.randn(
            y.shape, generator=torch.Generator().manual_seed(5)
        )
    block.zero_grad()
    y.backward(weight.to(y.dtype))
    return y.detach(), [x.grad, *(p.grad for p in block.parameters())]


def same(a, b):
    assert torch.equal(a[0], b[0])
    assert all(torch.equal(g, h) for g, h in zip(a[1], b[1], strict=True))


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("ratio", [None, 1.0])
def test_ratio_1_is_checkpointing_bit_for_bit(make, dropout, ratio):
    block, args, kwargs = make(dropout)
    expected = gradients(block, args, kwargs, lambda *a, **k: checkpoint(block, *a, use_reentrant=False, **k))
    plain = gradients(block, args, kwargs)
    names = list(block.state_dict())
    install(block, ratio)
    same(gradients(block, args, kwargs), expected)
    same(gradients(block, args, kwargs), plain)
    assert list(block.state_dict()) == names
    uninstall(block)
    assert "forward" not in vars(block)
    same(gradients(block, args, kwargs), plain)


def test_only_inputs_are_saved():
    from tests.saved import saved_bytes

    block, args, kwargs = BLOCKS["Llama"]()
    x = args[0].requires_grad_()
    install(block, 0.5)
    block(x, *args[1:], **kwargs)  # proves
    tensors = [t for t in torch.utils._pytree.tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)]
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
    assert saved_bytes(lambda: block(x, *args[1:], **kwargs), block) <= sum(storages.values())


@pytest.fixture
def chosen(monkeypatch):
    """Makes the selection a given one: rows and their weights."""
    choice = {}
    monkeypatch.setattr(
        subbatch,
        "select_rows",
        lambda scores, k, seed, stream=0: (choice["rows"], choice["weight"], torch.tensor(False)),
    )
    return choice


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_a_selection_gives_the_gradient_of_the_weighted_samples(make, chosen, dropout):
    """The whole batch's gradient with each sample's loss times its weight, and 0 for those left out: with dropout, too,
    where a sample's mask must not depend on who else is there."""
    block, args, kwargs = make(dropout)
    recompute = install(block, 0.5)
    chosen["rows"], chosen["weight"] = torch.tensor([1, 2, 5]), torch.tensor([1.5, 3.0, 1.0])
    weight = torch.randn(B, T, D)
    y, part = gradients(block, args, kwargs, weight=weight)
    assert recompute.draws == (subbatch.BY_ROW if dropout else subbatch.BY_TORCH)
    chosen["rows"], chosen["weight"] = torch.arange(B), torch.ones(B)
    scale = torch.zeros(B, 1, 1).index_copy_(0, torch.tensor([1, 2, 5]), torch.tensor([1.5, 3.0, 1.0]).view(3, 1, 1))
    again, whole = gradients(block, args, kwargs, weight=weight * scale)
    assert torch.equal(y, again)
    for g, h in zip(part, whole, strict=True):
        torch.testing.assert_close(g, h, rtol=1e-4, atol=1e-5)


def test_dropout_by_sample_is_dropout():
    block = nn.Sequential(nn.Flatten(1), nn.Dropout(0.25))
    install(block, 0.5)
    x = torch.ones(64, 1000, requires_grad=True)
    torch.manual_seed(0)
    y = block(x)
    kept = (y != 0).float()
    assert set(y.unique().tolist()) == {0.0, float(torch.tensor(1 / 0.75))}
    assert abs(kept.mean() - 0.75) < 4 * (0.25 * 0.75 / kept.numel()) ** 0.5
    rows = kept - kept.mean(1, keepdim=True)
    correlation = (rows @ rows.t()) / (rows.norm(dim=1)[:, None] * rows.norm(dim=1))
    assert (correlation - torch.eye(64)).abs().max() < 0.2  # 5.5 σ of 1/√1000, 2016 pairs
    assert not torch.equal(block(x), y)


def selections(p, k):
    """All sets of k rows with their probability under any fixed-size design that has inclusion probabilities p: here
    the mixture of systematic samples over all orders, with the random start integrated exactly."""
    found = {}
    n = len(p)
    orders = list(itertools.permutations(range(n)))
    for order in orders:
        ends = torch.tensor([p[i] for i in order], dtype=torch.float64).cumsum(0)
        cuts = sorted({0.0, 1.0, *(float(e) % 1 for e in ends)})
        for low, high in itertools.pairwise(cuts):
            if high - low < 1e-9:  # a rounding of p
                continue
            ticks = (low + high) / 2 + torch.arange(k, dtype=torch.float64)
            at = torch.searchsorted(ends, ticks, right=True).clamp(max=n - 1)
            rows = tuple(sorted(order[i] for i in at.tolist()))
            found[rows] = found.get(rows, 0.0) + (high - low) / len(orders)
    return found


@pytest.mark.parametrize("kind", ["Llama", "Bert", "plain"])
def test_unbiased_through_two_blocks_by_enumeration(kind, chosen, monkeypatch):
    """E over the upper selection, and given it the lower one, which sees only what the upper left: 3 of 4, 2 of 4."""
    n, make = 4, BLOCKS[kind]
    lower, args, kwargs = make()
    upper = copy.deepcopy(lower).requires_grad_(True)
    cut = lambda t: t[:n] if isinstance(t, torch.Tensor) and t.dim() and t.shape[0] == B else t  # noqa: E731
    args, kwargs = torch.utils._pytree.tree_map(cut, (args, kwargs))
    both = nn.ModuleList([lower, upper])
    weight = torch.randn(n, T, D) * torch.tensor([0.5, 1, 2, 4]).view(n, 1, 1)

    def run():
        x = args[0].detach().clone().requires_grad_()
        y = hidden(upper(hidden(lower(x, *args[1:], **kwargs)), *args[1:], **kwargs))
        both.zero_grad()
        y.backward(weight)
        return torch.cat([x.grad.flatten(), *(p.grad.flatten() for p in both.parameters())]).double()

    exact = run()
    install(upper, 0.75)
    install(lower, 0.5)
    plan, seen = [], []

    def select(scores, k, seed, stream=0):
        p = probabilities(scores, k)
        assert abs(float(p.sum()) - k) < 1e-9 and float(p.max()) <= 1 and torch.isfinite(p).all()
        designs = selections(p.tolist(), k)
        seen.append(designs)
        rows = torch.tensor(plan[len(seen) - 1] if len(plan) >= len(seen) else next(iter(designs)))
        return rows, (1 / p[rows]).float(), None

    monkeypatch.setattr(subbatch, "select_rows", select)
    run()
    mean, total = torch.zeros_like(exact), 0.0
    for first, p_first in list(seen[0].items()):
        plan[:] = [first]
        seen.clear()
        run()
        for second, p_second in list(seen[1].items()):
            plan[:] = [first, second]
            seen.clear()
            mean += p_first * p_second * run()
            total += p_first * p_second
    assert abs(total - 1) < 1e-6
    assert (mean - exact).norm() < 1e-5 * exact.norm()


def test_unbiased_over_many_seeds():
    """The stand-in's draws: mean over 200 seeds within 4 standard errors in every direction looked at. No sample's
    score is far below the others', so none is drawn too rarely for its weight to be seen."""
    block, args, kwargs = BLOCKS["Bert"](0.0)
    weight = torch.linspace(0.7, 1.5, B).view(B, 1, 1) * torch.randn(B, T, D)
    _, exact = gradients(block, args, kwargs, weight=weight)
    install(block, 0.5)
    drawn = [gradients(block, args, kwargs, seed=s, weight=weight)[1] for s in range(200)]
    for i, g in enumerate(exact):
        direction = torch.randn(g.shape, generator=torch.Generator().manual_seed(i))
        values = torch.stack([(d[i] * direction).sum() for d in drawn]).double()
        error = values.std() / len(values) ** 0.5
        assert abs(values.mean() - (g * direction).sum()) < 4 * error + 1e-5
        assert values.std() > 0


def test_probabilities():
    g = torch.Generator().manual_seed(0)
    for n, k in [(1, 1), (2, 1), (7, 3), (16, 15), (33, 8), (5, 5)]:
        for power in (0, 1, 6, 40):
            scores = torch.rand(n, generator=g) ** power
            p = probabilities(scores, k)
            assert abs(float(p.sum()) - k) < 1e-9 and 0 <= float(p.min()) and float(p.max()) <= 1 + 1e-12
            inside = p < 1 - 1e-9
            if inside.any() and scores[inside].min() > 1e-30:
                ratio = p[inside] / scores[inside].double()
                assert ratio.max() - ratio.min() < 1e-6 * ratio.max()
    p = probabilities(torch.tensor([0.0, 3.0, 0.0, 1.0, 0.0]), 3)
    torch.testing.assert_close(p, torch.tensor([1 / 3, 1, 1 / 3, 1, 1 / 3], dtype=torch.float64))
    torch.testing.assert_close(probabilities(torch.zeros(4), 1), torch.full((4,), 0.25, dtype=torch.float64))


@pytest.mark.parametrize("alive", [0, 1, 2, 3])
def test_fewer_samples_with_a_gradient_than_are_kept(alive):
    """They are all kept with weight 1: the exact gradient, and no NaN."""
    block, args, kwargs = BLOCKS["Llama"]()
    weight = torch.randn(B, T, D)
    weight[torch.randperm(B)[alive:]] = 0
    _, exact = gradients(block, args, kwargs, weight=weight)
    install(block, 0.5)
    _, part = gradients(block, args, kwargs, weight=weight)
    for g, h in zip(part, exact, strict=True):
        torch.testing.assert_close(g, h, rtol=1e-5, atol=1e-6)


def test_at_least_one_sample_and_evaluation_is_exact():
    block, args, kwargs = BLOCKS["Bert"]()
    exact = gradients(block, args, kwargs)
    install(block, 1e-6)
    _, (dx, *_) = gradients(block, args, kwargs)
    assert int((dx.flatten(1).norm(dim=1) > 0).sum()) == 1
    block.eval()
    same(gradients(block, args, kwargs), exact)


@pytest.mark.parametrize("reentrant", [False, None])
def test_checkpointing_around_and_inside(reentrant):
    """Around it, by the user; inside it, by the model's own gradient_checkpointing, which then does nothing. Where
    transformers checkpoints around the call instead (5.17), ours is within it, with the same gradients."""
    import transformers

    block, args, kwargs = BLOCKS["Bert"](0.2)
    install(block, 0.5)
    expected = gradients(block, args, kwargs)
    if reentrant is None:
        calls = []
        block.gradient_checkpointing = True
        around = "__call__" in vars(transformers.modeling_layers.GradientCheckpointingLayer)

        def own(forward, *a):
            calls.append(a)
            return checkpoint(forward, *a, use_reentrant=False)

        block._gradient_checkpointing_func = own
        same(gradients(block, args, kwargs), expected)
        assert len(calls) == around and block.gradient_checkpointing is True
    else:
        same(gradients(block, args, kwargs, lambda *a, **k: checkpoint(block, *a, use_reentrant=False, **k)), expected)


def cache_argument(block):
    """What the installed transformers calls a block's cache."""
    parameters = inspect.signature(inspect.unwrap(type(block).forward)).parameters
    (name,) = (name for name, p in parameters.items() if "Cache" in str(p.annotation))
    return name


def test_a_cache_is_left_out_and_a_full_one_is_refused():
    from transformers import DynamicCache

    block, args, kwargs = BLOCKS["Llama"]()
    name = cache_argument(block)
    kwargs = {k: v for k, v in kwargs.items() if k not in (name, "use_cache")}
    expected = gradients(block, args, kwargs)
    install(block, 1.0)
    cache = DynamicCache()
    same(gradients(block, args, {**kwargs, name: cache, "use_cache": True}), expected)
    assert cache.get_seq_length() == 0
    with torch.no_grad():
        block(args[0], **{**kwargs, name: cache})
    assert cache.get_seq_length() == T
    with pytest.raises(EfftuneError, match="whose cache holds keys"):
        gradients(block, args, {**kwargs, name: cache})


def test_layers_of_linear_attention_have_caches_without_a_length():
    from transformers import DynamicCache, Qwen3NextConfig, Qwen3NextForCausalLM

    torch.manual_seed(0)
    linear = {f"linear_{name}": 8 for name in ("key_head_dim", "value_head_dim")}
    linear |= {"linear_num_key_heads": 2, "linear_num_value_heads": 4}
    config = Qwen3NextConfig(
        vocab_size=97, hidden_size=D, intermediate_size=2 * D, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16,
        shared_expert_intermediate_size=16, **linear,
    )  # fmt: skip
    model = Qwen3NextForCausalLM(config).train()
    assert set(config.layer_types) == {"linear_attention", "full_attention"}
    ids = torch.randint(4, 97, (2, 8))
    name = cache_argument(model)

    def gradients_with(**kwargs):
        model.zero_grad()
        model(input_ids=ids, labels=ids, **kwargs).loss.backward()
        return [p.grad for p in model.parameters() if p.grad is not None]

    expected = gradients_with(use_cache=False)
    for layer in model.model.layers:
        install(layer)
    cache = DynamicCache(config=config)
    found = gradients_with(**{name: cache, "use_cache": True})
    assert len(found) == len(expected) and all(map(torch.equal, found, expected))
    with torch.no_grad():
        model(input_ids=ids, **{name: cache}, use_cache=True)
    with pytest.raises(EfftuneError, match="whose cache holds keys"):
        gradients_with(**{name: cache})


@pytest.mark.parametrize("inside", [True, False])
def test_autocast(inside):
    """Backward inside autocast too: weights cast under no_grad must not be taken from its cache."""
    block, args, kwargs = BLOCKS["Llama"]()

    def run():
        x = args[0].detach().clone().requires_grad_()
        block.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            y = block(x, *args[1:], **kwargs)
            if inside:
                y.float().square().sum().backward()
        if not inside:
            y.float().square().sum().backward()
        return [x.grad, *(p.grad for p in block.parameters())]

    expected = run()
    install(block, 1.0)
    assert all(torch.equal(a, b) for a, b in zip(run(), expected, strict=True))


def test_frozen_parameters_and_inputs():
    block, args, kwargs = BLOCKS["Llama"]()
    block.requires_grad_(False)
    install(block, 0.5)
    assert not block(*args, **kwargs).requires_grad
    x = args[0].detach().clone().requires_grad_()
    block(x, *args[1:], **kwargs).sum().backward()
    assert int((x.grad.flatten(1).norm(dim=1) > 0).sum()) == 3 and block.mlp.up_proj.weight.grad is None
    block.mlp.up_proj.weight.requires_grad_(True)
    block(*args, **kwargs).sum().backward()
    assert block.mlp.up_proj.weight.grad is not None and block.mlp.gate_proj.weight.grad is None


class Norm(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm1d(D)

    def forward(self, x):
        return self.norm(x.mean(1))[:, None] + x


class Noise(nn.Module):
    def forward(self, x):
        return x + torch.randn_like(x)


class Masked(nn.Module):
    def __init__(self):
        super().__init__()
        self.attention = nn.MultiheadAttention(D, 2, batch_first=True)

    def forward(self, x, mask):
        return x + self.attention(x, x, x, attn_mask=mask, need_weights=False)[0]


class Scalar(nn.Module):
    def forward(self, x):
        return x * 2, x.square().mean()


def test_what_cannot_be_cut_is_refused_in_words():
    x = torch.randn(B, T, D, requires_grad=True)
    with pytest.raises(EfftuneError, match="recompute of Norm fails on one sample alone"):
        install(Norm(), 1.0), (block := Norm(), install(block, 1.0))[0](x)
    install(block := Noise(), 0.5)
    with pytest.raises(EfftuneError, match="random numbers other than dropout's"):
        block(x)
    install(block := nn.TransformerEncoderLayer(D, 2, 8, 0.0), 0.5)  # (T, B, D)
    with pytest.raises(EfftuneError, match="another result for a sample alone"):
        block(x)
    install(block := Masked(), 0.5)
    square = torch.ones(T, T).triu(1).bool()
    block(x, square)
    with pytest.raises(EfftuneError, match="another result for a sample alone|fails on one sample alone"):
        block(x[:T], square)  # as many samples as positions: cut, though it is not per sample
    with pytest.raises(EfftuneError, match="fails on one sample alone"):
        block(x, square.expand(2 * B, T, T))  # samples times heads
    install(block := Scalar(), 0.5)
    with pytest.raises(EfftuneError, match=r"a result of shape \(\) has no batch"):
        block(x)
    install(block := nn.Linear(D, D), 0.5)
    with pytest.raises(EfftuneError, match="no argument has a batch dimension"):
        block(x[0, 0])
    with pytest.raises(EfftuneError, match="a share in"):
        install(nn.Linear(D, D), 0.0)
    install(block := Norm())  # plain recompute takes it
    block(x).sum().backward()


def test_another_override_of_forward_survives():
    block = nn.Linear(D, D)
    block.forward = own = lambda x: nn.functional.linear(x, block.weight) + 1
    x = torch.randn(B, D, requires_grad=True)
    expected = block(x)
    install(block, 0.5)
    install(block, 1.0)
    assert torch.equal(block(x), expected) and isinstance(block.forward, Recompute)
    uninstall(block)
    assert block.forward is own


def test_deepcopy_recomputes_the_copy():
    block, args, kwargs = BLOCKS["Bert"]()
    install(block, 1.0)
    twin = copy.deepcopy(block)
    with torch.no_grad():
        for p in twin.parameters():
            p.zero_()
    assert twin.forward.block is twin and not torch.equal(twin(*args, **kwargs), block(*args, **kwargs))


def test_a_block_called_twice_and_a_result_that_is_not_used():
    block, args, kwargs = plain_block()
    x = args[0].requires_grad_()
    reference = copy.deepcopy(block)
    install(block, 1.0)
    for b in (reference, block):
        y, info = b(b(x, **kwargs)[0], **kwargs)
        assert info["flag"] is True and not info["longest"].requires_grad
        y.sum().backward()
    for p, q in zip(reference.parameters(), block.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_dtypes(dtype):
    block, args, kwargs = BLOCKS["Llama"]()
    block = block.to(dtype)
    args, kwargs = torch.utils._pytree.tree_map(
        lambda t: t.to(dtype) if isinstance(t, torch.Tensor) and t.is_floating_point() else t, (args, kwargs)
    )
    y, exact = gradients(block, args, kwargs)
    install(block, 0.5)
    z, part = gradients(block, args, kwargs)
    assert torch.equal(y, z) and all(g.dtype == dtype and torch.isfinite(g).all() for g in part)
    assert not torch.equal(part[0], exact[0])


def test_compiled_equals_eager():
    """The graph breaks at the block; what is drawn and what comes out stay the same."""
    block = nn.Sequential(nn.Linear(D, D), nn.Dropout(0.2), nn.Tanh())
    install(block, 0.5)
    args = (torch.randn(B, T, D),)
    expected = gradients(block, args, {})
    same(gradients(block, args, {}, torch.compile(block, backend="aot_eager")), expected)
    assert int((expected[1][0].flatten(1).norm(dim=1) > 0).sum()) == 3
