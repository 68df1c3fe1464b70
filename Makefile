# `make help` lists what there is. Everything lands in .venv; nothing needs root.

# The first Python that is new enough and can make environments; override with `make PYTHON=...`.
PYTHON = $(firstword $(shell for p in python3 python3.14 python3.13 python3.12 python3.11; do \
	$$p -c 'import ensurepip, sys, venv; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$p; done))
BIN := .venv/bin
# Changes when the pinned set does, so that `make setup` acts again then and only then.
STAMP := .venv/ready-$(shell cat pyproject.toml constraints.txt | cksum | cut -d' ' -f1)
PROMPT ?= A train covers 310 km in 2 hours and 35 minutes. What is its average speed? Work it out step by step.
# A tree that pays on a CPU; float32, where both answers must be the same token for token.
DEMO := --dtype float32 --tree-nodes 12 --tree-depth 4 --tree-topk 6 --contemplate 4 --max-new-tokens 160

.DEFAULT_GOAL := help
.PHONY: help setup demo test test-vllm clean

help:  ## show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-9s %s\n", $$1, $$2 }' Makefile

setup: $(STAMP)  ## install everything, pinned, into .venv
	@:

$(STAMP):
	@test -n "$(PYTHON)" || { echo "Python 3.11 or newer with its venv module is needed" \
		"(on Debian and Ubuntu: apt install python3-venv)." >&2; exit 1; }
	@$(BIN)/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv --clear .venv
	@echo "Installing the pinned packages into .venv (some minutes the first time)." >&2
	@$(BIN)/python -m pip install -qq --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@rm -f .venv/ready-* && touch $@

demo: setup  ## stream a speculative answer, then the same by the plain target, with the speed-up
	$(BIN)/confu generate smollm2-135m-confu --prompt "$(PROMPT)" $(DEMO) --show-tokens --compare

test: setup  ## lint, format check, types, tests
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyrefly check
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --maxprocesses 4 --dist worksteal

test-vllm: setup  ## let vLLM serve an exported draft, in an environment of its own, and compare it with ours
	$(BIN)/python benchmarks/engine_vllm.py

clean:  ## remove the environment and all caches of the checkout
	rm -rf .venv build dist .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
