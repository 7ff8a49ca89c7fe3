# `make demo` and `make test` do all the set-up: they need Python >= 3.11, a C++ compiler and pip's network.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# What is imported is compiled to bytecode then, and kept; most of what is installed never is.
unexport PYTHONDONTWRITEBYTECODE
PIP := $(BIN)/python -m pip install --no-compile --disable-pip-version-check -c constraints.txt
SOURCES := $(shell find csrc tests/cuda_on_threads tests/openmp_on_threads -name '*.h' -o -name '*.cpp' -o -name '*.cu' -o -name '*.cuh')

.PHONY: demo test sanitize fuzz torch-versions nightly bench lint docs support dist check gpu clean

# For this machine, where the tests look at code for several kinds of GPU.
demo: ARCHS =
demo: $(VENV)/.installed
	$(BIN)/fusedopt demo

# Which GPUs the CUDA engine has code for, where nvcc is; those that are there, if it is empty.
ARCHS ?= 80 90 100

# WORKERS: how many processes take the tests; 0 for none but pytest's own.
WORKERS ?= auto
# SELECT: which tests, as an expression of markers; all where it is empty.
SELECT ?= not nightly
test: $(VENV)/.tested
	$(BIN)/python -m pytest -m "$(SELECT)" -n $(WORKERS) --maxprocesses 8 --dist loadgroup

# One wheel beside several versions of torch, which are downloaded: make torch-versions ARGS='--keep folder'
torch-versions: $(VENV)/.dist
	$(BIN)/python tests/torch_versions.py $(ARGS)

# What takes too long for every change. With -k the rest is done where something fails: make -k nightly MINUTES=60
nightly: WORKERS = 4
nightly: SELECT =
nightly: sanitize fuzz dist torch-versions test

# The host and the CPU engine under AddressSanitizer and UBSan.
sanitize: TESTS ?= $(patsubst %,tests/test_%.py,host moved layouts step errors)
sanitize: $(VENV)/.installed
	$(BIN)/python tests/sanitize.py $(TESTS)

# Random programs for MINUTES on each engine: make fuzz MINUTES=240
fuzz: MINUTES ?= 60
fuzz: $(VENV)/.installed
	failed=0; \
	for engine in "cpu" "cuda" "cuda --scan python" "eager"; do \
		$(BIN)/python tests/fuzz.py --minutes $(MINUTES) --engine $$engine || failed=1; \
	done; \
	exit $$failed

# Under ten minutes on two cores. Any option of `fusedopt bench`: make bench ARGS='--suite gpt2 --optimizer Lion'
bench: OUT ?= bench-results
bench: $(VENV)/.bench
	mkdir -p $(OUT)
	$(BIN)/fusedopt bench --json $(OUT)/bench.json $(ARGS); status=$$?; $(BIN)/fusedopt bench report $(OUT); exit $$status

lint: $(VENV)/.lint
	$(BIN)/ruff check
	$(BIN)/ruff format --check --extend-exclude '*.md'
	$(BIN)/clang-format --dry-run -Werror $(SOURCES)
	$(BIN)/pyright --pythonpath $(BIN)/python
	told=$$(PATH=$(CURDIR)/$(BIN):$$PATH PYTHONPATH=$(CURDIR) $(BIN)/pyright --verifytypes fusedopt --ignoreexternal) \
	|| { echo "$$told"; exit 1; }

# The site, in site/: a warning is an error.
docs: $(VENV)/.docs
	$(BIN)/python docs/generate.py build/docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

# What the support page shows, in docs/support.json: of the tests that tell it, by night and day. Half an hour.
support: $(VENV)/.bench
	FUSEDOPT_SUPPORT=docs/support.json $(BIN)/python -m pytest -n $(WORKERS) --maxprocesses 8 --dist loadgroup

# The source distribution and wheels, in dist/, each tried in a new environment without a compiler. Where nvcc is, one
# wheel has code for all GPUs, or those of FUSEDOPT_CUDA_ARCHS; make dist ARGS=--no-cuda leaves it out.
dist: $(VENV)/.dist
	$(BIN)/python tests/packages.py $(ARGS)

check: lint docs test

# On a machine with a GPU: builds in place with that machine's own Python and torch, without network, in nine minutes
# at most. All results are in OUT/results.tgz, in short in OUT/SUMMARY.md. What is not done by default takes a second
# call: make gpu ARGS='--part sanitize,gate'. Where there is no .git, FUSEDOPT_COMMIT is said in the results. Without a
# GPU it tries what it can in five minutes, with builds in build/dry.
gpu: OUT ?= gpu-results
gpu:
	$(PYTHON) bench/gpu.py $(OUT) $(ARGS)

$(VENV)/pyvenv.cfg:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "fusedopt needs Python 3.11 or newer: make PYTHON=...")'
	$(PYTHON) -m venv $(VENV)

COMPILED = FUSEDOPT_CUDA_ARCHS="$${FUSEDOPT_CUDA_ARCHS-$(ARCHS)}" $(PIP) --no-build-isolation

# Built without isolation, so that the build's own requirements are the pinned ones too.
# timm is an oracle of the tests; its torchvision is not needed, nor most of what torchtitan wants.
$(VENV)/.installed: $(VENV)/pyvenv.cfg setup.py csrc/toolchain.py pyproject.toml constraints.txt $(SOURCES)
	$(PIP) setuptools pybind11 ninja apache-tvm-ffi
	$(COMPILED) -e ".[test,clients]"
	$(PIP) --no-deps timm torchtitan docstring_parser spmd_types typeguard tyro
	echo $(ARCHS) > $@

# Where `make demo` came first, which compiles for no GPU but those that are there, the tests have more to look at.
$(VENV)/.tested: $(VENV)/.installed
	grep -q . $< || ! command -v nvcc > /dev/null || $(COMPILED) --no-deps -e .
	touch $@

# Others' optimizers, beside the torch that is there.
$(VENV)/.bench: $(VENV)/.installed
	$(PIP) "fusedopt[bench]"
	touch $@

$(VENV)/.dist: $(VENV)/.installed
	$(PIP) "fusedopt[dist]"
	touch $@

$(VENV)/.docs: $(VENV)/.installed
	$(PIP) "fusedopt[docs]"
	touch $@

# Brings pyright a node to run on.
$(VENV)/.lint: $(VENV)/.installed
	$(PIP) "fusedopt[lint]" "pyright[nodejs]"
	touch $@

clean:
	rm -rf $(VENV) build dist site *.egg-info .pytest_cache .hypothesis .ruff_cache fusedopt/*.so fusedopt/_build_report.json
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
