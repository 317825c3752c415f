# Two commands are all that a newcomer needs: `make demo` and `make test`. Both install first.
# TORCH_INDEX=<url of a wheel index> takes torch from there, e.g. PyTorch's index of CPU wheels.

PYTHON ?= python3
BIN := .venv/bin
INSTALLED := .venv/.installed
TORCH := $(shell sed -n 's/^torch==/torch==/p' constraints.txt)

.PHONY: demo test ui lint clean

demo: $(INSTALLED)  ## the default task from files to verdict; again: only what is missing
	@$(BIN)/dsel run tasks/digits.yaml

test: $(INSTALLED)
	$(BIN)/python -m pytest -n 2

ui: $(INSTALLED)  ## Dagster on http://127.0.0.1:3000, MLflow on http://127.0.0.1:5000
	@$(BIN)/dsel ui

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

$(INSTALLED): pyproject.toml constraints.txt
	@echo "installing into .venv (one to three minutes)"
	@$(PYTHON) -m venv .venv
	@$(BIN)/python -m pip install -q $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) $(TORCH)
	@$(BIN)/python -m pip install -q -c constraints.txt -e '.[dev]'
	@touch $@

clean:  ## the environment; the store stays
	rm -rf .venv
