# make demo and make test need nothing but Python 3.11+, git and make; the rest of the set-up is theirs.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
BENCHMARKS := attention experts kernels order loader preselect rephrase inference methods serving identity

.PHONY: setup demo test lint bench clean

setup: $(VENV)/.done

$(VENV)/.done: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet -c constraints.txt --editable '.[images,serve,wandb,test]'
	touch $@

demo: setup
	$(BIN)/sundog demo

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/basedpyright --warnings
	$(BIN)/lint-imports

# Much of a test's time is Ray starting: three test processes keep two cores busy.
test: lint
	$(BIN)/pytest -n 3 --dist loadfile

bench: setup
	for name in $(BENCHMARKS); do $(BIN)/python -m benchmarks.$$name || exit 1; done

clean:
	rm -rf $(VENV) build dist *.egg-info
