# make demo   the whole main job on the embedded mini-Mixtral
# make test   linters, types and tests
# make soak   kills collections at random times and compares what they end with; about half an hour
# All set up .venv first, when it is missing or older than what it is made from.

PYTHON ?= python3
BIN := .venv/bin
READY := .venv/.ready

.PHONY: demo test lint types tests soak docs clean

demo: $(READY)
	$(BIN)/expert-speculation demo --output_dir demo

test: lint types tests

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(READY)
	$(BIN)/mypy

tests: $(READY)
	$(BIN)/pytest

soak: $(READY)
	$(BIN)/python benchmarks/soak.py

docs: $(READY)
	$(BIN)/python -m expert_speculation.reference docs/CLI.md
	$(BIN)/python benchmarks/families.py docs/MODELS.md

$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed; try: make PYTHON=python3.12 " + "$(MAKECMDGOALS)")'
	$(PYTHON) -m venv .venv
	@echo "Installing the pinned versions into .venv; this takes some minutes."
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	@touch $@

clean:
	rm -rf .venv demo *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
