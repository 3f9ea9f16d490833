# Two commands do everything on a fresh machine: `make demo` and `make test`. Each sets up what it needs first.
SHELL := /bin/bash
VENV := .venv
PY := $(VENV)/bin/python
# Byte code is cached (imports are three times slower without it); large tensors are kept by the allocator, not given back at each step.
export MALLOC_MMAP_THRESHOLD_ := 4294967296
export MALLOC_TRIM_THRESHOLD_ := 8589934592
unexport PYTHONDONTWRITEBYTECODE

.PHONY: setup demo test fast check new bench docs clean
setup: $(VENV)/.ready

# uv is quick; where it cannot be had, pip does the same. A local folder of wheels named by PIP_FIND_LINKS serves both.
$(VENV)/.ready: pyproject.toml
	python3 -m venv $(VENV)
	if $(PY) -m pip install -q uv && UV_FIND_LINKS="$$PIP_FIND_LINKS" $(PY) -m uv pip install -q --python $(PY) torch==2.13.0 -e ".[dev,bench]"; \
	then :; else $(PY) -m pip install -q --no-compile torch==2.13.0 -e ".[dev,bench]"; fi
	touch $@

demo: setup  ## train a small transformer on handwritten digits, make it adaptive, measure it, write demo/report.html
	$(PY) -m apportion demo --out demo

test: setup check  ## everything that can be tested on this machine
	$(PY) -m pytest -n 2

fast: setup check  ## what runs in under a minute
	$(PY) -m pytest -n 2 -m "not slow"

check: setup
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/pyright

new: setup  ## make new slot=reducer name=diffrate arxiv=2305.17997: a method file and its test
	$(PY) -m apportion.methods.scaffold $(slot) $(name) $(arxiv)

bench: setup  ## make bench data=FOLDER: every committed result again
	$(PY) -m bench all --data $(data)

docs: setup  ## the pages that are made from code and results
	$(PY) -m bench tables

clean:
	rm -rf $(VENV) demo build *.egg-info
