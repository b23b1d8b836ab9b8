# make demo, make test: everything else these two call by themselves.
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
# Which torch: cpu, cuda, or auto (cuda where nvidia-smi finds a GPU). Where only one build is to be had, that one.
TORCH  ?= auto
STAMP  := $(VENV)/.installed

.PHONY: setup demo test long lint format bench peers robot-bundle clean
.DEFAULT_GOAL := help

help:  ## list the targets
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*##/\t/'

setup: $(STAMP)  ## create .venv, install the pinned dependencies, warm kernel caches

$(STAMP): setup.py constraints.txt scripts/setup.sh
	@PYTHON="$(PYTHON)" VENV="$(VENV)" TORCH="$(TORCH)" scripts/setup.sh
	@touch $@

demo: setup  ## run the main job: twins, Redis, learner, weights and a simulated real arm
	@$(BIN)/twinrl launch configs/demo.yaml $(ARGS)

test: setup  ## run the test suite
	@$(BIN)/python -m pytest $(ARGS)

long: setup  ## longer checks in resumable parts: 100,000 fuzzed requests, kill -9 for minutes, 2,000 resets, five seeds of the demo
	@VENV="$(VENV)" scripts/long.sh $(ARGS)

lint: setup  ## formatting, lint and import rules; changes nothing
	@$(BIN)/ruff format --check . && $(BIN)/ruff check . && $(BIN)/lint-imports

format: setup  ## format and fix what can be fixed
	@$(BIN)/ruff format . && $(BIN)/ruff check --fix .

bench: setup  ## quick forms of all benchmarks
	@for f in benchmarks/[a-z]*.py; do $(BIN)/python -m benchmarks.$$(basename $$f .py) --quick || exit 1; done

peers: setup  ## environments of the systems that benchmarks.replay compares with (1.4 GB)
	@PROJECT_PYTHON="$(abspath $(BIN))/python" sh benchmarks/peers/build.sh

robot-bundle: setup  ## twinrl-robot with all that it needs in one file, for a robot's PC without internet
	@$(BIN)/python scripts/robot_bundle.py $(ARGS)

clean:  ## remove what was built; runs/ stays
	rm -rf $(VENV) build dist *.egg-info packaging/robot/build packaging/robot/*.egg-info .pytest_cache .ruff_cache .import_linter_cache
	find . -name __pycache__ -not -path './runs/*' -prune -exec rm -rf {} +
