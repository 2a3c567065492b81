# `make quickstart` and `make test` install what they need into .venv and run.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
READY  := $(VENV)/.ready
DEV    := $(VENV)/.ready-dev

.PHONY: quickstart test check format docs examples bench clean

quickstart: $(READY)
	$(BIN)/longspan train examples/quickstart.yaml
	$(BIN)/longspan generate outputs/quickstart/hf --prompt "def "

test: $(DEV)
	$(BIN)/python -m pytest

check: $(DEV)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m pytest tests/test_architecture.py

format: $(DEV)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# what is made of the code: the page of all keys
docs: $(READY)
	$(BIN)/longspan config --markdown > docs/keys.md

examples: $(READY)
	$(BIN)/python examples/run_all.py

bench: $(DEV)
	$(BIN)/python benchmarks/run_all.py

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

# constraints.txt pins the tested set; torch first, so that no other package picks another build
$(READY): $(VENV)/bin/python pyproject.toml constraints.txt
	$(BIN)/python -m pip install -q -c constraints.txt torch
	$(BIN)/python -m pip install -q -c constraints.txt -e .
	touch $@

$(DEV): $(READY)
	$(BIN)/python -m pip install -q -c constraints.txt -e '.[dev,hf]'
	touch $@

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
