"""Rows drawn by scores: the same on all backends, k different ones, π as water-filling gives it, unbiased, and of the
variance that the formulas promise."""

import pytest
import torch

from efftune import use_backend
from efftune.ops._available import extension
from efftune.ops.rows_grad import rows_grad
from efftune.ops.sample_rows import (
    SAMPLERS,
    _systematic,
    row_norms,
    row_norms_op,
    sample_rows,
    sample_rows_op,
    select_rows,
    select_rows_op,
)
from tests.budget import assert_within_budget
from tests.ops.backends import BACKENDS, on

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
KERNELS = [b for b in BACKENDS[1:] if b.values[0][0] != "cuda"]
SELECT = BACKENDS[1:]
UNBIASED = [s for s in SAMPLERS if s != "topk"]


def seeded(seed):
    return torch.tensor(seed)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def log_normal(m, sigma, seed=0):
    return (sigma * torch.randn(m, generator=generator(seed))).exp()


def score_sets(m):
    sparse = torch.zeros(m)
    sparse[:: max(1, m // 4)] = 1.0
    outlier = torch.ones(m)
    outlier[m // 2] = 1e30
    return [torch.ones(m), log_normal(m, 1.0), log_normal(m, 12.0), sparse, outlier, torch.arange(m) * 1e-44]


def water_filling(scores, k):
    """π = min(1, a·s) with Σπ = k in float64, by bisection of log a; every score positive."""
    s = scores.double() / scores.double().max()
    low, high = torch.tensor(-200.0).double(), torch.tensor(200.0).double()
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (low, middle) if (s * middle.exp()).clamp(max=1).sum() > k else (middle, high)
    return (s * high.exp()).clamp(max=1)


# ---- selection


@pytest.mark.parametrize("backend", SELECT)
@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("m, k", [(1, 1), (2, 1), (5, 3), (8, 7), (131, 1), (1000, 300), (4099, 4098)])
def test_backends_draw_the_same_rows(backend, sampler, m, k):
    if backend[0] == "cuda" and sampler != "systematic":
        pytest.skip("composed of torch's operations")
    for seed, scores in enumerate([*score_sets(m), torch.zeros(m), torch.full((m,), torch.nan)]):
        args = scores, k, seeded(seed - 3), sampler, 2**31 + 7
        expected = on(("reference", "cpu"), select_rows, *args)
        result = on(backend, select_rows, *args)
        for a, b in zip(result, expected, strict=True):
            assert a.dtype == b.dtype and torch.equal(a, b)


@pytest.mark.parametrize("m, k", [(5, 3), (131, 1), (1000, 300), (1000, 999), (4096, 1228)])
def test_systematic_draws_exactly_k_different_rows_with_the_weights_of_water_filling(m, k):
    for seed, scores in enumerate(score_sets(m)):
        idx, weight, fallback = select_rows(scores, k, seeded(seed))
        assert (idx.diff() > 0).all() and idx.shape == weight.shape == (k,) and fallback == 0
        assert (weight >= 1).all() and weight.isfinite().all()
        if (scores > 0).all() and scores.max() < 1e12 * scores.min():
            pi = water_filling(scores, k)
            assert abs(pi.sum() - k) < 1e-9 * k  # the oracle's
            torch.testing.assert_close(1 / weight.double(), pi[idx], rtol=2e-7, atol=0)
            assert (weight[pi[idx] >= 1 - 1e-12] == 1).all()


@pytest.mark.parametrize("m, k", [(8, 3), (40, 13), (41, 40)])
@pytest.mark.parametrize("sigma", [0.3, 1.2, 4.0])
def test_shares_add_up_to_k(m, k, sigma):
    scores, pi = log_normal(m, sigma), torch.full((m,), torch.nan, dtype=torch.float64)
    seed = 0
    scores = scores.clamp(min=scores.max() * 1e-2)  # every row is seen within the range of seeds
    while pi.isnan().any():
        idx, weight, _ = select_rows(scores, k, seeded(seed))
        pi[idx], seed = 1 / weight.double(), seed + 1
        assert seed < 20000
    assert (pi <= 1).all() and abs(pi.sum().item() - k) <= 1e-6 * k


def test_points_hit_each_row_in_proportion_for_every_order():
    """The integral over the offset, exactly: of all `rest` offsets, n·width hit a row, and no row is hit twice."""
    for seed in range(20):
        widths = torch.randint(0, 30, (12,), generator=generator(seed))
        rest = widths.sum()
        n = int(torch.randint(1, int(rest // widths.max()) + 1, (), generator=generator(seed)))
        assert n * widths.max() <= rest
        cumulative, hits = widths.cumsum(0), torch.zeros(12, dtype=torch.int64)
        for r in range(int(rest)):
            points = _systematic(torch.tensor(r), torch.arange(n), rest, torch.tensor(n))
            assert torch.equal(points, (r + torch.arange(n) * rest) // n)
            rows = torch.searchsorted(cumulative, points, right=True)
            assert len(rows.unique()) == n
            hits[rows] += 1
        assert torch.equal(hits, n * widths)


def frequencies(scores, k, sampler, seeds):
    count = torch.zeros(len(scores), dtype=torch.float64)
    weights = torch.full_like(count, torch.nan)
    for seed in range(seeds):
        idx, weight, _ = select_rows(scores, k, seeded(seed), sampler)
        count.index_add_(0, idx, torch.ones(k, dtype=torch.float64))
        weights[idx] = weight.double()
    return count / seeds, weights


@pytest.mark.parametrize("sampler", UNBIASED)
@pytest.mark.parametrize("m, k, sigma", [(8, 3, 1.0), (8, 7, 2.0), (30, 9, 0.7)])
def test_rows_are_drawn_as_often_as_their_weight_says(sampler, m, k, sigma):
    """Unbiased for whatever is summed: E[count_i]·weight_i = 1 for every row; |z| bounded over all rows."""
    seeds, scores = 6000, log_normal(m, sigma).clamp(min=0.05)
    frequency, weights = frequencies(scores, k, sampler, seeds)
    expected = 1 / weights
    assert not weights.isnan().any() and abs(expected.sum() - k) < 1e-5 * k
    variance = expected * (1 - expected) if sampler == "systematic" else expected.clamp(max=k)
    sure = expected == 1
    assert (frequency[sure] == 1).all() or sampler == "crs"
    z = (frequency - expected)[~sure].abs() / (variance[~sure] / seeds).sqrt()
    assert (z < 4.7).all(), z  # P(|z| > 4.7) = 2.6e-6, for each of at most 30 rows in 9 tests


def test_pairs_are_drawn_together():
    """The order is random: systematic sampling in a fixed order would never draw some pairs of neighbours."""
    together = torch.zeros(6, 6)
    for seed in range(2000):
        idx, _, _ = select_rows(torch.ones(6), 3, seeded(seed))
        together[idx[:, None], idx[None, :]] += 1
    off = together[~torch.eye(6, dtype=torch.bool)] / 2000
    # a random order and a random offset: each pair equally often, P = 3·2 / (6·5)
    assert ((off - 0.2).abs() < 4.5 * (0.2 * 0.8 / 2000) ** 0.5).all()


def taken_by_the_rule(p, k):
    descending = p.sort(descending=True).values
    above = torch.cat([torch.zeros(1, dtype=p.dtype), descending.cumsum(0)])[:k]
    return int(((1 - above) / (k - torch.arange(k))).argmin())


def spread(parts, scores, k, sampler, seeds):
    """Mean and variance of the estimate of parts.sum(0) over seeds."""
    estimates = []
    for seed in range(seeds):
        idx, weight, _ = select_rows(scores, k, seeded(seed), sampler)
        estimates.append((weight.double()[:, None] * parts[idx]).sum(0))
    error = torch.stack(estimates) - parts.sum(0)
    return error.mean(0), error.square().sum(1)


@pytest.mark.parametrize("sigma", [0.3, 0.7, 1.2])
def test_variance(sigma):
    """Against the formulas for draws with replacement, and in the order systematic ≤ wta ≤ crs. The parts have the
    norms that the scores say, and random directions: with equal signs, systematic sampling would be exact."""
    m, k, seeds = 60, 18, 3000
    scores = log_normal(m, sigma, seed=3)
    direction = torch.randn(m, 12, generator=generator(1), dtype=torch.float64)
    parts = scores.double()[:, None] * direction / direction.norm(dim=1, keepdim=True)
    p = scores.double() / scores.double().sum()
    measured = {}
    for sampler in UNBIASED:
        bias, square = spread(parts, scores, k, sampler, seeds)
        measured[sampler], sem = square.mean().item(), (square.std() / seeds**0.5).item()
        # The bias has 12 coordinates: E|bias|² = variance / seeds, and a chi-square with 12 degrees of freedom or fewer
        assert bias.square().sum() < 5 * square.mean() / seeds
        if sampler == "systematic":
            continue
        c = taken_by_the_rule(p, k) if sampler == "wta" else 0
        others = p.sort(descending=True).indices[c:]
        left = p[others].sum()
        formula = left * (parts[others].square().sum(1) / p[others]).sum() - parts[others].sum(0).square().sum()
        assert abs(square.mean() - formula / (k - c)) < 5 * sem
    assert measured["systematic"] < measured["wta"]
    assert measured["wta"] < 1.05 * measured["crs"]  # at small sigma the rule takes no row, and the two are the same


def test_wta_takes_the_rows_of_the_papers_rule():
    scores, k = log_normal(200, 1.5), 60
    p = scores.double() / scores.double().sum()
    c = taken_by_the_rule(p, k)
    assert 0 < c < k
    idx, weight, _ = select_rows(scores, k, seeded(1), "wta")
    taken = p.sort(descending=True).indices[:c]
    others = ~torch.isin(idx, taken)
    assert torch.equal(idx[~others], taken.sort().values) and (weight[~others] == 1).all()
    expected = (1 - p[taken].sum()) / ((k - c) * p[idx[others]])
    torch.testing.assert_close(weight[others].double(), expected, rtol=1e-6, atol=0)


def test_topk():
    scores = log_normal(50, 1.0)
    idx, weight, _ = select_rows(scores, 10, seeded(1), "topk")
    assert torch.equal(idx, scores.topk(10).indices.sort().values) and (weight == 1).all()


@pytest.mark.parametrize("backend", BACKENDS[:2])
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_all_rows_are_kept_with_weight_one(backend, sampler):
    for k in (7, 100):
        idx, weight, fallback = on(backend, select_rows, torch.full((7,), torch.nan), k, seeded(1), sampler)
        assert torch.equal(idx, torch.arange(7)) and torch.equal(weight, torch.ones(7)) and fallback == 0
    idx, weight, fallback = on(backend, select_rows, torch.empty(0), 3, seeded(1), sampler)
    assert idx.shape == weight.shape == (0,) and fallback == 0


@pytest.mark.parametrize("backend", BACKENDS[:2])
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf, -1.0])
def test_scores_that_are_none_become_uniform(backend, value):
    scores = log_normal(40, 1.0)
    scores[17] = value
    for bad in (scores, torch.zeros(40)):
        idx, weight, fallback = on(backend, select_rows, bad, 10, seeded(4))
        expected = on(backend, select_rows, torch.ones(40), 10, seeded(4))
        assert fallback == 1 and fallback.dtype == torch.int32 and expected[2] == 0
        assert torch.equal(idx, expected[0]) and torch.equal(weight, torch.full((10,), 4.0))


@pytest.mark.parametrize("backend", BACKENDS[:2])
def test_rows_without_a_score(backend):
    scores = torch.zeros(20)
    scores[:6] = 1.0
    for seed in range(50):
        assert on(backend, select_rows, scores, 4, seeded(seed))[0].max() < 6
        idx, weight, fallback = on(backend, select_rows, scores, 10, seeded(seed))
        # fewer positive rows than k: these, and of the 14 others 4
        assert torch.equal(idx[:6], torch.arange(6)) and (weight[:6] == 1).all() and (weight[6:] == 3.5).all()
        assert fallback == 0


def test_seeds_and_streams():
    scores = log_normal(1000, 1.0)
    drawn = [select_rows(scores, 300, seeded(s), stream=t) for s in (0, 1, -1, 2**40) for t in (0, 1, 2**32 - 1)]
    again = [select_rows(scores, 300, seeded(s), stream=t) for s in (0, 1, -1, 2**40) for t in (0, 1, 2**32 - 1)]
    for i, a in enumerate(drawn):
        assert all(torch.equal(x, y) for x, y in zip(a, again[i], strict=True))
        assert all(not torch.equal(a[0], b[0]) for b in drawn[:i])


# ---- norms


@pytest.mark.parametrize("backend", [BACKENDS[0], *KERNELS])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 1), (3, 31), (7, 33), (5, 131), (2, 4096), (0, 5), (4, 0)])
def test_norms_are_within_budget(backend, dtype, shape):
    x = torch.randn(shape, generator=generator()).to(dtype)
    before = x.clone()
    norms = on(backend, row_norms, x)
    assert norms.dtype == torch.float32 and torch.equal(x, before)
    assert_within_budget(norms, x.double().norm(dim=1), x.float().norm(dim=1))
    wide = torch.full((shape[0], shape[1] + 5), torch.nan, dtype=dtype)
    wide[:, 2 : 2 + shape[1]] = x
    assert torch.equal(on(backend, row_norms, wide[:, 2 : 2 + shape[1]]), norms)


@pytest.mark.parametrize("dtype", DTYPES)
def test_instruction_sets_agree_bit_for_bit(dtype):
    cpu = extension("_cpu")
    if cpu is None:
        pytest.skip("the C++ extension is not built")
    x, results = torch.randn(40, 1111, generator=generator()).to(dtype), []
    try:
        for limit in (2, 1, 0):
            cpu.limit_isa(limit)
            results.append(row_norms(x))
    finally:
        cpu.limit_isa(2)
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])


