"""w + Σ a z: equal on all backends, a function of the offset alone, with the right moments, rounded once and unbiased.
Many seeds in one call are many calls; what is above the threshold keeps its bits."""

import itertools

import pytest
import torch
import torch._dynamo.testing

from efftune import perturb, perturb_, use_backend
from efftune.memory.meter import allocated
from efftune.ops import philox
from efftune.ops._available import extension
from efftune.ops.perturb import perturb_many, perturb_many_, perturb_many_op, perturb_op
from tests.budget import assert_within_budget
from tests.ops.backends import BACKENDS, INTERPRETED, cases, on, skip_truncation

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
DISTS, ROUNDINGS = ["normal", "rademacher"], ["nearest", "stochastic"]
KEY = dict(seed=-(3**39), stream=2**31 + 5, offset=2**33 + 77)
SEEDS = [-(3**39), 0, 1, 2**63 - 1, -(2**63), 7, -7, 2**32, 9, 10, 11]  # a group of eight and three more


def weights(n, dtype, seed=0):
    return (torch.randn(n, generator=torch.Generator().manual_seed(seed)) * 0.02).to(dtype)


@pytest.mark.parametrize(
    "backend, dtype, dist, rounding, n", cases(BACKENDS[1:], DTYPES, DISTS, ROUNDINGS, [0, 1, 7, 2049, 5003])
)
def test_backends_equal(backend, dtype, dist, rounding, n):
    skip_truncation(backend, dtype, exact=rounding == "stochastic")
    w = weights(n, dtype)
    oracle = on(("reference", "cpu"), perturb, w, 1e-3, dist=dist, rounding=rounding, **KEY)
    result = on(backend, perturb, w, 1e-3, dist=dist, rounding=rounding, **KEY)
    if dist == "rademacher":
        assert torch.equal(result, oracle)
    else:  # z to 4 ulps; a 16-bit result may then fall on the other side of a tie or of a random threshold
        step = torch.finfo(dtype).eps * oracle.float().abs().clamp(min=torch.finfo(dtype).tiny) + 1e-3 * 2**-19
        difference = (result.float() - oracle.float()).abs()
        assert (difference <= step).all()
        if dtype != torch.float32:
            assert (difference > 0).sum() <= 1 + n // 1000


@pytest.mark.parametrize("backend", BACKENDS[1:])
def test_normal_is_accurate(backend):
    n, seed = 4096 if backend == ("triton", "cpu") else 1 << 20, 3
    z = on(backend, perturb, torch.zeros(n), 1.0, seed=seed, stream=1)
    exact = philox.normal(seed, 1, 0, n)
    assert ((z.double() - exact).abs() <= 5 * 2**-23 * exact.abs()).all()


def amounts(count, dtype=torch.float32):
    return torch.linspace(-1.5e-3, 2e-3, count, dtype=dtype) if count > 1 else torch.full((1,), 1e-3, dtype=dtype)


@pytest.mark.parametrize("backend, dtype, dist, rounding, count", cases(BACKENDS, DTYPES, DISTS, ROUNDINGS, [2, 11]))
def test_many_seeds_are_many_calls_rounded_once(backend, dtype, dist, rounding, count):
    skip_truncation(backend, dtype, exact=rounding == "stochastic")
    n, key, a, seeds = 2601, dict(stream=KEY["stream"], offset=KEY["offset"], dist=dist), amounts(count), SEEDS[:count]
    w = weights(n, dtype)
    total = w.float()
    for k in range(count):
        total = on(backend, perturb, total, a[k].item(), seed=seeds[k], **key)
    if rounding == "stochastic":
        bits = philox.rounding_bits(seeds[0], KEY["stream"], KEY["offset"], n)
        total = philox.round_stochastic(total, dtype, bits)
    assert torch.equal(on(backend, perturb, w, a, seed=seeds, rounding=rounding, **key), total.to(dtype))


