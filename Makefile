# Targets for people; `make help` lists them.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
ARGS ?=
export NO_ALBUMENTATIONS_UPDATE := 1
unexport PYTHONDONTWRITEBYTECODE  # the tests start segkit hundreds of times

.DEFAULT_GOAL := help
.PHONY: help setup train test gpu-test lint types smoke golden soak audit docs tensorboard loss-table clean

help:  ## show this list
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /\t/' | awk -F'\t' '{printf "  make %-12s %s\n", $$1, $$2}'

# A link leads to the environment of another checkout, whose segkit an installation from here would replace.
# Modules are compiled by all cores, where pip takes one: left to the first import, it would be done at every start where
# Python may not write (in a container, or with PYTHONDONTWRITEBYTECODE), which doubles the time of one.
$(STAMP): pyproject.toml
ifneq ($(shell test -L $(VENV) && echo link),)
	@echo "note: $(VENV) is a link to $$(readlink -f $(VENV)): it is used as it is, and nothing is installed into it"
else
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --no-compile -e '.[dev,export,search,docs]'
	$(BIN)/python -m compileall -qq -j 0 $(VENV)/lib segkit || true  # some hold templates that are no Python
	touch $@
endif

setup: $(STAMP)  ## create .venv with segkit, the developer tools and most extras

train: $(STAMP)  ## run the main job: train on the embedded data set (ARGS="key=value ..." overrides)
	$(BIN)/python train.py experiment=synthetic_cpu $(ARGS)

test: $(STAMP)  ## run the tests (ARGS="-k name ..." chooses)
	$(BIN)/python -m pytest -n 2 --dist worksteal --durations=20 $(ARGS)

gpu-test: $(STAMP)  ## on a machine with a GPU: its tests, and the benches as a table for the README (gpu.md)
	$(BIN)/python scripts/gpu_report.py $(ARGS)

test-all: $(STAMP)  ## run all tests, those that take minutes each too
	$(BIN)/python -m pytest -n 2 --dist worksteal -m "" $(ARGS)

lint: $(STAMP)  ## check style
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(STAMP)  ## check types
	$(BIN)/mypy

smoke: $(STAMP)  ## every phase for a few steps, under 40 s
	$(BIN)/python train.py debug=smoke $(ARGS)

golden: $(STAMP)  ## write the golden traces again (a refactor must leave them unchanged)
	$(BIN)/python -m pytest tests/test_golden.py --write-golden

soak: $(STAMP)  ## kill and resume a small run at 30 random moments, then 2,000 steps watched for leaks
	$(BIN)/python scripts/soak.py $(ARGS)

audit: $(STAMP)  ## compare the installed packages with the known advisories; needs the network
	@if $(BIN)/python -c "import json, urllib.request as r; \
	json.load(r.urlopen('https://pypi.org/pypi/pillow/9.0.0/json', timeout=10))['vulnerabilities'][0]" 2>/dev/null; \
	then $(BIN)/pip-audit --skip-editable $(ARGS); \
	else echo "skipped: pypi.org, which lists the advisories, cannot be reached from here (a mirror without them does not do)"; fi

loss-table: $(STAMP)  ## write the table of the loss contract for the documentation
	$(BIN)/python -m pytest tests/losses/test_contract.py --loss-table=docs/loss_table.md -q

docs: $(STAMP)  ## build the documentation site into site/
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

tensorboard: $(STAMP)  ## look at all runs below outputs/
	$(BIN)/tensorboard --logdir outputs

clean:  ## delete caches and built files (not the runs)
	rm -rf site dist build .pytest_cache .ruff_cache .mypy_cache
