# SPDX-License-Identifier: Apache-2.0
# make train   train a CNN with CSGD and with SGD on handwritten digits; table and picture in out/digits
# make test    run the tests of the package on all cores; ARGS="tests/optim -k lr" chooses, ARGS=-n0 takes one process
# make test-programs      run the tests of experiments, benchmarks, examples and tools
# make test-integration   run it in Lightning, Accelerate, transformers and timm, which go into .venv, too
# make lint    check style and types
# make docs    the documentation as web pages, in out/docs, and a check of them; ARGS="--pictures DIR" keeps pictures
# make try-compilers   the bits of the CPU loops with every compiler that is here, for ten minutes; ARGS=clang chooses
# make try-versions   the quick tests with every Python that is here and three releases of torch; ARGS chooses
# make count-instructions   instructions per element of a step on the CPU; needs valgrind
# make wheel   wheels that install without a compiler, in out/wheels; ARGS="--python PATH" makes them for another Python
# make gpu-suite   on a machine with a GPU: build, test, measure; sanitize with ARGS="--parts sanitizers"; no network
# Needs Python >= 3.10 (PYTHON=...), a C++ compiler and make; the rest goes into .venv.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
CPP := $(wildcard $(patsubst %,csrc/*/*.%,h cuh cpp cu) $(patsubst %,tests/rule/hooks/*.%,h cpp cu) tests/cpu/*.h \
  tests/cpu/*.cpp tests/cuda/emulation/* tests/cuda/ptx/*.cpp)
ARGS ?=
# A test marked with xdist_group(name) runs in the same process as the others of its group. Tests of threads have more
# threads than there are cores left: these must not spin while they wait.
PYTEST := OMP_WAIT_POLICY=passive $(BIN)/python -m pytest --numprocesses auto --maxprocesses 8 --dist loadgroup
# What make test leaves out: tests of experiments and tools, and those that need other packages.
PROGRAM_TESTS := tests/experiments tests/cpu tests/cuda/test_gpu_tools.py tests/cuda/test_sass.py tests/test_pages.py \
  tests/test_versions.py tests/test_wheel.py
INTEGRATION_TESTS := $(patsubst %,tests/integration/test_%.py,lightning accelerate transformers timm)

.PHONY: train test test-programs test-integration lint docs format check-cuda count-instructions try-compilers \
  try-versions wheel gpu-suite clean

train: $(VENV)/built
	@echo "Training on the digits: 15 to 25 seconds on a quiet machine. Results go to out/digits."
	$(BIN)/python examples/train.py --out out/digits $(ARGS)

# Where ARGS names tests/..., only that.
test: $(VENV)/built
	$(PYTEST) $(if $(findstring tests/,$(ARGS)),,$(patsubst %,--ignore=%,$(PROGRAM_TESTS) $(INTEGRATION_TESTS))) $(ARGS)

test-programs: $(VENV)/built
	$(PYTEST) $(if $(findstring tests/,$(ARGS)),,$(PROGRAM_TESTS)) $(ARGS)

# Named by make test ARGS=tests/..., they are skipped where a package is missing. The variable makes that an error here.
test-integration: $(VENV)/integration
	HF_HUB_OFFLINE=1 CSGD_CUDA_INTEGRATION=1 $(PYTEST) \
	  tests/integration/test_compatibility.py $(INTEGRATION_TESTS) $(ARGS)

lint: $(VENV)/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run --Werror $(CPP)
	$(BIN)/mypy

# A warning is an error, and so is what Chromium, where there is one, finds in the pages. Needs no compiled extension.
docs: $(VENV)/docs
	$(BIN)/python -m sphinx --quiet --fail-on-warning --keep-going --fresh-env docs out/docs
	$(BIN)/python tools/check_pages.py out/docs $(ARGS)

$(VENV)/docs: $(VENV)/installed docs/requirements.txt
	$(BIN)/python -m pip install --quiet --constraint requirements-dev.txt --requirement docs/requirements.txt
	touch $@

format: $(VENV)/installed
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .
	$(BIN)/clang-format -i $(CPP)

# What can be checked of the CUDA part without a GPU; needs nvcc.
check-cuda: $(VENV)/installed
	$(BIN)/python tools/check_cuda.py $(ARGS)

count-instructions: $(VENV)/installed
	$(BIN)/python tools/count_instructions.py $(ARGS)

try-compilers: $(VENV)/installed
	$(BIN)/python tools/try_compilers.py $(ARGS)

wheel: $(VENV)/installed
	$(BIN)/python tools/make_wheel.py $(ARGS)

# Makes environments of its own.
try-versions:
	$(PYTHON) tools/try_versions.py $(ARGS)

# Uses the Python there is (PYTHON=...), which must have torch with CUDA and ninja; what else is missing is left out.
gpu-suite:
	$(PYTHON) tools/gpu_suite.py $(ARGS)

$(VENV)/installed: requirements-dev.txt
	@echo "Making the virtual environment $(VENV): downloads PyTorch and the tools, 1 to 3 minutes, once."
	test -d $(VENV) || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --requirement requirements-dev.txt
	touch $@

# An editable install: Python files are used where they lie, the extension is built into csgd_cuda/.
$(VENV)/built: $(VENV)/installed setup.py pyproject.toml $(wildcard csrc/*/*)
	@echo "Compiling the C++ extension into csgd_cuda/, about a minute; again only when csrc/ changes."
	$(BIN)/python -m pip install --quiet --no-build-isolation --no-deps --editable .
	touch $@

# The constraints keep torch as it is; "none" leaves the extension as built, where "auto" would compile it again.
$(VENV)/integration: $(VENV)/built
	CSGD_CUDA_BUILD=none $(BIN)/python -m pip install --quiet --no-build-isolation \
	  --constraint requirements-dev.txt --editable '.[test-integration]'
	touch $@

clean:
	rm -rf $(VENV) build out csgd_cuda/_C*.so *.egg-info