def test_many_seeds_in_float64():
    w, a = weights(700, torch.float64), amounts(11, torch.float64)
    total = w.clone()
    for k in range(11):
        perturb_(total, a[k], seed=SEEDS[k], stream=3)
    assert torch.equal(perturb(w, a, seed=SEEDS, stream=3), total)


@pytest.mark.parametrize("backend", BACKENDS[1:])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dist", ["normal", "rademacher"])
def test_a_sum_over_seeds_is_within_the_error_budget(backend, dtype, dist):
    skip_truncation(backend, dtype)
    n, count = 3001, 16 if backend == ("triton", "cpu") else 64
    w, a, key = weights(n, dtype), amounts(count), dict(seed=list(range(count)), stream=5, offset=3, dist=dist)
    oracle = perturb(w.double(), a.double(), **key)
    with use_backend("reference"):
        float32_result = perturb(w.float(), a, **key)
    assert_within_budget(on(backend, perturb, w, a, **key), oracle, float32_result)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64])
def test_no_seed_copies(backend, dtype):
    if dtype == torch.float64 and backend[0] != "reference":
        pytest.skip("float64 is computed by the reference")
    w = torch.tensor([1.5, -0.0, torch.inf, torch.nan, 3e-3]).to(dtype)
    a = torch.empty(0, dtype=torch.float64 if dtype == torch.float64 else torch.float32)
    for rounding in ("nearest", "stochastic"):
        result = on(backend, perturb, w, a, seed=[], stream=1, rounding=rounding)
        assert torch.equal(result.view(torch.uint8), w.view(torch.uint8))


@pytest.mark.parametrize(
    "backend, dtype, dist, rounding, seeds", cases(BACKENDS, DTYPES, DISTS, ROUNDINGS, [[3], [3, 4, 5]])
)
def test_threshold(backend, dtype, dist, rounding, seeds):
    """What is above it keeps its bits, the rest is as without it; in place and out of place."""
    threshold = weights(1, dtype, seed=5).abs().item()
    special = torch.tensor([torch.nan, torch.inf, -torch.inf, 0.0, -0.0, threshold, -threshold])
    w = torch.cat([weights(2500, dtype), special.to(dtype)])
    options = dict(seed=seeds, stream=1, offset=13, dist=dist, rounding=rounding)
    everywhere, a = on(backend, perturb, w, amounts(len(seeds)), **options), amounts(len(seeds))

    def in_place(w, a, **options):
        return perturb_(w.clone(), a, **options)

    def bits(x):
        return x.view(torch.int32 if dtype == torch.float32 else torch.int16)

    for bound in (0.0, threshold, 0.01):
        small = w.float().abs() <= torch.tensor(bound)
        for call in (perturb, in_place):
            result = on(backend, call, w, a, threshold=bound, **options)
            assert torch.equal(bits(result), bits(torch.where(small, everywhere, w)))
        assert bound != threshold or small[-4:].all() and not small[:-4].all()
    assert torch.equal(bits(on(backend, perturb, w, a, threshold=torch.inf, **options)), bits(everywhere))


