# The one command surface of the project: people, pre-commit and CI call these targets.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: help demo test lint check docs pictures notebooks bench study survey clean

help:  ## list the targets
	@grep -hE '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 10

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.demo: pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install --quiet --editable '.[demo]'
	@touch $@

$(VENV)/.dev: pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install --quiet --editable '.[dev]'
	@touch $@ $(VENV)/.demo $(VENV)/.docs

$(VENV)/.docs: pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install --quiet --editable '.[docs]'
	@touch $@

demo: $(VENV)/.demo  ## explain four photographs, offline, and write outputs/demo/index.html
	$(BIN)/parchgrad demo --force

test: $(VENV)/.dev  ## run every test
	$(BIN)/python -m pytest

lint: $(VENV)/.dev  ## ruff and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

docs: $(VENV)/.docs  ## build the pages into outputs/docs, warnings as errors
	$(BIN)/python -m sphinx -q -W --keep-going -b html docs outputs/docs
	@echo "Look at outputs/docs/index.html"

pictures: $(VENV)/.dev  ## draw the pictures of README and docs again
	$(BIN)/python tools/draw_figures.py

notebooks: $(VENV)/.dev  ## run the notebooks of docs/ again and write their outputs into them
	$(BIN)/python tools/run_notebooks.py

bench: $(VENV)/.dev  ## measure speed and memory beside Captum, and of statistics; an hour, on a quiet machine
	$(BIN)/python benchmarks/speed.py
	$(BIN)/python benchmarks/class_log_p.py
	$(BIN)/python benchmarks/collection.py
	$(BIN)/python benchmarks/collection.py --memory

study: $(VENV)/.dev  ## vary every setting on three networks, write docs/study; over an hour, resumed where it stopped
	$(BIN)/python -m benchmarks.study

survey: $(VENV)/.dev  ## try every family of torchvision and timm, write docs/models.md; ten minutes on one core
	$(BIN)/python tools/survey_models.py

check: lint test  ## all that a change must pass

clean:  ## remove the environment and everything generated
	rm -rf $(VENV) outputs build dist .mypy_cache .pytest_cache .ruff_cache .hypothesis
