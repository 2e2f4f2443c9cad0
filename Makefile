# Needs only Python 3.10 or newer (3.11 is tested), make and git. Everything is installed into .venv.
SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help

PYTHON ?= $(shell command -v python3.11 || command -v python3)
TORCH := 2.13.0
DEEPSPEED := 0.19.8
OLD_DEEPSPEED := 0.16.9
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
# A GPU machine gets the CUDA build, any other the CPU build, which is a tenth of its size.
BUILD := $(if $(shell nvidia-smi -L 2>/dev/null),cuda,cpu)
TORCH_STAMP := $(VENV)/.torch-$(TORCH)-$(BUILD)
JOB_STAMP := $(VENV)/.installed-job
DEV_STAMP := $(VENV)/.installed-dev
EXTRAS_STAMP := $(VENV)/.installed-extras
OLD_STAMP := $(VENV)/deepspeed-$(OLD_DEEPSPEED)
CONFIG ?= configs/recipes/quickstart.yaml
WORKERS ?= 2
PYTEST_ARGS ?=

.PHONY: help quickstart check test test-all lint format clean

help: ## show this list
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-12s %s\n", $$1, $$2}'

quickstart: $(JOB_STAMP) ## set up and fine-tune on handwritten digits, AdamW beside SPD (minutes, CPU is enough)
	$(BIN)/sharded-spd finetune $(CONFIG)

check: lint ## the developer's loop, in about two minutes: lint and the unit tests that start no ranks
	$(BIN)/python -m pytest tests/unit tests/reference -m "not slow" -n $(WORKERS) --dist loadgroup --no-loadscope-reorder $(PYTEST_ARGS)

test: $(DEV_STAMP) ## set up and run the quick tests, in WORKERS processes at once
	$(BIN)/python -m pytest -m "not slow" -n $(WORKERS) --dist loadgroup --no-loadscope-reorder $(PYTEST_ARGS)

test-all: $(DEV_STAMP) $(OLD_STAMP) $(EXTRAS_STAMP) ## set up and run every test, parity also on the other kernels, DeepSpeed also in its oldest version
	$(BIN)/python -m pytest $(PYTEST_ARGS)
	SHARDED_SPD_KERNELS=reference $(BIN)/python -m pytest tests/parity -m "not slow" $(PYTEST_ARGS)
	SHARDED_SPD_KERNELS=triton TRITON_INTERPRET=1 $(BIN)/python -m pytest tests/parity/test_parity.py -k single-1-golden $(PYTEST_ARGS)
	PYTHONPATH=$(OLD_STAMP) $(BIN)/python -m pytest tests/parity/test_zero.py $(PYTEST_ARGS)

lint: $(DEV_STAMP) ## style, formatting, types and the direction of imports
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/lint-imports

format: $(DEV_STAMP) ## reformat and mend what can be mended
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

clean: ## remove .venv and all caches
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .ruff_cache .mypy_cache .import_linter_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# torch first and by itself. The CPU build is taken from wherever pip is set up to look, else from torch's own
# index, else (systems whose plain build is the CPU one) as the plain version.
$(TORCH_STAMP):
	@"$(PYTHON)" -c 'import sys; sys.exit(sys.version_info < (3, 10))' \
	  || { echo "Python 3.10 or newer is needed, got: $(PYTHON). Name one: make PYTHON=/path/to/python3.11" >&2; exit 1; }
	"$(PYTHON)" -m venv $(VENV)
ifeq ($(BUILD),cpu)
	@echo "torch $(TORCH): the CPU build (no NVIDIA GPU seen)"
	$(PIP) install -qq "torch==$(TORCH)+cpu" 2>/dev/null \
	  || $(PIP) install -qq "torch==$(TORCH)+cpu" --retries 1 --timeout 20 \
	       --extra-index-url https://download.pytorch.org/whl/cpu \
	  || $(PIP) install -qq "torch==$(TORCH)"
else
	@echo "torch $(TORCH): the CUDA build (an NVIDIA GPU is present)"
	$(PIP) install -qq "torch==$(TORCH)"
endif
	@touch $@

$(JOB_STAMP): pyproject.toml $(TORCH_STAMP)
	@echo "sharded_spd and what the fine-tuning command needs"
	$(PIP) install -qq -e ".[job]" "torch==$(TORCH)"
	@touch $@

$(DEV_STAMP): pyproject.toml $(TORCH_STAMP)
	@echo "sharded_spd, the fine-tuning command, the test and the checking tools"
	$(PIP) install -qq -e ".[job,lora,deepspeed,fairscale,test,dev]" "torch==$(TORCH)" "deepspeed==$(DEEPSPEED)"
	@touch $@ $(JOB_STAMP)

$(EXTRAS_STAMP): $(DEV_STAMP)
	$(PIP) install -qq -e ".[wandb,mlflow,minilm]" "torch==$(TORCH)"
	@touch $@

$(OLD_STAMP): $(DEV_STAMP)
	$(PIP) install -qq --no-deps --target $@ "deepspeed==$(OLD_DEEPSPEED)"
	@touch $@
