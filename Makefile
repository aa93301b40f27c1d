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

.PHONY: bench test test-latest lint build gpu-check clean

bench: $(READY)
	$(PY) -m benchmarks.run --out $(OUT) $(BENCH_ARGS)

test: $(READY)
	OMP_NUM_THREADS=1 $(PY) -m pytest -q $(WORKERS) $(TEST_ARGS)

lint: $(READY)
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m clang_format --dry-run -Werror $(wildcard csrc/*.c* csrc/*.h csrc/hopper/* tests/*.cpp tests/*.h)

# The C++/CUDA library, in place; optional: setup.py says why where it cannot be built.
build: $(READY)
	$(PY) setup.py build_ext --inplace

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

# On a machine with a GPU, in 8 minutes: the tests, a short benchmark, the library's own speed. Everything goes to OUT as
# it is measured; a failure does not stop the next stage, but the exit status says so.
gpu-check: $(READY)
	mkdir -p $(OUT)
	-$(PY) setup.py build_ext --inplace > $(OUT)/build.log 2>&1
	status=0; \
	OMP_NUM_THREADS=4 timeout 210 $(PY) -m pytest -q -m gpu $(TEST_ARGS) > $(OUT)/tests.log 2>&1 || status=1; \
	tail -n 3 $(OUT)/tests.log; \
	timeout 110 $(PY) -m benchmarks.run --out $(OUT)/short --models resnet50 --batches 32 256 --impl auto triton \
		--baselines eager --budget 90 > $(OUT)/short.log 2>&1 || status=1; \
	tail -n 12 $(OUT)/short.log; \
	timeout 150 $(PY) -m benchmarks.run --out $(OUT)/library --models resnet50 --batches 256 128 32 --dtypes bf16 fp16 \
		--impl none --baselines eager compile --budget 135 > $(OUT)/library.log 2>&1 || status=1; \
	tail -n 20 $(OUT)/library.log; exit $$status

clean:
	rm -rf .venv .venv-latest build out *.egg-info fused_resnet/*.so
