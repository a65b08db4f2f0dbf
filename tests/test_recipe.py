import pytest

from efftune import EfftuneError
from efftune.methods.adapters.lora import LoraMethod
from efftune.methods.quantized.int8 import Int8Method
from efftune.recipe import format_recipe, parse


@pytest.mark.parametrize(
    "text, canonical",
    [
        ("lora", "lora"),
        ("lora()", "lora"),
        (" int8(group=32)+lora( r = 8 ) ", "int8(group=32) + lora(r=8)"),
        ("lora(lora_alpha=32)", "lora(lora_alpha=32.0)"),
        ("lora(target_modules=['q_proj', \"v_proj\"])", "lora(target_modules=('q_proj', 'v_proj'))"),
        ("lora(r=16, lora_alpha=None, use_rslora=True)", "lora(use_rslora=True)"),
        ("full + lisa(layers=3)", "full + lisa(layers=3)"),
    ],
)
def test_parse_and_format_round_trip(text, canonical):
    methods = parse(text)
    assert format_recipe(methods) == canonical
    assert parse(canonical) == methods


def test_order_and_settings():
    assert parse("int8(group=32) + lora(r=8)") == [Int8Method(group=32), LoraMethod(r=8)]


@pytest.mark.parametrize(
    "text, message",
    [
        (
            "lorra(r=8)",
            r"no method 'lorra' \(did you mean 'lora'\?\); "
            "the methods are: fedkseed, ferret, full, int8, lisa, lora, mesa, mezo, recompute, sparsemezo, vcas, "
            "wtacrs",
        ),
        ("lora(rank=8)", r"lora has no setting 'rank'"),
        ("lora(lora_alfa=8)", r"did you mean 'lora_alpha'\?"),
        ("lora(r='16')", r"lora: r is int, not '16'"),
        ("lora(r=True)", r"lora: r is int, not True"),
        ("lora(r=1.5)", r"lora: r is int, not 1.5"),
        ("lora(target_modules=[1])", r"target_modules is str or tuple, not \(1,\)"),
        ("lora(16)", r"takes its settings by name: r=..."),
        ("lora(r=size)", r"r=size is not a literal"),
        ("lora(r=__import__('os'))", r"is not a literal"),
        ("lora(**{'r': 1})", r"lora has no setting None"),
        ("lora(r=8", r"does not parse"),
        ("lora(r=8, r=9)", r"does not parse|given twice"),
        ("lora(r={[]: 1})", r"is not a literal"),
        ("", r"does not parse"),
        ("lora - full", r"is no method"),
        ("a.b(r=1)", r"is no method"),
        ("lora(r=1)(2)", r"is no method"),
    ],
)
def test_errors_name_the_method_the_field_and_what_would_do(text, message):
    with pytest.raises(EfftuneError, match=message):
        parse(text)
