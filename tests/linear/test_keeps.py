"""Keeps that keep less: quantised and sampled inputs, by themselves and behind operations that can be made again."""

from statistics import NormalDist

import pytest
import torch
from torch import nn

from efftune import EfftuneError, Linear
from efftune.linear import Exact, LoRA, Trained
from efftune.linear.handle import Source, load
from efftune.linear.keep import sampled
from efftune.linear.keep.quantized import Quantized
from efftune.linear.keep.sampled import Sampled
from efftune.memory import meter
from efftune.nn.norm import RMSNorm

M, K, N = 48, 20, 12


def layer(keep, delta=None, dtype=torch.float32, k=K, n=N):
    torch.manual_seed(0)
    made = Linear.from_linear(nn.Linear(k, n, dtype=dtype), delta=delta or Trained(), keep=keep)
    if isinstance(delta, LoRA):
        nn.init.normal_(made.lora_b)
    return made


def inputs(m=M, k=K, n=N, dtype=torch.float32):
    g = torch.Generator().manual_seed(1)
    scale = torch.randn(m, 1, generator=g).mul(0.8).exp()
    return (torch.randn(m, k, generator=g) * scale).to(dtype), torch.randn(m, n, generator=g).to(dtype)


def gradient(made, x, dy, name="weight"):
    made.zero_grad()
    x = x.detach().requires_grad_()
    made(x).backward(dy)
    return getattr(made, name).grad.clone(), x.grad


def bias_z(draws, exact):
    """z of every entry's mean, of draws (S, ...)."""
    draws = torch.stack(draws).double()
    spread = draws.std(0) / len(draws) ** 0.5
    return ((draws.mean(0) - exact.double()) / spread.clamp_min(1e-12)).abs().max()


KEEPS = [
    Sampled(0.4, min_rows=2), Sampled(0.4, "wta", min_rows=2), Sampled(0.4, "crs", min_rows=2),
    Sampled(0.4, min_rows=2, at="backward"), Quantized(8, 4), Quantized(4, 4),
]  # fmt: skip


@pytest.mark.parametrize("keep", KEEPS, ids=str)
@pytest.mark.parametrize("delta, name", [(Trained(), "weight"), (LoRA(r=3), "lora_a")], ids=str)
@pytest.mark.parametrize("seeds", [1500, pytest.param(10_000, marks=pytest.mark.slow)])
def test_weight_gradients_are_unbiased_and_dx_is_exact(keep, delta, name, seeds):
    x, dy = inputs()
    exact, dx = gradient(layer(Exact(), delta), x, dy, name)
    made = layer(keep, delta)
    draws = []
    for seed in range(seeds):
        torch.manual_seed(seed)
        drawn, got = gradient(made, x, dy, name)
        assert torch.equal(got, dx)
        draws.append(drawn)
    # |z| < 4 for one entry, Bonferroni-corrected for all of them
    limit = NormalDist().inv_cdf(1 - NormalDist().cdf(-4) / exact.numel())
    assert bias_z(draws, exact) < limit
    error = torch.stack([d - exact for d in draws]).norm() / exact.norm() / len(draws) ** 0.5
    assert 1e-4 < error < 2


@pytest.mark.parametrize("at", ["forward", "backward"])
def test_ratio_one_and_few_rows_are_bitwise_exact(at):
    x, dy = inputs()
    exact, _ = gradient(layer(Exact()), x, dy)
    assert torch.equal(gradient(layer(Sampled(1.0, at=at)), x, dy)[0], exact)
    few, dfew = x[:7], dy[:7]
    assert torch.equal(
        gradient(layer(Sampled(0.1, min_rows=8, at=at)), few, dfew)[0], gradient(layer(Exact()), few, dfew)[0]
    )


def test_topk_is_biased():
    """The test above can fail."""
    x, dy = inputs()
    exact, _ = gradient(layer(Exact()), x, dy)
    drawn, _ = gradient(layer(Sampled(0.4, "topk", min_rows=2)), x, dy)
    assert (drawn - exact).norm() > 0.1 * exact.norm()


def test_a_seed_replays():
    x, dy = inputs()
    for keep in KEEPS:
        made, found = layer(keep), []
        for seed in (5, 5, 6):
            torch.manual_seed(seed)
            found.append(gradient(made, x, dy)[0])
        assert torch.equal(found[0], found[1]) and not torch.equal(found[0], found[2])


