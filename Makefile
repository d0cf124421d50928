# Everything happens in .venv, which is made on first use. `make help` lists the targets.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
PIP    := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt
EXAMPLES := $(sort $(wildcard examples/*.yaml))

export OMP_NUM_THREADS ?= 1

.DEFAULT_GOAL := help
.PHONY: help demo test lint docs bench netlab examples build clean

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

bench: $(VENV)/.dev ## Time everything beside its peers: one table from one run each, several minutes
	$(BIN)/python benchmarks/optimizers.py
	$(BIN)/python benchmarks/optimizers.py --method novograd
	$(BIN)/python benchmarks/optimizers.py --method tra
	$(BIN)/python benchmarks/rank.py
	$(BIN)/python benchmarks/tail_index.py
	$(BIN)/python benchmarks/gradient_sources.py
	$(BIN)/python benchmarks/gradient_gaussianity.py
	$(BIN)/python benchmarks/monitors.py
	$(BIN)/python benchmarks/local_sgd.py
	$(BIN)/python benchmarks/byzantine.py
	$(BIN)/python benchmarks/lr_schedulers.py
	$(BIN)/python benchmarks/aggregation.py
	$(BIN)/python benchmarks/priority_sampling.py

netlab: $(VENV)/.dev ## Compare strategies on hosts with slow links, in network namespaces (Linux, root), half an hour
	$(BIN)/python -m benchmarks.netlab
	$(BIN)/python -m benchmarks.netlab.model

build: $(VENV)/.dev ## Build sdist and wheel into dist/
	$(BIN)/python -m build

clean: ## Remove everything that can be made again
	rm -rf $(VENV) build dist docs/_build docs/_generated *.egg-info runs lightning_logs
