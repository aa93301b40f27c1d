# Two commands do everything on a fresh machine: make bench, make test. PYTHON=python3 uses that interpreter as it is,
# without a virtual environment and without installing anything.
CONSTRAINTS := .ci/constraints.txt
OUT ?= out
export PYTHONPATH := $(CURDIR)
# What a command that runs out of time has said is in its log.
export PYTHONUNBUFFERED := 1

ifeq ($(origin PYTHON),undefined)
PY := .venv/bin/python
READY := .venv/ready
else
PY := $(PYTHON)
READY :=
endif

# One thread for each of two workers where pytest-xdist is there.
WORKERS = $(shell $(PY) -c "import xdist; print('-n 2')" 2>/dev/null)

.PHONY: bench test test-latest lint build tune figures gpu gpu-check gpu-tune gpu-bench gpu-peers clean

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

# The rest is for a machine with a GPU that is there for ten minutes: every limit of a target together is less. All that
# it leaves is in OUT, eight files at most, as it is measured. Without a checkout, COMMIT=name says what was measured.
gpu: $(READY)
	@$(PY) -c "import torch; raise SystemExit(not torch.cuda.is_available())" || \
		{ echo "this target needs a CUDA device, and PyTorch finds none here" >&2; exit 1; }
	mkdir -p $(OUT)
	-timeout 90 $(PY) setup.py build_ext --inplace > $(OUT)/build.log 2>&1

# The tests of what runs on the device, a short benchmark, the library's own speed, then the rest of the suite. A failure
# does not stop the next stage, but the exit status says so.
DEVICE_TESTS := $(wildcard tests/test_kernels_*.py) $(addprefix tests/test_,triton_blocks.py hopper.py native.py \
	graphs.py tune.py training_curve.py)
# One process would compile the kernels of a network one after another, for minutes.
COMPILE = timeout 60 $(PY) -m benchmarks.tune --compile --batches 32 256
MANY_WORKERS = $(shell $(PY) -c "import os, xdist; print('-n', min(12, os.cpu_count()))" 2>/dev/null)
# Interrupted at its limit, a run of tests still says which have failed, and where one hangs.
DEVICE_PYTEST = $(PY) -m pytest -q -o faulthandler_timeout=60 $(MANY_WORKERS)
gpu-check: gpu
	status=0; \
	OMP_NUM_THREADS=1 timeout -s INT -k 25 160 $(DEVICE_PYTEST) $(DEVICE_TESTS) $(TEST_ARGS) \
		> $(OUT)/tests.log 2>&1 || status=1; \
	tail -n 30 $(OUT)/tests.log; \
	$(COMPILE); \
	timeout 80 $(PY) -m benchmarks.run --out $(OUT)/short --models resnet50 --batches 256 32 --impl auto triton \
		--baselines eager --tune 0 --budget 50 > $(OUT)/short.log 2>&1 || status=1; \
	tail -n 12 $(OUT)/short.log; \
	timeout 100 $(PY) -m benchmarks.run --out $(OUT)/library --models resnet50 --batches 256 128 32 --dtypes bf16 fp16 \
		--impl none --baselines eager compile --budget 75 > $(OUT)/library.log 2>&1 || status=1; \
	tail -n 20 $(OUT)/library.log; \
	OMP_NUM_THREADS=1 timeout -s INT -k 20 45 $(DEVICE_PYTEST) tests $(addprefix --ignore=,$(DEVICE_TESTS)) \
		>> $(OUT)/tests.log 2>&1 || status=1; \
	tail -n 5 $(OUT)/tests.log; exit $$status

# OUT/sm<arch>.json, in BUDGET seconds: it goes on from fused_resnet/plans. Copied there, it is what ships, and what the
# next call goes on from.
BUDGET ?= 440
gpu-tune: gpu
	-cp fused_resnet/plans/*.json $(OUT)/ 2> /dev/null
	status=0; \
	timeout $$(($(BUDGET) + 50)) $(PY) -m benchmarks.tune --out $(OUT) --budget $(BUDGET) $(TUNE_ARGS) \
		> $(OUT)/tune.log 2>&1 || status=$$?; \
	rm -f $(OUT)/.sm*; tail -n 20 $(OUT)/tune.log; exit $$status

# Every layer by itself, then whole networks against the library's forms, by the tables that ship.
gpu-bench: gpu
	status=0; \
	$(COMPILE); \
	timeout 160 $(PY) -m benchmarks.layers --out $(OUT) --budget 130 $(LAYERS_ARGS) > $(OUT)/layers.log 2>&1 || status=1; \
	tail -n 5 $(OUT)/layers.log; \
	timeout 280 $(PY) -m benchmarks.run --out $(OUT) --models resnet50 --batches 256 32 --tune 0 --budget 220 \
		$(BENCH_ARGS) > $(OUT)/bench.log 2>&1 || status=1; \
	tail -n 40 $(OUT)/bench.log; exit $$status

# ResNet-50 against every contender that is installed there. Those that search for minutes come last, by themselves, so
# that they cost no one else a row.
PEERS := eager eager-nchw graph compile timm cudnn-graphs
SEARCHING := eager compile-max-autotune compile-freezing
gpu-peers: gpu
	status=0; \
	timeout 220 $(PY) -m benchmarks.run --out $(OUT) --models resnet50 --batches 256 --baselines $(PEERS) --tune 0 \
		--budget 150 $(BENCH_ARGS) > $(OUT)/peers.log 2>&1 || status=1; \
	tail -n 25 $(OUT)/peers.log; \
	timeout 280 $(PY) -m benchmarks.run --out $(OUT)/searching --models resnet50 --modes inference training \
		--batches 256 --baselines $(SEARCHING) --tune 0 --budget 150 $(BENCH_ARGS) > $(OUT)/searching.log 2>&1 || status=1; \
	tail -n 25 $(OUT)/searching.log; exit $$status

clean:
	rm -rf .venv .venv-latest build out *.egg-info fused_resnet/*.so
