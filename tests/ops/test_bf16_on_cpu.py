"""The AMX and AVX512-BF16 code of csrc/bf16_product.cpp on any processor: the same source, compiled against the
instructions of tests/ops/bf16_on_cpu/immintrin.h, whose tiles and bounds are checked."""

import re
import subprocess
from pathlib import Path

import pytest
import torch

from tests.budget import assert_within_budget
from tests.ops.cuda_on_cpu.build import CSRC, compiler

HERE = Path(__file__).parent / "bf16_on_cpu"
SOURCES = ["bf16_product.cpp", "bf16_product_kernels.h"]
NONE, AVX512, AMX = range(3)
UNITS = {"none": NONE, "avx512": AVX512, "amx": AMX}


def build(folder: Path, old: str = "", new: str = "") -> Path:
    """The program, with `new` in place of `old`. The options of the target go: instructions are functions here."""
    macros = subprocess.run([*compiler(), *"-dM -E -x c++ /dev/null".split()], capture_output=True, check=True).stdout
    if b"__x86_64__" not in macros or b"__clang__" in macros:
        pytest.skip("csrc/bf16_product.cpp has units for GCC on x86-64 alone")
    texts = {name: (CSRC / name).read_text() for name in SOURCES}
    assert not old or sum(text.count(old) for text in texts.values()) == 1
    for name, text in texts.items():
        (folder / name).write_text(re.sub("#pragma GCC target.*", "", text.replace(old, new) if old else text))
    flags = "-O0 -ffp-contract=off -fopenmp -Wall -Wno-psabi -fsanitize=bounds -fsanitize-undefined-trap-on-error"
    flags = [*flags.split(), f"-I{folder}", f"-I{HERE}", f"-I{CSRC}"]
    subprocess.run([*compiler(), *flags, str(HERE / "main.cpp"), "-o", str(folder / "program")], check=True)
    return folder / "program"


@pytest.fixture(scope="module")
def program(tmp_path_factory):
    return build(tmp_path_factory.mktemp("bf16"))


def product(program, unit, a, b, gaps=(0, 0, 0)):
    """a bᵀ. Rows are `gaps` further apart than long: there NaN stands in the operands, and 7, as around it, in out."""
    (m, k), n = a.shape, b.shape[0]
    operands = [torch.nn.functional.pad(x, (0, gap), value=torch.nan) for x, gap in zip((a, b), gaps, strict=False)]
    numbers = (UNITS[unit], m, n, k, k + gaps[0], k + gaps[1], n + gaps[2])
    data = b"".join(x.view(torch.int16).numpy().tobytes() for x in operands)
    run = subprocess.run([program, *map(str, numbers)], input=data, capture_output=True, timeout=60)
    assert run.returncode == 0, run.stderr.decode() or f"ended by signal {-run.returncode}"
    out = torch.frombuffer(bytearray(run.stdout), dtype=torch.float32)
    around = (out.numel() - m * (n + gaps[2])) // 2
    result = out[around : out.numel() - around].view(m, n + gaps[2])
    assert (out[:around] == 7).all() and (out[out.numel() - around :] == 7).all() and (result[:, n:] == 7).all()
    return result[:, :n].contiguous()


def integers(m, n, k):
    """Operands whose products and sums are exact in whatever order."""
    g = torch.Generator().manual_seed(0)
    return tuple(torch.randint(-8, 9, (rows, k), generator=g).bfloat16() for rows in (m, n))


SHAPES = [(1, 1, 1), (16, 32, 32), (33, 31, 64), (300, 100, 257), (7, 65, 1000), (31, 97, 2), (257, 33, 33)]  # M, N, K


@pytest.mark.parametrize("gaps", [(0, 0, 0), (3, 1, 5)])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("unit", UNITS)
def test_every_element_is_where_it_belongs(program, unit, shape, gaps):
    a, b = integers(*shape)
    assert torch.equal(product(program, unit, a, b, gaps).double(), a.double() @ b.double().t())


@pytest.mark.parametrize("unit", UNITS)
def test_within_budget(program, unit):
    g = torch.Generator().manual_seed(0)
    a, b = (torch.randn(rows, 777, generator=g).bfloat16() for rows in (37, 41))
    in_order = torch.zeros(37, 41)
    for j in range(777):
        in_order += a[:, j : j + 1].float() * b[:, j].float()
    out = product(program, unit, a, b)
    assert_within_budget(out, a.double() @ b.double().t(), in_order)
    if unit == "avx512":  # what the library runs in tests elsewhere is this unit, in its order
        assert torch.equal(out, product(program, "none", a, b))


@pytest.mark.parametrize(
    "unit, old, new",
    [
        ("amx", "_tile_dpbf16ps(1, 4, 7)", "_tile_dpbf16ps(1, 4, 6)"),
        ("amx", "palette[48 + tile] = kSide", "palette[48 + tile] = 8"),
        ("avx512", "*b_row = b + s * 2 * kTileWords + n * kSide", "*b_row = b + s * 2 * kTileWords + n / 16 * kSide"),
        ("none", "uint32_t b[kSteps][2][kTileWords]", "uint32_t b[kSteps - 1][2][kTileWords]"),
        ("none", "static_cast<size_t>(cols - k) * sizeof *at", "sizeof tile[r]"),
    ],
)
def test_a_wrong_index_is_noticed(tmp_path, unit, old, new):
    a, b = integers(70, 71, 300)
    program = build(tmp_path, old, new)
    with pytest.raises(AssertionError):
        assert torch.equal(product(program, unit, a, b, (3, 3, 3)).double(), a.double() @ b.double().t())
