# Each target wraps one command that can be run by hand; `make help` lists them. Every target works
# as the first command in a fresh clone.

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
MAKEFLAGS += --no-print-directory
# The tests start services by the hundred, and each would compile all of its modules again.
unexport PYTHONDONTWRITEBYTECODE

PYTHON_VENV := .venv/bin/python
# What takes longest and what waits most comes first, so that the short ones fill the gaps. A file
# runs in one of the workers, and the end-to-end tests in one together (tests/conftest.py).
TESTS := tests/e2e tests/lint tests/integration tests/kernels tests/datapath tests/unit
WORKERS ?= auto
APART := -n $(WORKERS) --dist loadfile --no-loadscope-reorder
PYTEST_ARGS ?=

# ---- for people

.PHONY: help
help: ## This list
	@echo "Cilia: identity-based networking over eBPF. Targets:"
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-10s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)
	@echo "Most need root, for namespaces and eBPF. First steps: make demo"

.PHONY: setup
setup: ## Install Debian and Python packages, make .venv (idempotent)
	@scripts/setup.sh

.PHONY: demo
demo: setup bpf ## Watch real workloads be allowed and denied by label
	@$(PYTHON_VENV) -m lab.demo

.PHONY: lab
lab: setup bpf ## Start the Star Wars lab, and leave it running
	@.venv/bin/cilia lab up examples/lab/star-wars.yaml

.PHONY: test
test: setup bpf ## All tests but the slow ones (within 15 minutes)
	@$(PYTHON_VENV) -m pytest $(TESTS) $(APART) -m "not slow" $(PYTEST_ARGS)

.PHONY: test-all
test-all: export CILIA_PROPERTY_EXAMPLES ?= 2000
test-all: setup bpf ## Slow and property tests too; CILIA_PROPERTY_EXAMPLES sets how many
	@failed=0; \
	$(PYTHON_VENV) -m pytest $(TESTS) $(APART) -m "not slow" $(PYTEST_ARGS) || failed=1; \
	$(PYTHON_VENV) -m pytest tests/unit tests/datapath $(APART) -m slow $(PYTEST_ARGS) || failed=1; \
	$(PYTHON_VENV) -m pytest tests/integration tests/e2e tests/kernels -m slow $(PYTEST_ARGS) \
		|| failed=1; \
	exit $$failed

.PHONY: bench
bench: setup bpf ## Measure, each figure against its baseline; ONLY=name,... chooses
	@$(PYTHON_VENV) -m tests.bench $(if $(ONLY),--only '$(ONLY)')

.PHONY: clean
clean: ## Remove what was built and cached (not .venv)
	@rm -rf build .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache
	@find . -path ./.venv -prune -o -path ./.git -prune -o -type d -name __pycache__ -print0 | xargs -0r rm -rf

.PHONY: distclean
distclean: clean ## Remove .venv as well
	@rm -rf .venv

# ---- eBPF objects

CLANG ?= clang
# v3 instructions need Linux 5.1; the datapath needs 5.10 anyway.
BPF_CFLAGS := -O2 -g -target bpf -mcpu=v3 -Wall -Wextra -Werror \
	-Ibpf -Ibpf/include -idirafter /usr/include/$(shell uname -m)-linux-gnu
BPF_SOURCES := $(wildcard bpf/*.c bpf/tests/*.c)
BPF_OBJECTS := $(BPF_SOURCES:bpf/%.c=build/bpf/%.o)

.PHONY: bpf
bpf: setup ## Compile bpf/*.c to build/bpf
	@$(MAKE) bpf-objects

.PHONY: bpf-objects
bpf-objects: $(BPF_OBJECTS)
	@:

# Written beside and moved into place: a compiler that is killed leaves no half object.
build/bpf/%.o: bpf/%.c Makefile
	@mkdir -p $(@D)
	@echo "clang $<"
	@$(CLANG) $(BPF_CFLAGS) -MMD -MP -MT $@ -MF $(@:.o=.d) -c $< -o $@.tmp
	@mv $@.tmp $@

-include $(BPF_OBJECTS:.o=.d)

# ---- generated code

.PHONY: protos
protos: setup ## Regenerate the committed gRPC stubs from protos/**/*.proto
	@scripts/protos.sh .

.PHONY: schemas
schemas: setup ## Rewrite the committed schemas of policy documents
	@.venv/bin/cilia policy schema >cilia/policy/schemas/policy.schema.json
	@.venv/bin/cilia policy schema --format crd >cilia/policy/schemas/crds.yaml

.PHONY: lock
lock: ## Rewrite requirements.lock from pyproject.toml (UPGRADE=1: newest versions)
	@scripts/lock.sh
