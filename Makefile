# Everything here sets itself up: Python >= 3.10 with venv, make and a C++17 compiler are enough. `make help` lists targets.
PYTHON ?= python3
VENV ?= .venv
JOBS ?= 2
BIN := $(VENV)/bin

CPP_FILES = $(shell find csrc tests/host -name '*.h' -o -name '*.cpp' -o -name '*.cu' -o -name '*.cuh')
BUILD_INPUTS := setup.py pyproject.toml CMakeLists.txt \
                $(shell find csrc cmake -type f 2>/dev/null) cce_ext/_version.py
INSTALLED := $(VENV)/.installed
BUILT := $(VENV)/.built

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help setup build demo test lint format wheel clean

help:  ## this list
	@sed -n 's/^\([a-z]*\):.*##  *\(.*\)/  make \1	\2/p' $(MAKEFILE_LIST) | expand -t 16

$(INSTALLED): requirements-dev.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
	  { echo "Python >= 3.10 is needed: make PYTHON=/path/to/python3 ..."; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements-dev.txt
	touch $@

$(BUILT): $(INSTALLED) $(BUILD_INPUTS)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-build-isolation --no-deps -e .
	touch $@

setup: $(INSTALLED)  ## create .venv with the pinned dependencies

build: $(BUILT)  ## compile and install into .venv, editable

demo: $(BUILT)  ## train and compare a small model
	$(BIN)/python -m examples.demo

test: $(BUILT)  ## every test that this machine can run
	$(BIN)/python -m pytest -q tests -n $(JOBS)

lint: $(INSTALLED)  ## ruff and clang-format, nothing is changed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run -Werror $(CPP_FILES)

format: $(INSTALLED)  ## let ruff and clang-format rewrite the sources
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(CPP_FILES)

wheel: $(INSTALLED)  ## dist/*.whl for this Python
	$(BIN)/python -m build --wheel --no-isolation

clean:  ## remove what was built, keep .venv
	rm -rf build dist *.egg-info cce_ext/*.so $(BUILT)
	find . -name __pycache__ -not -path './$(VENV)/*' -prune -exec rm -rf {} +
