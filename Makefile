# One command each; `make help` lists them. Needs only Python >= 3.11 and the package index.

VENV ?= .venv
BIN := $(VENV)/bin
PYTEST_ARGS ?=
# Test files are shared out to two processes: much of a test is compiling, which keeps one core busy.
WORKERS ?= 2
# And most of that is LLVM making fast what runs once: the slow tests keep what users get.
UNTUNED = XLA_FLAGS="--xla_backend_optimization_level=0 $$XLA_FLAGS"
PYTEST = $(UNTUNED) $(BIN)/python -m pytest -n $(WORKERS) --dist loadfile $(PYTEST_ARGS)
# The first Python that is new enough; PYTHON=... chooses another.
PYTHON ?= $(shell for p in python3 python3.12 python3.11 python3.13 python3.14; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && { echo $$p; break; }; done)
export JAX_PLATFORMS ?= cpu

.DEFAULT_GOAL := help
.PHONY: help demo palette test test-slow test-fast lint format types notebooks docs bench check

help:  ## list the targets
	@sed -n 's/^\([a-z-]*\):.*## /\1|/p' $(MAKEFILE_LIST) | while IFS='|' read -r name text; do \
		printf '%-12s %s\n' "$$name" "$$text"; done

demo:  ## install what is needed and show the whole path on a small corpus (6 minutes at most)
	@begin=$$(date +%s) && $(MAKE) --no-print-directory $(VENV)/.ready-demo && ready=$$(date +%s) && \
	$(BIN)/python experiments/demo.py && \
	echo "Seconds: $$((ready - begin)) installing, $$(($$(date +%s) - ready)) running."

palette: $(VENV)/.ready-demo  ## from texts to community profiles beside the truth, offline, with nothing given
	@$(BIN)/python experiments/palette.py --intervals

test: lint types notebooks  ## everything that CI checks: style, types, notebooks, doctests, tests (TORCH=1: with PyTorch)
ifeq ($(TORCH),1)
	@$(MAKE) --no-print-directory $(VENV)/.ready-torch
	@TORCH=$$(test -s $(VENV)/.ready-torch && echo 1) $(PYTEST)
else
	@$(PYTEST)
endif

# What a newer Python and JAX would break first: the mathematics, and reading data.
FAST ?= $(addprefix tests/test_,laws.py adapt.py parity.py likelihoods.py metrics.py comparisons.py splits.py describe.py)

test-fast: $(VENV)/.ready-fast  ## a few minutes of tests: mathematics, metrics, reading; no style, types or doctests
	@$(PYTEST) $(FAST)

test-slow: $(VENV)/.ready-test  ## the tests that take minutes
	@$(BIN)/python -m pytest -m slow $(PYTEST_ARGS)

lint: $(VENV)/.ready-test  ## check style
	@$(BIN)/ruff check --quiet . && $(BIN)/ruff format --quiet --check . || \
		{ echo "style: run make format, then see what is left with $(BIN)/ruff check"; exit 1; }

format: $(VENV)/.ready-test  ## rewrite files in the project's style
	@$(BIN)/ruff check --quiet --fix . ; $(BIN)/ruff format .

types: $(VENV)/.ready-test  ## check types and import cycles
	@$(BIN)/basedpyright --pythonpath $(BIN)/python

# The notebooks read the runs of make demo; without those, a small registry of the same layout, made here.
NOTEBOOKS = notebooks/*.ipynb
SMALL = .cache/runs
# Much of a notebook is compiling: what one has compiled the next need not.
notebooks: export JAX_COMPILATION_CACHE_DIR ?= $(CURDIR)/.cache/jax
notebooks: export JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS ?= 0.3

notebooks: $(VENV)/.ready-test  ## execute every notebook (KEEP=1: and write its outputs into it)
	@test -e runs/demo-profiles.png -o -e $(SMALL)/demo-profiles.png || \
		$(BIN)/python experiments/demo.py --small --root $(SMALL)
	@$(BIN)/python -m pytest --nbmake --nbmake-timeout=300 -W default $(if $(KEEP),--overwrite,-n $(WORKERS)) $(NOTEBOOKS)
	@$(if $(KEEP),$(BIN)/python notebooks/tidy.py $(NOTEBOOKS))

docs: $(VENV)/.ready-docs  ## build the API reference from the docstrings, in build/docs
	@$(BIN)/python docs/build.py build/docs

bench: $(VENV)/.ready-test  ## run the benchmarks (timings as ratios)
	@for file in benchmarks/*.py; do $(BIN)/python "$$file" || exit 1; done

# .ci/install makes $(VENV) where it is missing or was left half made, and writes the mark last.
$(VENV)/.ready-demo: pyproject.toml
	@.ci/install "$(PYTHON)" $(VENV) demo

$(VENV)/.ready-test: pyproject.toml
	@.ci/install "$(PYTHON)" $(VENV) test

$(VENV)/.ready-fast: pyproject.toml
	@.ci/install "$(PYTHON)" $(VENV) fast

$(VENV)/.ready-docs: $(VENV)/.ready-demo
	@.ci/install "$(PYTHON)" $(VENV) docs

$(VENV)/.ready-torch: $(VENV)/.ready-test
	@.ci/install "$(PYTHON)" $(VENV) torch
