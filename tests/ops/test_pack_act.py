"""Packed activations: codes and stats equal bit for bit everywhere, a stored range that spans its group, an exact mean,
errors below one scale, NaN for what cannot be packed."""

import pytest
import torch

from efftune import use_backend
from efftune.ops import philox
from efftune.ops._available import extension
from efftune.ops.draw_seed import draw_seed
from efftune.ops.pack_act import pack_act, pack_op, unpack_act, unpack_op
from tests.budget import assert_within_budget
from tests.ops.backends import BACKENDS, cases, on, skip_truncation

RUNS = [b for b in BACKENDS if b.values[0][0] != "cuda"]
KERNELS = RUNS[1:]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
REFERENCE = ("reference", "cpu")
SEED = torch.tensor(2**61 + 12345)
SHAPES = [
    ((1, 1), 2),
    ((3, 64), 64),
    ((7, 33), 100),
    ((5, 131), 32),
    ((2, 3, 128), 64),
    ((4, 300), 300),
    ((1031,), 48),
    ((0, 64), 32),
    ((4, 0), 32),
]


def values(shape, dtype=torch.float32, mean=1.0):
    return (torch.randn(shape, generator=torch.Generator().manual_seed(1)) * 3 + mean).to(dtype)


def packed(backend, *args):
    return tuple(on(backend, lambda *a, i=i: pack_act(*a)[i], *args) for i in range(2))


def same(a, b):
    return all(torch.equal(s.view(torch.uint8), t.view(torch.uint8)) for s, t in zip(a, b, strict=True))


def each(stats, group, cols):
    """min and scale of every element, in float64."""
    return stats.double().repeat_interleave(group, -2)[..., :cols, :].unbind(-1)


@pytest.mark.parametrize("backend, dtype, bits, shape_and_group", cases(KERNELS, DTYPES, [8, 4], SHAPES))
def test_backends_equal(backend, dtype, bits, shape_and_group):
    shape, group = shape_and_group
    x = values(shape, dtype)
    for seed in (SEED, None):
        before = x.clone()
        expected = packed(REFERENCE, x, bits, group, seed, 2**31 + 5)
        assert same(packed(backend, x, bits, group, seed, 2**31 + 5), expected)
        assert torch.equal(x, before)
    for out in (torch.float32, torch.float16):
        args = (*expected, bits, group, shape[-1], out)
        assert torch.equal(on(backend, unpack_act, *args), on(REFERENCE, unpack_act, *args))


@pytest.mark.parametrize("backend", [b for b in KERNELS if b.values[0][0] == "triton"])
@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("shape, group", [((7, 40), 16), ((5, 35), 8)])
def test_more_rows_than_a_grid_is_high(backend, bits, shape, group, monkeypatch):
    monkeypatch.setattr("efftune.triton_kernels.pack_act.MAX_GRID", 3)
    x = values(shape)
    expected = packed(REFERENCE, x, bits, group, SEED, 1)
    assert same(packed(backend, x, bits, group, SEED, 1), expected)
    args = (*expected, bits, group, shape[-1], torch.float32)
    assert torch.equal(on(backend, unpack_act, *args), on(REFERENCE, unpack_act, *args))


@pytest.mark.parametrize("backend", KERNELS)
@pytest.mark.parametrize("bits", [8, 4])
def test_statistics_at_an_odd_address(backend, bits):
    """The Triton kernel reads min and scale as one word."""
    codes, stats = pack_act(values((4, 64)), bits, 16, SEED)
    args = bits, 16, 64, torch.float32

    def unpacked(codes, stats):
        odd = stats.new_empty(stats.numel() + 1)[1:].view(stats.shape).copy_(stats)
        return unpack_act(codes, odd, *args)

    assert torch.equal(on(backend, unpacked, codes, stats), unpack_act(codes, stats, *args))