@pytest.mark.parametrize("backend", BACKENDS)
def test_threshold_is_met_by_the_clean_weight(backend):
    """In float64, too; and seeds that lift a weight over it do not stop halfway."""
    dtype = torch.float64 if backend[0] == "reference" else torch.float32
    w, a = torch.full((100,), 0.5, dtype=dtype), torch.full((4,), 1.0, dtype=dtype)
    options = dict(seed=[1, 2, 3, 4], stream=1, dist="rademacher")
    assert torch.equal(on(backend, perturb, w, a, threshold=0.5, **options), on(backend, perturb, w, a, **options))
    assert torch.equal(on(backend, perturb, w, a, threshold=0.49, **options), w)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_number_or_a_tensor(backend, dtype):
    w, key = weights(300, dtype), dict(stream=1, dist="rademacher", rounding="stochastic")
    expected = on(backend, perturb, w, 0.25, seed=3, **key)
    for a in (torch.tensor(0.25), torch.tensor([0.25]), torch.tensor([0.25, 1.0])[::2]):
        a.requires_grad_()
        for seed in (3, [3], (3,), range(3, 4)):
            result = on(backend, lambda w, seed, a: perturb(w, a.to(w.device), seed=seed, **key), w, seed, a)
            assert torch.equal(result, expected) and not result.requires_grad
    two, spread = torch.tensor([0.25, -0.5]), torch.tensor([0.25, 7.0, -0.5, 7.0])
    results = [on(backend, perturb, w, two, seed=[3, 4], **key)]
    results += [on(backend, lambda w, a: perturb(w, a[::2], seed=[3, 4], **key), w, spread)]
    assert torch.equal(*results) and not torch.equal(results[0], expected)


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["triton", "cuda"])
def test_nothing_waits_for_the_gpu(backend):
    w, a = torch.zeros(5000, device="cuda"), torch.ones(3, device="cuda")
    with use_backend(backend):
        for mode in ("default", "error"):  # the first call compiles
            torch.cuda.set_sync_debug_mode(mode)
            try:
                perturb_(w, a, seed=[1, 2, 3], stream=1, threshold=2.0)
                perturb_(w, a.square().mean(), seed=1, stream=1)
                perturb_(w, 0.5, seed=1, stream=1)
            finally:
                torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize(
    "backend, dtype, dist, rounding, many", cases(BACKENDS, [torch.float16], DISTS, ROUNDINGS, [False, True])
)
def test_shards_equal_the_whole(backend, dtype, dist, rounding, many):
    seeds, threshold = (SEEDS[:9], 0.02) if many else ([5], None)
    n, options = 3001, dict(seed=seeds, stream=2, dist=dist, rounding=rounding, threshold=threshold)
    w, a = weights(n, dtype), amounts(len(seeds))
    whole = on(backend, perturb, w, a, offset=11, **options)
    cuts = [0, 1, 6, 130, 1025, n]
    shards = [on(backend, perturb, w[i:j].clone(), a, offset=11 + i, **options) for i, j in zip(cuts, cuts[1:])]
    assert torch.equal(torch.cat(shards), whole)


@pytest.mark.parametrize("seeds", [[1], [1, 2, 3]])
def test_threads_and_layout_do_not_matter(seeds):
    w, a = weights(1 << 16, torch.float32), amounts(len(seeds))  # 32 tiles: enough for several threads
    options, threads = dict(seed=seeds, stream=1, dist="rademacher", threshold=0.03), torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        whole = perturb(w, a, **options)
        torch.set_num_threads(3)
        assert torch.equal(perturb(w, a, **options), whole)
    finally:
        torch.set_num_threads(threads)
    with use_backend("reference"):
        expected = perturb(w, a, **options).view(256, 256)
    strided = w.view(256, 256).t().contiguous().t()
    assert not strided.is_contiguous() and torch.equal(perturb(strided, a, **options), expected)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dist", ["normal", "rademacher"])
@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
@pytest.mark.parametrize("seeds, threshold", [(SEEDS[:1], None), (SEEDS, 0.02)])
def test_instruction_sets_agree_bit_for_bit(dtype, dist, rounding, seeds, threshold):
    """A replay on another processor gives the same weights."""
    cpu = extension("_cpu")
    if cpu is None:
        pytest.skip("the C++ extension is not built")
    w, results = weights(9001, dtype), []
    try:
        for limit in (2, 1, 0):
            cpu.limit_isa(limit)
            options = KEY | dict(seed=seeds, threshold=threshold, dist=dist, rounding=rounding)
            results.append(perturb(w, amounts(len(seeds)), **options))
    finally:
        cpu.limit_isa(2)
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])