# ---- rows


@pytest.mark.parametrize("backend", [BACKENDS[0], *KERNELS])
@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_belong_to_their_indices(backend, dtype):
    x, factor = torch.randn(37, 65, generator=generator()).to(dtype), log_normal(37, 1.0)
    before = x.clone()
    strided = torch.full((37, 70), torch.nan, dtype=dtype)
    strided[:, 3:68] = x
    for sampler in SAMPLERS:
        rows, idx, weight, fallback = on(backend, sample_rows, x, factor, 11, seeded(3), sampler, 5)
        assert torch.equal(rows, x[idx]) and rows.is_contiguous() and rows.dtype == dtype
        scores = on(backend, row_norms, x) * factor
        expected = select_rows(scores, 11, seeded(3), sampler, 5)
        assert all(torch.equal(a, b) for a, b in zip((idx, weight, fallback), expected, strict=True))
        other = on(backend, sample_rows, strided[:, 3:68], factor, 11, seeded(3), sampler, 5)
        assert all(torch.equal(a, b) for a, b in zip(other, (rows, idx, weight, fallback), strict=True))
    assert torch.equal(x, before)
    plain, ones = (on(backend, sample_rows, x, f, 11, seeded(3)) for f in (None, torch.ones(37)))
    assert all(torch.equal(a, b) for a, b in zip(plain, ones, strict=True))
    rows, idx, weight, _ = on(backend, sample_rows, x, factor, 37, seeded(3))
    assert torch.equal(rows, x) and rows.data_ptr() != x.data_ptr() and (weight == 1).all()
    assert on(backend, sample_rows, x[:0], None, 4, seeded(3))[0].shape == (0, 65)


