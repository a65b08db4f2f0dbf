# A fresh Linux machine with Python and no GPU: `make test` and `make train` do all the set-up. Re-runs reuse .venv and
# rebuild only csrc files that changed.
PYTHON ?= python3
PY := .venv/bin/python

.PHONY: test test-slow train lint

test: .venv/ready
	$(PY) -m pytest -q -n 2

test-slow: .venv/ready
	$(PY) -m pytest -q -m slow

train: .venv/ready
	$(PY) -m efftune.cli train

lint: .venv/lint
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m pyright --pythonpath $(PY)
	.venv/bin/clang-format --dry-run --Werror csrc/*

# torch first, and pinned: it is the big download, and nothing that follows may replace it.
.venv/torch:
	$(PYTHON) -m venv .venv
	$(PY) -m pip install --quiet --upgrade pip
	$(PY) -m pip install --quiet torch==2.13.0
	touch $@

.venv/ready: .venv/torch pyproject.toml setup.py $(wildcard csrc/*)
	$(PY) -m pip install --quiet -e '.[test]'
	touch $@

.venv/lint: .venv/ready
	$(PY) -m pip install --quiet -e '.[dev]'
	touch $@
