# Two commands do everything on a fresh machine: make bench, make test. PYTHON=python3 uses that interpreter as it is,
# without a virtual environment and without installing anything.
CONSTRAINTS := .ci/constraints.txt
OUT ?= out
export PYTHONPATH := $(CURDIR)

ifeq ($(origin PYTHON),undefined)
PY := .venv/bin/python
READY := .venv/ready
else
PY := $(PYTHON)
READY :=
endif

# One thread for each of two workers where pytest-xdist is there.
WORKERS = $(shell $(PY) -c "import xdist; print('-n 2')" 2>/dev/null)

.PHONY: bench test test-latest lint build tune figures gpu-check gpu-tune gpu-bench gpu-peers clean

bench: $(READY)
	$(PY) -m benchmarks.run --out $(OUT) $(BENCH_ARGS)

test: $(READY)
	OMP_NUM_THREADS=1 $(PY) -m pytest -q $(WORKERS) $(TEST_ARGS)

lint: $(READY)
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -c "import clang_format; clang_format.clang_format()" --dry-run -Werror $(wildcard csrc/*.c* csrc/*.h csrc/hopper/* tests/*.cpp tests/*.h)

# The C++/CUDA library, in place; optional: setup.py says why where it cannot be built.
build: $(READY)
	$(PY) setup.py build_ext --inplace

# The table of plans that the package ships, on the card that is here.
tune: $(READY)
	$(PY) -m benchmarks.tune $(TUNE_ARGS)

# The README's section of figures, and the pictures, from benchmarks/results/*.json.
figures: $(READY)
	$(PY) -m benchmarks.figures

.venv/ready: pyproject.toml setup.py $(CONSTRAINTS) $(wildcard csrc/*)
	python3 -m venv .venv
	.venv/bin/python -m pip install -q -c $(CONSTRAINTS) torch setuptools wheel ninja
	.venv/bin/python -m pip install -q -c $(CONSTRAINTS) --no-build-isolation -e ".[triton,bench,test,lint]"
	touch $@

# The suite with the newest PyTorch and Triton that pip offers.
test-latest:
	python3 -m venv .venv-latest
	.venv-latest/bin/python -m pip install -q --upgrade torch setuptools wheel ninja
	.venv-latest/bin/python -m pip install -q --upgrade --no-build-isolation ".[triton,bench,test]"
	$(MAKE) test PYTHON=.venv-latest/bin/python

# On a machine with a GPU, in 9 minutes: the tests of what runs there, a short benchmark, the library's own speed, then
# the rest of the suite. Everything goes to OUT as it is measured; a failure does not stop the next stage, but the exit
# status says so.
DEVICE_TESTS := $(wildcard tests/test_kernels_*.py) $(addprefix tests/test_,triton_blocks.py hopper.py native.py \
	graphs.py tune.py training_curve.py)
# One process would compile the kernels of a network one after another, for minutes.
COMPILE = timeout 60 $(PY) -m benchmarks.tune --compile
MANY_WORKERS = $(shell $(PY) -c "import os, xdist; print('-n', min(12, os.cpu_count()))" 2>/dev/null)
gpu-check: $(READY)
	mkdir -p $(OUT)
	-$(PY) setup.py build_ext --inplace > $(OUT)/build.log 2>&1
	status=0; \
	OMP_NUM_THREADS=1 timeout 180 $(PY) -m pytest -q $(MANY_WORKERS) $(DEVICE_TESTS) $(TEST_ARGS) \
		> $(OUT)/tests.log 2>&1 || status=1; \
	tail -n 30 $(OUT)/tests.log; \
	$(COMPILE) --batches 12 --size 96 --modes training & $(COMPILE) --batches 32 256; wait; \
	timeout 80 $(PY) -m benchmarks.run --out $(OUT)/short --models resnet50 --batches 32 256 --impl auto triton \
		--baselines eager --budget 60 > $(OUT)/short.log 2>&1 || status=1; \
	tail -n 12 $(OUT)/short.log; \
	timeout 115 $(PY) -m benchmarks.run --out $(OUT)/library --models resnet50 --batches 256 128 32 --dtypes bf16 fp16 \
		--impl none --baselines eager compile --budget 100 > $(OUT)/library.log 2>&1 || status=1; \
	tail -n 20 $(OUT)/library.log; \
	OMP_NUM_THREADS=1 timeout 60 $(PY) -m pytest -q $(MANY_WORKERS) tests $(addprefix --ignore=,$(DEVICE_TESTS)) \
		> $(OUT)/rest.log 2>&1 || status=1; \
	tail -n 5 $(OUT)/rest.log; exit $$status

# On a machine with a GPU, in BUDGET seconds and a minute: OUT/sm<arch>.json, which goes on from fused_resnet/plans.
# Copied there, it is what ships, and what the next call goes on from.
BUDGET ?= 500
gpu-tune: $(READY)
	mkdir -p $(OUT)
	-$(PY) setup.py build_ext --inplace > $(OUT)/build.log 2>&1
	-cp fused_resnet/plans/*.json $(OUT)/ 2> /dev/null
	status=0; \
	timeout $$(($(BUDGET) + 50)) $(PY) -m benchmarks.tune --out $(OUT) --budget $(BUDGET) $(TUNE_ARGS) \
		> $(OUT)/tune.log 2>&1 || status=$$?; \
	rm -f $(OUT)/.*.lock; tail -n 20 $(OUT)/tune.log; exit $$status

# On a machine with a GPU, in 9 minutes: every layer by itself, then whole networks against the library's forms.
gpu-bench: $(READY)
	mkdir -p $(OUT)
	-$(PY) setup.py build_ext --inplace > $(OUT)/build.log 2>&1
	status=0; \
	$(COMPILE) --batches 32 256; \
	timeout 190 $(PY) -m benchmarks.layers --out $(OUT) --budget 160 $(LAYERS_ARGS) > $(OUT)/layers.log 2>&1 || status=1; \
	timeout 300 $(PY) -m benchmarks.run --out $(OUT) --models resnet50 --batches 256 32 --budget 260 $(BENCH_ARGS) \
		> $(OUT)/bench.log 2>&1 || status=1; \
	tail -n 40 $(OUT)/bench.log; exit $$status

# On a machine with a GPU, in 9 minutes: ResNet-50 against every contender that is installed there.
PEERS := eager eager-nchw graph compile compile-max-autotune compile-freezing timm cudnn-graphs
gpu-peers: $(READY)
	mkdir -p $(OUT)
	-$(PY) setup.py build_ext --inplace > $(OUT)/build.log 2>&1
	timeout 560 $(PY) -m benchmarks.run --out $(OUT) --models resnet50 --batches 256 --baselines $(PEERS) \
		--budget 400 $(BENCH_ARGS) > $(OUT)/peers.log 2>&1; status=$$?; tail -n 40 $(OUT)/peers.log; exit $$status

clean:
	rm -rf .venv .venv-latest build out *.egg-info fused_resnet/*.so