def test_other_layouts_and_dtypes_go_to_the_reference():
    x = torch.randn(12, 9, generator=generator())
    for other in (x.t().contiguous().t(), x.double()):
        assert sample_rows_op.select(other, None, 4, seeded(1), "systematic", 0).name == "reference"
        rows, idx, _, _ = sample_rows(other, None, 4, seeded(1))
        assert torch.equal(rows, other[idx]) and rows.dtype == other.dtype


@pytest.mark.parametrize(
    "change, sentence",
    [
        (dict(k=0), "at least 1 row, not 0"),
        (dict(seed=torch.tensor([1])), "0-d int64 tensor on the CPU"),
        (dict(seed=torch.tensor(1.0)), "draw_seed"),
        (dict(sampler="uniform"), "samplers systematic, wta, crs, topk, not 'uniform'"),
        (dict(stream=-1), "stream in"),
        (dict(stream=2**32), "stream in"),
    ],
)
def test_errors_name_the_remedy(change, sentence):
    arguments = dict(k=2, seed=seeded(1), sampler="crs", stream=0) | change
    with pytest.raises(ValueError, match=sentence):
        select_rows(torch.ones(4), *arguments.values())
    with pytest.raises(ValueError, match=sentence):
        sample_rows(torch.ones(4, 3), None, *arguments.values())


