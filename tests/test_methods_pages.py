"""`efftune methods` says what a recipe can be made of."""

import dataclasses

import pytest

from efftune import cli
from efftune.methods import Method, available

METHODS = {name: cls for name, cls in available().items() if cls.__module__.startswith("efftune.")}


def said(capsys, *arguments):
    assert cli.main(["methods", *arguments]) == 0
    return capsys.readouterr().out


def test_methods_lists_each_with_whole_sentences(capsys):
    lines = said(capsys).splitlines()
    heads = [line for line in lines if not line.startswith(" ")]
    assert [head.partition("(")[0] for head in heads] == list(available())
    for name, cls in METHODS.items():
        at = lines.index(next(head for head in heads if head.startswith(f"{name}(")))
        end = next((i for i in range(at + 1, len(lines)) if not lines[i].startswith(" ")), len(lines))
        text = " ".join(line.strip() for line in lines[at + 1 : end])
        assert text[0].isupper() and text.endswith("."), name
        assert text in " ".join((cls.__doc__ or "").split())
        assert len(text) <= 300, name  # a list of them is read
        assert max(map(len, lines[at + 1 : end])) <= 100


def test_the_signature_has_every_setting_and_its_default(capsys):
    assert "recompute(every=1)" in said(capsys)
    assert "mesa(bits=8, group=64, max_error=None, target_modules='all-linear')" in said(capsys)


def test_a_method_by_its_name_is_all_there_is_to_know(capsys):
    text = said(capsys, "sparsemezo")
    assert text.startswith("sparsemezo(eps=0.001, ")
    for words in ("arXiv:2402.15751", "arXiv:2006.10820"):  # of its own docstring, of its family's
        assert words in text
    assert text.endswith("\nPage: docs/methods/sparsemezo.md\n")
    assert "target_modules: str | tuple[str, ...] = 'all-linear'" in said(capsys, "lora")


@pytest.mark.parametrize("name", METHODS)
def test_all_of_the_docstring_and_of_the_settings_is_printed(name, capsys):
    text = said(capsys, name)
    for line in (METHODS[name].__doc__ or "").splitlines():
        assert line.strip() in text
    for field in dataclasses.fields(METHODS[name]):
        assert f"    {field.name}: {field.type} = {field.default!r}\n" in text


def test_several_names_and_an_unknown_one(capsys):
    text = said(capsys, "int8", "peqa")
    assert text.index("Page: docs/methods/int8.md") < text.index("peqa(target_modules")
    assert cli.main(["methods", "lorra"]) == 1
    error = capsys.readouterr().err
    assert "There is no method 'lorra' (did you mean 'lora'?); the methods are: " + ", ".join(available()) in error


def test_a_method_of_another_package(capsys, monkeypatch):
    """Its settings may lack a default, or annotations that are strings, and it has no page here."""

    @dataclasses.dataclass(frozen=True)
    class Outside(Method):
        """Trains what it likes.

        In its own way.
        """

        name = "outside"

    fields = [("rank", int), ("names", list, dataclasses.field(default_factory=lambda: ["q"]))]
    made = dataclasses.make_dataclass("Outside", fields, bases=(Outside,), frozen=True)
    made.__doc__, made.__module__ = Outside.__doc__, "outside_methods"
    monkeypatch.setitem(available(), "outside", made)
    assert "outside(rank, names=['q'])\n    Trains what it likes.\n" in said(capsys)
    text = said(capsys, "outside")
    assert "    rank: int\n    names: list = ['q']\n" in text and "Page" not in text
