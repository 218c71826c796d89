#!/usr/bin/env bash
# Runs the tests that take `backend`, those that want a GPU and test_standin_*.py on the stand-in device.
# Usage: tests/standin_device/run.sh BUILD_FOLDER [PYTEST_ARGUMENTS...]
set -euo pipefail
folder=$(realpath "$1")
shift
module=$(find "$folder/module/" -name '_C_standin*.so' | head -n 1)
[ -n "$module" ] || { echo "no _C_standin module in $folder; build it with make test-standin" >&2; exit 1; }

# The package as it is installed, with its benchmarks.
root=$(realpath "$(dirname "$0")/../..")
rm -rf "$folder/site" && mkdir -p "$folder/site/fusereg"
ln -s "$root"/python/fusereg/* "$root/bench" "$folder/site/fusereg"

# torch looks for NVIDIA's libraries where the linker does, and finds those of stubs.py.
LD_LIBRARY_PATH="$folder/lib" FUSEREG_TEST_STANDIN_MODULE="$module" \
  PYTHONPATH="$folder/site" OMP_NUM_THREADS=1 \
  "$folder/venv/bin/python" -m pytest -q -p no:cacheprovider "$@"
