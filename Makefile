VENV ?= .venv
PYTHON ?= python3
ACCELERATOR ?= cpu
CONSTRAINTS ?= constraints.txt
WORKERS ?= $(shell getconf _NPROCESSORS_ONLN)

PY := $(VENV)/bin/python
# worksteal: what lies together, and shares fixtures, runs in one worker; a worker that is done takes over
PYTEST := $(PY) -m pytest --numprocesses=$(WORKERS) --maxprocesses=8 --dist=worksteal
# --no-compile: Python compiles what is imported when it is, a small part
PIP_INSTALL := $(PY) -m pip install --no-compile $(if $(CONSTRAINTS),-c $(CONSTRAINTS))
EXTRAS_cpu := train,eval,dev
EXTRAS_cuda := $(EXTRAS_cpu),cuda
EXTRAS_tpu := $(EXTRAS_cpu),tpu
EXTRAS := $(EXTRAS_$(ACCELERATOR))
STAMP := $(VENV)/.install-$(ACCELERATOR)$(if $(CONSTRAINTS),,-unconstrained)
PARITY_STAMP := $(VENV)/.install-parity
PLAN_STAMP := $(VENV)/.install-plan

ifeq ($(EXTRAS),)
$(error ACCELERATOR: expected cpu, cuda or tpu, got '$(ACCELERATOR)')
endif

.DEFAULT_GOAL := help
.PHONY: help install demo clean-demo test test-slow soak soak-short parity plan-check check lint format-check types format

help:  ## show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "make %-12s %s\n", $$1, $$2}' $(MAKEFILE_LIST)
	@echo "Variables: VENV=$(VENV) PYTHON=$(PYTHON) ACCELERATOR=$(ACCELERATOR) (cpu, cuda or tpu) CONSTRAINTS=$(CONSTRAINTS) WORKERS=$(WORKERS)"

install: $(STAMP)  ## make the virtual environment with everything in it

$(PY):
	$(PYTHON) -m venv $(VENV)

$(STAMP): pyproject.toml $(CONSTRAINTS) | $(PY)
	$(PIP_INSTALL) -e ".[$(EXTRAS)]"
	$(PIP_INSTALL) --no-deps lm-eval # its IFEval verifiers; the thirty packages that the rest of it needs stay away
	@touch $@

$(PARITY_STAMP): $(STAMP)
	$(PIP_INSTALL) -e ".[parity]"
	@touch $@

$(PLAN_STAMP): $(STAMP)
	$(PIP_INSTALL) -e ".[plan-gpu,tpu]"
	@touch $@

demo: install  ## train GOPO and GRPO on the small review data and compare them
	$(PY) data/reviews/prepare.py runs/demo
	$(PY) -m train sft --config configs/demo/sft.yaml
	$(PY) -m train reward --config configs/demo/reward.yaml
	$(PY) -m train reward --config configs/demo/judge.yaml
	$(PY) -m train policy --config configs/demo/gopo.yaml
	$(PY) -m train policy --config configs/demo/grpo.yaml
	$(PY) -m eval generate --config configs/demo/generate.yaml --checkpoint runs/demo/gopo --out runs/demo/texts/gopo.jsonl
	$(PY) -m eval generate --config configs/demo/generate.yaml --checkpoint runs/demo/grpo --out runs/demo/texts/grpo.jsonl
	$(PY) -m eval judge runs/demo/texts/gopo.jsonl runs/demo/texts/grpo.jsonl --backend reward_model --model runs/demo/judge --name_a GOPO --name_b GRPO --out runs/demo/judged
	$(PY) -m eval compare runs/demo/gopo runs/demo/grpo --judge runs/demo/judge --name_a GOPO --name_b GRPO --judged runs/demo/judged --out runs/demo/compare
	$(PY) -m eval report runs/demo/gopo runs/demo/grpo --reward_models runs/demo/reward runs/demo/judge --compare runs/demo/compare --out runs/demo

clean-demo:  ## remove what the demo made
	rm -rf runs/demo

test: install  ## run the quick tests
	$(PYTEST)

test-slow: install  ## run the tests that take minutes
	$(PYTEST) -m slow

soak: install  ## kill runs at random moments, feed programs inputs that are almost valid, damage, full disks: half an hour
	$(PY) -m bench.soak all

soak-short: install  ## the same for a minute or two
	$(PY) -m bench.soak all --short --seed 1

parity: $(PARITY_STAMP)  ## compare with PyTorch (installs torch)
	$(PYTEST) -m parity

plan-check: $(PLAN_STAMP)  ## compile for GPUs and TPUs (installs their compilers, no CUDA)
	$(PYTEST) -m compilers

check: lint format-check types  ## lint, formatting, types: what CI runs before the tests

lint: install
	$(PY) -m ruff check .

format-check: install
	$(PY) -m ruff format --check .

types: install
	$(PY) -m mypy

format: install  ## format the code and fix what ruff can fix
	$(PY) -m ruff format .
	$(PY) -m ruff check --fix .
