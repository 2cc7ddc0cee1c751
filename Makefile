# make demo      set up .venv and run the whole pipeline on text found in this Python installation
# make test      set up .venv and run linter, type checker and the quick tests
# make test-all  the same with the slow tests
PYTHON ?= python3
RUN ?= runs/demo
BIN := .venv/bin

.PHONY: demo test test-all check clean

demo: .venv/installed
	$(BIN)/cpipe demo $(RUN)

test: check
	$(BIN)/pytest -m "not slow"

test-all: check
	$(BIN)/pytest

check: .venv/installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# pip, not uv: only pip takes a local CPU build of torch where one is configured.
.venv/installed: pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --editable .
	touch $@

.venv/installed-dev: .venv/installed
	$(BIN)/pip install --quiet --editable '.[dev]'
	touch $@

clean:
	rm -rf .venv build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis
