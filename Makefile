# make quickstart   build data, train and solve: a model learns Sudoku in minutes
# make test         the tests            make lint   style and types
# make test-all     all tests, the long ones too
# make test-cluster all tests of clusters: jobs, Slurm, nodes that come and go, storage that machines share (half an hour)
# make fuzz         50,000 random words and damaged files for all commands; FUZZ="--seed 1 --count 5000" for others
# make cluster-up   start a cluster on this machine whose nodes come and go (cluster/local.yaml; CLUSTER=FILE for another)
# make cluster-down end it
# make chaos        inject 100 faults into real runs and report what happened; CHAOS="--faults 10 --seed 1" for others
# Options: PYTHON=python3.12, PIP_FLAGS="--extra-index-url https://download.pytorch.org/whl/cpu" (torch without CUDA)

PYTHON ?= python3
PIP_FLAGS ?=
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

.DEFAULT_GOAL := help
.PHONY: help quickstart test test-all test-cluster fuzz chaos cluster-up cluster-down lint format clean

help:
	@sed -n '/^$$/q; s/^# //p' Makefile

# The marker is younger than what it depends on: the environment is made again only if they change. An environment
# whose creation was interrupted has no pip yet; it is deleted and made again.
$(READY): pyproject.toml constraints.txt
	@echo "making the environment in $(VENV) (a few minutes the first time)"
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "error: $(PYTHON) is older than Python 3.11; use make PYTHON=python3.12"; exit 2; }
	@$(BIN)/python -m pip --version >/dev/null 2>&1 || { rm -rf $(VENV) && $(PYTHON) -m venv $(VENV); } || \
		{ echo "error: $(PYTHON) cannot make environments; install its venv package (apt install python3-venv)"; exit 2; }
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check $(PIP_FLAGS) -c constraints.txt -e '.[dev]'
	@touch $@

quickstart: $(READY)
	@$(BIN)/hrm-ray data build recipe=sudoku_easy out=data/sudoku-easy
	@$(BIN)/hrm-ray train experiment=quickstart
	@echo; echo "On the 500 held-out puzzles:"
	@$(BIN)/hrm-ray eval runs/quickstart data=data/sudoku-easy
	@echo; echo "Three of them, solved:"; echo
	@$(BIN)/hrm-ray solve runs/quickstart data=data/sudoku-easy count=3
	@echo; echo "Try next:"
	@echo "  $(BIN)/hrm-ray solve runs/quickstart 21784...5.....1.2........8...6.152..374....5.1.2793.6.5.9.64..76...7..4...35.861. paths=8 noise=0.5 select=valid"
	@echo "  $(BIN)/hrm-ray train experiment=quickstart lr=1e-3 run_name=slower"
	@echo "  $(BIN)/hrm-ray data build recipe=sudoku_6x6 out=data/sudoku-6x6 && $(BIN)/hrm-ray train experiment=sudoku_6x6"

test: $(READY) lint
	@$(BIN)/python -m pytest

test-all: $(READY) lint
	@$(BIN)/python -m pytest -m ''

CLUSTER_TESTS := tests/jobs tests/training/test_preemption.py tests/training/test_shared.py tests/storage/test_lease.py \
	tests/tuning/test_cluster.py tests/tuning/test_remote.py tests/data/test_placing.py tests/data/test_cluster_lost.py

test-cluster: $(READY)
	@$(BIN)/python -m pytest -m '' $(CLUSTER_TESTS)

fuzz: $(READY)
	@$(BIN)/python -m tests.fuzz $(FUZZ)

cluster-up: $(READY)
	@PATH="$(abspath $(BIN)):$$PATH" cluster/local.sh up $(CLUSTER)

cluster-down:
	@cluster/local.sh down

chaos: $(READY)
	@nice $(BIN)/python -m tests.faults.chaos $(CHAOS)

lint: $(READY)
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy

format: $(READY)
	@$(BIN)/ruff check --fix .
	@$(BIN)/ruff format .

clean:
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache .hypothesis
