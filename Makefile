# Both set-up commands work from a clean checkout with Python 3.11+ and make alone.
PYTHON ?= $(firstword $(foreach p,python3 python3.13 python3.12 python3.11,$(shell \
	$(p) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $(p))))
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
INPUTS := pyproject.toml constraints.txt

.PHONY: help demo test check mutants chaos bench bench-daemon bench-trace bench-claims core core-remove \
	format clean

help: ## show this help
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

demo: $(VENV)/.worker core ## daemon, two workers, the shipped model, real text (DOC=some.txt takes yours)
	$(BIN)/modelworker demo $(if $(DOC),--doc "$(DOC)")

test: $(VENV)/.dev core ## all CPU tests
	$(BIN)/python -m pytest -q $(ARGS)

check: $(VENV)/.dev ## ruff, mypy, import-linter
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

mutants: $(VENV)/.dev ## apply one-line faults, see a test fail for each
	$(BIN)/python -m tests.mutants.run $(ARGS)

chaos: $(VENV)/.dev ## kill, stop, cut, flood a running kvd (ARGS="workers --kills 100"; all: over an hour)
	$(BIN)/python -m tests.chaos $(ARGS)

bench: bench-daemon bench-trace bench-claims ## all benchmarks, one after the other

bench-daemon: $(VENV)/.dev core ## what the cache core and its RPC cost, against the budgets
	$(BIN)/python -m tests.benchmarks.daemon $(ARGS)

bench-trace: $(VENV)/.dev core ## hits on a trace of requests (TRACE=file POLICY=name CAPACITY=blocks)
	$(BIN)/python -m tests.benchmarks.trace $(if $(TRACE),--trace "$(TRACE)") \
		$(if $(POLICY),--policy "$(POLICY)") $(if $(CAPACITY),--capacity "$(CAPACITY)") $(ARGS)

bench-claims: $(VENV)/.dev core ## paged against contiguous memory, on the running system
	$(BIN)/python -m tests.benchmarks.claims $(ARGS)

core: | $(VENV)/bin/python ## compile the cache core in place, if its sources have changed
	@$(BIN)/python -c "import mypyc, setuptools" 2>/dev/null || \
		$(PIP) install -q -c constraints.txt --group core
	@$(BIN)/python compile_core.py

core-remove: | $(VENV)/bin/python ## remove what `make core` made: the sources run as they are
	$(BIN)/python compile_core.py --remove

format: $(VENV)/.dev ## put the code into shape
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean: ## remove what the targets above made
	find kvd shared -name '*.so' -delete -o -name compiled.json -delete
	rm -rf $(VENV) build dist .mypy_cache .ruff_cache .pytest_cache .import_linter_cache

$(VENV)/bin/python:
	@test -n "$(PYTHON)" || { echo "Python 3.11 or newer is needed; name it with PYTHON=..."; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(PIP) install -q -c constraints.txt pip

$(VENV)/.worker: $(INPUTS) | $(VENV)/bin/python
	@echo "installing kvd, the worker and what they need into $(VENV) (torch is large: minutes)"
	$(PIP) install -q -c constraints.txt -e '.[worker]'
	@touch $@

$(VENV)/.dev: $(INPUTS) | $(VENV)/bin/python
	@echo "installing kvd and the test tools into $(VENV) (torch is large: minutes)"
	$(PIP) install -q -c constraints.txt -e '.[worker]' --group dev
	@touch $@ $(VENV)/.worker
