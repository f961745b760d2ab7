# One environment for everything. TORCH_INDEX_URL may name a CPU-only package index for torch.
VENV ?= .venv
PYTHON ?= python3
BIN := $(VENV)/bin
PIP_TORCH := $(if $(TORCH_INDEX_URL),--index-url $(TORCH_INDEX_URL),)

.PHONY: demo test proof lint format clean

# torch 2.13.0 is pinned here because an unpinned torch may bring gigabytes of CUDA libraries; any of 2.11-2.13 works.
$(BIN)/python:
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -q torch==2.13.0 $(PIP_TORCH)

$(VENV)/.installed: pyproject.toml | $(BIN)/python
	$(BIN)/pip install -q -e .
	touch $@

$(VENV)/.test-installed: $(VENV)/.installed
	$(BIN)/pip install -q -e .[test] ruff mypy
	touch $@

demo: $(VENV)/.installed
	$(BIN)/deepseek-fp4 demo

test: $(VENV)/.test-installed
	$(BIN)/python -m pytest -m "not proof"

proof: $(VENV)/.test-installed
	$(BIN)/pip install -q -e .[proof]
	$(BIN)/python -m pytest -m proof

lint: $(VENV)/.test-installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(VENV)/.test-installed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) build dist *.egg-info
