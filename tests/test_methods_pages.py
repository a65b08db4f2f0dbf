"""`efftune methods` and the pages in docs/methods say what a recipe can be made of."""

import ast
import dataclasses
import inspect
import re
from pathlib import Path

import pytest

from efftune import cli
from efftune.methods import Method, available
from efftune.recipe import parse

ROOT = Path(__file__).parents[1]
PAGES = ROOT / "docs" / "methods"
HEADS = ["When to take it.", "What it saves.", "What it costs.", "Settings that matter.", "Traps.", "Source."]

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


def skeleton(cls):
    """The page of a method as far as its docstring tells it."""
    doc = inspect.cleandoc(cls.__doc__ or "")
    entries = dict(re.findall(r"^(Args|Memory|Cost|Raises|Source)[^:\n]*:((?:.|\n(?=\s))*)", doc, re.M))
    known = {"What it saves.": "Memory", "What it costs.": "Cost", "Traps.": "Raises", "Source.": "Source"}
    told = {head: " ".join(entries.get(entry, "...").split()) for head, entry in known.items()}
    told["Settings that matter."] = ", ".join(f"`{field.name}`" for field in dataclasses.fields(cls))
    block = f'```python\ntuner = efftune.apply(llama(), "{cls.name}")\nstep(tuner)\n```\n\n```text\n...\n```\n\n'
    lines = [f"**{head}** {told.get(head, '...')}\n\n" + block * (head == "What it costs.") for head in HEADS]
    return f"# {cls.name}\n\n`{cls.name}` {doc.partition(chr(10) * 2)[0]}\n\n" + "".join(lines)


def text_of(name):
    page = PAGES / f"{name}.md"
    if not page.exists():
        pytest.fail(f"docs/methods/{name}.md is missing; write it from this:\n\n{skeleton(METHODS[name])}")
    return page.read_text()


def spans(text):
    """What stands between backticks, outside of blocks."""
    return re.findall(r"`([^`]+)`", re.sub(r"^```.*?^```$", "", text, flags=re.M | re.S))


def printed(text):
    """(recipe, weights, gradients, optimizer, kept) of each line that `step` prints, which test_docs.py compares."""
    return re.findall(r"^(.+): weights (\S+), gradients (\S+), optimizer (\S+), kept (\S+) MiB$", text, re.M)


@pytest.mark.parametrize("name", METHODS)
def test_every_method_has_a_page_of_one_shape(name):
    text = text_of(name)
    title, first, *_ = text.split("\n\n")
    assert title == f"# {name}"
    assert first.startswith(f"`{name}` ") and first.endswith(".")
    assert re.findall(r"^\*\*(.+?)\*\*", text, re.M) == HEADS
    assert 10 <= len(text.splitlines()) <= 40
    assert "..." not in text.replace("(...)", "")  # as in a skeleton
    assert any(name in recipe for recipe, *_ in printed(text))


@pytest.mark.parametrize("name", METHODS)
def test_settings_and_recipes_of_a_page_exist(name):
    text = text_of(name)
    settings = re.search(r"^\*\*Settings that matter\.\*\* (.+?)\n\n", text, re.M | re.S)
    assert settings is not None
    fields = {field.name for field in dataclasses.fields(METHODS[name])}
    named = [span for span in spans(settings[1]) if re.fullmatch(r"\w+(=.*)?", span) and span not in available()]
    assert named or not fields
    for field, _, value in (span.partition("=") for span in named):
        assert field in fields, field
        ast.literal_eval(value or "None")
    for span in spans(text):
        if re.match(rf"({'|'.join(available())})(\(|$| \+)", span):
            parse(span)


@pytest.mark.parametrize("name", METHODS)
def test_the_source_names_the_papers_of_the_docstring(name):
    source, doc = text_of(name).partition("**Source.**")[2], METHODS[name].__doc__ or ""
    paper = re.search(r"^ *Source: (.+? \d{4})\b", doc, re.M)
    assert (paper[1] if paper else "no paper") in source
    of_page, of_docstring = (set(re.findall(r"arXiv:(\d+\.\d+)", text)) for text in (source, doc))
    assert of_docstring <= of_page
    code = "".join(path.read_text() for path in (ROOT / "efftune").rglob("*.py"))
    assert all(f"arXiv:{number}" in code for number in of_page)


@pytest.mark.parametrize("name", METHODS)
def test_figures_of_a_page_stand_where_a_command_puts_them(name):
    """In README.md or docs/benchmarks.md, in what a block of the page prints, or in the docstring."""
    text = text_of(name)
    prose, shown = "".join(text.split("```")[::2]), "".join(text.split("```")[1::2])
    tables = (ROOT / "README.md").read_text() + (ROOT / "docs" / "benchmarks.md").read_text()
    known = f"{tables}{shown}{METHODS[name].__doc__}"
    words = re.sub(r"`[^`]+`|arXiv:\S+|section \S+", "", prose)
    for figure in re.findall(r"\d+\.\d+|\d[\d.,]*(?=\s(?:MiB|GiB|ms|d|%)(?!\w))", words):
        assert re.search(rf"(?<![\d.,]){re.escape(figure)}(?!\d|[.,]\d)", known), figure


def test_links_of_the_pages_lead_somewhere():
    for page in PAGES.glob("*.md"):
        for target in re.findall(r"\]\(([^)#:]+)\)", page.read_text()):
            assert (page.parent / target).exists(), f"{page.name}: {target}"


def test_the_index_has_every_method_in_one_table_and_the_figures_of_the_pages():
    index = (PAGES / "README.md").read_text()
    assert sorted(re.findall(r"^\| \[(\w+)\]\(\1\.md\) \|", index, re.M)) == sorted(METHODS)
    assert {path.stem for path in PAGES.glob("*.md")} == {"README", *METHODS}
    rows = re.findall(r"^\| `(.+?)` \| (\S+) \| (\S+) \| (\S+) \| (\S+) \|$", index, re.M)
    pages = {row for name in METHODS for row in printed(text_of(name))}
    assert rows and set(rows) <= pages


def test_the_skeleton_of_a_page_has_what_the_docstring_tells():
    text = skeleton(METHODS["mesa"])
    assert re.findall(r"^\*\*(.+?)\*\*", text, re.M) == HEADS
    assert "**What it saves.** bits/8 + 4/group bytes for each value instead of 2 or 4.\n" in text
    assert "**Source.** Pan et al. 2021, arXiv:2111.11124.\n" in text and "`max_error`" in text
