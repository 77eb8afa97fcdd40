# The one command surface of the project: people, pre-commit and CI call these targets.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
LOWEST := .venv-lowest
# Every process computes on one core, so that they do not wait for each other.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses auto --maxprocesses 4 --dist worksteal
# The oldest Python that the package takes, wherever it is; else the usual one.
LOWEST_PYTHON ?= $(firstword $(shell for python in python3.10 $$(pyenv root 2>/dev/null)/versions/3.10.*/bin/python3.10 \
	$(PYTHON); do $$python -c 'import sys; print(sys.executable)' 2>/dev/null; done))

.PHONY: help demo test test-system test-all test-lowest lint check docs pictures notebooks bench gpu soak study leaderboard survey mutants \
	fuzz clean

help:  ## list the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 13

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.demo: pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install --quiet --editable '.[demo]'
	@touch $@

$(VENV)/.dev: pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install --quiet --editable '.[dev]'
	@touch $@ $(VENV)/.demo $(VENV)/.docs

$(LOWEST)/.dev: pyproject.toml tools/lowest_versions.py
	$(LOWEST_PYTHON) -m venv --clear $(LOWEST)
	$(LOWEST)/bin/python -m pip install --quiet packaging tomli
	$(LOWEST)/bin/python tools/lowest_versions.py test > $(LOWEST)/constraints.txt
	$(LOWEST)/bin/python -m pip install --quiet --constraint $(LOWEST)/constraints.txt --editable '.[test]'
	@touch $@

$(VENV)/.docs: pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install --quiet --editable '.[docs]'
	@touch $@

$(VENV)/.leaderboard: $(VENV)/.dev
	$(BIN)/python -m pip install --quiet --editable '.[leaderboard]'
	@touch $@

$(VENV)/.mutants: $(VENV)/.dev
	$(BIN)/python -m pip install --quiet 'mutmut>=3.8,<4'
	@touch $@

demo: $(VENV)/.demo  ## explain four photographs, offline, and write outputs/demo/index.html
	$(BIN)/parchgrad demo --force

test: $(VENV)/.dev  ## run the tests of all that the package does
	$(PYTEST) --ignore=tests/system

test-system: $(VENV)/.dev  ## run the tests that start browsers, processes and crowds, or try whole pages and networks
	$(PYTEST) tests/system

test-all: test test-system  ## run every test

test-lowest: $(LOWEST)/.dev  ## run the tests with the lowest versions that pyproject.toml admits, on Python 3.10 if found
	$(subst $(VENV),$(LOWEST),$(PYTEST)) --ignore=tests/system --ignore=tests/explorer --ignore=src/parchgrad/explorer

lint: $(VENV)/.dev  ## ruff and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

docs: $(VENV)/.docs  ## build the pages into outputs/docs, warnings as errors
	$(BIN)/python -m sphinx -q -W --keep-going -b html docs outputs/docs
	@echo "Look at outputs/docs/index.html"

pictures: $(VENV)/.dev  ## draw the pictures of README and docs again
	$(BIN)/python tools/draw_figures.py
	$(BIN)/python tools/draw_gallery.py
	$(BIN)/python tools/draw_report.py

notebooks: $(VENV)/.dev  ## run the notebooks of docs/ again and write their outputs into them
	$(BIN)/python tools/run_notebooks.py

bench: $(VENV)/.dev  ## measure imports, speed and memory beside Captum, and statistics; an hour, on a quiet machine
	$(BIN)/python benchmarks/imports.py
	$(BIN)/python benchmarks/speed.py
	$(BIN)/python benchmarks/class_log_p.py
	$(BIN)/python benchmarks/collection.py
	$(BIN)/python benchmarks/collection.py --memory

gpu: $(VENV)/.dev  ## check and measure on a CUDA device, write outputs/gpu; eight minutes, no network needed
	$(BIN)/python -m benchmarks.gpu

soak: $(VENV)/.dev  ## twenty users of the explorer for a minute, threads on one model, and thousands of explanations
	PARCHGRAD_SOAK_SECONDS=60 $(BIN)/python -m pytest tests/system/test_crowd.py tests/system/test_concurrency.py tests/system/test_leaks.py

study: $(VENV)/.dev  ## vary every setting on four networks, write docs/study; over an hour, resumed where it stopped
	$(BIN)/python -m benchmarks.study

leaderboard: $(VENV)/.leaderboard  ## compare the methods people use on six networks, write docs/leaderboard; under two hours, resumed where it stopped
	$(BIN)/python -m benchmarks.leaderboard

survey: $(VENV)/.dev  ## try every family of torchvision and timm, write docs/models.md; 20 minutes on one core
	$(BIN)/python tools/survey_models.py

mutants: $(VENV)/.mutants  ## change the maths in every small way and see a test fail; 15 minutes
	rm -rf mutants
	OMP_NUM_THREADS=1 $(BIN)/mutmut run --max-children 2
	$(BIN)/mutmut results

FUZZ ?= 4000
fuzz: $(VENV)/.dev  ## try every parser of files with FUZZ spoilt ones, others each time; ten minutes for 4000
	HYPOTHESIS_EXAMPLES=$(FUZZ) $(BIN)/python -m pytest tests/system/test_hostile_files.py --durations=0 \
	  --hypothesis-seed=$$($(BIN)/python -c 'import secrets; print(secrets.randbelow(10**9))')

check: lint test  ## the quick part of what CI runs

clean:  ## remove the environment and everything generated
	rm -rf $(VENV) $(LOWEST) outputs mutants build dist .mypy_cache .pytest_cache .ruff_cache .hypothesis