def test_dtypes_draw_the_same():
    z = {dtype: perturb(torch.zeros(4096, dtype=dtype), 1.0, seed=9, stream=4) for dtype in (*DTYPES, torch.float64)}
    for dtype in (torch.bfloat16, torch.float16):
        assert torch.equal(z[dtype], z[torch.float32].to(dtype))
    assert torch.allclose(z[torch.float64], z[torch.float32].double(), rtol=1e-6, atol=0)


def test_in_place_and_out():
    w = weights(1000, torch.bfloat16)
    before, out, version = w.clone(), torch.full_like(w, torch.nan), w._version
    expected = perturb(w, 0.1, seed=1, stream=1)
    assert torch.equal(w, before) and w._version == version
    assert perturb(w, 0.1, seed=1, stream=1, out=out) is not None and torch.equal(out, expected)
    assert perturb_(w, 0.1, seed=1, stream=1) is w and torch.equal(w, expected) and w._version > version
    parameter = torch.nn.Parameter(before.clone())
    assert torch.equal(perturb_(parameter, 0.1, seed=1, stream=1), expected) and parameter.requires_grad


@pytest.mark.parametrize("dist", ["normal", "rademacher"])
def test_moments(dist):
    n = 1 << 22
    z = perturb(torch.zeros(n), 1.0, seed=2024, stream=17, dist=dist).double()
    fourth = 3 if dist == "normal" else 1
    for power, moment, variance in [(1, 0, 1), (2, 1, fourth - 1), (3, 0, 15), (4, fourth, 96)]:
        error = abs((z**power).mean().item() - moment)
        assert error <= 5 * (variance / n) ** 0.5 if variance else error == 0
    for lag in (1, 2, 3, 4, 128):
        assert abs((z[lag:] * z[:-lag]).mean().item()) < 5 / (n - lag) ** 0.5
    if dist == "normal":
        cdf, _ = torch.special.ndtr(z).sort()
        ks = (cdf - torch.arange(n, dtype=torch.float64) / n).abs().max().item()
        assert ks < 2.0 / n**0.5  # Kolmogorov: exceeded with probability 7e-4
        assert 4.5 < z.abs().max().item() <= 6.77


def test_seeds_streams_and_offsets_are_distinct():
    keys = [(s, t) for s in (0, 1, 2**32, -1) for t in (0, 1, 2**31)]
    z = torch.stack([perturb(torch.zeros(4096), 1.0, seed=s, stream=t) for s, t in keys])
    correlation = z @ z.t() / 4096 - torch.eye(len(keys))
    assert correlation.fill_diagonal_(0).abs().max() < 5 / 64
    far = perturb(torch.zeros(4096), 1.0, seed=0, stream=0, offset=2**34)
    assert not (far == z[0]).any()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("scale", [1.0, 2.0**-16, 3e-7])
