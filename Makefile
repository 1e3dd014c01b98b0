# Two commands do everything on a fresh clone: `make demo` and `make test`.
# They need Python >= 3.10, a C++ compiler and make; the rest goes into .venv, once.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# Errors only: what pip warns of (mirrors, caches, root) is no news to who just wants the demo.
PIP := $(BIN)/python -m pip --disable-pip-version-check -qq
TORCH := torch==2.13.0
PINS := $(TORCH) 'transformers==5.23.0; python_version >= "3.11"' \
    'transformers==5.20.2; python_version < "3.11"'
CPP = $(shell find csrc -name '*.h' -o -name '*.cpp' -o -name '*.cu' -o -name '*.cuh')

ENVIRONMENT := $(VENV)/environment.stamp
BUILD := $(VENV)/build.stamp

.DELETE_ON_ERROR:
.PHONY: help demo lab test test-slow fuzz asan mutations kills bench figures lint format build clean
.DEFAULT_GOAL := help

help:  ## show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## /{printf "make %-10s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

demo: $(BUILD)  ## train a transformer with and without rope_fused (ARGS="--help" for options)
	@$(BIN)/rope-fused demo $(ARGS)

lab: $(BUILD)  ## extend a small model's window by every method, under 20 minutes (FULL=1: two seeds, more of all)
	@$(BIN)/rope-fused lab $(if $(FULL),--full) $(ARGS)

test: $(BUILD)  ## the tests that need neither a GPU nor much time (ARGS="-k rotate" and the like)
	@$(BIN)/pytest -m "not slow and not gpu" --durations=10 $(ARGS)

test-slow: $(BUILD)  ## the slow tests
	@$(BIN)/pytest -m "slow and not gpu" --durations=10 $(ARGS)

fuzz: $(BUILD)  ## random calls, legal and not (MINUTES=10; ARGS="--backend triton"); adds to the log
	@$(BIN)/python tests/fuzz.py --minutes $(or $(MINUTES),1) --log bench/results/fuzz.jsonl $(ARGS)

asan: $(BUILD)  ## the tests and random calls (MINUTES=10) under Address- and UndefinedBehaviorSanitizer
	@$(BIN)/python tests/sanitize.py --minutes $(or $(MINUTES),10) $(ARGS)

mutations: $(BUILD)  ## plant faults one by one, which the tests must notice (ARGS="--only swap")
	@$(BIN)/python tests/mutations.py $(ARGS)

kills: $(BUILD)  ## stop long runs at random moments, which must go on to the same end (TIMES=10)
	@$(BIN)/python tests/kills.py --times $(or $(TIMES),10) $(ARGS)

bench: $(BUILD)  ## the benchmarks
	@$(BIN)/pytest bench --benchmark-only $(ARGS)

figures: $(BUILD)  ## draw the README's pictures from the results in bench/results
	@$(BIN)/rope-fused bench --plot $(wildcard bench/results/*.json) --out docs

lint: $(BUILD)  ## check style: ruff and clang-format
	@$(BIN)/ruff check
	@$(BIN)/ruff format --check
	@$(BIN)/clang-format --dry-run -Werror $(CPP)

format: $(BUILD)  ## rewrite the code in our style
	@$(BIN)/ruff check --fix-only --quiet
	@$(BIN)/ruff format
	@$(BIN)/clang-format -i $(CPP)

build: $(BUILD)  ## install into .venv, compiling what changed

clean:  ## remove what was built, but not .venv
	@rm -rf build dist *.egg-info rope_fused/*.so $(BUILD)
	@rm -rf .pytest_cache .ruff_cache .hypothesis .benchmarks
	@find rope_fused triton_kernels tests bench -name __pycache__ -prune -exec rm -rf {} + 2>&-; true

# torch goes first and alone, so that what is installed after it cannot choose another.
$(ENVIRONMENT): pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit("rope_fused needs Python 3.10 or newer: make PYTHON=..." \
	    if sys.version_info < (3, 10) else 0)'
	@$(PIP) --version >/dev/null 2>&1 || { echo "Creating $(VENV)"; $(PYTHON) -m venv $(VENV); }
	@echo "Installing $(TORCH) (a large download the first time)"
	@$(PIP) install 'pip>=23'
	@$(PIP) install $(TORCH)
	@touch $@

# An editable install: the tests run this tree. Objects are kept in build/.
$(BUILD): $(ENVIRONMENT) setup.py $(CPP)
	@echo "Building rope_fused and installing what it is tested with"
	@$(PIP) install $(PINS) --editable '.[dev]'
	@touch $@
