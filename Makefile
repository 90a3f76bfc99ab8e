# Two commands on a fresh machine with Python 3.11 and make: `make run` and `make test`.
# Each first makes .venv and installs constraints.txt's versions into it, once.

PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV := .venv
BIN := $(CURDIR)/$(VENV)/bin
COURSE := $(BIN)/python -m utils.course

help:
	@echo "make run         execute every chapter, both forms, on the tiny models; leaves build/report/index.html"
	@echo "make test        run every test, the notebooks' own included"
	@echo "make lab         open JupyterLab"
	@echo "make bench       measure time and memory against peft and bitsandbytes; writes JSON and a table"
	@echo "make gpu-test    on a machine with a CUDA GPU: run the kernels compiled, and train; writes data/measurements"
	@echo "make gpu-bench   on a machine with a CUDA GPU: measure kernels and training steps; writes data/measurements"
	@echo "make build       write the notebooks of solutions/*.py again (EXECUTE=1 runs and stores outputs too)"
	@echo "make collect     CH=02_lora FROM=folder: take in a class's submissions"
	@echo "make grade       CH=02_lora: grade them with nbgrader, into build/grading"
	@echo "make test-floor  run the unit tests on the oldest versions that pyproject.toml allows"
	@echo "make compare-adapters  record what AdapterHub's adapters 1.3 computes, and compare with it"

$(VENV)/ready: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed; PYTHON=/path/to/python3.11 make ... names one.")'
	@echo "Setting up $(VENV); this takes a few minutes, once."
	@$(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $@

run: $(VENV)/ready
	@$(COURSE) run --profile tiny --jobs 2

test: $(VENV)/ready
	@$(COURSE) test

lab: $(VENV)/ready
	@$(BIN)/python -m jupyter lab

bench: $(VENV)/ready
	@$(BIN)/python -m bench

gpu-test: $(VENV)/ready
	@$(BIN)/python -m bench.gpu test

gpu-bench: $(VENV)/ready
	@$(BIN)/python -m bench.gpu bench

build: $(VENV)/ready
	@$(COURSE) build $(if $(EXECUTE),--execute)

collect: $(VENV)/ready
	@$(COURSE) collect "$(CH)" "$(FROM)"

grade: $(VENV)/ready
	@$(COURSE) grade "$(CH)"

.venv-floor/ready: pyproject.toml utils/course/floors.py
	@echo "Setting up .venv-floor with the oldest allowed versions."
	@$(PYTHON) -m venv .venv-floor
	@.venv-floor/bin/python utils/course/floors.py pyproject.toml > .venv-floor/floors.txt
	@.venv-floor/bin/python -m pip install --quiet --disable-pip-version-check -c .venv-floor/floors.txt -e '.[dev]'
	@touch $@

test-floor: .venv-floor/ready
	@OMP_NUM_THREADS=1 .venv-floor/bin/python -m pytest -q -n 2 --dist loadfile tests

.venv-adapters/ready:
	@echo "Setting up .venv-adapters: adapters 1.3 needs an older transformers."
	@$(PYTHON) -m venv .venv-adapters
	@.venv-adapters/bin/python -m pip install --quiet --disable-pip-version-check adapters==1.3.0 $$(grep ^torch= constraints.txt)
	@touch $@

compare-adapters: .venv-adapters/ready $(VENV)/ready
	@OMP_NUM_THREADS=1 .venv-adapters/bin/python tests/record_adapters.py
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q tests/test_adapters_library.py

.PHONY: help run test lab bench gpu-test gpu-bench build collect grade test-floor compare-adapters
