# make demo: the whole pipeline, small. make test: the tests. Both create .venv on first use.
PYTHON ?= python3
BIN := .venv/bin
.PHONY: install demo test test-slow test-gpu lint clean

install: .venv/.installed

.venv/.installed: setup.cfg pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[test]"
	touch $@

demo: install
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/deepspeed --num_accelerators 1 distill/run.py --config configs/demo.yaml

test: install lint
	$(BIN)/python -m pytest

test-slow: install
	$(BIN)/python -m pytest -m slow

test-gpu: install
	$(BIN)/python -m pytest -m gpu

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports --no-cache

# What `make demo` made, and caches; other runs stay.
clean:
	rm -rf runs/demo .pytest_cache .ruff_cache .import_linter_cache .hypothesis
