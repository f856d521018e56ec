# make train   train on scikit-learn's digits four ways and compare them, into runs/digits
# make test    the whole test suite
# make bench   the benchmarks
# make docs    the API reference, into build/docs
# make check-gpu  on a machine with a GPU: builds, tests, measures, with $(PYTHON) as it is
# make sanitize  the ops' tests with CPU kernels that check addresses and undefined behaviour
# make lint    style, formats, types        make format   put the formats right
# make clean   remove what was compiled     make distclean   the environment, too
#
# Each sets .venv up first where that is not done yet, and compiles what changed.
#   PYTHON=python3.12                        the interpreter (3.10 or later)
#   TORCH="./torch-2.13.0+cpu-….whl"         which torch to install: a requirement, a file or a
#                                            URL, where the package index has only CUDA builds
#                                            and a CPU one is wanted. PIP_EXTRA_INDEX_URL and
#                                            pip's other variables work as well.
# By default not the newest torch that the package runs under: that one is several gigabytes.
PYTHON ?= python3
TORCH ?= torch<2.14

VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
COMPILED := $(VENV)/.compiled
DEMO := $(VENV)/.demo
SOURCES := $(shell find csrc -type f)
BUILD_FILES := pyproject.toml setup.py tools/build_backend.py tools/torch_range.py
PYTHON_FILES := adagrad_kernels tests benchmarks $(wildcard docs/*.py) examples tools setup.py

.PHONY: train test bench docs check-gpu sanitize lint format clean distclean
.DELETE_ON_ERROR:

train: $(if $(wildcard $(INSTALLED)),$(COMPILED),$(DEMO))
	$(BIN)/adagrad-kernels train --compare --overwrite --out runs/digits

test: $(COMPILED)
	$(BIN)/python -m pytest

bench: $(COMPILED)
	$(BIN)/python -m pytest benchmarks --benchmark-sort=name --benchmark-columns=median,iqr,rounds

docs: $(COMPILED)
	$(BIN)/python docs/api.py build/docs

# No environment of its own, nothing downloaded: such a machine may have no network.
check-gpu:
	$(PYTHON) tools/check_gpu.py

# The library of this build lies by itself; ADAGRAD_KERNELS_LIBRARY has it loaded instead.
sanitize: $(COMPILED)
	ADAGRAD_KERNELS_SANITIZE=1 ADAGRAD_KERNELS_CUDA=0 \
	  $(BIN)/python setup.py --quiet build_ext --build-lib build/sanitize
	ADAGRAD_KERNELS_LIBRARY=build/sanitize/adagrad_kernels/_C.abi3.so \
	  ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1 \
	  LD_PRELOAD="$$($(CXX) -print-file-name=libasan.so) $$($(CXX) -print-file-name=libstdc++.so)" \
	  $(BIN)/python -m pytest $(wildcard tests/test_ops_*.py) -k "not inductor and not compilation"

lint: $(COMPILED)
	$(BIN)/ruff check $(PYTHON_FILES)
	$(BIN)/ruff format --check $(PYTHON_FILES)
	$(BIN)/clang-format --dry-run -Werror $(SOURCES)
	$(BIN)/pyright

format: $(INSTALLED)
	$(BIN)/ruff check --fix-only $(PYTHON_FILES)
	$(BIN)/ruff format $(PYTHON_FILES)
	$(BIN)/clang-format -i $(SOURCES)

# The environment and everything to be imported, the package itself in editable mode.
define install
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install "pip>=23" "setuptools>=77" ninja "$(TORCH)"
	$(BIN)/python -m pip install --no-build-isolation --editable ".[$(1)]"
	touch $@
endef

$(INSTALLED): $(BUILD_FILES)
	$(call install,dev)

# As much of it as training takes, where nothing has been installed yet.
$(DEMO): $(BUILD_FILES) $(SOURCES)
	$(call install,experiments)

# After that only the kernels, and of those only what changed.
$(COMPILED): $(INSTALLED) $(SOURCES) tools/find_cuda.py tools/kernel_flags.py
	$(BIN)/python setup.py --quiet build_ext --inplace
	touch $@

clean:
	rm -rf build dist *.egg-info adagrad_kernels/*.so $(COMPILED)
	find $(PYTHON_FILES) -name __pycache__ -exec rm -rf {} +

distclean: clean
	rm -rf $(VENV)
