# Every target sets up what it needs in .venv when it is first called: Python 3.10 or later with pip, and make, will do.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable

.PHONY: test laws lint format quickstart bench release clean

test: $(VENV)/dev.stamp  ## the test suite
	$(BIN)/python -m pytest -n 2

laws: $(VENV)/dev.stamp  ## the same with many more random networks per law
	HYPOTHESIS_PROFILE=deep $(BIN)/python -m pytest -n 2

lint: $(VENV)/dev.stamp  ## what CI checks besides the tests
	$(BIN)/ruff format --check
	$(BIN)/ruff check
	$(BIN)/mypy

format: $(VENV)/dev.stamp
	$(BIN)/ruff format
	$(BIN)/ruff check --fix

quickstart: $(VENV)/examples.stamp  ## train, prune, fine-tune and draw docs/quickstart.png
	$(BIN)/python examples/quickstart.py

bench: $(VENV)/dev.stamp  ## every benchmark, one after the other
	set -e; for file in benchmarks/[!_]*.py; do echo "== $$file"; $(BIN)/python $$file; done

release: $(VENV)/dev.stamp  ## dist/: sdist and wheel, once the sdist passes its own tests (some: TESTS="tests/test_docs.py -x")
	.ci/release $(BIN)/python $(or $(TESTS),-n 2)

clean:
	rm -rf $(VENV)

$(VENV)/%.stamp: pyproject.toml constraints.txt | $(BIN)/python
	@echo "Setting up $(VENV): some 300 MB of wheels, several GB with a CUDA build of torch."
	$(INSTALL) ".[$*]"
	touch $@

$(BIN)/python:
	$(PYTHON) -c "import sys; sys.exit(sys.version_info < (3, 10) and 'taylorfx needs Python 3.10 or later; PYTHON=... names one')"
	$(PYTHON) -m venv $(VENV)
