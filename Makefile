# make demo   the whole chain on videos it draws itself, on the CPU, in minutes
# make test   checks and tests
# make test-fast  the tests that start no Ray and no process and do not train for long
# make gpu    what a GPU does with it, as a table in gpu.md, in minutes; needs a PyTorch that sees the GPU
# make check  lint, formatting, types and import direction only
# make format rewrite the code in the project's format

PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
DEMO ?= demo-output
# More than two cores, for tests wait for processes and for Ray.
TESTERS ?= 3
# Else each of the hundreds of processes that tests start compiles the package again.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: demo test test-fast gpu check format clean

demo: $(READY)
	$(BIN)/deltacache demo $(DEMO)

test: check
	$(BIN)/pytest -n $(TESTERS) --dist loadfile --no-loadscope-reorder

test-fast: $(READY)
	$(BIN)/pytest -n $(TESTERS) --dist loadfile --no-loadscope-reorder -m 'not slow'

gpu:
	PYTHONPATH=src $(PYTHON) benchmarks/gpu.py --out gpu.md

check: $(READY)
	$(BIN)/ruff format --check src tests benchmarks examples
	$(BIN)/ruff check src tests benchmarks examples
	$(BIN)/basedpyright
	$(BIN)/lint-imports

format: $(READY)
	$(BIN)/ruff format src tests benchmarks examples
	$(BIN)/ruff check --fix src tests benchmarks examples

# pip and not uv: the CPU build of torch is chosen by whatever index pip is set up with.
$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "deltacache needs Python 3.11 or later; $(PYTHON) is older. Try: make PYTHON=/path/to/python3.11"; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $(READY)

clean:
	rm -rf $(VENV) $(DEMO)
