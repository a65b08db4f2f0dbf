"""Every function of efftune._cpu refuses arguments that do not fit, in words and before it reads or writes anything."""

import contextlib
import re
from unittest import mock

import pytest
import torch

from efftune.ops._available import extension
from efftune.ops._op import use_backend
from tests.ops.test_instruction_sets import KERNELS

# name: the places of its sizes, from 0, which may not be negative
SIZES = {
    "perturb": [2], "dropout": [2], "relu": [3], "int8_dequantize": [3, 4, 5],
    "pack_act": [3, 4, 6, 7], "unpack_act": [3, 4, 5, 6], "norm": [6, 7], "norm_backward": [8, 9], "glu": [6, 7],
    "rotary": [4, 5, 6], "row_norms": [3, 4], "select_rows": [1, 2, 5], "gather_rows": [3, 4, 6, 7],
    "scale_rows": [4, 5, 7], "linear_cross_entropy": [6, 7, 8, 9], "draw": [0],
    "entries_grad": [7, 8, 9], "entries_linear": [7], "topk_count": [1], "topk_collect": [1, 5, 7],
    "topk_merge": [1, 3],
}  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def built():
    if extension("_cpu") is None:
        pytest.skip("the C++ extension is not built")


def others():
    """Calls of the functions that no kernel of the table calls."""
    cpu, x, y = extension("_cpu"), torch.ones(1, 4).bfloat16(), torch.zeros(1, 1)
    cpu.draw(4, [1, 2], 3, True, 1)
    cpu.bf16_product(x.data_ptr(), x.data_ptr(), y.data_ptr(), (1, 1, 4), (4, 4, 1), "none", 1)
    cpu.limit_isa(2)
    cpu.bf16_unit()


RUNS = {name: (names, run) for names, run in KERNELS.items() for name in names.split()}
RUNS |= {name: ("", lambda _: others()) for name in ("draw", "bf16_product", "limit_isa", "bf16_unit")}


def during_a_call(name, check):
    """check(function, arguments) while the arguments of a call of this function are alive."""
    cpu, checked = extension("_cpu"), []
    function = getattr(cpu, name)

    def instead(*args):
        if not checked:
            checked.append(True)
            check(function, args)
        return function(*args)

    names, run = RUNS[name]
    forced = use_backend("cpp") if names and "row_norms" not in names else contextlib.nullcontext()
    with forced, mock.patch.object(cpu, name, instead):
        list(run(torch.float32) or ())
    assert checked


def refused(function, args, error, sentence):
    with pytest.raises(error) as found:
        function(*args)
    assert type(found.value) is error and re.fullmatch(sentence, str(found.value))


def changed(args, change):
    """(place, arguments) with one of them, or one item of a list or tuple in them, changed where `change` does that."""
    for i, arg in enumerate(args):
        found = [("", change(arg))]
        if isinstance(arg, (list, tuple)):
            found += [(place.replace("argument", "item") + " of ", inner) for place, inner in changed(arg, change)]
        for place, new in found:
            if new is not None:
                yield f"{place}argument {i + 1}", type(args)([*args[:i], new, *args[i + 1 :]])


def test_every_function_is_tested():
    assert {name for name in dir(extension("_cpu")) if not name.startswith("_")} == set(RUNS) >= set(SIZES)


@pytest.mark.parametrize("name", RUNS)
def test_number_of_arguments(name):
    def check(function, args):
        n = len(args)
        for count in range(n):
            refused(function, args[:count], TypeError, f"{name} takes more than {count} arguments.")
        refused(function, (*args, 0), TypeError, f"{name} takes {n} arguments, not {n + 1}.")
        with pytest.raises(TypeError):
            function(*args, x=0)
        for place, short in changed(args, lambda arg: arg[:-1] if isinstance(arg, tuple) else None):
            refused(function, short, TypeError, rf"{name} takes more than \d+ items in {place}.")
        for place, long in changed(args, lambda arg: (*arg, 0) if isinstance(arg, tuple) else None):
            refused(function, long, TypeError, rf"{name} takes \d+ items in {place}, not \d+.")

    during_a_call(name, check)


class Strange:
    pass


@pytest.mark.parametrize("name", RUNS)
def test_kinds_of_arguments(name):
    def check(function, args):
        for place, strange in changed(args, lambda arg: Strange()):
            wanted = "(an integer|a number|True or False|a name|a list or tuple)"
            refused(function, strange, TypeError, f"{name} takes {wanted} as {place}, not Strange.")
        for kind, other in ((int, 1.5), (int, "1"), (bool, 1), (str, 3), (str, None), (float, "1"), (list, "ab")):
            for _, wrong in changed(args, lambda arg, kind=kind, other=other: other if type(arg) is kind else None):
                with pytest.raises(TypeError, match=f"^{name} takes .* as .*argument .*, not "):
                    function(*wrong)

    during_a_call(name, check)


@pytest.mark.parametrize("name", RUNS)
def test_ranges_of_arguments(name):
    def check(function, args):
        for number in (2**64, -(2**63) - 1, 10**40):
            for place, wrong in changed(args, lambda arg, number=number: number if type(arg) is int else None):
                sentence = rf"{name} takes an integer from -?\d+ to \d+ as {place}, not {number}."
                refused(function, wrong, ValueError, sentence)
        for _, wrong in changed(args, lambda arg: "float8" if type(arg) is str else None):
            with pytest.raises(ValueError, match="^[^ ]+ takes "):
                function(*wrong)
        for size in SIZES.get(name, ()):
            with pytest.raises(ValueError, match=" takes? "):
                function(*args[:size], -1, *args[size + 1 :])
        if name not in ("select_rows", "topk_merge", "limit_isa", "bf16_unit"):
            for count in (0, -1):
                refused(function, (*args[:-1], count), ValueError, "The kernels take at least one thread.")

    during_a_call(name, check)


def test_what_a_number_may_be():
    """What has __index__ or __float__, a bool for an integer, and any sequence or iterable for a list."""
    draw = extension("_cpu").draw
    expected = draw(4096, [1, 2], 3, True, 1)
    assert draw(torch.tensor(4096), (1, torch.tensor(2)), True + 2, True, True) == expected != 0
    assert draw(4096, iter([1, 2]), 3, True, 1) == expected

    class Shrinking(list):
        def __index__(self):
            seeds.clear()
            return 1

    seeds = [Shrinking(), 2, 3]
    with pytest.raises(TypeError, match="draw takes more than 1 items in argument 2"):
        draw(4096, seeds, 3, True, 1)
