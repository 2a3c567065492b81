# `make quickstart` and `make test` install what they need into .venv and run.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
READY  := $(VENV)/.ready
DEV    := $(VENV)/.ready-dev

.PHONY: quickstart test quick check format docs examples bench gpu-check gpu-wheels cuda-dry-run clean

quickstart: $(READY)
	$(BIN)/longspan train examples/quickstart.yaml
	$(BIN)/longspan generate outputs/quickstart/hf --prompt "def "

# Two tests run at a time, because the processes of a test wait for each other.
test: $(DEV)
	$(BIN)/python -m pytest -n 2 --dist worksteal

# what needs no other process: an answer in under a minute
quick: $(DEV)
	$(BIN)/python -m pytest -m "not processes and not slow and not gpu"

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

# on a machine with a GPU, in under 8 minutes; elsewhere it lists what it skipped. It installs nothing, so that it needs
# no network: what is missing comes from .wheels (make gpu-wheels)
gpu-check:
	$(if $(wildcard $(BIN)/python),$(BIN)/python,$(PYTHON)) benchmarks/gpu_check.py --out outputs/gpu_check \
		$(if $(wildcard .wheels),--wheels .wheels)

# what benchmarks/gpu_check.py may miss on a machine without a network: copy the checkout with this folder
gpu-wheels: $(READY)
	$(BIN)/python benchmarks/gpu_check.py --download .wheels

# shapes, dtypes and devices of the CUDA paths by a CUDA build of torch, without a GPU: an environment of its own, 5 GB
CUDA_VENV := .venv-cuda
cuda-dry-run: $(CUDA_VENV)/.ready
	PYTHONPATH=src:benchmarks $(CUDA_VENV)/bin/python benchmarks/cuda_dry_run.py

$(CUDA_VENV)/.ready: pyproject.toml
	$(PYTHON) -m venv $(CUDA_VENV)
	$(CUDA_VENV)/bin/python -m pip install -q torch
	$(CUDA_VENV)/bin/python -m pip install -q -e .
	touch $@

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
	rm -rf $(VENV) $(CUDA_VENV) .wheels build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
