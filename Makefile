# make demo   generate two clips and two pictures with the built-in models; downloads Python packages only
# make test   lint, unit, parity and headless tests; with a ComfyUI checkout also the tests inside it
#
# Both make their own environment in .venv on first use. Settings, as in `make demo TORCH=torch`:
#   PYTHON       interpreter the environment is made from
#   TORCH        what pip installs as torch, options included. On Linux the plain package brings 2.5 GB of CUDA
#                libraries; PyTorch's install page has the line for the processor alone
#   COMFYUI_DIR  checkout of ComfyUI for the host tests (default: ~/comfy/ComfyUI if it is there)
#   KANDINSKY5_TOKENIZERS  folder with the public Qwen2.5-VL and CLIP tokenizers, for the token tests where there is
#                no ComfyUI checkout to take them from
#   JOBS         processes that run the tests, with one thread each (default: 2; each takes up to 2.5 GB)

PYTHON ?= python3
TORCH ?= torch==2.13.0
VENV := .venv
BIN := $(VENV)/bin
COMFYUI_DIR ?= $(wildcard $(HOME)/comfy/ComfyUI)
JOBS ?= 2

.PHONY: demo test clean

demo: $(VENV)/.installed
	$(BIN)/python -m comfyui_kandinsky5.headless.demo

test: $(VENV)/.tested-with
	$(BIN)/ruff check .
ifeq ($(COMFYUI_DIR),)
	@echo "*** No ComfyUI checkout: the tests inside ComfyUI are SKIPPED. Set COMFYUI_DIR to run them. ***"
	@[ -n "$$KANDINSKY5_TOKENIZERS" ] || echo "*** The tests of real token ids are SKIPPED as well: set KANDINSKY5_TOKENIZERS. ***"
endif
	COMFYUI_DIR="$(COMFYUI_DIR)" OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(JOBS) --dist loadfile

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed: pyproject.toml | $(VENV)/bin/python
	$(BIN)/python -c "import torch" 2>/dev/null || $(BIN)/python -m pip install --quiet $(TORCH)
	$(BIN)/python -m pip install --quiet --editable .
	touch $@

$(VENV)/.tested-with: $(VENV)/.installed
	$(BIN)/python -m pip install --quiet --editable ".[test]"
	touch $@

clean:
	rm -rf $(VENV) output
