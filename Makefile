# Every target sets itself up. `make` alone lists them.
.DEFAULT_GOAL := help
SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

# What PyPI has of torch for Linux is made for CUDA. The CPU build is at PyTorch's own index, asked where it can be reached.
TORCH_INDEX := https://download.pytorch.org/whl/cpu

# `make test-latest` has an environment of its own.
PYTHON_LATEST ?= python3.12
VENV_LATEST ?= .venv-latest
READY_LATEST := $(VENV_LATEST)/.ready
TORCH_LATEST ?= torch==2.13.0+cpu

# pip compiles to bytecode what it installs, on one core, and nothing of an editable install: here all cores do, the
# project included, which hundreds of short processes of the tests import, and without what no run imports. (What is
# written for a newer Python does not compile; nobody imports it.)
PIP := --quiet --disable-pip-version-check --no-compile
define COMPILE
@$(1)/bin/python -m compileall -q -j 0 -x '/(tests?|_inductor|networkx|fontTools|mypy|physics)/|/(torch/testing|transformers/models)/' $(1)/lib moba_train kernels tests docs >/dev/null 2>&1 || true
endef

# Without an NVIDIA driver the pinned CPU set is installed; with one, pip resolves the ranges of pyproject.toml.
GPUS := $(shell nvidia-smi -L 2>/dev/null | grep -c '^GPU')
CONSTRAINTS := $(if $(filter 0,$(GPUS)),-c constraints-cpu.txt,)
# The demo shards each row over two context-parallel ranks; a machine with a single GPU runs it on one.
DEMO_RANKS ?= $(if $(filter 1,$(GPUS)),1,2)
DEMO_RUN ?= runs/demo
TORCHRUN := $(BIN)/torchrun --standalone --nproc-per-node

# One thread a rank: with two ranks on two cores, more threads only wait for one another. The environment may say otherwise.
export OMP_NUM_THREADS ?= 1
export PYTHONUNBUFFERED := 1

.PHONY: help
help: ## List the targets
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

$(READY): pyproject.toml constraints-cpu.txt
	@echo "Setting up $(VENV) (a minute or two the first time) ..."
	@$(PYTHON) -c 'import sys; sys.exit("Python 3.11 or newer is needed, this is " + sys.version.split()[0] + "; say: make PYTHON=python3.12 ...") if sys.version_info < (3, 11) else None'
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@index=; if [ "$(GPUS)" = 0 ] && $(PYTHON) -c 'from urllib.request import urlopen; urlopen("$(TORCH_INDEX)/", timeout=5)' 2>/dev/null; \
	then index="--extra-index-url $(TORCH_INDEX)"; fi; \
	$(BIN)/python -m pip install $(PIP) $$index $(CONSTRAINTS) -e '.[dev]'
	$(call COMPILE,$(VENV))
	@touch $@

.PHONY: setup
setup: $(READY) ## Make .venv and install the project into it

# The fault drills show the order of a save from its system calls. Where strace cannot be installed here, that test says how.
.PHONY: strace
strace:
	@if ! which strace >/dev/null && [ "$$(id -u)" = 0 ] && which apt-get >/dev/null; then \
	  echo "Installing strace ..."; \
	  apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends strace || true; \
	fi

# The suite, with the programs of folder $(1). What is timed runs by itself.
define SUITE
@$(1)/python -m pytest -m "not slow and not gpu and not parity and not slurm" --ignore tests/kernels/test_speed.py -n 3 --dist loadfile --no-loadscope-reorder
@$(1)/python -m pytest tests/kernels/test_speed.py
@TRITON_INTERPRET=1 $(1)/python -m pytest tests/kernels/triton -n 2
endef

.PHONY: test
test: $(READY) strace ## Run the test suite (CPU, many-rank tests included)
	$(call SUITE,$(BIN))

$(READY_LATEST): pyproject.toml constraints-latest.txt
	@echo "Setting up $(VENV_LATEST) (a minute or two the first time) ..."
	@if ! $(PYTHON_LATEST) -c 'import sys; sys.exit(sys.version_info < (3, 12))' 2>/dev/null; then \
	  echo "$(PYTHON_LATEST) does not run here, or is older than 3.12. Install Python 3.12 (pyenv install 3.12, or uv python install 3.12)," >&2; \
	  echo "then name it: make test-latest PYTHON_LATEST=/path/to/python3.12" >&2; exit 1; \
	fi
	@test -x $(VENV_LATEST)/bin/python || $(PYTHON_LATEST) -m venv $(VENV_LATEST)
	@if ! $(VENV_LATEST)/bin/python -m pip install $(PIP) --no-deps --extra-index-url $(TORCH_INDEX) '$(TORCH_LATEST)'; then \
	  echo "$(TORCH_LATEST) was not found; it is looked for at $(TORCH_INDEX) too. Name a wheel of it:" >&2; \
	  echo "make test-latest TORCH_LATEST=/path/to/wheel, or take the build that PyPI has: TORCH_LATEST=torch==2.13.0" >&2; \
	  echo "(on Linux it is made for CUDA and brings 3 GB; the tests run on the CPU all the same)." >&2; exit 1; \
	fi
	@$(VENV_LATEST)/bin/python -m pip install $(PIP) '$(TORCH_LATEST)'
	@grep -v '^torch==' constraints-latest.txt \
	  | $(VENV_LATEST)/bin/python -m pip install $(PIP) --no-deps -r /dev/stdin -e .
	$(call COMPILE,$(VENV_LATEST))
	@touch $@

