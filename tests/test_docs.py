"""What the documents show can be copied: their Python runs, or stands in the repository; their command lines parse."""

import argparse
import ast
import importlib
import json
import re
import shlex
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import pytest

from efftune.cli import parser
from efftune.recipe import parse

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
METHODS = ROOT / "docs" / "methods"  # whose pages go on from what their index defines, and show what they print
SPARSE = ROOT / "docs" / "sparse-files.md"  # shows what it prints, too
LANGUAGES = {"python", "cpp", "text", "json", "toml"}

# Each page in a process of its own, as somebody would who pastes one block after the other. They are forked from one
# that has imported what takes long. A method that a page writes into a file of its own is found as if it lay there.
# A block that is followed by what it prints has to print that.
RUN = """
import contextlib, io, json, os, sys, traceback, types
import peft, torch, transformers  # before what a page shows, and once
import efftune
from efftune.methods import Method, available
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM, Trainer, get_scheduler

def paste(blocks):
    sys.modules["__main__"] = types.ModuleType("__main__")
    names = vars(sys.modules["__main__"])
    for place, block, shown in blocks:
        with contextlib.redirect_stdout(io.StringIO()) as printed:
            exec(compile(block, place, "exec"), names)
        if shown is not None and printed.getvalue() != shown:
            raise AssertionError(f"{place} prints:\\n{printed.getvalue()}and not:\\n{shown}")
        for value in list(names.values()):
            if isinstance(value, type) and issubclass(value, Method) and value.__module__ == "__main__":
                available()[value.name] = value

failed = []
for page, blocks in json.load(sys.stdin).items():
    os.makedirs(page)
    child = os.fork()
    if not child:
        os.chdir(page)
        try:
            paste(blocks)
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    failed += [page] * (os.waitpid(child, 0)[1] != 0)
print(json.dumps(failed))
"""


def name(page):
    return str(page.relative_to(ROOT))


def blocks(page):
    """(place, language, text) of each fenced block."""
    text = page.read_text()
    for found in re.finditer(r"^```(\w*)\n(.*?)^```$", text, re.M | re.S):
        line = text.count("\n", 0, found.start()) + 1
        yield f"{name(page)}:{line}", found[1], found[2]


def commands(page):
    """(place, words) of each indented command line, continuation lines joined and comments left out, and of benchmarks
    in the middle of a sentence. Of what a benchmark may be given, [a|b], the first."""
    text = re.sub(r"\\\n +", " ", page.read_text())
    for number, line in enumerate(text.splitlines(), 1):
        found = re.findall(r"`(?:OMP_NUM_THREADS=1 )?(python -m bench\.[^`]+)`", line)
        if re.match(r"    +(efftune|python|torchrun|make|pip|pytest)\b", line):
            found.append(line)
        for command in found:
            command = command.replace(" ...", "").replace("[", "").replace("]", "")
            words = shlex.split(re.sub(r"(\w)\|\w+", r"\1", command) if "bench." in command else command, comments=True)
            yield f"{name(page)}:{number}", words


def statements(source):
    return {ast.dump(node) for node in ast.parse(source).body}


@pytest.fixture(scope="module")
def repository():
    folders = ("efftune", "triton_kernels", "bench", "tests")
    return set().union(*(statements(f.read_text()) for folder in folders for f in (ROOT / folder).rglob("*.py")))


def to_run(page):
    """(place, text, what it prints or None) of each block of Python."""
    before = to_run(METHODS / "README.md") if page.parent == METHODS and page.name != "README.md" else []
    found = [*blocks(page), (None, None, None)]
    shows = page.parent == METHODS or page == SPARSE
    pairs = [(block, text if shows and kind == "text" else None) for block, (_, kind, text) in pairwise(found)]
    return before + [(place, text, shown) for (place, kind, text), shown in pairs if kind == "python"]


def test_python_runs(repository, tmp_path):
    own = {name(page): [b for b in to_run(page) if not statements(b[1]) <= repository] for page in PAGES}
    own = {page: found for page, found in own.items() if found}
    assert {"README.md", "docs/methods/lora.md"} <= own.keys()
    run = subprocess.run(
        [sys.executable, "-c", RUN], input=json.dumps(own), capture_output=True, text=True, cwd=tmp_path,
        env={"PYTHONPATH": str(ROOT), "PATH": "/usr/bin:/bin", "HOME": str(tmp_path), "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert run.returncode == 0 and json.loads(run.stdout.splitlines()[-1]) == [], run.stderr[-6000:]


def test_every_block_says_what_it_is():
    other = [place for page in PAGES for place, language, _ in blocks(page) if language not in LANGUAGES]
    assert not other


def test_excerpts_of_cpp_stand_in_csrc():
    def squeezed(text):
        return "".join(text.split())

    source = squeezed("".join(f.read_text() for f in sorted((ROOT / "csrc").glob("*"))))
    excerpts = [(place, text) for page in PAGES for place, language, text in blocks(page) if language == "cpp"]
    assert excerpts and all(squeezed(text) in source for _, text in excerpts)


def fail(self, message):
    raise ValueError(message)


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_command_lines_parse(page, monkeypatch):
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
            try:
                parsed_by_itself(words[2], words[3:], monkeypatch)
            except ValueError as error:
                pytest.fail(f"{place}: {error}")


class Parsed(Exception):
    """Instead of what a benchmark does once it has read its options."""


def parsed_by_itself(module, options, monkeypatch):
    """Lets the benchmark read the options and run no further. Raises ValueError where its parser refuses them."""
    if module == "bench.tables":  # it takes no options, and rewrites the pages
        assert not options
        return
    main = importlib.import_module(module).main
    parse = argparse.ArgumentParser.parse_args

    def parse_and_stop(self, args=None, namespace=None):
        parse(self, args, namespace)
        raise Parsed

    with monkeypatch.context() as patched:
        patched.setattr(argparse.ArgumentParser, "parse_args", parse_and_stop)
        patched.setattr(sys, "argv", [module, *options])
        with pytest.raises(Parsed):
            main()


@pytest.mark.parametrize(
    "command",
    ["bench.perturb --seed 3", "bench.glu --rows many", "bench.fidelity", "bench.block --dtype float16"],
)
def test_a_benchmark_refuses_what_it_does_not_know(command, monkeypatch):
    monkeypatch.setattr(argparse.ArgumentParser, "error", fail)
    module, *options = command.split()
    with pytest.raises(ValueError):
        parsed_by_itself(module, options, monkeypatch)
