"""What is the same on all devices divides by no Python number: see `efftune.ops._divide`."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from efftune.ops import dropout, int8, pack_act, philox, sample_rows
from efftune.ops._divide import divide

SEED = torch.tensor(7)
aten = torch.ops.aten
DIVISIONS = {aten.div, aten.div_, aten.floor_divide, aten.floor_divide_}


class Divisors(TorchDispatchMode):
    """Where the divisor of each division is: "cpu" for Python numbers. With operands on the meta device nothing but
    those is on the CPU."""

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.overloadpacket in DIVISIONS and args[0].is_floating_point():
            self.found.append(args[1].device.type if isinstance(args[1], torch.Tensor) else "cpu")
        return func(*args, **(kwargs or {}))


def x(*shape, dtype=torch.float32):
    return torch.empty(shape, dtype=dtype, device="meta")


CASES = {
    "int8_quantize": (1 + 1, lambda: int8._quantized(x(5, 131), 32)),
    "pack_act, 8 bits": (1, lambda: pack_act._reference(x(5, 131), 8, 32, SEED, 3)),
    "pack_act, 4 bits": (1, lambda: pack_act._reference(x(5, 131), 4, 32, None, 3)),
    "dropout": (1, lambda: dropout._reference(x(40, dtype=torch.float64), 0.3, SEED, 3)),
    "select_rows, systematic": (2, lambda: sample_rows._select_reference(x(40), 7, SEED, "systematic", 3)),
    "select_rows, wta": (3, lambda: sample_rows._select_reference(x(40), 7, SEED, "wta", 3)),
    "select_rows, crs": (2, lambda: sample_rows._select_reference(x(40), 7, SEED, "crs", 3)),
    "round_stochastic": (1, lambda: philox.round_stochastic(x(40), torch.float16, x(40, dtype=torch.int64))),
    "normal": (0, lambda: philox.normal(7, 3, 0, 40, x(1).device)),
}


@pytest.mark.parametrize("name", CASES)
def test_no_divisor_is_a_python_number(name):
    count, call = CASES[name]
    with Divisors() as divisors:
        call()
    assert divisors.found == ["meta"] * count


def test_divisors_are_seen():
    with Divisors() as divisors:
        x(3) / 15, x(3).div_(15), x(3) / torch.tensor(15.0), x(3) / x(3), divide(x(3), 15)  # noqa: B018
    assert divisors.found == ["cpu"] * 3 + ["meta"] * 2


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_quotients_are_rounded_once(device, dtype):
    numbers = torch.randn(10_000, generator=torch.Generator().manual_seed(0), dtype=dtype)
    for by in (3, 15, 127, 255, 0.7):
        found = divide(numbers.to(device), by).cpu()
        assert found.dtype == dtype and torch.equal(found, numbers / torch.full_like(numbers, by))