.PHONY: test-latest
test-latest: $(READY_LATEST) strace ## The same suite with Python 3.12 and the newest megatron-core
	$(call SUITE,$(VENV_LATEST)/bin)

.PHONY: test-slow
test-slow: $(READY) ## Run the tests that take minutes
	@$(BIN)/python -m pytest -m "slow and not gpu and not slurm" --timeout 1800

SLURM := munged slurmctld slurmd sbatch

.PHONY: test-slurm
test-slurm: $(READY) ## Test jobs under a real Slurm, a private one on this machine (root; installs slurm-wlm and munge; 8 minutes)
	@if ! which $(SLURM) >/dev/null; then \
	  if [ "$$(id -u)" != 0 ]; then echo "As root: apt-get install slurm-wlm munge; then make test-slurm, as root too." >&2; exit 1; fi; \
	  apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends slurm-wlm munge; \
	fi
	@$(BIN)/python -m pytest -m slurm tests/slurm --timeout 600

.PHONY: parity
parity: $(READY) ## The whole parity grid of the operator against fp64 (20 minutes on 2 cores)
	@$(BIN)/python -m pytest -m "parity and not gpu" --timeout 14400

.PHONY: aot
aot: $(READY) ## Compile every Triton kernel for sm_80, sm_90, sm_100: registers, spills, shared memory (no GPU; half an hour and more)
	@$(BIN)/python -m moba_kernels.aot

.PHONY: bench
bench: $(READY) ## Time the operator on this machine's CPU, after a parity gate; figures go to kernels/bench/results
	@$(BIN)/python kernels/bench/attend_bench.py $(ARGS)

# On a GPU machine that is offline these run with the system's Python, which needs torch, triton and numpy, nothing else.
GPU_PYTHON ?= python3

.PHONY: gpu-test
gpu-test: ## Check the operator on a GPU (no set-up; within 9 minutes)
	@$(GPU_PYTHON) tests/gpu/run.py $(ARGS)

.PHONY: gpu-bench
gpu-bench: ## Time the operator on a GPU (no set-up; within 9 minutes)
	@$(GPU_PYTHON) kernels/bench/attend_bench.py --device cuda $(ARGS)

.PHONY: lint
lint: $(READY) ## Ruff, the import rule, and mypy on the strict modules
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/lint-imports
	@$(BIN)/mypy

.PHONY: smoke
smoke: $(READY) ## A whole run in under a minute on one process: prepare, train, report
	@$(BIN)/moba-train prep stdlib --out data/smoke --vocab-size 1024 --max-mib 1 --needles 64:512
	@$(BIN)/moba-train train configs/smoke.toml --resume auto
	@$(BIN)/moba-train report runs/smoke

.PHONY: demo
demo: $(READY) ## Prepare, train on 2 ranks, stop, resume, find the needle, report (about 7 minutes on 2 cores)
	@launch/demo.sh "$(BIN)" "$(DEMO_RANKS)" "$(DEMO_RUN)"

.PHONY: million
million: $(READY) ## One step on a document of 1,048,576 tokens on two CPU ranks, and its memory (4 to 8 minutes on 2 cores, 11 GiB)
	@$(BIN)/moba-train prep stdlib --out data/million --vocab-size 4096 --join
	@$(BIN)/moba-train plan configs/million_cpu.toml
	@rm -rf runs/million
	@$(TORCHRUN) 2 -m moba_train train configs/million_cpu.toml
	@$(BIN)/moba-train report runs/million
	@$(BIN)/python launch/check_million.py runs/million

.PHONY: scaling
scaling: $(READY) ## Write docs/scaling.md: bytes, time, balance and memory of an 8B model on 8 to 512 GPUs, on paper (4 minutes)
	@$(BIN)/python docs/scaling/make.py

.PHONY: clean
clean: ## Remove the virtual environment, prepared data and runs
	rm -rf $(VENV) $(VENV_LATEST) data/demo data/smoke data/million runs