def test_errors_of_shapes_and_dtypes():
    for scores in (torch.ones(4, 1), torch.ones(4, dtype=torch.float64)):
        with pytest.raises(ValueError, match="scores .* in float32"):
            select_rows(scores, 2, seeded(1))
    for x in (torch.ones(4), torch.ones(4, 3, dtype=torch.int8)):
        with pytest.raises(ValueError, match="floating-point matrix"):
            row_norms(x)
        with pytest.raises(ValueError, match="floating-point matrix"):
            sample_rows(x, None, 2, seeded(1))
    for factor in (torch.ones(3), torch.ones(4, dtype=torch.float64)):
        with pytest.raises(ValueError, match=r"a factor \(4,\) in float32"):
            sample_rows(torch.ones(4, 3), factor, 2, seeded(1))


def test_forced_backends_say_why_not():
    with use_backend("cuda"), pytest.raises(RuntimeError, match="wta is composed of torch"):
        select_rows(torch.ones(4), 2, seeded(1), "wta")
    with use_backend("cuda"), pytest.raises(RuntimeError, match="rows exceed the"):
        select_rows(torch.ones(20000), 2, seeded(1))
    with use_backend("cuda"), pytest.raises(RuntimeError, match="NVIDIA"):
        select_rows(torch.ones(4), 2, seeded(1))
    with use_backend("cpp"), pytest.raises(RuntimeError, match="neighbours in memory"):
        row_norms(torch.ones(4, 3).t())


