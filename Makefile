# make demo | test: each sets up everything it needs (Python >= 3.11, git and make are enough) and does its job.
.PHONY: demo test fast long check bench chaos faults flat fuzz house trace lab venv chromium clean

PYTHON ?= python3
BIN := .venv/bin
STAMP := .venv/.flexkernel-installed
FAIRSCALE := 0.4.13
MEGATRON := $(shell grep '^megatron-core==' constraints.txt)
TORCH := $(shell grep '^torch==' constraints.txt)
# Engines are processes: threads of their own would only fight over the cores.
export OMP_NUM_THREADS ?= 1

demo: $(STAMP)
	$(BIN)/python -m flexkernel demo

test: check chromium
	$(BIN)/python -m pytest $(PYTEST)

# No engines and no browser: most of the truth, in about two minutes
fast: $(STAMP)
	$(BIN)/python -m pytest -m "not slow and not browser" $(PYTEST)

long: check chromium
	$(BIN)/python -m pytest --long $(PYTEST)

check: $(STAMP)
	$(BIN)/python -m ruff check .
	$(BIN)/python -m ruff format --check .
	$(BIN)/python -m mypy

# The calls that one activation, edit, gradient and generated token make: make trace
trace: $(STAMP)
	$(BIN)/python -m tools.trace

# The structure of the code, measured: make house
house: $(STAMP)
	$(BIN)/python tools/house.py

# What it costs beside what it would be done with otherwise: make bench ROWS="reads edit"
bench: $(STAMP)
	PYTHONPATH=. $(BIN)/python -m tools.benchmarks $(ROWS)

# Faults at random: make chaos N=200 SEED=7
N ?= 200
chaos: $(STAMP)
	$(BIN)/python -m tools.chaos --rounds $(N) $(if $(SEED),--seed $(SEED))

# The same cell again and again in a real kernel: nothing grows. make flat N=1000
flat: $(STAMP)
	$(BIN)/python -m tools.flat --runs $(if $(filter command line,$(origin N)),$(N),1000)

# Inputs at random: make fuzz SECONDS=600 SEED=7
SECONDS ?= 600
fuzz: $(STAMP)
	$(BIN)/python -m tools.fuzz --seconds $(SECONDS) $(if $(SEED),--seed $(SEED))

# Thirty faults, each made on purpose, as a table in tools/FAULTS.md: make faults TIMES=3
TIMES ?= 3
faults: $(STAMP)
	$(BIN)/python -m tools.faults --times $(TIMES) --write tools/FAULTS.md

lab: $(STAMP)
	$(BIN)/python -m flexkernel demo-model
	$(BIN)/python -m jupyterlab notebooks/quickstart.ipynb

venv: $(STAMP)

$(STAMP): setup.cfg pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	    { echo "flexkernel needs Python 3.11 or newer; $(PYTHON) is $$($(PYTHON) --version 2>&1). Say make PYTHON=python3.12"; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' || \
	    { echo "$(PYTHON) cannot make virtual environments; on Debian: apt-get install python3-venv"; exit 1; }
	@$(BIN)/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv .venv
	@# Without a GPU the CPU build spares gigabytes; where its index is out of reach, the default one has to do.
	@$(BIN)/python -c 'import torch' 2>/dev/null || command -v nvidia-smi >/dev/null || \
	    $(BIN)/python -m pip install --quiet --no-deps --retries 0 --timeout 5 $(TORCH) \
	        --index-url https://download.pytorch.org/whl/cpu || echo "taking $(TORCH) from the default index"
	$(BIN)/python -m pip install --disable-pip-version-check -e '.[test]' -c constraints.txt
	@# A model library whose layers the tests read; it has no wheel, and its build asks for nothing but setuptools.
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-build-isolation --no-deps \
	    fairscale==$(FAIRSCALE) || echo "fairscale cannot be built here; its test is skipped"
	@# Another, which has a wheel for some versions of Python only, and needs nothing that is not there.
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --only-binary :all: $(MEGATRON) || \
	    echo "there is no $(MEGATRON) for this Python; its test is skipped"
	$(BIN)/python -m flexkernel install --sys-prefix
	@touch $@

# Browser tests are skipped where there is no chromium, except on CI, which must run them.
chromium:
ifeq ($(CI),true)
	@command -v chromium >/dev/null && ls /usr/share/fonts/truetype/wqy >/dev/null 2>&1 || { \
	    sudo=$$([ "$$(id -u)" = 0 ] || echo sudo); \
	    $$sudo apt-get update && $$sudo apt-get install -y --no-install-recommends chromium fonts-dejavu-core fonts-wqy-microhei; }
endif

clean:
	rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -not -path './.venv/*' -prune -exec rm -rf {} +
