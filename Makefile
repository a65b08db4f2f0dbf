# A fresh Linux machine with Python and no GPU: `make test` and `make train` do all the set-up. Re-runs reuse .venv and
# rebuild only csrc files that changed. constraints.txt holds the versions that CI last passed with; `make test-latest`
# goes without it, `make test-oldest` takes the oldest that are supported (docs/versions.md).
PYTHON ?= python3
PYTHON_OLDEST ?= python3.12
PY := .venv/bin/python
OLDEST := torch==2.11.0 triton==3.6.0 numpy==2.5.2 transformers==5.17.0

# Files that no test or run imports as a rule: more than half of what is installed, which need not be compiled to
# bytecode.
NOT_IMPORTED := transformers/(models/(?!auto|llama|gpt2|bert|bloom)|exporters|pipelines)|/(tests|testing|_vendor)/
NOT_IMPORTED := $(NOT_IMPORTED)|/(pip|setuptools|pygments|fontTools|pydantic|rich|werkzeug|grpc|typer|click)/
NOT_IMPORTED := $(NOT_IMPORTED)|/sympy/(physics|parsing|stats)/|/benchmarks/

# The programs that tests start import the package again, from bytecode.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: test test-slow test-latest test-oldest train lint

test: .venv/ready
	$(PY) -m pytest -q -n 2

test-slow: .venv/ready
	$(PY) -m pytest -q -m slow

train: .venv/ready
	$(PY) -m efftune.cli train

# The imports of the package as it is installed: triton_kernels lies within it there.
lint: .venv/lint
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m pyright --pythonpath $(PY)
	.venv/bin/clang-format --dry-run --Werror $(wildcard csrc/*.cpp csrc/*.cu csrc/*.h)
	rm -rf build/imports
	$(PY) setup.py -q build_py --build-lib build/imports
	cd build/imports && ../../.venv/bin/lint-imports --no-cache ../../pyproject.toml

test-latest: .venv-latest/ready
	.venv-latest/bin/python -m pytest -q -n 2

test-oldest: .venv-oldest/ready
	.venv-oldest/bin/python -m pytest -q -n 2 tests/ops tests/linear tests/nn tests/interop tests/methods/test_contract.py

# uv unpacks in seconds what takes pip half a minute; pip where uv does not reach the index.
install = .venv/bin/uv pip install --quiet --system-certs --python $(PY) -c constraints.txt $(1) \
	|| $(PY) -m pip install --quiet --no-compile -c constraints.txt $(1)

.venv/bin/uv: constraints.txt
	$(PYTHON) -m venv .venv
	$(PY) -m pip install --quiet -c constraints.txt uv
	$(call install,setuptools)
	touch $@

# Two at a time, since neither needs the other: packages are unpacked while csrc is compiled, without torch, in the time
# that they leave.
.venv/ready: .venv/bin/uv constraints.txt pyproject.toml setup.py $(wildcard csrc/*)
	$(MAKE) -j2 .venv/packages .venv/kernels
	touch $@

# torch first, by pip, and pinned: it is the big download, and nothing that follows may replace it.
.venv/packages: build/test.txt constraints.txt
	$(PY) -m pip install --quiet --no-compile -c constraints.txt torch
	$(call install,-r build/test.txt)
	-$(PY) -m compileall -q -j 0 -x '$(NOT_IMPORTED)' .venv/lib/python*/site-packages > /dev/null
	touch $@

.venv/kernels: pyproject.toml setup.py $(wildcard csrc/*)
	nice -n 19 $(PY) -m pip install --quiet --no-build-isolation --no-deps -e .
	touch $@

.venv/lint: .venv/ready build/dev.txt
	$(call install,-r build/dev.txt)
	touch $@

build/%.txt: .ci/requirements.py pyproject.toml
	mkdir -p build
	$(PYTHON) $< $* > $@

.venv-latest/ready: pyproject.toml setup.py $(wildcard csrc/*)
	$(PYTHON) -m venv .venv-latest
	.venv-latest/bin/pip install --quiet --upgrade pip
	.venv-latest/bin/pip install --quiet --upgrade --upgrade-strategy eager -e '.[test]'
	touch $@

.venv-oldest/ready: pyproject.toml setup.py $(wildcard csrc/*)
	$(PYTHON_OLDEST) -m venv .venv-oldest
	.venv-oldest/bin/pip install --quiet --upgrade pip
	.venv-oldest/bin/pip install --quiet $(OLDEST) -e '.[test]'
	touch $@
