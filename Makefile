# `make demo` and `make test` set everything up on a fresh machine with Python 3.11+.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin

.PHONY: demo test test-long test-cuda docs check format clean

$(VENV)/demo.stamp: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --editable '.[demo]' --constraint constraints.txt
	touch $@

$(VENV)/test.stamp: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --editable '.[demo,test,frameworks]' --constraint constraints.txt
	touch $@ $(VENV)/demo.stamp

# The report page is tested in a real browser: the one that is there, or Chromium from the system's packages.
$(VENV)/browser.stamp: $(VENV)/test.stamp
	$(BIN)/python tests/browser.py --install
	touch $@

$(VENV)/docs.stamp: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --editable '.[docs]' --constraint constraints.txt
	touch $@

demo: $(VENV)/demo.stamp
	$(BIN)/trajrec demo

test: $(VENV)/browser.stamp
	$(BIN)/python -m pytest -n 2 -q

test-long: $(VENV)/test.stamp
	$(BIN)/python -m pytest -q -m long

test-cuda: $(VENV)/test.stamp
	$(BIN)/python -m pytest -q -m cuda

docs: $(VENV)/docs.stamp
	$(BIN)/python docs/make_reference.py
	$(BIN)/python -m zensical build --strict

check: $(VENV)/test.stamp
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(VENV)/test.stamp
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache build *.egg-info
