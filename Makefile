# These do all the set-up there is, and may be repeated at will.
#
#   make chat               talk to the built-in model; ARGS="--temperature 0" passes flags on
#   make serve              put it behind HTTP, with a web chat; ARGS="--port 8080" passes flags on
#   make demo-cluster       a gateway and two workers on this machine; kill one, and its answers go on
#   make test               the whole test suite; ARGS="tests/engine -x" runs a part of it
#   make test-clients       real clients against a real server; downloads each into an environment of its own
#   make check              lint, types and layers
#   make reference          write docs/reference/ from the code
#   make docs               build the documentation site in build/site; broken links fail
#   make clean              remove what make made

PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
# Torch first and pinned: a range would pull gigabytes of CUDA where there may be no GPU.
PIP    := $(BIN)/python -m pip --disable-pip-version-check install --quiet --constraint constraints.txt

.PHONY: chat serve demo-cluster test test-clients check reference docs clean

chat: $(VENV)/installed
	@$(BIN)/moesaic chat $(ARGS)

serve: $(VENV)/installed-serve
	@$(BIN)/moesaic serve --log-format text $(ARGS)

demo-cluster: $(VENV)/installed-worker
	@BIN=$(BIN) exec deploy/demo-cluster.sh

test: $(VENV)/installed-test
	@$(BIN)/python -m pytest $(ARGS)

test-clients: $(VENV)/installed-test
	@$(BIN)/python -m pytest -m clients tests/clients $(ARGS)

check: $(VENV)/installed-test
	@$(BIN)/ruff check . && $(BIN)/ruff format --check . && $(BIN)/mypy && $(BIN)/python -m pytest tests/test_layers.py

reference: $(VENV)/installed-test
	@$(BIN)/python -m tools.generate_reference

docs: $(VENV)/installed-docs
	@$(BIN)/zensical build --strict --clean

$(VENV)/python: constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Moesaic needs Python 3.11 or later; try make PYTHON=python3.12")'
	@echo "Setting up $(VENV); the first time takes a minute ..." >&2
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(PIP) $$(cat constraints.txt) >&2
	@touch $@

$(VENV)/installed: pyproject.toml CMakeLists.txt $(wildcard csrc/*.* csrc/formats/*) $(VENV)/python
	@$(PIP) --editable . >&2
	@touch $@

$(VENV)/installed-serve: pyproject.toml $(VENV)/installed
	@$(PIP) --editable '.[serve]' >&2
	@touch $@

$(VENV)/installed-worker: pyproject.toml $(VENV)/installed
	@$(PIP) --editable '.[worker]' >&2
	@touch $@

$(VENV)/installed-test: pyproject.toml $(VENV)/installed
	@$(PIP) --editable '.[test]' >&2
	@touch $@

$(VENV)/installed-docs: pyproject.toml $(VENV)/installed
	@$(PIP) --editable '.[docs]' >&2
	@touch $@

clean:
	@rm -rf $(VENV) build dist .cache .mypy_cache .ruff_cache .pytest_cache .hypothesis