@pytest.mark.parametrize("backend", KERNELS)
@pytest.mark.parametrize("bits", [8, 4])
def test_unpack_to_bfloat16(backend, bits):
    skip_truncation(backend, torch.bfloat16)
    args = (*pack_act(values((9, 331)), bits, 64, SEED), bits, 64, 331, torch.bfloat16)
    assert torch.equal(on(backend, unpack_act, *args), on(REFERENCE, unpack_act, *args))


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("shape, group", SHAPES[:7])
def test_definition(bits, shape, group):
    """The formula in float64, where no rounding decides; stats as narrow as bf16 allows; the layout of the codes."""
    x = values(shape)
    codes, stats = pack_act(x, bits, group, SEED, 3)
    cols, levels = shape[-1], 2**bits - 1
    assert codes.shape == (*shape[:-1], -(-cols * bits // 8)) and stats.shape == (*shape[:-1], -(-cols // group), 2)
    for start in range(0, cols, group):
        part, (low, scale) = x[..., start : start + group], stats[..., start // group, :].unbind(-1)
        least, most = part.amin(-1).double(), part.amax(-1).double()
        above = torch.nextafter(low, torch.full_like(low, torch.inf)).double()
        assert ((low.double() <= least) & (least < above)).all()
        smaller = torch.nextafter(scale, torch.zeros_like(scale)).double()
        reach = (most - low.double()) * (1 + 2**-22)
        assert (scale.double() * levels >= reach * (1 - 2**-21)).all() and (smaller * levels < reach).all()
    low, scale = each(stats, group, cols)
    draw = philox.rounding_bits(int(SEED), 3, 0, x.numel()).view(shape)
    position = (x.double() - low) / scale + (draw + 0.5) * 2**-16
    clear = (position - position.round()).abs() > 1e-4
    each_code = codes if bits == 8 else torch.stack([codes % 16, codes // 16], -1).flatten(-2)
    assert torch.equal(each_code[..., :cols][clear], position.floor()[clear].to(torch.uint8))
    assert (~clear).sum() <= 2 + x.numel() // 500 and (each_code[..., cols:] == 0).all()


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64])
@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("mean", [0.0, 200.0])
def test_error_is_below_one_scale(dtype, bits, mean):
    x = values((64, 1000), dtype, mean)
    for seed, most in ((SEED, 1.0), (None, 0.5)):
        codes, stats = pack_act(x, bits, 64, seed)
        oracle = unpack_act(codes, stats, bits, 64, 1000, torch.float64)
        _, scale = each(stats, 64, 1000)
        assert ((oracle - x.double()).abs() <= scale * (most + 1e-4)).all()
        for out in DTYPES:
            result, float32 = (unpack_act(codes, stats, bits, 64, 1000, d) for d in (out, torch.float32))
            assert_within_budget(result, oracle, float32)


@pytest.mark.parametrize("bits", [8, 4])
def test_mean_is_exact_over_all_draws(bits, monkeypatch):
    """By enumeration: each of 8 elements meets each of the 65,536 numbers that can be drawn."""
    monkeypatch.setattr(
        philox, "rounding_bits", lambda seed, stream, start, count, device: torch.arange(start, start + count) // 8
    )
    for x in (values((8,), mean=0.0), values((8,), mean=100.0), torch.linspace(-3, 5, 8)):
        with use_backend("reference"):
            codes, stats = pack_act(x.expand(2**16, 8), bits, 8, SEED)
        scale = stats[0, 0, 1].double()
        bias = unpack_act(codes, stats, bits, 8, 8, torch.float64).mean(0) - x.double()
        assert (bias.abs() <= scale * (2**-17 + 2**bits * 2**-22)).all()


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("dtype", DTYPES)
def test_mean_over_many_draws(bits, dtype):
    """z of each element's mean over 100 seeds of 40 rows: none beyond 5.5, and their squares have mean 1."""
    x, rows, seeds = values((256,), dtype), 40, 100
    torch.manual_seed(7)
    total = torch.zeros(256, dtype=torch.float64)
    for _ in range(seeds):
        codes, stats = pack_act(x.expand(rows, 256), bits, 64, draw_seed())
        total += unpack_act(codes, stats, bits, 64, 256, torch.float64).sum(0)
    low, scale = each(stats[0], 64, 256)
    fraction = ((x.double() - low) / scale).frac()
    variance = scale**2 * fraction * (1 - fraction) / (rows * seeds)
    drawn = variance > scale**2 * 1e-6  # the others lie on a code
    error = total / (rows * seeds) - x.double()
    z = (error / variance.sqrt())[drawn]
    assert drawn.sum() > 100 and z.abs().max() < 5.5 and abs(z.square().mean() - 1) < 5 * (2 / len(z)) ** 0.5
    assert (error[~drawn].abs() <= scale[~drawn] * 1e-3).all()


def test_seeds_and_streams_differ():
    x = values((4, 512))
    first = pack_act(x, 8, 64, SEED, 0)[0]
    assert torch.equal(first, pack_act(x, 8, 64, SEED)[0])
    for seed, stream in ((SEED, 1), (SEED + 1, 0)):
        assert (pack_act(x, 8, 64, seed, stream)[0] != first).double().mean() > 0.2


@pytest.mark.parametrize("backend", RUNS)
@pytest.mark.parametrize("bits", [8, 4])
def test_constant_groups_and_extremes(backend, bits):
    rows = torch.tensor(
        [
            [0.0, -0.0, 0.0, 0.0],
            [-7.25] * 4,
            [1 / 3] * 4,  # no bf16
            [2.0**-149, -(2.0**-149), 0.0, 2.0**-130],
            [1e-44, 1e-44, 2e-44, 3e-44],
            [-1.5e38, 1.5e38, 0.0, 1e38],
            [2.0**127, 2.0**127, 2.0**127, 3.39e38],
            [1.0, 1.0, 1.0, 1.0 + 2**-23],
        ]
    )
    codes, stats = packed(backend, rows, bits, 4, SEED, 0)
    assert same((codes, stats), packed(REFERENCE, rows, bits, 4, SEED, 0))
    result = on(backend, unpack_act, codes, stats, bits, 4, 4, torch.float32)
    assert torch.equal(result[:2], rows[:2]) and not codes[:2].any()
    assert not torch.signbit(stats[0]).any() and not stats[:2, :, 1].any()
    error, (low, scale) = (result.double() - rows.double()).abs(), each(stats, 4, 4)
    assert (error <= scale * (1 + 1e-4) + 2.0**-23 * (rows.abs() + low.abs())).all()
    assert (scale[3:5] == 2.0**-100).all() and scale[2].max() < 2**-9 / (2**bits - 1) * 1.02
    half = rows[1:3].to(torch.bfloat16)  # its own min: exact
    assert torch.equal(unpack_act(*pack_act(half, bits, 4, SEED), bits, 4, 4, torch.bfloat16), half)


@pytest.mark.parametrize("backend", RUNS)
@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("dtype", DTYPES)
def test_not_finite_becomes_nan(backend, bits, dtype):
    all_ones = torch.tensor([-1], dtype=torch.int32 if dtype == torch.float32 else torch.int16).view(dtype)  # -NaN
    bad = torch.cat([torch.tensor([torch.inf, -torch.inf, torch.nan], dtype=dtype), all_ones])
    x = values((8, 96), dtype)
    for row, value in enumerate(bad):
        x[row, 32 + 9 * row] = value
        x[4 + row, 32:64] = value
    codes, stats = packed(backend, x, bits, 32, SEED, 0)
    assert same((codes, stats), packed(REFERENCE, x, bits, 32, SEED, 0))
    result = on(backend, unpack_act, codes, stats, bits, 32, 96, torch.float32)
    assert result[:, 32:64].isnan().all() and stats[:, 1].isnan().all()
    assert result[:, :32].isfinite().all() and result[:, 64:].isfinite().all()
    if dtype == torch.float32:  # a range above float32's, a min below bf16's
        x = torch.tensor([[-3e38, 3e38], [-3.4e38, -3.4e38]])
        assert same(packed(backend, x, bits, 2, SEED, 0), packed(REFERENCE, x, bits, 2, SEED, 0))
        assert packed(backend, x, bits, 2, SEED, 0)[1].isnan().all()


@pytest.mark.parametrize("backend", KERNELS)
@pytest.mark.parametrize("bits", [8, 4])
def test_strided_rows_are_read_in_place(backend, bits):
    merged = values((2, 5, 140))
    for x in (merged[..., :70], merged[..., 70:], merged[:, 2:3, 3:73], merged[:1, ::2, :70], merged[0, 0]):
        expected = packed(REFERENCE, x.contiguous(), bits, 32, SEED, 0)
        assert same(packed(backend, x, bits, 32, SEED, 0), expected)
        with use_backend(backend[0]):
            assert pack_op.select(x.to(backend[1]), bits, 32, SEED, 0).name == backend[0]
    for x in (merged[..., :6].mT, merged[..., ::2], merged[:, :3].transpose(0, 1)):  # copied
        expected = packed(REFERENCE, x.contiguous(), bits, 32, SEED, 0)
        assert same(packed(backend, x, bits, 32, SEED, 0), expected)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bits", [8, 4])
def test_instruction_sets_and_threads_agree(dtype, bits):
    cpu = extension("_cpu")
    if cpu is None:
        pytest.skip("the C++ extension is not built")
    x, results, threads = values((97, 1031), dtype), [], torch.get_num_threads()
    try:
        for limit, count in ((2, 1), (2, 2), (1, 2), (0, 1)):
            cpu.limit_isa(limit)
            torch.set_num_threads(count)
            codes, stats = pack_act(x, bits, 72, SEED, 1)
            results.append((codes, stats, unpack_act(codes, stats, bits, 72, 1031, dtype)))
    finally:
        cpu.limit_isa(2)
        torch.set_num_threads(threads)
    assert all(same(results[0], r) for r in results[1:])


@pytest.mark.parametrize("bits", [8, 4])
def test_bytes(bits):
    codes, stats = pack_act(values((16, 1024), torch.bfloat16), bits, 64, SEED)
    assert codes.nbytes + stats.nbytes == 16 * 1024 * (bits / 8 + 4 / 64)


@pytest.mark.parametrize(
    "args, sentence",
    [
        ((torch.ones(2, 4, dtype=torch.int32), 8, 4, SEED), "float32"),
        ((torch.tensor(1.0), 8, 4, SEED), "0 dimensions"),
        ((torch.ones(2, 4), 3, 4, SEED), "4 or 8 bits"),
        ((torch.ones(2, 4), 8, 0, SEED), "group of at least 1"),
        ((torch.ones(2, 4), 4, 3, SEED), "even"),
        ((torch.ones(2, 4), 8, 4, SEED[None]), "draw_seed"),
        ((torch.ones(2, 4), 8, 4, SEED, -1), "stream"),
    ],
)
def test_pack_errors(args, sentence):
    for backend in (None, "reference"):
        with use_backend(backend), pytest.raises(ValueError, match=sentence):
            pack_act(*args)


def test_unpack_errors_and_refusals():
    codes, stats = pack_act(values((4, 64)), 8, 32, SEED)
    for backend in (None, "reference"):
        with use_backend(backend):
            with pytest.raises(ValueError, match=r"stats \(..., 4, 2\)"):
                unpack_act(codes, stats, 8, 16, 64, torch.float32)
            with pytest.raises(ValueError, match=r"codes \(..., 32\)"):
                unpack_act(codes, stats, 4, 32, 64, torch.float32)
            with pytest.raises(ValueError, match="uint8"):
                unpack_act(codes.float(), stats, 8, 32, 64, torch.float32)
            with pytest.raises(ValueError, match="int64"):
                unpack_act(codes, stats, 8, 32, 64, torch.int64)
    with use_backend("cpp"), pytest.raises(RuntimeError, match="float64 is computed by the reference"):
        pack_act(values((4, 64), torch.float64), 8, 32, SEED)


@pytest.mark.parametrize("seed", [SEED, None])
def test_opcheck_and_compile(seed):
    torch._dynamo.reset()
    merged = values((6, 140))
    for x in (merged[:, :70], merged):
        torch.library.opcheck(pack_op.overload, (x, 4, 32, seed, 1))
    codes, stats = pack_act(merged, 4, 32, seed)
    torch.library.opcheck(unpack_op.overload, (codes, stats, 4, 32, 140, torch.bfloat16))

    def there_and_back(x):
        return unpack_act(*pack_act(x, 4, 32, seed, 1), 4, 32, x.shape[-1], torch.float32) * 2

    compiled = torch.compile(there_and_back, fullgraph=True, backend="aot_eager")
    for x in (merged, merged[:, :70], merged[:5].t()):
        assert torch.equal(compiled(x), there_and_back(x))
