# batchjac: everything a newcomer or CI runs. Needs Python 3.11 or newer, make and the package registry.
#   make demo    the main job on real data, into runs/demo
#   make test    the doctests, then the test suite        (PYTEST_ARGS="-k name -x")
#   make check   format, lint, types
#   make bench   every case beside every other way, then docs/performance.md   (BENCH_ARGS="--resume")
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
EXTRAS := cli,progress,report,data,weights,demo,peers,dev

INSTALL := $(BIN)/python -m pip install --disable-pip-version-check -qq --constraint constraints.txt

# Two processes: more would only share the same cores; one is easier to debug (TEST_JOBS=0).
TEST_JOBS   ?= 2
PYTEST_ARGS ?=
BENCH_ARGS  ?=

# Installing compiles these, where there is a C compiler.
KERNELS := hatch_build.py $(wildcard src/batchjac/native/*.[ch])

.PHONY: demo test doctest suite check format bench docs clean
.DELETE_ON_ERROR:

demo: $(VENV)/.installed-demo
	$(BIN)/batchjac demo

test: doctest suite

doctest: $(VENV)/.installed-dev
	$(BIN)/python -m pytest --doctest-modules src -q

suite: $(VENV)/.installed-dev
	$(BIN)/python -m pytest -n $(TEST_JOBS) --dist worksteal $(PYTEST_ARGS)

check: $(VENV)/.installed-dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

format: $(VENV)/.installed-dev
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

bench: $(VENV)/.installed-bench
	$(BIN)/python -m benchmarks $(BENCH_ARGS)
	$(BIN)/python -m benchmarks.training
	$(BIN)/python -m benchmarks.page

docs: $(VENV)/.installed-dev
	$(BIN)/python -m tests.conformance

clean:
	rm -rf $(VENV) runs build dist .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find src tests benchmarks -name __pycache__ -type d -prune -exec rm -rf {} + 2>/dev/null || true

# The stamps make a second run fast: pip is asked again only when what to install has changed.
$(VENV)/.installed-dev: pyproject.toml constraints.txt $(KERNELS) | $(BIN)/python
	@echo "installing batchjac and everything its tests need into $(VENV), once: a minute or two"
	$(INSTALL) --editable '.[$(EXTRAS)]'
	@touch $@ $(VENV)/.installed-demo

$(VENV)/.installed-bench: pyproject.toml constraints.txt $(VENV)/.installed-dev | $(BIN)/python
	@echo "installing the libraries that batchjac is measured against into $(VENV), once: a minute"
	$(INSTALL) --editable '.[$(EXTRAS),bench]'
	@touch $@

$(VENV)/.installed-demo: pyproject.toml constraints.txt $(KERNELS) | $(BIN)/python
	@echo "installing batchjac and what the demo needs into $(VENV), once: a minute or two"
	$(INSTALL) --editable '.[demo]'
	@touch $@

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "batchjac needs Python 3.11 or newer, and $(PYTHON) is $$($(PYTHON) --version 2>&1)." \
	       "Name another: make PYTHON=python3.12" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