def test_stochastic_rounding_is_unbiased(backend, dtype, scale):
    """Values between two neighbours, float16 subnormals included; draws over offsets are independent."""
    values = torch.tensor([1.003, -1.3, 0.7001, 1.9999]) * scale
    low = values.to(dtype)
    # a z lands on the value: with signs, only the elements that drew +1 are looked at.
    draws = 2048 if backend == ("triton", "cpu") else 16384
    positive = perturb(torch.zeros(draws), 1.0, seed=6, stream=3, dist="rademacher") > 0
    for value, base in zip(values.tolist(), low):
        a = value - base.item()
        result = on(
            backend, perturb, base.expand(draws).clone(), a, seed=6, stream=3, dist="rademacher", rounding="stochastic"
        )
        chosen, target = result.double()[positive], base.double().item() + a
        neighbours = chosen.unique()
        assert len(neighbours) <= 2 and neighbours.min() <= target <= neighbours.max()
        step = (neighbours.max() - neighbours.min()).item()
        assert abs(chosen.mean().item() - target) <= 4.5 * step / 2 / len(chosen) ** 0.5 + step * 2**-16


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_stochastic_rounding_is_unbiased_over_seeds(dtype):
    w, a, seeds = weights(50, dtype), 2e-5, 2000
    signs = torch.stack([perturb(torch.zeros(50), 1.0, seed=s, stream=1, dist="rademacher") for s in range(seeds)])
    drawn = [perturb(w, a, seed=s, stream=1, dist="rademacher", rounding="stochastic") for s in range(seeds)]
    error = torch.stack(drawn).double() - (w.float() + a * signs).double()
    step = torch.finfo(dtype).eps * w.abs().double().clamp(min=torch.finfo(dtype).tiny)
    assert (error.mean(0).abs() <= 4.5 * step / 2 / seeds**0.5).all() and (error.abs() <= 2 * step).all()
    with use_backend("cpp"):  # what it is for: steps far below a bfloat16 step vanish when rounded to nearest
        nearest = perturb(w, 1e-6, seed=1, stream=1, dist="rademacher")
    assert dtype != torch.bfloat16 or (nearest == w).float().mean() > 0.9


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_stochastic_rounding_of_a_sum_over_seeds_is_unbiased(backend, dtype):
    draws = 2048 if backend == ("triton", "cpu") else 16384
    w, a = torch.full((draws,), 0.7), torch.tensor([1.1e-3, -3e-4, 7e-5])
    options = dict(seed=[6, 7, 8], stream=3, dist="rademacher")
    exact = perturb(w.to(dtype).float(), a, **options).double()  # one of eight values
    error = on(backend, perturb, w.to(dtype), a, rounding="stochastic", **options).double() - exact
    step = torch.finfo(dtype).eps / 2  # of numbers in [0.5, 1)
    assert (error.abs() < step).all() and error.abs().max() > step / 2
    for value in exact.unique():
        here = error[exact == value]
        assert here.mean().abs() <= 4.5 * step / 2 / len(here) ** 0.5


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
def test_zero_step_is_the_identity(backend, dtype, rounding):
    """Every 16-bit pattern: infinities and NaN, subnormals, both zeros."""
    if dtype == torch.float32:
        w = torch.tensor([0.0, -0.0, 1e-42, torch.inf, -torch.inf, torch.nan, 3.4e38])
    else:
        w = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
    if backend == ("triton", "cpu"):  # the interpreter loads bfloat16 subnormals as 0
        flushed = (dtype == torch.bfloat16) & (w.float().abs() < torch.finfo(dtype).tiny)
        w = w[~flushed][::16].contiguous()
    result = on(backend, perturb, w, 0.0, seed=1, stream=1, rounding=rounding)
    assert torch.equal(result.isnan(), w.isnan())
    assert torch.equal(result[~w.isnan()], w[~w.isnan()])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_nearest_rounds_to_even(dtype):
    """C++ against torch on sums that fall everywhere, ties included."""
    w = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
    w = w[w.isfinite()][::3].contiguous()
    for a in (torch.finfo(dtype).eps / 2, 2.0**-25, 3.0, 1e-3, 6.0e4):
        options = dict(seed=1, stream=1, dist="rademacher")
        with use_backend("reference"):
            expected = perturb(w, a, **options)
        assert torch.equal(perturb(w, a, **options), expected)


@pytest.mark.parametrize(
    "change, sentence",
    [
        (dict(w=torch.zeros(3, dtype=torch.int8)), "float32, bfloat16 or float16"),
        (dict(dist="gauss"), "'normal' or 'rademacher'"),
        (dict(rounding="up"), "'nearest' or 'stochastic'"),
        (dict(stream=2**32), "stream in"),
        (dict(stream=-1), "stream in"),
        (dict(offset=-1), "offset of at least 0"),
        (dict(out=torch.zeros(4)), "out like w"),
        (dict(out=torch.zeros(3, dtype=torch.float16)), "out like w"),
        (dict(a=torch.tensor(1.0, dtype=torch.float64)), "a as torch.float32"),
        (dict(a=torch.tensor(1)), "a as torch.float32"),
        (dict(w=torch.zeros(3, dtype=torch.bfloat16), a=torch.tensor(1.0).bfloat16()), "a as torch.float32"),
        (dict(w=torch.zeros(3, dtype=torch.float64), a=torch.tensor(1.0)), "a as torch.float64"),
        (dict(a=torch.tensor(1.0, device="meta")), "a as torch.float32 on cpu"),
        (dict(a=torch.ones(2), seed=[1, 2, 3]), "one a for each seed"),
        (dict(a=torch.ones(2)), "one a for each seed"),
        (dict(a=torch.ones(1, 1)), "one a for each seed"),
        (dict(seed=[1, 2]), "one a for each seed"),
        (dict(seed=[]), "one a for each seed"),
        (dict(threshold=-0.1), "threshold of at least 0"),
        (dict(threshold=torch.nan), "threshold of at least 0"),
    ],
)
def test_errors_name_the_remedy(change, sentence):
    arguments = dict(w=torch.zeros(3), a=1.0, seed=1, stream=1) | change
    with pytest.raises(ValueError, match=sentence):
        perturb(arguments.pop("w"), arguments.pop("a"), **arguments)


def test_opcheck():
    for dtype in (torch.float32, torch.bfloat16):
        w = weights(64, dtype)
        args = (w, torch.empty_like(w), torch.tensor([0.1, 0.2]), [1, 2], 2, 3, "normal", "stochastic", 0.02)
        torch.library.opcheck(perturb_op.overload, args)


@pytest.mark.parametrize(
    "backend, kind, dynamic",
    [*itertools.product(["aot_eager"], ["number", "tensor", "seeds"], [None, True]), ("inductor", "seeds", None)],
)
def test_compiles_once_for_all_seeds_and_amounts(backend, kind, dynamic):
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend(backend)

    @torch.compile(fullgraph=True, backend=counter, dynamic=dynamic)
    def step(w, a, seed):
        return perturb_(w, a, seed=seed, stream=7).sum()

    for i, seed in enumerate((5, 2**40, -7, 3, 4)):
        a = 0.1 * i + 0.5
        if kind != "number":
            a = torch.full(() if kind == "tensor" else (2,), a)
        seed = [seed, seed - 3] if kind == "seeds" else seed
        expected, w = perturb(weights(100, torch.float32), a, seed=seed, stream=7), weights(100, torch.float32)
        total = step(w, a, seed)
        assert torch.equal(w, expected) and torch.allclose(total, expected.sum())
    assert counter.frame_count == (1 if dynamic else 2)  # torch takes a number for a constant until it has seen another


# Many tensors in one call

SIZES = [2601, 0, 1, 2048, 7, *[33] * 66]  # more than one table of 64


