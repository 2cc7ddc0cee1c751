# make demo      set up .venv and run the whole pipeline on text found in this Python installation
# make test      set up .venv and run linter, type checker and the quick tests
# make test-all  the same, and then the slow tests
#
# WORKERS=8 tests by so many processes at once; the slow tests go one by one, as they start processes and measure time.
PYTHON ?= python3
RUN ?= runs/demo
WORKERS ?= 2
BIN := .venv/bin

.PHONY: demo test test-all check clean

demo: .venv/installed
	$(BIN)/cpipe demo $(RUN)

test: check
	OMP_NUM_THREADS=1 $(BIN)/pytest -m "not slow" --numprocesses $(WORKERS) --dist loadfile

test-all: test
	$(BIN)/pytest -m slow

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
