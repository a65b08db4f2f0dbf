"""linear_cross_entropy's products of bfloat16 operands: one result, whatever the processor and its units."""

import pytest
import torch

import efftune.ops.linear_cross_entropy as module
from efftune import use_backend
from efftune.ops._available import extension
from tests.budget import assert_within_budget, rms
from tests.ops.test_linear_cross_entropy import SHAPES, check, operands, ours, run, take_small_tiles


@pytest.fixture
def small_tiles(monkeypatch):
    take_small_tiles(monkeypatch)


@pytest.fixture(params=["widened", "none", "own"])
def units(request, monkeypatch):
    """Without units, with emulated ones, and with those of this processor."""
    own = module._unit()
    if request.param == "own" and own == "none":
        pytest.skip("this processor has no units for bfloat16 products")
    monkeypatch.setattr(module, "_widened", lambda *args: request.param == "widened")
    monkeypatch.setattr(module, "_unit", lambda: own if request.param == "own" else "none")


@pytest.mark.parametrize("label_smoothing, softcap", [(0.0, None), (0.1, 1.5)])
@pytest.mark.parametrize("shape", [*SHAPES, (37, 24, 1301), (65, 300, 257)])
def test_bfloat16_within_budget_with_and_without_units(units, small_tiles, shape, label_smoothing, softcap):
    made, targets, dy = operands(shape, torch.bfloat16)
    check("cpp", torch.bfloat16, made, targets, dy, label_smoothing=label_smoothing, softcap=softcap)


def test_units_are_used_for_bfloat16_alone(monkeypatch):
    cpu = torch.device("cpu")
    for unit in ("none", "avx512", "amx"):
        monkeypatch.setattr(module, "_unit", lambda unit=unit: unit)
        assert module._widened(module._cpp_tile, cpu, torch.bfloat16) == (unit == "none")
        assert module._widened(module._torch_tile, cpu, torch.bfloat16)
        assert module._widened(module._cpp_tile, cpu, torch.float16)
        assert not module._widened(module._cpp_tile, cpu, torch.float32)
        assert not module._widened(module._triton_tile, torch.device("cuda"), torch.bfloat16)


def test_all_processors_give_one_result_under_autocast(monkeypatch, small_tiles):
    """Also the gradient of a float32 weight, which no product may round to bfloat16 on its way."""
    made, targets, dy = operands((37, 24, 1301), torch.float32)
    results = []
    for widened in (True, False):
        monkeypatch.setattr(module, "_widened", lambda *args, widened=widened: widened)
        monkeypatch.setattr(module, "_unit", lambda: "none")
        with torch.autocast("cpu", torch.bfloat16), use_backend("cpp"):
            results.append(run(ours, torch.float32, made, targets, dy))
    for a, b in zip(*results, strict=True):
        assert rms(a.double() - b.double()) <= 2e-5 * rms(a)


@pytest.mark.parametrize("m, n, k", [(1, 1, 1), (16, 32, 32), (33, 31, 64), (300, 100, 257), (7, 65, 1000), (3, 0, 5)])
def test_products_of_bfloat16(units, m, n, k):
    """Rows apart, sizes that no tile divides: the result in float32 and nothing beside it."""
    g = torch.Generator().manual_seed(0)
    a, b = (torch.randn(rows, k + 3, generator=g).bfloat16()[:, 1 : 1 + k] for rows in (m, n))
    out = torch.full((m + 1, n + 2), 7.0)
    oracle, in_order = a.double() @ b.double().t(), torch.zeros(m, n)
    for j in range(k):  # float32 sums one after the other: a library's blocked sum errs less
        in_order += a[:, j : j + 1].float() * b[:, j].float()
    for left in (a, a.t().contiguous().t()):
        module._cpp_product(left, b, out[:m, :n])
        assert_within_budget(out[:m, :n].contiguous(), oracle, in_order)
        assert (out[m:] == 7).all() and (out[:, n:] == 7).all()


def test_products_refuse_a_unit_that_is_not_there():
    with pytest.raises(ValueError, match="a unit that this processor has"):
        extension("_cpu").bf16_product(0, 0, 0, (0, 0, 0), (0, 0, 0), "avx1024", 1)
