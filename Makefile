# Every target makes its own .venv when there is none, or when what it is made from has changed.
# PYTHON chooses the interpreter it is made with (3.11 or later). ENGINE_VERSION chooses another vLLM, in a
# .venv of its own, which is a copy of .venv by hard links if that exists.

PYTHON ?= python3
BENCH ?= tests/bench
VLLM_TESTS := tests/vllm tests/e2e
ENGINE_VERSIONS := 0.28.0 0.29.0 0.30.0 0.31.0 0.32.0 0.33.0
OLDEST := $(firstword $(ENGINE_VERSIONS))
VENV := .venv$(addprefix -vllm-,$(ENGINE_VERSION))
BIN := $(VENV)/bin
READY := $(VENV)/.ready
SGLANG := .venv-sglang

# Two files at a time, in the order of tests/conftest.py. A file stays in one worker: its tests share
# engines and servers.
PYTEST := $(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

.DEFAULT_GOAL := help
.PHONY: help run check test coverage vllm oldest sglang matrix lint docs bench viewer clean

help:  ## list the targets
	@sed -n 's/^\([a-z]*\):.*## /  make \1\t/p' Makefile

run: $(READY)  ## the demo: several chats on a real vLLM, with kvcache and without
	@$(BIN)/kvcache demo

check: lint  ## lint, then every test that needs no engine, GPU, server or wheel
	$(PYTEST) -m "not engine and not gpu and not server and not wheel and not bench and not viewer"

test: lint oldest sglang  ## lint, then every test; on the oldest supported vLLM those of the connector
	$(PYTEST)

oldest: $(READY)
	@$(MAKE) --no-print-directory ENGINE_VERSION=$(OLDEST) vllm VLLM_TESTS="tests/vllm tests/e2e/test_one_process.py"

sglang: $(SGLANG)/.ready  ## the tests of the SGLang backend, on SGLang's own host pools
	$(PYTEST:$(BIN)/python%=$(SGLANG)/bin/python%) tests/sglang

# Tests of durations and of garbage collection fail under the tracer; the report counts them too.
coverage: $(READY)  ## the line coverage of all tests but the wheel's; child processes count too
	rm -rf build/coverage
	-$(BIN)/coverage run $(PYTEST:$(BIN)/python%=%) -m "not wheel and not gpu and not bench and not viewer"
	$(BIN)/coverage combine -q
	$(BIN)/coverage report

vllm: $(READY)  ## tests of the connector, and those that start an engine (ENGINE_VERSION: another vLLM)
	$(PYTEST) $(VLLM_TESTS)

matrix: $(READY)  ## the tests of `make vllm` on every supported vLLM, one after the other
	@failed=; for version in $(ENGINE_VERSIONS); do \
		$(MAKE) --no-print-directory ENGINE_VERSION=$$version vllm || failed="$$failed $$version"; \
	done; test -z "$$failed" || { echo "failed on vLLM$$failed"; exit 1; }

lint: $(READY)  ## ruff and mypy
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

docs: $(READY)  ## the site, into build/docs; every warning is an error
	$(BIN)/python -m sphinx -E -W --keep-going -q docs build/docs

bench: $(READY)  ## the performance bars, of the wheel: compiled, as people install it
	rm -rf build/dist build/wheel
	$(BIN)/python -m build --outdir build/dist >/dev/null
	$(BIN)/python -m pip install --quiet --no-deps --target build/wheel build/dist/*.whl
	PYTHONSAFEPATH=1 PYTHONPATH=$(CURDIR)/build/wheel:$(CURDIR) \
		$(BIN)/python -m pytest $(BENCH) -m bench -s -o "pythonpath=build/wheel ."

viewer: $(READY)  ## the trace of a real request in a viewer from PyPI (850 MB), and its picture
	$(BIN)/python -m pytest tests/e2e/test_viewer.py -m viewer -s

clean:  ## remove what the other targets made
	rm -rf .venv .venv-* build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis

$(READY): pyproject.toml tests/install_engine.py
	@$(PYTHON) -c 'import sys; sys.version_info >= (3, 11) or sys.exit("kvcache needs Python 3.11 or later (make PYTHON=...); this is " + sys.version)'
	@if [ "$(ENGINE_VERSION)" ] && [ -e .venv/.ready ]; then \
		rm -rf $(VENV); cp -al .venv $(VENV); rm $(VENV)/.ready; \
		grep -rlIF $(CURDIR)/.venv $(BIN) $(VENV)/pyvenv.cfg | xargs sed -i 's|$(CURDIR)/.venv|&-vllm-$(ENGINE_VERSION)|'; \
	else $(PYTHON) -m venv $(VENV); fi
	@$(BIN)/python tests/install_engine.py
	@touch $@

# SGLang requires other versions than vLLM does, so it has a copy of .venv by hard links.
$(SGLANG)/.ready: $(READY) tests/install_sglang.py
	@rm -rf $(SGLANG); cp -al $(VENV) $(SGLANG); rm $(SGLANG)/.ready
	@grep -rlIF $(CURDIR)/$(VENV) $(SGLANG)/bin $(SGLANG)/pyvenv.cfg | xargs sed -i 's|$(CURDIR)/$(VENV)|$(CURDIR)/$(SGLANG)|'
	@$(SGLANG)/bin/python tests/install_sglang.py
	@touch $@