@pytest.mark.parametrize(
    "backend, dtype, dist, rounding, count, skew", cases(BACKENDS, DTYPES, DISTS, ROUNDINGS, [0, 1, 3], [0, 3])
)
def test_many_tensors_are_many_calls(backend, dtype, dist, rounding, count, skew):
    """Bit for bit, in place, aligned or not, and nothing beside them is written."""
    sizes = SIZES[:6] if backend == INTERPRETED or backend[0] == "reference" else SIZES  # which are slow
    streams = [2**32 - 1 - 77 * i for i in range(len(sizes))]
    thresholds = [None if i % 3 else 0.02 for i in range(len(sizes))]
    a, key = amounts(count) if count else torch.zeros(0), dict(seed=SEEDS[:count], dist=dist, rounding=rounding)

    def many(whole, a):
        parts = [whole[at : at + n] for at, n in zip(where, sizes, strict=True)]
        perturb_many_(parts, a, streams=streams, thresholds=thresholds, **key)
        return whole

    def one_by_one(whole, a):
        for at, n, stream, threshold in zip(where, sizes, streams, thresholds, strict=True):
            perturb_(whole[at : at + n], a, stream=stream, threshold=threshold, **key)
        return whole

    def elsewhere(whole, a):
        parts = [whole[at : at + n] for at, n in zip(where, sizes, strict=True)]
        return tuple(perturb_many(parts, a, streams=streams, thresholds=thresholds, **key))

    where = [8 + skew + at for at in itertools.accumulate([0, *(n + 16 - n % 8 for n in sizes[:-1])])]
    whole = weights(where[-1] + sizes[-1] + 8, dtype)
    result = on(backend, many, whole.clone(), a)
    assert torch.equal(result, on(backend, one_by_one, whole.clone(), a))
    assert torch.equal(result, whole) == (count == 0)
    kept = whole.clone()
    made = on(backend, elsewhere, whole, a)
    assert torch.equal(whole, kept)
    for new, at, n in zip(made, where, sizes, strict=True):
        assert torch.equal(new, result[at : at + n])


@pytest.mark.parametrize("backend", [b for b in BACKENDS if b.values[0][0] != "reference"])
@pytest.mark.parametrize("rounding", ROUNDINGS)
def test_in_place_takes_no_memory_and_else_that_of_the_result(backend, rounding):
    w = weights(2**13 if backend == INTERPRETED else 2**15, torch.bfloat16)

    def peaks(w):
        a, key = torch.full((), 1e-3, device=w.device), dict(seed=3, rounding=rounding)
        calls = [
            lambda: perturb_(w, a, stream=1, **key),
            lambda: perturb_many_([w, w[:64]], a, streams=[1, 2], **key),
            lambda: perturb_many([w, w[:64]], a, streams=[1, 2], **key),
        ]
        for call in calls:
            call()  # the first compiles
        return torch.tensor([allocated(call, w.device)[1] for call in calls])

    one, many, new = on(backend, peaks, w)
    assert max(one, many) <= 4096  # a table of pointers
    assert w.nbytes + 128 <= new <= w.nbytes + 128 + 4096


def test_many_tensors_of_several_kinds():
    tensors = [torch.randn(5, 3), torch.randn(4).bfloat16(), torch.randn(6, 2).t(), torch.zeros(0)]
    copies, a = [t.clone() for t in tensors], torch.tensor(0.5)
    versions = [t._version for t in tensors]
    perturb_many_(tensors, a, seed=3, streams=[1, 2, 3, 4])
    for t, copy, stream, version in zip(tensors, copies, [1, 2, 3, 4], versions, strict=True):
        assert torch.equal(t, perturb(copy, a, seed=3, stream=stream)) and t._version > version
    made = perturb_many(copies, a, seed=3, streams=[1, 2, 3, 4])
    assert all(torch.equal(t, new) and t.stride() == new.stride() for t, new in zip(tensors, made, strict=True))
    perturb_many_([], a, seed=3, streams=[])
    assert perturb_many([], a, seed=3, streams=[]) == []
    with pytest.raises(ValueError, match="a stream and a threshold for each tensor, here 4, not 2"):
        perturb_many_(tensors, a, seed=3, streams=[1, 2])
    for thresholds in ([], [0.1] * 5):
        with pytest.raises(ValueError, match=f"here 4, not 4 and {len(thresholds)}"):
            perturb_many(tensors, a, seed=3, streams=[1, 2, 3, 4], thresholds=thresholds)
    with pytest.raises(ValueError, match="a stream in "):
        perturb_many_(tensors, a, seed=3, streams=[1, 2, 3, -4])
    torch.library.opcheck(
        perturb_many_op.overload,
        (a, [torch.randn(3), torch.randn(2, 2)], [torch.randn(3), torch.randn(2, 2)], [3], [1, 2], "normal", "nearest",
         [1.0, 2.0]),
    )  # fmt: skip
