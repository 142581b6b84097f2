# The virtual environment is made on first use and reinstalled only when pyproject.toml or constraints.txt change.
# PYTHON chooses the interpreter it is made with. FLOWGUIDES_DATA, where set, reaches every program unchanged.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP_INSTALL := $(BIN)/python -m pip install --disable-pip-version-check -c constraints.txt

.DEFAULT_GOAL := help
.PHONY: help demo test lint docs clean
.NOTPARALLEL:

help:
	@echo "make demo   fit the eight-schools example; results go to demo_output/"
	@echo "make test   lint, type check, tests and docstring examples"
	@echo "make lint   ruff and mypy only"
	@echo "make docs   build the HTML documentation into docs/_build/html"
	@echo "make clean  remove everything that these made, except $(VENV)"

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed-base: pyproject.toml constraints.txt | $(BIN)/python
	$(PIP_INSTALL) -e .
	touch $@

$(VENV)/.installed-dev: pyproject.toml constraints.txt | $(BIN)/python
	$(PIP_INSTALL) -e ".[dev]"
	touch $(VENV)/.installed-base $@

demo: $(VENV)/.installed-base
	$(BIN)/python examples/eight_schools.py --output demo_output

lint: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy pyro_flowguides

test: lint
	OMP_NUM_THREADS=1 MPLBACKEND=Agg $(BIN)/pytest -n 2 --dist worksteal

docs: $(VENV)/.installed-dev
	$(BIN)/sphinx-build -W --keep-going -b html docs docs/_build/html

clean:
	rm -rf demo_output docs/_build build dist *.egg-info .pytest_cache .hypothesis .mypy_cache .ruff_cache
	find . -path ./$(VENV) -prune -o -type d -name __pycache__ -exec rm -rf {} +
