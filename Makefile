PYTHON ?= python3
BIN := .venv/bin

.PHONY: install quickstart test check clean

install: .venv/.installed

# A machine without an NVIDIA driver first gets a CPU build of torch, so that pip pulls no CUDA packages.
.venv/.installed: pyproject.toml
	$(PYTHON) -c 'import sys; assert sys.version_info >= (3, 11), "mtpo needs Python 3.11 or newer"'
	$(PYTHON) -m venv .venv
	command -v nvidia-smi >/dev/null || $(BIN)/python -m pip install --no-deps \
		--index-url https://download.pytorch.org/whl/cpu 'torch>=2.8,<2.14' || true
	$(BIN)/python -m pip install -e '.[dev]'
	touch $@

# The whole loop on a laptop; run it again to go on with an interrupted run, or to see its table.
quickstart: install
	$(BIN)/python -m recipes.quickstart --out runs/quickstart --resume

test: install
	$(BIN)/python -m pytest

check: install
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/pyright
	$(BIN)/python -m pytest

clean:
	rm -rf .venv runs/quickstart
