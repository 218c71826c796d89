#!/usr/bin/env bash
# Tries bench/gpu.sh on the stand-in device: STAGE is check or measure. A GPU's times it can't tell, and
# the sizes that fill one take it minutes, so that it measures the small cases alone unless CASES says more,
# and has more time than a GPU would for the kernels that the CPU runs: a LIMIT of 900 s for each stage.
# Usage: tests/standin_device/gpu.sh BUILD_FOLDER STAGE OUT
set -euo pipefail
folder=$(realpath "$1")
root=$(realpath "$(dirname "$0")/../..")
module=$(find "$folder/module/" -name '_C_standin*.so' | head -n 1)
[ -n "$module" ] || { echo "no _C_standin module in $folder; build it with make test-standin" >&2; exit 1; }

# What a build or a wheel would have installed.
rm -rf "$folder/gpu" && mkdir -p "$folder/gpu/site"
cp -r "$root/python/fusereg" "$folder/gpu/site/fusereg"
cp -r "$root/bench" "$folder/gpu/site/fusereg/bench"
touch "$folder/gpu/.installed"

export LIMIT="${LIMIT:-900}" CASES="${CASES:-drop_path_add|gelu/|28x28-nhwc}"
export LD_LIBRARY_PATH="$folder/lib" FUSEREG_TEST_STANDIN_MODULE="$module" OMP_NUM_THREADS=1
PYTHONPATH="$root/tests/standin_device/start" PYTHON="$folder/venv/bin/python" BUILD="$folder/gpu" \
  "$root/bench/gpu.sh" "$2" "$3"
