# make demo   install, make Carvana-like pairs, train, evaluate, draw: everything from nothing
# make test   install, run the tests            make lint   ruff, mypy, import-linter
# make soak SECONDS=600   rounds of kills, full disks and damaged files at random, against undisturbed runs
# make docs   install, build the pages of docs/ as HTML in build/docs; a warning is an error
# make gpu-check OUT=DIR   tests and benchmarks that need a GPU, nine minutes, results as JSON in DIR
# make install   only the virtual environment, with numba's kernels compiled and cached
# make clean     remove what these made (data/ and runs/ stay)
# make peers     .venv-peers: fastseg beside the libraries that the benchmarks compare it with
PYTHON ?= python3
BIN := .venv/bin
OUT ?= gpu-check
SECONDS ?= 600
STAMP := .venv/installed

.PHONY: demo test soak lint docs gpu-check install peers clean

install: $(STAMP)
peers: .venv-peers/installed

# The peers stay out of .venv: their torchvision breaks the import of torchmetrics where torch is a CPU build.
.venv/installed: EXTRA := dev
.venv-peers/installed: EXTRA := peers
%/installed: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 10) else "fastseg needs Python 3.10 or newer; this is " + sys.version.split()[0] + ". Run make PYTHON=/path/to/a/newer/python3.")'
	$(PYTHON) -m venv $*
	$*/bin/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[$(EXTRA)]'
	$*/bin/python scripts/compile_kernels.py
	touch $@

demo: $(STAMP)
	$(BIN)/python scripts/demo.py

# A process per core, each with one thread: threads of several processes on the same cores wait for each other.
test: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n logical --dist worksteal

soak: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python tests/soak.py --seconds $(SECONDS)

gpu-check: $(STAMP)
	$(BIN)/python benchmarks/gpu_check.py --out $(OUT)

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-cache

docs: $(STAMP)
	$(BIN)/python -m sphinx --fail-on-warning --keep-going --nitpicky --quiet docs build/docs

clean:
	rm -rf .venv .venv-peers build *.egg-info .pytest_cache .mypy_cache .ruff_cache
