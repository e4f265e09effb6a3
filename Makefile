# `make` lists the commands. Everything runs in .venv, which is made on first use and kept up to date.

PYTHON ?= python3
RECIPE ?= digits
ARGS   ?=
TORCH  ?=

# One process for each core, up to eight: the tests are many and small.
PYTEST = $(BIN)/python -m pytest -n auto --maxprocesses 8 --dist worksteal

VENV := .venv$(if $(TORCH),-$(TORCH))
BIN  := $(VENV)/bin
PIN  := $(or $(TORCH),$(shell sed -n 's/^torch==//p' constraints.txt))

# The other torch that the package admits.
OTHER_TORCH := 2.14.1

MAKEFLAGS += --no-print-directory
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.DEFAULT_GOAL := help
.PHONY: help train test test-full lint pytest sanitize bench test-cuda bench-cuda gallery docs wheel clean
.DELETE_ON_ERROR:
.NOTPARALLEL:

help: ## list the commands
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/  make \1\t\2/p' Makefile | expand -t 20
	@echo
	@echo '  RECIPE=name ARGS="--key=value ..."  another recipe, other settings; ARGS=--help shows them (make train)'
	@echo '  TORCH=$(OTHER_TORCH)                        another torch, in an environment of its own (make test)'
	@echo '  PYTHON=/path/to/python              the Python to make .venv with, 3.11 or newer'

train: $(VENV)/.built ## train RECIPE (digits, descent, regression, depth, learning_rate, language_model), say where the curves are
	$(BIN)/python -m recipes $(RECIPE) $(ARGS)

# Style and types are properties of the source: they are checked once, with the pinned tools, and not again for TORCH=.
test: $(if $(TORCH),,lint) pytest ## ruff, mypy, pytest with doctests; under ten minutes

test-full: test sanitize $(VENV)-examples/.installed ## what is slower as well: sanitizers, packaging, documentation, TensorBoard in a browser, the other torch
	$(PYTEST) -m slow
	$(MAKE) test TORCH=$(OTHER_TORCH)

lint: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

pytest: $(VENV)/.built
	$(PYTEST)

# One library of kernels must serve both torches: with TORCH= the tests load what the other torch's headers built.
sanitize: $(VENV)/.built ## the kernels' tests under AddressSanitizer and UBSan
	$(BIN)/python -m tests.native.sanitized -q

bench: $(VENV)/.built ## stock and torchcalc side by side (ARGS=--quick: under a minute)
	$(BIN)/python -m benchmarks $(ARGS)

# On whatever machine has the GPU, with the Python there: nothing is installed.
# The nodes, which launch kernels, are built where a compiler is: half a minute, the first time.
test-cuda: ## the tests that a GPU can run, with $(PYTHON)'s own torch, Triton and pytest; under four minutes
	@$(PYTHON) -c 'from torchcalc.native.build import build_what_is_missing; build_what_is_missing()'
	@$(PYTHON) -m tests.cuda $(ARGS)

bench-cuda: ## stock and torchcalc side by side on a GPU, likewise
	@$(PYTHON) -c 'from torchcalc.native.build import build_what_is_missing; build_what_is_missing()'
	@$(PYTHON) -m benchmarks.cuda $(ARGS)

gallery: $(VENV)/.built ## the README's pictures: runs three recipes, photographs TensorBoard with Chromium
	$(BIN)/python -m recipes.gallery $(ARGS)

# Not --quiet: it hides the warnings from --strict, too.
docs: $(VENV)/.built ## the documentation, from the docstrings: build/docs/index.html; what mkdocs warns of is an error
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict --config-file .docs/mkdocs.yml
	@echo build/docs/index.html

wheel: $(VENV)/.installed ## dist/torchcalc-*.whl, with the kernels for this platform
	$(BIN)/python -m build --wheel --no-isolation --outdir dist

clean: ## remove environments, builds and caches; runs/ stays
	rm -rf .venv .venv-* build dist .hypothesis .mypy_cache .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(VENV)/.created:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
		echo "torchcalc needs Python 3.11 or newer; $(PYTHON) is $$($(PYTHON) --version 2>&1). Use: make PYTHON=/path/to/python3.11"; exit 1; }
	$(PYTHON) -m venv --clear $(VENV)
	@touch $@

# Another torch says itself which setuptools it takes. The build backend first: what is installed without build isolation need not be downloaded for each build.
$(VENV)/.installed: $(VENV)/.created pyproject.toml constraints.txt Makefile torchcalc/native/hatch_build.py
	@echo 'Installing torch $(PIN), torchcalc and its tools into $(VENV): minutes, the first time'
	@sed 's/^torch==.*/torch==$(PIN)/$(if $(TORCH),; /^setuptools==/d)' constraints.txt > $(VENV)/constraints.txt
	$(BIN)/python -m pip install --quiet -c $(VENV)/constraints.txt 'torch==$(PIN)' hatchling editables
	$(BIN)/python -m pip install --quiet -c $(VENV)/constraints.txt --no-build-isolation -e '.[recipes,dev,docs]'
	@touch $@

# transformers and accelerate see the packages of $(VENV), and add theirs: the other tests run without them.
$(VENV)-examples/.installed: $(VENV)/.installed
	$(BIN)/python -m venv --clear $(VENV)-examples
	@$(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))' > "$$($(VENV)-examples/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/examples.pth"
	$(VENV)-examples/bin/python -m pip install --quiet -c $(VENV)/constraints.txt accelerate transformers
	@touch $@

# What the kernels are made from: C++, and the formulas. Where the loops come out as they were, this takes three seconds.
FORMULAS := $(wildcard $(addprefix torchcalc/,formula/*.py activations/*.py losses/*.py layers/*.py optim/*.py))
$(VENV)/.built: $(VENV)/.installed $(wildcard torchcalc/native/*.py torchcalc/native/csrc/*.* torchcalc/native/csrc/node/*) $(FORMULAS)
	@echo 'Building the kernels that are not up to date'
	$(BIN)/python -c 'from torchcalc.native.build import build_what_is_missing; build_what_is_missing()'
	@touch $@