def test_systematic_has_less_variance_than_wta_and_wta_than_crs():
    x, dy = inputs(m=256)
    exact, _ = gradient(layer(Exact()), x, dy)

    def error(sampler):
        made, total = layer(Sampled(0.3, sampler)), 0.0
        for seed in range(300):
            torch.manual_seed(seed)
            total += float((gradient(made, x, dy)[0] - exact).square().sum())
        return total

    systematic, wta, crs = map(error, ("systematic", "wta", "crs"))
    assert systematic < 0.8 * wta and wta < 0.95 * crs


def test_drawing_in_backward_knows_the_gradient_and_has_less_variance():
    x, dy = inputs(m=256)
    dy = dy * torch.linspace(-3, 3, 256)[:, None].exp()
    exact, _ = gradient(layer(Exact()), x, dy)
    errors = []
    for at in ("forward", "backward"):
        made, total = layer(Sampled(0.3, at=at)), 0.0
        for seed in range(200):
            torch.manual_seed(seed)
            total += float((gradient(made, x, dy)[0] - exact).square().sum())
        errors.append(total)
    assert errors[1] < 0.3 * errors[0]


def saved_by(call):
    with meter.saved(nn.Linear(1, 1)) as kept:
        out = call()
    assert out.requires_grad
    return kept.total


