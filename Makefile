# One target a habit. `make train` and `make test` install what they need first.

PYTHON ?= $(shell for p in python3 python3.13 python3.12 python3.11 python; do \
	$$p -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$p && break; done)
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
EXTRAS ?= dev
ARGS ?=
JOBS ?= 2

export PIP_ROOT_USER_ACTION := ignore
export PIP_DISABLE_PIP_VERSION_CHECK := 1
ifeq ($(OMP_WAIT_POLICY)$(KMP_BLOCKTIME),) # as mmprune_train/threads.py, also where torch is imported first
export GOMP_SPINCOUNT ?= 2000
endif

.DEFAULT_GOAL := help
.PHONY: help install train smoke test test-slow test-fuzz test-slurm test-cuda lint format docs clean

help: ## this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /  make \1\t/' | expand -t 20

install: $(STAMP) ## create .venv and install the project (EXTRAS=dev,gpu)

$(STAMP): pyproject.toml
	@test -n "$(PYTHON)" || { echo "Python 3.11 or newer with venv is needed (Debian: apt install python3-venv); PYTHON=... names one" >&2; exit 2; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -e '.[$(EXTRAS)]'
	@touch $@

train: $(STAMP) ## the main job: +experiment=demo (ARGS="key=value ...")
	$(BIN)/python -m mmprune_train +experiment=demo $(ARGS)

smoke: $(STAMP) ## both stages with tiny random models, under a minute
	$(BIN)/python -m mmprune_train +experiment=smoke $(ARGS)

test: $(STAMP) ## the tests that fit ten minutes (ARGS="tests/config -k typo")
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(JOBS) -m "not slow and not slurm and not fuzz and not cuda" $(ARGS)

test-slow: $(STAMP) ## the tests that take long
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(JOBS) --dist loadfile -m "slow and not slurm and not cuda" $(ARGS)

test-fuzz: $(STAMP) ## broken records, images, overrides and files by the thousand (ARGS="--fuzz-seed=7")
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(JOBS) -m fuzz tests/fuzz $(ARGS)

test-slurm: $(STAMP) ## jobs of a real Slurm of two nodes on this machine, which root installs where apt-get can
	$(BIN)/python tests/slurm/cluster.py install
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m slurm tests/slurm $(ARGS)

test-cuda: $(STAMP) ## what only a GPU can show (MMPRUNE_TEST_DEVICE=cpu: as much of it as a CPU can)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m cuda tests/gpu $(ARGS)

lint: $(STAMP) ## ruff and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(STAMP) ## let ruff mend what it can
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: $(STAMP) ## API pages in build/docs
	$(BIN)/pdoc mmprune_train -o build/docs

clean: ## remove .venv and caches (never runs/)
	rm -rf $(VENV) build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis
