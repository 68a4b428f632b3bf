# make demo     the whole main job on the embedded mini-Mixtral
# make browser  installs Debian's chromium, as root, for the tests that open the report in it; optional
# make test     linters, types and tests
# make soak     kills collections at random times and compares what they end with; about half an hour
# demo, test and soak set up .venv first, when it is missing or older than what it is made from.

PYTHON ?= python3
BIN := .venv/bin
READY := .venv/.ready

.PHONY: demo browser test lint types tests soak docs clean

demo: $(READY)
	$(BIN)/expert-speculation demo --output_dir demo

# Never fails: without chromium the tests that need it are skipped, and say so.
browser:
	@if command -v chromium; then \
	  echo "Chromium is here already."; \
	elif { apt-get update && apt-get install --yes chromium fonts-dejavu-core; } >/dev/null 2>&1 && command -v chromium; then \
	  echo "Installed Debian's chromium."; \
	else \
	  echo "Chromium was not installed: that needs apt, the network and root. Tests in a browser will be skipped."; \
	fi

test: lint types tests

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(READY)
	$(BIN)/mypy

tests: $(READY)
	OMP_NUM_THREADS=1 $(BIN)/pytest --numprocesses auto --maxprocesses 8 --dist loadfile

soak: $(READY)
	$(BIN)/python benchmarks/soak.py

docs: $(READY)
	$(BIN)/python -m expert_speculation.reference docs/CLI.md
	$(BIN)/python benchmarks/families.py docs/MODELS.md
	$(BIN)/python -m groundwork.profiles.reference docs/HARDWARE.md

$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed; try: make PYTHON=python3.12 " + "$(MAKECMDGOALS)")'
	$(PYTHON) -m venv .venv
	@echo "Installing the pinned versions into .venv; this takes some minutes."
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	@touch $@

clean:
	rm -rf .venv demo *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
