# Everything a person or CI does with this repository. `make help` lists it.
# Needs only Python 3.11 or newer, make, and a package index that pip can reach.

SHELL := /bin/sh
.DEFAULT_GOAL := help

VENV := .venv
BIN := $(VENV)/bin
PYTHON ?= $(shell for p in python3.13 python3.12 python3.11 python3 python; do \
	$$p -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1 && echo $$p && break; done)
PROTOS := $(shell cd protos 2>/dev/null && find forebay -name '*.proto' | sort)
CODE := protos/forebay services/forebay orchestrator/forebay
CHECKED := services/forebay orchestrator/forebay examples/python/ask.py
# Most tests wait for processes and clocks rather than compute. Files stay whole, for their fixtures.
JOBS ?= 4
PYTEST := $(BIN)/python -m pytest

# What is tested is what is here, whatever the shell has on its path.
unexport PYTHONPATH

.PHONY: help run demo test unit contract e2e lint format protos bench live polyglot soak llama-server lock clean compose-up compose-down compose-image

help: ## Lists the targets.
	@awk -F ':.*## ' '/^[a-z0-9-]+:.*## / { printf "  make %-13s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

run: $(VENV)/.run ## Sets everything up, starts the mesh, asks a first question and keeps serving.
	@$(BIN)/forebay up --ask "What is the capital of France?"

demo: $(VENV)/.run ## Does the same once and exits; non-zero if no answer came.
	@$(BIN)/forebay up --ask "What is the capital of France?" --once

test: $(VENV)/.dev ## Runs the tests, with coverage across processes.
	@rm -f .coverage .coverage.*
	$(BIN)/python -m coverage run -m pytest --numprocesses $(JOBS) --dist loadfile $(ARGS)
	@$(BIN)/python -m coverage combine --quiet
	@$(BIN)/python -m coverage report --fail-under=95

unit contract e2e: $(VENV)/.dev ## Runs one kind of tests only.
	$(PYTEST) tests/$@ $(ARGS)

lint: $(VENV)/.dev ## Checks style, types, protos, imports, and that generated code is up to date.
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy $(CHECKED)
	$(BIN)/buf lint
	$(BIN)/buf format -d --exit-code
	@against=$$(git describe --tags --abbrev=0 2>/dev/null || git rev-parse --verify -q HEAD~1); \
	if [ -n "$$against" ]; then echo "buf breaking against $$against"; \
	$(BIN)/buf breaking --against ".git#ref=$$against"; fi
	PYTHONPATH=protos:services:orchestrator $(BIN)/lint-imports
	$(BIN)/python tests/check_generated.py

format: $(VENV)/.dev ## Formats code and protos.
	$(BIN)/ruff check --fix-only .
	$(BIN)/ruff format .
	$(BIN)/buf format -w

protos: $(VENV)/.dev ## Generates the stubs again.
	cd protos && ../$(BIN)/python -m grpc_tools.protoc -I. \
	--plugin=protoc-gen-mypy=../$(BIN)/protoc-gen-mypy --plugin=protoc-gen-mypy_grpc=../$(BIN)/protoc-gen-mypy_grpc \
	--python_out=. --grpc_python_out=. --mypy_out=. --mypy_grpc_out=. $(PROTOS)

bench: $(VENV)/.dev ## Measures, side by side with a direct call.
	$(BIN)/python -m pytest tests/benchmarks -s --timeout=1200 -o python_files='bench_*.py' $(ARGS)

live: $(VENV)/.dev ## Runs the contract on real servers named by FOREBAY_OLLAMA_URL, FOREBAY_LMSTUDIO_URL, FOREBAY_JAEGER_URL.
	$(PYTEST) -m live $(ARGS)

polyglot: $(VENV)/.dev ## Builds the example clients in Go, Node, Java and Rust and runs them.
	$(PYTEST) -m polyglot --timeout=1800 $(ARGS)

soak: $(VENV)/.dev ## Runs the long simulations, fault and memory runs: an hour and a half.
	$(PYTEST) -m soak -v -s --timeout=3600 $(ARGS)

llama-server: $(VENV)/.dev ## Builds llama-server for the tests that use it: once, about ten minutes.
	$(BIN)/python tests/llama.py build

compose-image: ## Builds the container image.
	docker build -f deploy/Dockerfile -t forebay:0.1.0 .

compose-up: ## Starts orchestrator, bridges, Jaeger, Prometheus and Grafana in containers.
	@mkdir -p deploy/secrets && cd deploy/secrets && touch lmstudio_token && \
	{ test -s grafana_password || $(PYTHON) -c 'import secrets; print(secrets.token_urlsafe(18))' > grafana_password; }
	docker compose up --build --detach --wait

compose-down: ## Stops them; calls in progress end first.
	docker compose down

lock: ## Pins what CI runs again, from a clean environment.
	rm -rf $(VENV) && $(MAKE) $(BIN)/python
	$(BIN)/python -m pip install --quiet --editable '.[mlx]' --group dev
	$(BIN)/python -m pip freeze --exclude-editable --exclude forebay > constraints.txt

clean: ## Removes what make made here. The models under the user's cache folder stay.
	rm -rf $(VENV) .coverage .coverage.* .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache dist build
	rm -rf examples/go/ask examples/go/gen examples/node/node_modules examples/java/target examples/rust/target
	find $(CODE) tests -name __pycache__ -type d -prune -exec rm -rf {} +

$(VENV)/bin/python:
	@test -n "$(PYTHON)" || { echo "Forebay needs Python 3.11 or newer with venv and pip:" \
	"install it (on Debian and Ubuntu: apt install python3 python3-venv), or name it: make PYTHON=/path/to/python3" >&2; exit 69; }
	@echo "Making a virtual environment in $(VENV) with $$($(PYTHON) --version)"
	@$(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip install --quiet --upgrade 'pip>=25.1'

$(VENV)/.run: $(VENV)/bin/python pyproject.toml constraints.txt
	@echo "Installing Forebay and what it needs"
	@$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[mlx]' 2>$(VENV)/mlx.log \
	|| { echo "MLX has no build for this machine ($(VENV)/mlx.log says more): going on without mlx-service" >&2; \
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable .; }
	@touch $@

$(VENV)/.dev: $(VENV)/.run
	@echo "Installing what the tests and checks need"
	@$(BIN)/python -m pip install --quiet --constraint constraints.txt --group dev
	@touch $@
