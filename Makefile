# Every target first sets up .venv. The only requirement is Python with pip.
PYTHON ?= python3
BIN := .venv/bin
OUT ?= demo

.PHONY: setup demo test test-fast mutation lint docs bench bench-quick clean

setup: .venv/.done

.venv/.done: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet -c constraints.txt torch
	$(BIN)/pip install --quiet -c constraints.txt -e ".[dev,docs]"
	touch $@

demo: setup
	$(BIN)/vlm-unlearn demo --out $(OUT)

test: setup
	# Two processes with one thread each take a third of the time of one process with two threads.
	HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 $(BIN)/pytest -n 2 --dist loadfile --no-loadscope-reorder

test-fast: setup
	# The unmarked tests: no browser, no other processes, nothing slow.
	HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 $(BIN)/pytest -n 2 --dist loadfile --no-loadscope-reorder -m "not slow and not browser and not multiprocess and not gpu"

mutation: setup
	$(BIN)/python tests/mutation.py

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

docs: setup
	# Strict: a broken link or anchor fails the build.
	HF_HUB_OFFLINE=1 NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet --strict
	@echo "The site is in site/. Open site/index.html. Search needs a server: run $(BIN)/mkdocs serve and open http://127.0.0.1:8000"

bench: setup
	$(BIN)/python -W ignore benchmarks/speed.py

bench-quick: setup
	$(BIN)/python -W ignore benchmarks/speed.py --quick

clean:
	rm -rf .venv demo site
