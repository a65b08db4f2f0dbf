"""csrc/*.cu without a GPU: bit for bit what the CPU kernels compute, but for the fused product of `perturb`; and the
machine that runs them notices what a GPU would not forgive. The tests of the operators themselves run on it, too, as
their backend "cuda-on-cpu"."""

import faulthandler
import os

import pytest
import torch

from efftune import perturb, use_backend
from efftune.ops import philox
from efftune.ops.sample_rows import select_rows
from tests.ops.backends import on
from tests.ops.cuda_on_cpu.build import CSRC, compile_kernels, cuda_on_cpu, link

CUDA = ("cuda", "cpu")
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def fused(a, z, y):
    """a·z + y in float32, rounded once. The product is exact in float64, and the sum is rounded to odd there, after
    which rounding to fewer bits is as good as of the sum itself."""
    product, y = a.double() * z.double(), y.double()
    total = product + y
    rest = total - product
    error = (product - (total - rest)) + (y - rest)
    even = total.view(torch.int64) & 1 == 0
    other = torch.nextafter(total, torch.copysign(torch.tensor(torch.inf).double(), error))
    return torch.where(even & (error != 0), other, total).float()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dist", ["normal", "rademacher"])
@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
@pytest.mark.parametrize("seeds", [[3], [5, -9, 2**63 - 1], []])
@pytest.mark.parametrize("n, offset", [(1, 0), (8, 8), (9, 7), (300, 2**31 - 5), (2601, 2**40 + 3), (70001, 16)])
def test_perturb_is_the_cpu_kernel_with_a_fused_product(dtype, dist, rounding, seeds, n, offset):
    key = dict(stream=2**31 + 9, offset=offset, dist=dist)
    a = torch.linspace(-1e-2, 2e-2, max(2, len(seeds)))[: len(seeds)]
    for w_at, out_at, threshold in ((0, 0, None), (offset % 8, offset % 8, 0.02), (3, 0, None), (0, 1, 0.0)):
        w = (0.02 * torch.randn(n + 8, generator=generator(n))).to(dtype)[w_at : w_at + n]
        around = torch.full((n + 16,), 7.0, dtype=dtype)
        out = around[8 + out_at : 8 + out_at + n]
        y = w.float()
        for a_k, seed in zip(a, seeds, strict=True):
            y = fused(a_k, perturb(torch.zeros(n), 1.0, seed=seed, **key), y)
        if rounding == "stochastic" and seeds and dtype != torch.float32:
            y = philox.round_stochastic(y, dtype, philox.rounding_bits(seeds[0], key["stream"], offset, n))
        small = w.float().abs() <= (torch.inf if threshold is None else torch.tensor(threshold))
        on(CUDA, perturb, w, a, seed=seeds, rounding=rounding, threshold=threshold, out=out, **key)
        assert torch.equal(out, torch.where(small, y.to(dtype), w))
        beside = torch.cat([around[: 8 + out_at], around[8 + out_at + n :]])
        assert (beside == 7).all()  # nothing else was written


def score_sets(m):
    random = torch.rand(m, generator=generator(m))
    sparse = (random < 0.05).float()
    some_invalid = random.clone()
    some_invalid[m // 2] = torch.nan
    return [random, (20 * random).exp(), torch.zeros(m), sparse, torch.ones(m), some_invalid]


@pytest.mark.parametrize("m", [1, 5, 511, 513, 2048, 2049, 8191, 8192])
def test_select_rows_is_the_cpu_kernel(m):
    for i, scores in enumerate(score_sets(m)):
        for share in (0.01, 0.3, 0.9, 1.0):
            args = scores, max(1, int(share * m)), torch.tensor(7 * m + i), "systematic", 3
            with use_backend("cpp"):
                expected = select_rows(*args)
            for x, y in zip(on(CUDA, select_rows, *args), expected, strict=True):
                assert torch.equal(x, y)


BARRIER, BARRIERS = "__syncthreads();", 4
BEFORE_OUT = BARRIER + "\n\n    // Out in the order of the rows."


def without_barrier(n):
    """The source without its n-th barrier."""

    def change(source):
        parts = source.split(BARRIER)
        assert len(parts) == BARRIERS + 1  # a new one is to be tested, too
        return BARRIER.join([*parts[:n], parts[n] + parts[n + 1], *parts[n + 2 :]])

    return change


def instead(old, new):
    def change(source):
        assert source.count(old) == 1
        return source.replace(old, new)

    return change


FAULTS = {f"no-barrier-{n}": (without_barrier(n), None) for n in range(BARRIERS)} | {
    "not-all-at-a-barrier": (instead(BEFORE_OUT, "if (threadIdx.x == 7) return;\n" + BEFORE_OUT), "not reached by all"),
    "not-the-same-barrier": (
        instead(BEFORE_OUT, "if (threadIdx.x > 0)\n__syncthreads();\nelse\n" + BEFORE_OUT), "different barriers"
    ),
    "too-little-memory": (instead("drawn[kThreads * kItems]", "drawn[kThreads]"), "beyond the shared memory"),
    "not-initialised": (instead("shared.drawn[row] = saturated || hit", "if (hit) shared.drawn[row] = true"), None),
    "too-much-memory": (instead("kMaxCudaRows / kThreads>(", "8 * kMaxCudaRows / kThreads>("), "invalid argument"),
}  # fmt: skip
QUICK = ["no-barrier-3", "not-all-at-a-barrier", "too-little-memory", "not-initialised"]


@pytest.mark.parametrize(
    "fault", [pytest.param(name, marks=() if name in QUICK else pytest.mark.slow) for name in FAULTS]
)
def test_faults_are_noticed(fault, tmp_path):
    change, sentence = FAULTS[fault]
    source = tmp_path / "sample_rows.cu"
    source.write_text(change((CSRC / "sample_rows.cu").read_text()))
    module = link(tmp_path, sample_rows=compile_kernels(source, tmp_path / "sample_rows.o"))

    def same(m):
        outlier = torch.ones(m).index_fill(0, torch.randint(m, (1,), generator=generator(m)), 1e30)
        for scores in (torch.rand(m, generator=generator(m)), outlier):
            args = scores, m // 3, torch.tensor(1)
            with cuda_on_cpu(module), use_backend("cuda"):
                result = select_rows(*args)
            if not all(torch.equal(x, y) for x, y in zip(result, select_rows(*args), strict=True)):
                return False
        return True

    child = os.fork()  # a faulty kernel may write anywhere
    if child == 0:
        faulthandler.disable()
        try:
            noticed = not all([same(m) for m in [2048, 8192] * 4]) and sentence is None
        except RuntimeError as error:
            noticed = sentence is None or sentence in str(error)
        finally:
            os._exit(0 if noticed else 1)
    status = os.waitpid(child, 0)[1]
    assert status == 0 or sentence is None and os.WIFSIGNALED(status)
