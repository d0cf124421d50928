# Everything happens in .venv, which is made on first use. `make help` lists the targets.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
PIP    := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt
OLDEST   := $(shell sed -n 's/^  "\(lightning\|torch\)>=\([0-9.]*\).*/\1==\2/p' pyproject.toml)

export OMP_NUM_THREADS ?= 1

.DEFAULT_GOAL := help
.PHONY: help demo check test lint docs oldest bench netlab examples build clean

help: ## Show this list
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "  make %-9s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

$(VENV)/.run: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	@echo "Installing what training needs into $(VENV) ..."
	$(PIP) torch
	$(PIP) --editable '.[examples,report]'
	@touch $@

$(VENV)/.dev: $(VENV)/.run
	@echo "Installing the development tools into $(VENV) ..."
	$(PIP) --editable '.[dev]'
	@touch $@

demo: $(VENV)/.run ## Train on real data, on 2 ranks with Local SGD, watch the ranks of the weights, show the result
	$(BIN)/lightning-sgd fit --config examples/local_sgd.yaml --trainer.callbacks+=RankMonitor --test_after_fit true
	$(BIN)/lightning-sgd report runs/local_sgd

check: lint ## Check style and types and run the quick tests, in 3 minutes: while you work
	$(BIN)/python -m pytest -m "not slow and not ranks"

test: $(VENV)/.dev ## Run every test
	$(BIN)/python -m pytest

lint: $(VENV)/.dev ## Check style, types and the direction of imports
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

docs: $(VENV)/.dev ## Build the documentation, strictly, into docs/_build/html
	$(BIN)/sphinx-build --fail-on-warning --keep-going --nitpicky --builder html docs docs/_build/html

examples: $(VENV)/.dev ## Run every example
	$(BIN)/python examples/run_all.py

oldest: ## Run the quick tests with the oldest lightning and torch that pyproject.toml allows, in .venv-oldest
	$(PYTHON) -m venv .venv-oldest
	.venv-oldest/bin/python -m pip install --quiet --disable-pip-version-check $(OLDEST) --editable '.[dev]'
	.venv-oldest/bin/python -m pytest -m "not slow and not ranks"

bench: $(VENV)/.dev ## Time everything beside its peers: one table from one run each, several minutes
	for script in benchmarks/[!_]*.py; do $(BIN)/python $$script || exit 1; done
	for method in novograd tra; do $(BIN)/python benchmarks/optimizers.py --method $$method || exit 1; done

netlab: $(VENV)/.dev ## Compare strategies on hosts with slow links, in network namespaces (Linux, root), half an hour
	$(BIN)/python -m benchmarks.netlab
	$(BIN)/python -m benchmarks.netlab.model

build: $(VENV)/.dev ## Build sdist and wheel into dist/
	$(BIN)/python -m build

clean: ## Remove everything that can be made again
	rm -rf $(VENV) .venv-oldest build dist docs/_build docs/_generated *.egg-info runs lightning_logs