def test_opcheck():
    x = torch.randn(9, 5, generator=generator())
    torch.library.opcheck(row_norms_op.overload, (x,))
    for sampler in SAMPLERS:
        torch.library.opcheck(select_rows_op.overload, (log_normal(9, 1.0), 4, seeded(2), sampler, 3))
        torch.library.opcheck(sample_rows_op.overload, (x, log_normal(9, 1.0), 4, seeded(2), sampler, 3))
    torch.library.opcheck(sample_rows_op.overload, (x, None, 20, seeded(2), "systematic", 3))


class Sampled(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, w, seed):
        rows, idx, weight, _ = sample_rows(x, None, x.shape[0] // 2, seed)
        ctx.save_for_backward(rows, idx, weight)
        return x @ w.t()

    @staticmethod
    def backward(ctx, dy):
        rows, idx, weight = ctx.saved_tensors
        return None, rows_grad(dy, idx, weight, rows), None


def test_compiled_equals_eager_over_many_seeds():
    from efftune.ops.draw_seed import draw_seed

    torch._dynamo.reset()

    def loss(x, w):
        return Sampled.apply(x, w, draw_seed()).square().sum()

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    x, grads = torch.randn(24, 7, generator=generator()), []
    for seed in range(16):
        for f in (loss, compiled):
            w = torch.ones(5, 7, requires_grad=True)
            torch.manual_seed(seed)
            f(x, w).backward()
            grads.append(w.grad)
        assert torch.equal(grads[-1], grads[-2])
    assert len({tuple(g.flatten().tolist()) for g in grads}) > 8  # the draws differ


@pytest.mark.gpu
@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("m", [4096, 20000])
def test_nothing_waits_for_the_gpu(sampler, m):
    x, g = torch.randn(m, 64, device="cuda"), torch.randn(m, 32, device="cuda")
    sample_rows(x, None, m // 3, seeded(1), sampler)  # compiles
    torch.cuda.set_sync_debug_mode("error")
    try:
        rows, idx, weight, _ = sample_rows(x, None, m // 3, seeded(2), sampler)
        rows_grad(g, idx, weight, rows)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.slow
@pytest.mark.parametrize("sampler", UNBIASED)
@pytest.mark.parametrize("m, k", [(4, 1), (8, 3), (64, 19), (300, 100)])
def test_rows_are_drawn_as_often_as_their_weight_says_over_many_seeds(sampler, m, k):
    seeds, scores = 200_000, log_normal(m, 1.0).clamp(min=0.2)
    frequency, weights = frequencies(scores, k, sampler, seeds)
    expected = 1 / weights
    variance = expected * (1 - expected) if sampler == "systematic" else expected
    open_rows = expected < 1
    z = (frequency - expected)[open_rows].abs() / (variance[open_rows] / seeds).sqrt()
    assert (z < 5).all()
