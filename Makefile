# Two commands do everything: `make demo` runs the main job, `make test` passes the tests. Both set up what they need first.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
PYTEST_ARGS ?=
# The files of the tests are shared out among so many processes, in their order: chaos, which takes longest, begins, and the
# short unit tests fill all to the end. One more than the two cores, because some tests wait. 0: one after another, with breakpoints.
PYTEST_WORKERS ?= 3
CLUSTER_ARGS ?=
# Threads that wait must not spin: other tests need the core. With tiny tensors that is two thirds of the processor time.
export OMP_WAIT_POLICY ?= PASSIVE

.DEFAULT_GOAL := help
.PHONY: help demo test lint protos check-protos check-deploy test-fast test-cluster test-images test-peers peers images lock clean

help: ## Show this.
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | awk -F':.*## ' '{printf "  make %-14s %s\n", $$1, $$2}'

$(INSTALLED): requirements/cpu.lock pyproject.toml scripts/check_install.py
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "honed needs Python 3.11 or later; set PYTHON=/path/to/python3"; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps -r requirements/cpu.lock
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation -e .
	$(BIN)/python scripts/check_install.py
	@touch $@

demo: $(INSTALLED) ## Fine-tune a tiny model online on real human ratings; the report goes to out/demo.
	$(BIN)/honed demo --directory out/demo

test: $(INSTALLED) ## Lint, types, the contract's checks, and every test.
	$(MAKE) --no-print-directory lint check-protos
	$(BIN)/python -m pytest -n $(PYTEST_WORKERS) --dist loadfile --no-loadscope-reorder $(PYTEST_ARGS)

test-fast: $(INSTALLED) ## The tests that start no engine and no server.
	$(BIN)/python -m pytest tests/unit $(PYTEST_ARGS)

lint: $(INSTALLED) ## ruff and mypy.
	$(BIN)/ruff check services tests loadtest scripts
	$(BIN)/ruff format --check services tests loadtest scripts
	$(BIN)/mypy

check-protos: $(INSTALLED) ## buf lint, breaking changes, freshness of the stubs.
	$(BIN)/python scripts/protos.py check

protos: $(INSTALLED) ## Write the stubs anew.
	$(BIN)/python scripts/protos.py generate

images: ## Container images with docker, podman or buildah; REGISTRY=, TAG=, BASE=, IMAGES=, TOOL=, BUILD_OPTIONS=.
	@$(PYTHON) scripts/images.py $(IMAGES) $(if $(REGISTRY),--registry '$(REGISTRY)') $(if $(TAG),--tag '$(TAG)') \
		$(if $(BASE),--base '$(BASE)') $(if $(TOOL),--tool $(TOOL)) \
		$(if $(TOOL_OPTIONS),--tool-options='$(TOOL_OPTIONS)') $(if $(BUILD_OPTIONS),--build-options='$(BUILD_OPTIONS)')

# Everything that `make images` takes goes for the tests too; RUN_OPTIONS= are for the containers' `run`.
test-images: $(INSTALLED) ## Build the images and run their containers; BASE=, TOOL=, TOOL_OPTIONS=, BUILD_OPTIONS=, RUN_OPTIONS=.
	HONED_TEST_IMAGES=1 BASE='$(BASE)' TOOL='$(TOOL)' TOOL_OPTIONS='$(TOOL_OPTIONS)' BUILD_OPTIONS='$(BUILD_OPTIONS)' \
		RUN_OPTIONS='$(RUN_OPTIONS)' $(BIN)/python -m pytest tests/images $(PYTEST_ARGS)

lock: $(INSTALLED) ## Resolve the images' locks anew from pyproject.toml and requirements/cpu.lock.
	test -x build/uv/bin/uv || $(BIN)/python -m pip install --quiet --target build/uv uv
	PATH="$$PWD/build/uv/bin:$$PATH" $(BIN)/python scripts/locks.py write

# checkov brings a hundred packages of its own: an environment apart, pinned as the other one is.
build/checkov/.installed: requirements/checkov.lock
	rm -rf build/checkov
	$(PYTHON) -m venv build/checkov
	build/checkov/bin/python -m pip install --quiet --disable-pip-version-check --no-deps -r requirements/checkov.lock
	@touch $@

check-deploy: $(INSTALLED) build/checkov/.installed ## checkov on every overlay; deploy/checkov.yaml says why a check is left out.
	$(BIN)/python scripts/check_deploy.py

# The systems whose losses ours are compared with: an environment apart, pinned as the other ones are. Two releases of one package
# do not go into one environment, so the last TRL that has PPO lies in a folder beside it; verl does too, without the packages that
# only its engines need, and without the folders of its wheel that have the names of ours.
PEERS := build/peers/bin/python
PEERS_INSTALL := $(PEERS) -m pip install --quiet --disable-pip-version-check --no-deps
build/peers/.installed: requirements/peers.lock requirements/peers-trl-ppo.lock requirements/peers-verl.lock
	rm -rf build/peers
	$(PYTHON) -m venv build/peers
	$(PEERS_INSTALL) -r requirements/peers.lock
	$(PEERS_INSTALL) --target build/peers/trl-ppo -r requirements/peers-trl-ppo.lock
	$(PEERS_INSTALL) --target build/peers/verl -r requirements/peers-verl.lock
	rm -rf build/peers/verl/tests build/peers/verl/scripts
	@touch $@

peers: build/peers/.installed ## An environment with TRL and verl, for test-peers.

# Warnings are the peers' own: they do not fail a test here.
test-peers: build/peers/.installed ## Our losses against TRL's and verl's own functions, to 1e-6 in float32.
	HONED_TEST_PEERS='trl verl' PYTHONPATH=services:build/peers/verl $(PEERS) -m pytest -W ignore tests/peers $(PYTEST_ARGS)
	HONED_TEST_PEERS=trl_ppo PYTHONPATH=services:build/peers/trl-ppo $(PEERS) -m pytest -W ignore tests/peers $(PYTEST_ARGS)

test-cluster: $(INSTALLED) ## A whole run on the cluster of kubectl's context, with deleted pods and restarts; CLUSTER_ARGS=--help.
	$(BIN)/python -m loadtest.cluster $(CLUSTER_ARGS)

clean: ## Remove the environment and everything that was made.
	rm -rf $(VENV) out build .pytest_cache .mypy_cache .ruff_cache .hypothesis
