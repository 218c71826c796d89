#!/usr/bin/env bash
# Runs the checks of `fusereg verify` with the build for 64-bit Arm in an emulator, on a processor with few
# extensions and on one with all, and compares results with float64 and bits with this machine's. Before them,
# what is written for NEON is compared with the scalar functions that define it (vectors.cpp).
# Usage: tests/aarch64/run.sh FOLDER TECHNIQUES DTYPES      (such as: build/aarch64 dropout,penalty float32)
set -euo pipefail
here=$(realpath "$(dirname "$0")")
folder=$(realpath "$1")
work=(-m fusereg.cli.checks._worker --name baseline --device cpu --isa baseline --techniques "$2" --dtypes "$3")

mkdir -p "$folder/site/fusereg"
for part in "$here"/../../python/fusereg/*; do
  case $part in *.so | *__pycache__) ;; *) ln -sfn "$(realpath "$part")" "$folder/site/fusereg/" ;; esac
done
ln -sf "$folder"/build/_C.*.so "$folder/site/fusereg/"

aarch64-linux-gnu-g++ -static -std=c++17 -O3 -I"$here/../../csrc" "$here/vectors.cpp" -o "$folder/vectors"
FUSEREG_CPU_ISA=baseline python "${work[@]}" > "$folder/here.jsonl"
for processor in ${FUSEREG_AARCH64_PROCESSORS:-neoverse-n1 max}; do
  printf '\n-- %s\n' "$processor"
  qemu-aarch64-static -cpu "$processor" "$folder/vectors"
  PYTHONPATH="$folder/site:$folder/packages" OMP_NUM_THREADS=2 qemu-aarch64-static -cpu "$processor" \
    -L "$folder/sysroot" "$folder/sysroot/usr/bin/python3" "${work[@]}" > "$folder/$processor.jsonl"
  python "$here/compare.py" "$folder/here.jsonl" "$folder/$processor.jsonl"
done
