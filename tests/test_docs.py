"""What the documents show can be copied: their Python runs, or stands in the repository; their command lines parse."""

import argparse
import ast
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from efftune.cli import parser
from efftune.recipe import parse

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
LANGUAGES = {"python", "cpp", "text", "json"}

# In a process of its own, as somebody would who pastes one block after the other. A method that a page writes into a
# file of its own is found as if it lay there.
RUN = """
import json, sys
from efftune.methods import Method, available

for place, block in json.load(sys.stdin):
    exec(compile(block, place, "exec"), globals())
    for value in list(globals().values()):
        if isinstance(value, type) and issubclass(value, Method) and value.__module__ == "__main__":
            available()[value.name] = value
"""


def blocks(page):
    """(place, language, text) of each fenced block."""
    text = page.read_text()
    for found in re.finditer(r"^```(\w*)\n(.*?)^```$", text, re.M | re.S):
        line = text.count("\n", 0, found.start()) + 1
        yield f"{page.relative_to(ROOT)}:{line}", found[1], found[2]


def commands(page):
    """(place, words) of each indented command line, continuation lines joined and comments left out."""
    text = re.sub(r"\\\n +", " ", page.read_text())
    for number, line in enumerate(text.splitlines(), 1):
        if re.match(r"    +(efftune|python|torchrun|make|pip|pytest)\b", line):
            words = shlex.split(line.replace(" ...", "").replace("[", "").replace("]", ""), comments=True)
            yield f"{page.relative_to(ROOT)}:{number}", words


def statements(source):
    return {ast.dump(node) for node in ast.parse(source).body}


@pytest.fixture(scope="module")
def repository():
    folders = ("efftune", "triton_kernels", "bench", "tests")
    return set().union(*(statements(f.read_text()) for folder in folders for f in (ROOT / folder).rglob("*.py")))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_python_runs(page, repository, tmp_path):
    import json

    found = [(place, text) for place, language, text in blocks(page) if language == "python"]
    own = [block for block in found if not statements(block[1]) <= repository]
    if own:
        command = [sys.executable, "-c", RUN]
        run = subprocess.run(
            command, input=json.dumps(own), capture_output=True, text=True, cwd=tmp_path,
            env={"PYTHONPATH": str(ROOT), "PATH": "/usr/bin:/bin", "HOME": str(tmp_path), "OMP_NUM_THREADS": "1"},
        )  # fmt: skip
        assert run.returncode == 0, run.stderr[-3000:]


def test_every_block_says_what_it_is():
    other = [place for page in PAGES for place, language, _ in blocks(page) if language not in LANGUAGES]
    assert not other


def test_excerpts_of_cpp_stand_in_csrc():
    def squeezed(text):
        return "".join(text.split())

    source = squeezed("".join(f.read_text() for f in sorted((ROOT / "csrc").glob("*"))))
    excerpts = [(place, text) for page in PAGES for place, language, text in blocks(page) if language == "cpp"]
    assert excerpts and all(squeezed(text) in source for _, text in excerpts)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_command_lines_parse(page, monkeypatch):
    def fail(self, message):
        raise ValueError(message)

    monkeypatch.setattr(argparse.ArgumentParser, "error", fail)
    targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.M)
    for place, words in commands(page):
        if "efftune" in words and words[0] in ("efftune", "torchrun"):
            words = words[words.index("efftune") + 1 :]
            given = parser().parse_args(words)
            for recipe in (getattr(given, "recipe", None), *(getattr(given, "recipes", None) or ())):
                if recipe is not None:
                    parse(recipe)
        elif words[0] == "make":
            assert words[1] in targets, place
        elif words[:2] == ["python", "-m"] and words[2].startswith("bench."):
            source = (ROOT / f"{words[2].replace('.', '/')}.py").read_text()
            missing = [word for word in words[3:] if word.startswith("--") and f'"{word}"' not in source]
            assert not missing or "standard_options" in source or "harness" in source, (place, missing)
