#!/usr/bin/env bash
# Runs the suite with the CUDA kernels on the host, once for each order of threads and blocks that
# FUSEREG_HOST_SCHEDULE names ("forward reverse random:1"); by default in one.
# Usage: tests/cuda_on_host/run.sh BUILD_FOLDER [PYTEST_ARGUMENTS...]
set -euo pipefail
folder=$1
shift
module=$(find "$folder" -name '_C_cuda_on_host*.so' | head -n 1)
[ -n "$module" ] || { echo "no _C_cuda_on_host module in $folder; build it with make test" >&2; exit 1; }

# ASan must be there before everything else, and libstdc++ before ASan looks for its exceptions.
preload="$(c++ -print-file-name=libasan.so) $(c++ -print-file-name=libstdc++.so)"
for schedule in ${FUSEREG_HOST_SCHEDULE:-forward}; do
  printf '\n-- schedule %s\n' "$schedule"
  # Python itself leaks at exit by design, and torch's libraries are not instrumented.
  LD_PRELOAD=$preload ASAN_OPTIONS=detect_leaks=0:detect_stack_use_after_return=0 \
    UBSAN_OPTIONS=print_stacktrace=1 OMP_NUM_THREADS=1 \
    FUSEREG_TEST_HOST_MODULE="$(realpath "$module")" FUSEREG_HOST_SCHEDULE=$schedule \
    python -m pytest -q -p no:cacheprovider "$@"
done
