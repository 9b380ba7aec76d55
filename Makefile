# Everything runs in a virtual environment that the first target to need it makes: `make demo` is enough to start.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
# For `make bench`: a folder with train.csv and test.csv, and a Hugging Face encoder to fine-tune as the teacher.
DATA ?=
TEACHER ?=

.DEFAULT_GOAL := help
.PHONY: help install demo test lint types format bench soak clean

help: ## print this list
	@awk -F ':.*## ' '/^[a-z]+:.*## /{printf "  make %-9s %s\n", $$1, $$2}' $(firstword $(MAKEFILE_LIST))

# The constraints decide every version, torch's too: whichever build of 2.13.0 the machine's package index offers.
$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "$(PYTHON) is older than 3.11: make PYTHON=python3.11")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -c constraints.txt -e '.[dev]'
	@touch $@

install: $(STAMP) ## make the virtual environment and install the project with its pinned dependencies

demo: $(STAMP) ## distil a small teacher on generated support tickets, CPU only, into runs/demo
	$(BIN)/raydistill demo

test: lint types ## lint, type check and every test that is not slow, in two processes
	$(BIN)/pytest -n 2 --dist loadfile --no-loadscope-reorder

lint: $(STAMP) ## ruff: rules and formatting
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(STAMP) ## pyright, strict for the maths, the config and the cache
	$(BIN)/pyright --pythonpath $(BIN)/python

format: $(STAMP) ## rewrite the code the way ruff wants it
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(STAMP) ## the benchmarks; DATA=folder TEACHER=model for the one on BANKING77
	@for file in benchmarks/*.py; do printf '%-28s %s\n' "$$file" "$$(sed -n '1s/"""//gp' "$$file")"; done
	$(BIN)/python benchmarks/cache.py
ifneq ($(and $(DATA),$(TEACHER)),)
	$(BIN)/python benchmarks/banking77.py --data $(DATA) --teacher $(TEACHER)
else
	@echo 'benchmarks/banking77.py left out: make bench DATA=folder-with-train-and-test-csv TEACHER=model-folder'
endif

soak: $(STAMP) ## the slow tests, in two processes
	$(BIN)/pytest -m slow -n 2 --dist load

clean: ## remove what tools leave behind; the virtual environment and runs/ stay
	rm -rf build dist *.egg-info .pytest_cache .ruff_cache .hypothesis
	find . -path ./$(VENV) -prune -o -path ./runs -prune -o -type d -name __pycache__ -exec rm -rf {} +