@pytest.mark.parametrize(
    "keep, each",
    [(Exact(), M * K * 4), (Sampled(0.25, min_rows=2), 12 * (K * 4 + 8 + 4) + 8), (Quantized(8, 4), M * K * 2),
     (Quantized(4, 4), M * K * 3 // 2)],
    ids=str,
)  # fmt: skip
def test_layers_that_read_one_tensor_share_what_is_kept(keep, each):
    layers = [layer(keep) for _ in range(3)]
    weights = 3 * N * K * 4
    x, _ = inputs()
    one = saved_by(lambda: layers[0](x)) - weights // 3
    three = saved_by(lambda: torch.cat([made(x) for made in layers], -1)) - weights
    seeds = 16 if keep.random else 0  # the layers that take no sample of their own keep their seed, 8 bytes
    assert one <= each + 8 and three <= one + seeds


@pytest.mark.parametrize("keep", [Sampled(0.25, min_rows=2), Quantized(4, 4)], ids=str)
def test_behind_a_norm_nothing_more_is_kept_and_the_gradient_is_unbiased(keep):
    torch.manual_seed(0)
    norm = RMSNorm(nn.Parameter(torch.rand(K) + 0.5), keep=keep if keep.restores else None)
    x, dy = inputs()
    x.requires_grad_()
    expected = layer(Exact())
    expected(RMSNorm(norm.weight)(x)).backward(dy)
    made = layer(keep)
    draws = []
    for seed in range(800):
        torch.manual_seed(seed)
        made.zero_grad()
        made(norm(x)).backward(dy)
        draws.append(made.weight.grad.clone())
    assert bias_z(draws, expected.weight.grad) < 4.5
    alone = saved_by(lambda: norm(x))
    both = saved_by(lambda: made(norm(x))) - N * K * 4
    assert both - alone <= M * 4 + 8  # norms of rows, a seed


def test_lora_dropout_keeps_its_input_and_a_seed():
    x, _ = inputs()
    layers = [layer(Exact(), LoRA(r=2, lora_dropout=0.5)) for _ in range(3)]
    parameters = {p.untyped_storage().data_ptr() for made in layers for p in made.parameters()}
    weights = sum(
        p.nbytes for made in layers for p in made.parameters() if p.untyped_storage().data_ptr() in parameters
    )
    biases = 3 * N * 4
    kept = saved_by(lambda: torch.cat([made(x) for made in layers], -1)) - weights + biases
    assert kept <= M * K * 4 + 3 * (M * 2 * 4 + 8)


@pytest.mark.parametrize("keep", [Sampled(0.5, min_rows=2), Quantized(8, 4)], ids=str)
def test_compiled_is_unbiased_too(keep):
    """Rows and indices come out of one operator: drawn twice, they would not fit, and the gradient would be biased."""
    torch._dynamo.reset()
    x, dy = inputs(m=24)
    exact, _ = gradient(layer(Exact()), x, dy)
    made = layer(keep)
    compiled = torch.compile(made, fullgraph=True, backend="aot_eager")
    draws, equal = [], 0
    for seed in range(300):
        torch.manual_seed(seed)
        made.zero_grad()
        compiled(x.detach().requires_grad_()).backward(dy)
        draws.append(made.weight.grad.clone())
        torch.manual_seed(seed)
        equal += torch.equal(gradient(made, x, dy)[0], draws[-1])
    assert bias_z(draws, exact) < 4.5
    assert equal == 300


def test_scores_that_are_not_finite_stay_unbiased_and_are_counted():
    x, dy = inputs()
    keep = Sampled(0.4, min_rows=2)
    for factor in (torch.full((M,), torch.nan), torch.zeros(M), torch.full((M,), torch.inf)):
        before = sampled.fallbacks()
        draws = []
        for seed in range(800):
            kept = keep.save(x, Source(scores=factor), torch.tensor(seed))
            draws.append(keep.weight_grad(dy, kept))
        assert bias_z(draws, dy.t() @ x) < 4.5
        assert sampled.fallbacks() == before + 800


def test_a_nan_in_the_input_reaches_the_gradient():
    x, dy = inputs()
    for keep in (Sampled(0.9, min_rows=2), Quantized(8, 4), Quantized(4, 4)):
        x[3, 2] = torch.nan
        found = [gradient(layer(keep), x, dy)[0].isnan().any() for _ in range(20)]
        assert any(found)


@pytest.mark.parametrize(
    "make, sentence",
    [
        (lambda: Sampled(0.0), r"lies in \(0, 1\], not 0.0"), (lambda: Sampled(1.5), "not 1.5"),
        (lambda: Sampled(0.3, "best"), "sampler is one of systematic"),
        (lambda: Sampled(0.3, min_rows=0), "at least 1"), (lambda: Sampled(at="noon"), "'forward' or at 'backward'"),
        (lambda: Quantized(3), "8 or 4 bits, not 3"), (lambda: Quantized(8, 7), "even number"),
    ],
)  # fmt: skip
def test_settings_out_of_range(make, sentence):
    with pytest.raises(EfftuneError, match=sentence):
        make()


def test_quantized_refuses_integers():
    with pytest.raises((TypeError, ValueError), match="int64|floating"):
        Quantized(8).hold(torch.ones(2, 4, dtype=torch.int64), torch.tensor(1))


def test_held_codes_come_back():
    x, _ = inputs(k=130)
    for bits, most in ((8, 0.01), (4, 0.12)):
        again = load(Quantized(bits, 32).hold(x, torch.tensor(3)))
        assert again.shape == x.shape and (again - x).norm() < most * x.norm()


@pytest.mark.parametrize("keep", [Sampled(0.4, min_rows=2), Quantized(4, 4)], ids=str)
def test_a_tensor_that_lives_on_is_drawn_anew_and_seen_as_it_is(keep):
    """Data that the caller holds, and a parameter as an input: what was kept of it must not outlive the pass."""
    x, dy = inputs()
    made = layer(keep)
    draws = []
    for seed in range(1500):
        torch.manual_seed(seed)
        made.zero_grad()
        made(x).backward(dy)  # one tensor object for all passes
        draws.append(made.weight.grad.clone())
    assert bias_z(draws, dy.t() @ x) < 4.5
    made.zero_grad()
    made(x)  # a pass without a backward, and then a change in place
    with torch.no_grad():
        x.mul_(100)
    made(x).backward(dy)
    assert (made.weight.grad - dy.t() @ x).norm() < 2 * (dy.t() @ x).norm()
    assert made.weight.grad.norm() > 10 * draws[0].norm()


def test_a_change_in_place_after_a_norm_is_seen():
    norm, made = RMSNorm(nn.Parameter(torch.rand(K) + 0.5)), layer(Exact())
    x, dy = inputs()
    y = norm(x.requires_grad_())
    with torch.no_grad():
        y.mul_(3)
    made(y).backward(dy)
    torch.testing.assert_close(made.weight.grad, dy.t() @ (3 * norm(x)).detach())
