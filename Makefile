# Two commands do everything on a fresh machine with Python 3.11 or newer and make:
#   make demo     environment, install, real images and weights, six methods on two processes, the table of differences
#   make test     environment, install, lint, types, the documentation, all tests
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# Without this, idle threads of one process spin on the core that another one needs.
export OMP_WAIT_POLICY := PASSIVE

.DEFAULT_GOAL := help
.PHONY: help demo test quick lint types docs links tests results bench gpu clean

help: ## list the targets
	@grep -hE '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z]+):.*## (.*)/  make \1\t\2/' | expand -t 18

demo: $(VENV)/.installed ## six methods on real images with a pretrained ViT (7 minutes on 2 cores, installation included)
	cores=$$($(BIN)/python -c 'import os; print(len(os.sched_getaffinity(0)))'); \
	$(BIN)/python train.py conf/compare/demo.yaml $$([ $$cores -gt 1 ] || echo fabric.devices=1)

test: lint types docs tests ## lint, types, the documentation and all tests

quick: $(VENV)/.installed ## the tests that take seconds, while you work
	$(BIN)/python -m pytest -n auto --maxprocesses=4 --dist worksteal -m 'not slow and not slurm'

lint: $(VENV)/.installed ## ruff: rules and format
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/.installed ## mypy, strict
	$(BIN)/mypy

# Needs no network. Every page is read anew (-E), because its text may come from the code; what notebooks print comes from
# the cache in build/docs as long as neither they nor the code have changed.
docs: $(VENV)/.installed ## the documentation: build/docs/html/index.html; any warning is an error
	rm -rf build/docs/html
	$(BIN)/python -m sphinx -E -W --keep-going -q -j auto -d build/docs/doctrees -b html docs build/docs/html
	@echo "open build/docs/html/index.html"

links: $(VENV)/.installed ## ask every external link of the documentation; needs network, so it is no part of `make test`
	$(BIN)/python -m sphinx -E --keep-going -q -j auto -D nb_execution_mode=off -D suppress_warnings=myst-nb.lexer \
	  -d build/docs/doctrees-links -b linkcheck docs build/docs/links

# A file of tests stays in one process, because what its tests share is made once; ranks of a run need cores, too. Jobs
# of a real Slurm are timed by the cluster: they come last, on two clusters, one test at a time on each.
tests: $(VENV)/.installed ## pytest, files side by side
	$(BIN)/python -m pytest -n auto --maxprocesses=4 --dist loadfile --no-loadscope-reorder --ignore=tests/slurm
	$(BIN)/python -m pytest -ra -n auto --maxprocesses=2 --dist load --maxschedchunk=1 tests/slurm

results: $(VENV)/.installed ## the demo over several rounds with four methods (about half an hour on 2 cores)
	for method in lora_fair fedit centralized local_only; do \
	  $(BIN)/python train.py conf/demo.yaml method.name=$$method || exit 1; \
	done

bench: $(VENV)/.installed ## the benchmarks of docs/performance.md, one after the other (about an hour on 2 quiet cores)
	@for line in local_training.py "local_training.py --cohort 6 --batch-size 8" rounds.py loading.py scheduling.py \
	  exchange.py server_step.py attention.py scaling.py; do \
	  echo; echo "== benchmarks/$$line"; $(BIN)/python benchmarks/$$line || exit 1; \
	done

gpu: $(VENV)/.installed ## correctness and speed on one GPU, in eight minutes; `make gpu GPU="--only b --minutes 3"` for a part
	$(BIN)/python benchmarks/gpu.py $(GPU)

clean: ## remove the environment and what tools left behind (runs/ and the download cache stay)
	rm -rf $(VENV) build .mypy_cache .pytest_cache .ruff_cache .hypothesis lorafair.egg-info

# TORCH names the build to install, e.g. TORCH='torch --index-url https://download.pytorch.org/whl/cu128'. Without it: on
# Linux without an NVIDIA GPU a CPU build (200 MB instead of several GB), from the configured package index if that has
# one, else from pytorch.org; everywhere else what the package index gives.
TORCH ?=
$(VENV)/.installed: pyproject.toml setup.py Makefile
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "lorafair needs Python 3.11 or newer; name one with: make PYTHON=python3.12 ..."; exit 1; }
	$(PYTHON) -m venv --clear $(VENV)
	@torch="$(TORCH)"; cpu=https://download.pytorch.org/whl/cpu; \
	if [ -z "$$torch" ] && [ "$$(uname -s)" = Linux ] && ! nvidia-smi -L >/dev/null 2>&1; then \
	  version=$$($(BIN)/pip index versions torch 2>/dev/null | grep -oE '[0-9.]+\+cpu' | head -n 1); \
	  if [ -n "$$version" ]; then torch="torch==$$version"; \
	  elif $(BIN)/pip download -q --no-deps --timeout 5 --retries 1 -d $(VENV)/probe --index-url $$cpu torchvision >/dev/null 2>&1; \
	  then torch="torch torchvision --index-url $$cpu"; fi; rm -rf $(VENV)/probe; \
	fi; \
	echo "installing $${torch:-torch} and the package into $(VENV)"; \
	$(BIN)/pip install -q $${torch:-torch} && \
	version=$$($(BIN)/python -c 'from importlib.metadata import version; print(version("torch"))') && \
	$(BIN)/pip install -q "torch==$$version" -e '.[dev]' # else the newest torchvision would bring another torch along
	@# lorafair itself copes with a torchvision made for another torch; this lets `import timm` alone do so, too
	@$(BIN)/python -c 'from lorafair.third_party import mend_torchvision; mend_torchvision()'
	@touch $@
