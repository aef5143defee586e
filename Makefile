# Every target sets itself up: a machine needs Python >= 3.11 with venv, make and a C compiler.
#   make train ARGS="--task digits --seed 0,1,2"     options of the program that a target runs
#   make test PYTHON=python3.12                      the interpreter that .venv is made with

PYTHON ?= python3
VENV ?= .venv
ARGS ?=

RUN := $(VENV)/bin/python
PIP := $(RUN) -m pip install --constraint constraints.txt
READY := $(VENV)/.ready
COMPLETE := $(VENV)/.complete

# One thread: several threads are slower on matrices of this size, and timings vary with what else runs.
export OMP_NUM_THREADS ?= 1
export OPENBLAS_NUM_THREADS ?= 1
# `kernels/` and `optim/` at the root must not be importable under their own names.
export PYTHONSAFEPATH := 1

.PHONY: help setup train test bench soak aot gpu docs lint typecheck clean
.DEFAULT_GOAL := help

help: ## list the targets
	@sed -n 's/^\([a-z]*\):.*## /\1\t/p' Makefile

setup: $(COMPLETE) ## make .venv with the pinned versions of everything

$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	    echo "Python 3.11 or newer is needed and $(PYTHON) is not: make $(MAKECMDGOALS) PYTHON=python3.12" >&2; exit 1; }
	@$(PYTHON) -c 'import venv, ensurepip' || { echo "$(PYTHON) lacks venv (Debian: package python3-venv)" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
	@# torch first and alone: its wheel, for CPU or CUDA, decides which builds of the others fit.
	$(PIP) torch
	@[ "$$(uname -s)" != Linux ] || $(PIP) triton
	$(PIP) --editable '.[bench]'
	@touch $@

# What training and benchmarks can do without: test tools, the documentation's generator, frameworks.
$(COMPLETE): $(READY)
	$(PIP) --editable '.[bench,dev,docs,frameworks]'
	@touch $@

train: $(READY) ## train the benchmark tasks with each method: table, CSV, PNG
	$(RUN) -m spectral_ops.bench train $(ARGS)

test: lint ## lint and run the tests, those of documentation, examples and packages too
	$(RUN) -m pytest --numprocesses auto $(ARGS)

# ARGS go to all three programs, so of use is only --out DIR.
bench: $(READY) ## on a CPU: operations, optimizer steps and training against their peers; tables and CSV in out/
	$(RUN) -m spectral_ops.bench kernels --device cpu $(ARGS)
	$(RUN) -m spectral_ops.bench steps $(ARGS)
	$(RUN) -m spectral_ops.bench train $(ARGS)

soak: $(READY) ## 10,000 steps in bf16 beside fp32: defects, errors, memory; fails over a limit
	$(RUN) -m spectral_ops.bench soak $(ARGS)

aot: $(READY) ## compile every kernel for GPUs that need not be there; fails on spills and the like
	$(RUN) -m spectral_ops.bench aot $(ARGS)

# Nothing is installed: the interpreter has torch and triton, and the folders come together under one import name.
#   make gpu COMMAND=train ARGS="--device cuda --preset gpt2"      another program of bench/, the same way
COMMAND ?= gpu
gpu: ## on a GPU, with the torch and triton of PYTHON: checks, timings, tiles, written to OUT or out/
	@site=$$(mktemp -d) && trap 'rm -rf "$$site"' EXIT && mkdir "$$site/spectral_ops" && \
	ln -s "$(CURDIR)"/spectral_ops/* "$(CURDIR)/kernels" "$(CURDIR)/optim" "$(CURDIR)/bench" "$$site/spectral_ops" && \
	PYTHONPATH="$$site" $(PYTHON) -m spectral_ops.bench $(COMMAND) $(ARGS)

docs: $(COMPLETE) ## the documentation as a site in out/docs; fails on warnings
	$(RUN) -m mkdocs build --strict $(ARGS)

lint: $(COMPLETE) ## ruff
	$(RUN) -m ruff check .

# On a built wheel, since type checkers cannot follow the editable install.
typecheck: $(COMPLETE) ## mypy on the installed wheel
	@rm -rf build  # setuptools would pack what an older build left there
	@site=$$(mktemp -d) && trap 'rm -rf "$$site" "$(CURDIR)/build"' EXIT && \
	$(RUN) -m pip wheel --quiet --no-deps --wheel-dir "$$site" . && \
	$(RUN) -m pip install --quiet --no-deps --target "$$site" "$$site"/*.whl && \
	cd "$$site" && "$(abspath $(RUN))" -m mypy --config-file "$(CURDIR)/pyproject.toml" --package spectral_ops

clean: ## remove build products and caches; .venv and out/ stay
	rm -rf build dist *.egg-info .pytest_cache .ruff_cache .mypy_cache .benchmarks
	find . -name __pycache__ -not -path './.venv/*' -prune -exec rm -rf {} +
