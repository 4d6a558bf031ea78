# Every target works alone on a fresh machine: it makes .venv, installs and compiles what it needs. Stamps in
# .venv make a second run quick. A change of csrc/ or setup.py recompiles; a change of pyproject.toml reinstalls.

PYTHON ?= python3
VENV ?= .venv
# Installed first, unless .venv has a torch. The kernels are compiled against it.
TORCH ?= torch==2.13.0
PREFLIGHT_TORCH ?= torch==2.11.0
# The tests patch these and compare with them. Unpacked without dependencies, because their pins conflict with ours.
VERL ?= verl==0.9.1
OPENRLHF ?= openrlhf==0.11.2
FASTRLHF_BUILD ?= auto
# OUT: results of `make gpu` and `make gpu-quick`. ARGS: more arguments for the command behind a target.
OUT ?= build/gpu
ARGS ?=
# Processes of the test run.
JOBS ?= $(shell nproc 2>/dev/null || echo 2)

export FASTRLHF_BUILD
export PIP_DISABLE_PIP_VERSION_CHECK = 1
export PIP_NO_INPUT = 1
# setup.py must find the ninja of .venv first: another release would not reuse its build log.
export PATH := $(abspath $(VENV))/bin:$(PATH)

PY := $(VENV)/bin/python
PIP := $(PY) -m pip install --quiet --no-compile
# A one-line extra of pyproject.toml, the only place that lists versions.
extra = $(shell sed -n 's/^$(1) = \[\(.*\)\]$$/\1/p' pyproject.toml | tr -d ',"')
CPP := $(wildcard csrc/*.h csrc/*.cpp csrc/common/*.h csrc/cpu/*.h csrc/cpu/*.cpp csrc/cuda/*.h csrc/cuda/*.cuh csrc/cuda/*.cu)
SHIM := $(wildcard tests/_support/host_shim/*.h tests/_support/host_shim/*.cpp tests/_support/host_shim/*.cu tests/_support/host_shim/include/*.h)
PREFLIGHT := build/preflight
ORACLES := build/oracles

.DEFAULT_GOAL := help
.PHONY: help install demo docs test nightly test-isa fuzz bench bench-docs bench-update budgets traffic wheels gpu gpu-quick preflight check fmt clean

help:
	@echo "make demo       align the shipped tiny model end to end and write its report (minutes, 2 CPU cores)"
	@echo "make test       the test suite"
	@echo "make nightly    the tests that make test leaves out: every family of models, kills of runs"
	@echo "make test-isa   the ops' CPU tests again under each lesser instruction set that this machine has"
	@echo "make fuzz       random calls and command lines against the reference, < 20 minutes; ARGS=--quick: CI's part"
	@echo "make docs       the documentation site in build/docs, from docs/ and the docstrings; needs Python 3.11"
	@echo "make bench      time the ops against eager PyTorch; writes benchmarks/results/"
	@echo "make bench-docs the table, plots and performance page of README and docs/ from the committed results"
	@echo "make budgets    instructions per logit and resident blocks of the row kernels on sm_90; needs nvcc, no GPU"
	@echo "make traffic    bytes, launches, host syncs and memory of the linear ops' CUDA plan; needs no GPU"
	@echo "make wheels     release wheels in dist/: one for every Python, one with the C++ packer for each on PATH"
	@echo "make gpu        on a CUDA machine, < 10 minutes: build, tests, sanitizer, quickstart, bench; OUT=$(OUT)"
	@echo "make gpu-quick  its first 150 seconds alone: build, timings, counters, a part of the op tests"
	@echo "make bench-update  on a CUDA machine: a PPO update of a 1B Llama with four heads, and what fits"
	@echo "make preflight  build the CUDA kernels against $(PREFLIGHT_TORCH) in a separate venv, no GPU needed"
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
	$(PIP) "setuptools>=77" ninja pybind11
	@$(PY) -c 'import torch' 2>/dev/null || { echo "$(PIP) $(TORCH)"; $(PIP) $(TORCH); }
	FASTRLHF_BUILD=none $(PIP) --no-build-isolation -e '.[bench,demo]'
	@# pip byte-compiles on one core. Some packages have files for newer Pythons, whose failure is harmless.
	@$(PY) -m compileall -q -j 0 $(VENV)/lib >/dev/null 2>&1 || true
	@touch $@

# In place and with ninja, so that only changed files compile. The editable install above finds the result.
$(VENV)/.stamp-build-$(FASTRLHF_BUILD): $(VENV)/.stamp-deps setup.py $(CPP) $(wildcard fastrlhf/ops/*.py)
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

$(VENV)/.stamp-docs: $(VENV)/.stamp-deps
	$(PIP) $(call extra,docs)
	@touch $@

install: $(VENV)/.stamp-build-$(FASTRLHF_BUILD)

demo: install
	$(VENV)/bin/fastrlhf demo --overwrite $(ARGS)

# Offline once .venv exists. tests/packaging/test_docs.py builds the same way and runs the snippets.
docs: $(VENV)/.stamp-docs
	$(PY) -m sphinx -q -W --keep-going -b html docs build/docs

test: install $(VENV)/.stamp-test $(ORACLES)/.stamp-$(VERL)-$(OPENRLHF)
	$(PY) -m pytest -n $(JOBS) --dist loadfile --no-loadscope-reorder -m "not nightly" $(ARGS)

nightly: install $(VENV)/.stamp-test $(ORACLES)/.stamp-$(VERL)-$(OPENRLHF)
	$(PY) -m pytest -n $(JOBS) -m nightly $(ARGS)

test-isa: install $(VENV)/.stamp-test
	$(PY) tests/isas.py $(ARGS)

fuzz: install $(VENV)/.stamp-test
	$(PY) tests/fuzz.py $(ARGS)

# The test extra brings TRL, which is timed beside ours.
bench: install $(VENV)/.stamp-test
	$(PY) benchmarks/run.py $(ARGS)

bench-docs: $(VENV)/.stamp-deps
	$(PY) benchmarks/performance.py $(ARGS)
	$(PY) docs/front_page.py $(ARGS)

# Reads machine code; benchmarks/walks.py has the rule. ARGS="--only triton --loops" names the loops.
budgets: $(VENV)/.stamp-deps
	$(PY) benchmarks/budgets.py $(ARGS)

# Runs the ops' CUDA plan on meta tensors. The kernel library supplies the schemas.
traffic: install
	$(PY) benchmarks/traffic.py $(ARGS)

# These need no network. They use the first Python whose torch finds a GPU: .venv's, or the machine's own.
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

# A copy of the tracked tree, so that the CUDA build does not replace the checkout's kernels.
# numpy: the interpreter of that torch's Triton calls int() on one-element arrays, an error from numpy 2.4 on.
preflight:
	rm -rf $(PREFLIGHT) && mkdir -p $(PREFLIGHT)
	git ls-files -z | tar --null -T - -cf - | tar -xf - -C $(PREFLIGHT)
	test -x $(VENV)-preflight/bin/python || $(PYTHON) -m venv $(VENV)-preflight
	$(VENV)-preflight/bin/python -m pip install --quiet "setuptools>=77" ninja pybind11 \
	  "numpy<2.4" $(PREFLIGHT_TORCH)
	cd $(PREFLIGHT) && FASTRLHF_BUILD=none $(abspath $(VENV))-preflight/bin/python -m pip install --quiet \
	  --no-build-isolation -e '.[bench,demo]' $(call extra,test)
	cd $(PREFLIGHT) && FASTRLHF_BUILD=cuda $(abspath $(VENV))-preflight/bin/python setup.py --quiet build_ext --inplace
	cd $(PREFLIGHT) && $(abspath $(VENV))-preflight/bin/python -m fastrlhf doctor
	cd $(PREFLIGHT) && $(abspath $(VENV))-preflight/bin/python -m pytest -m "not slow and not nightly" $(ARGS)

# The kernels are compiled once, for FASTRLHF_BUILD. dist/ gets one wheel tagged py3-none, without _C, for any Python,
# and one wheel with _C for each python3.x >= 3.10 on PATH; pip prefers the latter where it fits. A Python without its
# headers (python3.x-dev) is left out. build/lib* goes before each: setuptools would package its leftovers.
wheels: install
	rm -rf dist build/wheels && mkdir -p dist
	$(PYTHON) -m venv build/wheels && build/wheels/bin/python -m pip install --quiet "setuptools>=77"
	@set -e; export FASTRLHF_LIBRARY="$(CURDIR)/fastrlhf/libfastrlhf.so"; \
	wheel() { rm -rf build/lib* build/bdist*; "$$1" -m pip wheel --quiet --no-deps --wheel-dir dist $$2 .; }; \
	wheel build/wheels/bin/python --no-build-isolation; \
	for minor in 10 11 12 13 14 15; do \
	  py=python3.$$minor; \
	  header="$$($$py -c 'import sysconfig; print(sysconfig.get_path("include"))' 2>/dev/null || true)/Python.h"; \
	  if [ -f "$$header" ]; then wheel $$py; else echo "make wheels: no $$py with headers on PATH"; fi; \
	done
	ls -l dist

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
