PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin

.PHONY: install demo test test-slow test-all lint bench check-adm clean

# One installation for the demo and the tests; repeated when pyproject.toml changes.
install: $(VENV)/.installed
$(VENV)/.installed: pyproject.toml
	$(PYTHON) -c "import sys; sys.exit(0 if (3, 11) <= sys.version_info[:2] <= (3, 13) else 'error: EDT needs Python 3.11 to 3.13; make PYTHON=python3.12')"
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --editable '.[demo,dev]'
	touch $@

demo: install
	$(BIN)/python tools/demo.py

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# Two processes of one thread each. Most of the time goes into starting scripts, which threads do not
# make faster.
test: install lint
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m "not slow" -n 2 --dist worksteal -q

# TensorFlow, for the tests that run ADM's graph itself.
$(VENV)/.installed-tf: $(VENV)/.installed
	$(BIN)/pip install --quiet --editable '.[tf]'
	touch $@

# The tests that `make test` leaves out, and no other.
test-slow: $(VENV)/.installed-tf
	$(BIN)/python -m pytest -m slow -q

test-all: test test-slow

# The rows of README's speed table that a CPU gives, about ten minutes; leave the machine alone meanwhile.
bench: install
	$(BIN)/python benchmarks/bench_step.py --compile off block --json
	$(BIN)/python benchmarks/bench_step.py --precision fp32 --json
	$(BIN)/python benchmarks/bench_sampling.py --json
	$(BIN)/python benchmarks/bench_vae.py --json
	$(BIN)/python benchmarks/table.py

# OpenAI's published line for its own samples; EDT_ADM_FILES names the folder of the files (docs/evaluation.md).
check-adm: install
	$(BIN)/python -m pytest tests/metrics/test_evaluator_published.py -rs

clean:
	rm -rf runs/demo
