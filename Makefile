# Every target works alone on a fresh machine: it makes .venv, installs and compiles what it needs. Stamps in
# .venv make a second run quick; a change of csrc/ or setup.py compiles again, of pyproject.toml installs again.

PYTHON ?= python3
VENV ?= .venv
# Installed first, and only where .venv holds no torch yet. The extension is then built against that torch.
TORCH ?= torch==2.13.0
PREFLIGHT_TORCH ?= torch==2.11.0
# Whose functions the tests patch and compare with: unpacked alone, for their pins clash with ours.
VERL ?= verl==0.9.1
OPENRLHF ?= openrlhf==0.11.2
FASTRLHF_BUILD ?= auto
# Results of `make gpu` and `make gpu-quick`, and more arguments for the command or pytest behind a target.
OUT ?= build/gpu
ARGS ?=
# Processes of the test run.
JOBS ?= $(shell nproc 2>/dev/null || echo 2)

export FASTRLHF_BUILD
export PIP_DISABLE_PIP_VERSION_CHECK = 1
export PIP_NO_INPUT = 1
# The ninja of .venv, which setup.py needs, before any other: two releases do not share a build log.
export PATH := $(abspath $(VENV))/bin:$(PATH)

PY := $(VENV)/bin/python
PIP := $(PY) -m pip install --quiet --no-compile
# The extras' lists in pyproject.toml are the one place where versions stand.
extra = $(shell sed -n 's/^$(1) = \[\(.*\)\]$$/\1/p' pyproject.toml | tr -d ',"')
CPP := $(wildcard csrc/*.h csrc/*.cpp csrc/common/*.h csrc/cpu/*.h csrc/cpu/*.cpp csrc/cuda/*.h csrc/cuda/*.cuh csrc/cuda/*.cu)
SHIM := $(wildcard tests/_support/host_shim/*.h tests/_support/host_shim/*.cpp tests/_support/host_shim/*.cu tests/_support/host_shim/include/*.h)
PREFLIGHT := build/preflight
ORACLES := build/oracles

.DEFAULT_GOAL := help
.PHONY: help install demo test test-isa bench bench-readme bench-update budgets traffic gpu gpu-quick preflight check fmt clean

help:
	@echo "make demo       align the shipped tiny model end to end and write its report (minutes, 2 CPU cores)"
	@echo "make test       the whole test suite"
	@echo "make test-isa   the ops' CPU tests again under each lesser instruction set that this machine has"
	@echo "make bench      time the ops against eager PyTorch; writes benchmarks/results/"
	@echo "make bench-readme  README's performance section and plots from the committed results"
	@echo "make budgets    instructions a logit and resident blocks of the row kernels on sm_90; needs nvcc, no GPU"
	@echo "make traffic    bytes, launches, host syncs and memory of the linear ops' CUDA plan; needs no GPU"
	@echo "make gpu        on a CUDA machine, < 10 minutes: build, tests, sanitizer, quickstart, bench; OUT=$(OUT)"
	@echo "make gpu-quick  its first 150 seconds alone: build, timings, counters, a part of the op tests"
	@echo "make bench-update  on a CUDA machine: a PPO update of a 1B Llama with four heads, and what fits"
	@echo "make preflight  build the CUDA extension against $(PREFLIGHT_TORCH) in a venv of its own, no GPU needed"
	@echo "make check      formatting and lint; edits nothing (make fmt does)"
	@echo "make clean      remove build outputs; keeps .venv and runs/"

$(VENV)/.stamp-venv:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null || \
	  { echo "fastrlhf: $(PYTHON) is missing or older than 3.10: install one and set PYTHON=python3.x" >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || \
	  { echo "fastrlhf: $(PYTHON) cannot make a virtual environment: install python3-venv" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
	@touch $@

$(VENV)/.stamp-deps: $(VENV)/.stamp-venv pyproject.toml
	$(PIP) "setuptools>=77" wheel ninja pybind11
	@$(PY) -c 'import torch' 2>/dev/null || { echo "$(PIP) $(TORCH)"; $(PIP) $(TORCH); }
	FASTRLHF_BUILD=none $(PIP) --no-build-isolation -e .
	@# pip byte-compiles on one core; some packages hold files of newer Pythons, which fail and do not matter.
	@$(PY) -m compileall -q -j 0 $(VENV)/lib >/dev/null 2>&1 || true
	@touch $@

# In place and through ninja, so that only changed files compile; the editable install above finds the result.
$(VENV)/.stamp-build-$(FASTRLHF_BUILD): $(VENV)/.stamp-deps setup.py $(CPP)
	$(PY) setup.py --quiet build_ext --inplace
	@touch $@

$(VENV)/.stamp-test: $(VENV)/.stamp-deps
	$(PIP) $(call extra,test)
	@touch $@

$(ORACLES)/.stamp-$(VERL)-$(OPENRLHF): $(VENV)/.stamp-venv
	rm -rf $(ORACLES)
	$(PIP) --no-deps --ignore-requires-python --target $(ORACLES) $(VERL) $(OPENRLHF)
	@touch $@

$(VENV)/.stamp-dev: $(VENV)/.stamp-venv pyproject.toml
	$(PIP) $(call extra,dev)
	@touch $@

install: $(VENV)/.stamp-build-$(FASTRLHF_BUILD)

demo: install
	$(VENV)/bin/fastrlhf demo --overwrite $(ARGS)

test: install $(VENV)/.stamp-test $(ORACLES)/.stamp-$(VERL)-$(OPENRLHF)
	$(PY) -m pytest -n $(JOBS) --dist loadfile --no-loadscope-reorder $(ARGS)

test-isa: install $(VENV)/.stamp-test
	$(PY) tests/isas.py $(ARGS)

# With the test requirements: TRL is timed beside ours.
bench: install $(VENV)/.stamp-test
	$(PY) benchmarks/run.py $(ARGS)

bench-readme: $(VENV)/.stamp-deps
	$(PY) benchmarks/readme.py $(ARGS)

# Reads machine code: benchmarks/walks.py has the rule. ARGS="--only triton --loops" names the loops.
budgets: $(VENV)/.stamp-deps
	$(PY) benchmarks/budgets.py $(ARGS)

# The ops as they run on a GPU, on meta tensors; the kernels' C++ extension says what exists.
traffic: install
	$(PY) benchmarks/traffic.py $(ARGS)

# Need no network. Take the first Python whose torch finds a GPU: .venv's, or the machine's own.
gpu: ON_GPU = benchmarks/gpu.py --out $(OUT)
gpu-quick: ON_GPU = benchmarks/gpu.py --quick --out $(OUT)
bench-update: ON_GPU = benchmarks/update.py --out $(OUT)/update.json
gpu gpu-quick bench-update:
	@set -e; py=; \
	for p in $(PY) $(PYTHON); do \
	  if $$p -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' 2>/dev/null; then py=$$p; break; fi; \
	done; \
	[ -n "$$py" ] || { echo "make $@: no CUDA device that the torch of $(PY) or $(PYTHON) can use" >&2; exit 1; }; \
	PYTHONPATH="$(CURDIR):$$PYTHONPATH" $$py $(ON_GPU) $(ARGS)

# A copy of the tracked tree, so that the CUDA build does not replace the checkout's own extension.
# numpy: the interpreter of that torch's Triton calls int() on arrays of one element, which numpy 2.4 refuses.
preflight:
	rm -rf $(PREFLIGHT) && mkdir -p $(PREFLIGHT)
	git ls-files -z | tar --null -T - -cf - | tar -xf - -C $(PREFLIGHT)
	test -x $(VENV)-preflight/bin/python || $(PYTHON) -m venv $(VENV)-preflight
	$(VENV)-preflight/bin/python -m pip install --quiet "setuptools>=77" wheel ninja pybind11 \
	  "numpy<2.4" $(PREFLIGHT_TORCH)
	cd $(PREFLIGHT) && FASTRLHF_BUILD=none $(abspath $(VENV))-preflight/bin/python -m pip install --quiet \
	  --no-build-isolation -e . $(call extra,test)
	cd $(PREFLIGHT) && FASTRLHF_BUILD=cuda $(abspath $(VENV))-preflight/bin/python setup.py --quiet build_ext --inplace
	cd $(PREFLIGHT) && $(abspath $(VENV))-preflight/bin/python -m fastrlhf doctor
	cd $(PREFLIGHT) && $(abspath $(VENV))-preflight/bin/python -m pytest -m "not slow" $(ARGS)

check: $(VENV)/.stamp-dev
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/ruff check .
	$(VENV)/bin/clang-format --dry-run -Werror $(CPP) $(SHIM)

fmt: $(VENV)/.stamp-dev
	$(VENV)/bin/ruff format .
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/clang-format -i $(CPP) $(SHIM)

clean:
	rm -rf build dist *.egg-info .pytest_cache .ruff_cache .hypothesis $(VENV)/.stamp-build-*
	rm -f fastrlhf/*.so
	find fastrlhf kernels tests benchmarks -name __pycache__ -type d -prune -exec rm -rf {} +
