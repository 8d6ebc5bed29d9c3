# Everything runs in .venv, which is made by the first target that needs it; once installed, everything works offline.
# PYTHON=python3.12 chooses the interpreter, ARGS="..." is passed on: make test ARGS="-k soft_split".
# Tests run in several processes, which hide what tests print: make test ARGS="-n 0 -s" runs them in one.
.DEFAULT_GOAL := help
.PHONY: help demo test test-slow test-all properties sanitize gpu bench lint env

PYTHON ?= python3
GPU_OUT ?= benchmarks/results/gpu-$(shell date -u +%Y-%m-%d)

VENV := .venv
PY := $(VENV)/bin/python
READY := $(VENV)/.ready
# Exists until a new .venv is complete. If it exists at the next start, the .venv is incomplete and is made again.
FILLING := $(VENV)/.filling
LOG := $(VENV)/install.log
TEST := $(PY) -m pytest -n auto --dist loadgroup
PIP := PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_ROOT_USER_ACTION=ignore $(PY) -m pip install

help: ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-10s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

demo: $(READY) ## a photo through a model before and after t2t_fast.swap: demo-report/report.html
	@$(PY) -m t2t_fast demo $(ARGS)

test: $(READY) ## the quick tests; those for a GPU are skipped without one
	@$(TEST) -m "not slow" $(ARGS)

test-slow: $(READY) ## the slow tests
	@$(TEST) -m slow $(ARGS)

test-all: $(READY) ## all tests
	@$(TEST) $(ARGS)

properties: $(READY) ## 20,000 random cases of all operators against the float64 reference: three minutes
	@$(PY) -m pytest tests/ops/test_properties.py -q -s --hypothesis-profile=long --hypothesis-seed=0 $(ARGS)

sanitize: $(READY) ## the native CPU operators under the address and undefined-behaviour sanitizers
	@$(PY) tests/support/native_sanitizer.py $(ARGS)

gpu: ## on a machine with a GPU, without network: build, test, verify, measure into GPU_OUT=DIR
	@$(or $(wildcard $(PY)),$(PYTHON)) -m benchmarks.gpu --out $(GPU_OUT) $(ARGS)

bench: $(READY) ## the benchmarks that this machine can run
	@$(PY) -m t2t_fast bench $(ARGS)

lint: $(READY) ## ruff: rules and format; mypy: types
	@$(PY) -m ruff check .
	@$(PY) -m ruff format --check .
	@$(PY) -m mypy

env: $(READY) ## versions, device, native build, and the backend of every operator with reasons
	@$(PY) -m t2t_fast env $(ARGS)

# The stamp lies inside .venv, so that it is removed with it; it is ignored if there is no working Python in .venv.
ifeq ($(shell $(PY) -c "" 2>&1 || echo broken),)
$(READY): pyproject.toml setup.py $(wildcard build_support/*.py csrc/* csrc/*/* csrc/*/*/*)
else
.PHONY: $(READY)
endif
$(READY):
	@if [ -e $(FILLING) ] || ! $(PY) -m pip --version >/dev/null 2>&1; then \
		echo "Making .venv with $(PYTHON)"; \
		$(PYTHON) -m venv --clear $(VENV); \
	fi
	@if [ -e $(READY) ]; then \
		echo "Installing t2t_fast into .venv again: its project files have changed"; \
	else \
		echo "Installing PyTorch and what t2t_fast needs into .venv: minutes, and about 6 GB of disk, once"; \
		touch $(FILLING); \
	fi
	@{ $(PIP) "torch>=2.11" torchvision timm "setuptools>=77" "pybind11>=2.12" ninja \
		&& $(PIP) -v --no-build-isolation -e ".[test]"; } >$(LOG) 2>&1 \
		|| { tail -n 40 $(LOG); echo "pip failed; its complete output is in $(LOG)"; exit 1; } >&2
	@sed -n 's/^ *\(t2t_fast: .*\)/\1/p' $(LOG)
	@rm -f $(FILLING)
	@touch $(READY)
