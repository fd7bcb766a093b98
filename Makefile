# Every target sets up what it needs in .venv; on a fresh machine with Python and pip nothing else is needed.
PYTHON ?= python3
BIN := .venv/bin
OUT ?= demo

.PHONY: setup demo test lint docs bench bench-quick clean

setup: .venv/.done

.venv/.done: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet -c constraints.txt torch
	$(BIN)/pip install --quiet -c constraints.txt -e ".[dev,docs]"
	touch $@

demo: setup
	$(BIN)/vlm-unlearn demo --out $(OUT)

test: setup
	# Two processes of one thread each take a third of the time of one with two.
	HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 $(BIN)/pytest -n 2 --dist loadfile

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

docs: setup
	# Strict: a broken link or anchor fails.
	HF_HUB_OFFLINE=1 NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet --strict
	@echo "the site is in site/: open site/index.html; its search works where it is served: $(BIN)/mkdocs serve, then http://127.0.0.1:8000"

bench: setup
	$(BIN)/python -W ignore benchmarks/speed.py

bench-quick: setup
	$(BIN)/python -W ignore benchmarks/speed.py --quick

clean:
	rm -rf .venv demo site
