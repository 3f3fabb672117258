# Every target makes what it needs, in a virtual environment of the newest supported Python that is found.
# Another one: make test PYTHON=python3.12

ifndef PYTHON
# One that is there but does not run, as a pyenv shim may be, or that cannot make virtual environments, is no find.
PYTHON := $(shell for python in python3.13 ~/.pyenv/versions/3.13.*/bin/python python3.12 \
	~/.pyenv/versions/3.12.*/bin/python python3.11 ~/.pyenv/versions/3.11.*/bin/python python3; do \
	$$python -c 'import ensurepip, sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$python && break; done)
endif

VERSION := $(shell $(PYTHON) -c 'import ensurepip, sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null)
ifeq ($(VERSION),)
$(error $(or $(PYTHON),Python 3.11 or later) is not here, or cannot make virtual environments: install it with its \
venv package (Debian: apt-get install python3 python3-venv), or name another with PYTHON=)
endif

VENV := .venv/$(VERSION)
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --quiet --disable-pip-version-check

.PHONY: demo test test-all lint types bench soak clean

demo: $(VENV)/demo.installed
	$(BIN)/python -m shardrepo demo $(ARGS)

# Those whom the benchmarks compare with are tested too: each has to find its own rows.
test: $(VENV)/test.installed $(VENV)/bench.installed
	$(BIN)/python -m pytest -n 2 --dist loadfile $(ARGS)

# Also what takes minutes: a hundred thousand operations, hundreds of databases.
test-all: $(VENV)/test.installed $(VENV)/bench.installed
	SHARDREPO_LONG=1 $(BIN)/python -m pytest -n 2 --dist loadfile $(ARGS)

# Not the pages: the README lines up the comments of its examples.
lint: $(VENV)/lint.installed
	$(BIN)/ruff format --check --config 'format.exclude = ["*.md"]' .
	$(BIN)/ruff check .

types: $(VENV)/test.installed $(VENV)/types.installed
	$(BIN)/mypy
	$(BIN)/pyright --pythonpath $(BIN)/python

bench: $(VENV)/test.installed $(VENV)/bench.installed
	SHARDREPO_LONG=1 $(BIN)/python -m benchmarks --write $(ARGS)

# The load while everything fails: make soak ARGS='--minutes 30'
soak: $(VENV)/test.installed
	$(BIN)/python -m benchmarks soak $(ARGS)

clean:
	rm -rf .venv .pytest_cache .mypy_cache .ruff_cache .hypothesis dist

# All or nothing: half an environment would be taken for one by the next run.
$(BIN)/python:
	$(PYTHON) -m venv $(VENV) && $(PIP) install --upgrade 'pip>=25.1' || { rm -rf $(VENV); exit 1; }

$(VENV)/demo.installed: pyproject.toml | $(BIN)/python
	$(PIP) install --editable '.[demo]'
	@touch $@

$(VENV)/test.installed: pyproject.toml | $(BIN)/python
	$(PIP) install --editable '.[demo,test]'
	@touch $@

$(VENV)/%.installed: pyproject.toml | $(BIN)/python
	$(PIP) install --group $*
	@touch $@
