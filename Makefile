# make answer   a generated answer, with nothing else to set up      make test    the whole test suite
# make setup    all that tests and the commands of the README need   make check   format, lint, types
# make bench           whole answers against Hugging Face, ONNX Runtime and OpenVINO: the headline, under 20 minutes
# make bench-all       the same for all peers, batches, sizes and answer lengths; some hours
# make bench-kernels   every operation against this machine's ceilings, into benchmarks/results/
# make gpu-suite       on a GPU: ceilings, tests, evidence, benchmarks, profiles into $OUT or runs/gpu-suite, 9 minutes
# make soak            a server under long load, kills, vanishing clients and broken images
# make screenshots     pictures of the page into docs/img (needs a Chromium)
# make fuzz            what reads strangers' bytes, under atheris (pip install "miss-engine[fuzz]"), 10 minutes a target
# make sanitize        the CPU kernels under address and undefined-behaviour sanitizers, some minutes
PYTHON ?= python3
VENV ?= .venv
# The torch to install where the virtual environment has none, and the index it comes from (empty: pip's own).
TORCH_SPEC ?= torch==2.13.0
TORCH_INDEX ?=
PIP := $(VENV)/bin/python -m pip --disable-pip-version-check
RUN := $(VENV)/bin/python -m
CSRC := $(shell find csrc -path csrc/tests -prune -o -name "*.cpp" -print -o -name "*.h" -print)
EXTRAS := dicom,train,evaluate,weights,zero,transcap,serve,test

.DEFAULT_GOAL := help
.PHONY: help answer setup test check parity torture soak fuzz sanitize bench bench-all bench-kernels gpu-suite screenshots clean

help:
	@grep '^# make' Makefile | sed 's/^# //'

$(VENV)/.answer: pyproject.toml setup.py $(CSRC)
	@echo "[1/3] virtual environment: $(VENV)"
	@test -x $(VENV)/bin/python || $(PYTHON) -m venv $(VENV)
	@echo "[2/3] torch ($(TORCH_SPEC)), if there is none yet; this is the large download"
	@$(VENV)/bin/python -c 'import torch' 2>/dev/null || $(PIP) install -q $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) "$(TORCH_SPEC)" numpy
	@echo "[3/3] miss-engine"
	@$(PIP) install -q "setuptools>=77" wheel pybind11
	@$(PIP) install -q --no-build-isolation -e .
	@$(RUN) miss kernels built
	@touch $@

$(VENV)/.setup: $(VENV)/.answer
	@echo "[+] what tests, training and evaluation need"
	@$(PIP) install -q --no-build-isolation -e ".[$(EXTRAS)]"
	@touch $@

$(VENV)/.peers: $(VENV)/.setup
	@echo "[+] what answers are measured against: ONNX Runtime, OpenVINO, NNCF"
	@$(PIP) install -q --no-build-isolation -e ".[peers]"
	@touch $@

setup: $(VENV)/.setup

answer: $(VENV)/.answer
	@$(RUN) miss answer --image examples/chest-xray.jpg --question "what modality is this image?" --question "is there a fracture?" --question "which organ is shown?"
	@$(RUN) miss answer --image examples/brain-mri.jpg --question "what modality is used to take this image?" --question "which part of the body is this?" --question "is this image normal?"

# Two processes of one thread each: the tests' tensors are too small for two threads to share.
test: $(VENV)/.setup
	@OMP_NUM_THREADS=1 $(RUN) pytest -q -n 2 --dist loadfile --no-loadscope-reorder

check: $(VENV)/.setup
	@$(RUN) ruff format --check . && $(RUN) ruff check . && $(RUN) mypy

# The whole base model against Hugging Face, hidden states to gradients: about 8 GB and some minutes.
parity: $(VENV)/.setup
	@$(RUN) pytest -q tests/models/test_parity.py --full-size

# Every operation, its peers and this machine's ceilings; under 10 minutes on two cores that have nothing else to do.
bench-kernels: $(VENV)/.setup
	@bash -o pipefail -c "$(RUN) miss bench kernels --shapes base small --out benchmarks/results | cut -c -160"

# Peers' converted models are kept in the user's cache folder: the first run takes some minutes more.
bench: $(VENV)/.peers
	@$(RUN) miss bench answer --preset base --batch 1 8 --peers headline --quick --out benchmarks/results
	@$(RUN) miss bench answer --preset base --image-size 480 --peers openvino-bf16 openvino-int8 --quick --judged 0 --out benchmarks/results
	@$(RUN) miss bench answer --preset small --peers hf-fp32 --quick --judged 0 --out benchmarks/results

bench-all: $(VENV)/.peers
	@$(RUN) miss bench answer --preset base --peers all --out benchmarks/results
	@$(RUN) miss bench answer --preset base --batch 1 2 4 8 --questions-per-image 1 8 64 --judged 0 --out benchmarks/results
	@$(RUN) miss bench answer --preset base --image-size 224 384 480 --tokens 2 4 8 16 --judged 0 --out benchmarks/results
	@$(RUN) miss bench answer --preset small --peers all --out benchmarks/results

# Builds and installs nothing: a machine with a GPU has what it needs (docs/gpu/README.md).
gpu-suite:
	@benchmarks/gpu_suite.sh

torture: $(VENV)/.setup
	@OMP_NUM_THREADS=1 $(RUN) pytest -q -m torture

soak: $(VENV)/.setup
	@OMP_NUM_THREADS=1 $(RUN) pytest -q -m soak tests/engine/serving

screenshots: $(VENV)/.setup
	@$(RUN) tests.engine.serving.screenshots

# FUZZ_SECONDS of each; what is found lies in build/fuzz.
FUZZ_SECONDS ?= 600
fuzz: $(VENV)/.setup
	@for target in image dicom manifest request checkpoint; do \
	  $(RUN) tests.fuzz.$$target -max_total_time=$(FUZZ_SECONDS) || exit 1; done

# A build of its own in build/sanitize: the normal one stays.
sanitize: $(VENV)/.setup
	@$(RUN) tests.sanitize

clean:
	rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
