# Two commands on a machine with Python 3.10-3.12, make and a compiler: `make demo` and `make test`. Everything stays in this tree.

ifndef PYTHON
PYTHON := $(firstword $(foreach p,python3.11 python3.12 python3.10 python3,$(shell $(p) -c \
	'import ensurepip, sys, venv; print("$(p)" if (3, 10) <= sys.version_info < (3, 13) else "")' 2>/dev/null)))
endif
VENV := .venv
# More options for pip, such as a mirror or a folder of wheels: make demo PIP_ARGS="--find-links /some/wheels"
PIP_ARGS ?=
PIP := $(VENV)/bin/python -m pip -qq --disable-pip-version-check
INSTALL := $(PIP) install $(PIP_ARGS)
STAMP := $(VENV)/.installed
CONFIG ?= examples/configs/demo.yaml
DEMO_OUTPUT ?= runs/demo
# For example: make demo FAE_ARGS="--ranks 1 --set train.steps=20"; make test PYTEST_ARGS="tests/core -x"
FAE_ARGS ?=
PYTEST_ARGS ?=
# Processes that run tests, each in one thread; a file's tests stay in one process. 0: none beside pytest's own, as a debugger needs it.
WORKERS ?= 2

.PHONY: demo test tutorial cluster lint env clean

demo: $(STAMP) ## profile, place, train hot/cold and compare with stock TorchRec, on 1 and on 2 ranks
	$(VENV)/bin/fae compare --config $(CONFIG) --output $(DEMO_OUTPUT) $(FAE_ARGS)
	@echo "report: $(abspath $(DEMO_OUTPUT))/report.html (pictures) and report.json (every figure)"

test: $(STAMP) ## the whole suite
	$(VENV)/bin/python -m pytest -n $(WORKERS) --dist loadfile $(PYTEST_ARGS)

tutorial: $(STAMP) ## run every block of docs/tutorial and hold what is printed against what its pages show
	$(VENV)/bin/python docs/tutorial/run.py

cluster: $(STAMP) ## jobs on a Slurm cluster that is set up for them; takes Debian's packages slurm-wlm and munge
	$(VENV)/bin/python -m pytest -m cluster tests/cluster $(PYTEST_ARGS)

lint: $(STAMP) ## ruff (rules and format) and mypy --strict
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy

env: $(STAMP) ## the environment alone

$(STAMP): requirements-cpu.txt requirements-cpu-nodeps.txt setup.cfg pyproject.toml
	@test -n "$(PYTHON)" || { echo "no Python 3.10, 3.11 or 3.12 with the modules venv and ensurepip found; install one or name one: make demo PYTHON=/path/to/python3.11" >&2; exit 2; }
	@test -x $(VENV)/bin/pip || { echo "env: creating $(VENV) with $$($(PYTHON) --version)"; $(PYTHON) -m venv --clear $(VENV); }
	@echo "env: installing torch and fbgemm (CPU), the largest part"
	@$(INSTALL) --constraint requirements-cpu.txt torch fbgemm-gpu-cpu
	@echo "env: installing the other pinned requirements"
	@$(INSTALL) --requirement requirements-cpu.txt
	@$(INSTALL) --no-deps --requirement requirements-cpu-nodeps.txt
	@echo "env: installing fae_torchrec (editable)"
	@$(INSTALL) --no-deps --no-build-isolation --editable .
	@touch $@

clean: ## the environment, caches and runs
	rm -rf $(VENV) runs build .pytest_cache .mypy_cache .ruff_cache .hypothesis *.egg-info
	find . -name __pycache__ -type d -not -path './.git/*' -prune -exec rm -rf {} +
