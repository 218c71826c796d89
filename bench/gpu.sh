#!/usr/bin/env bash
# Everything that needs a GPU, in one command and inside ten minutes:
#
#   bench/gpu.sh OUTDIR
#
# Builds fusereg for this machine's device, runs the whole test suite with the tests marked `gpu`, runs
# the small shapes under compute-sanitizer (memcheck, racecheck), and measures. Logs, reports and
# results go to OUTDIR. Needs on the machine: python3 with torch (CUDA), pytest, hypothesis, numpy,
# pybind11, scikit-build-core, apache-tvm-ffi and rich; nvcc, cmake, ninja, a C++17 compiler.
# PYTHON names another interpreter than python3. Nothing is downloaded and nothing is installed for good.
#
# Each stage has its own time limit and all of them share one. A stage that fails does not stop those
# after it, except that nothing can run without the build. Exit status: the number of failed stages.
# shellcheck disable=SC2329  # the stages' functions are called by name, in a shell of their own
set -u -o pipefail

readonly TOTAL_SECONDS=580

if [ "$#" -ne 1 ] || [ "$1" = "-h" ] || [ "$1" = "--help" ]; then
  echo "usage: bench/gpu.sh OUTDIR" >&2
  exit 64
fi

root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)" || exit 64
mkdir -p "$1" || exit 64
out="$(cd "$1" && pwd)" || exit 64
python="${PYTHON:-python3}"
work="$(mktemp -d)" || exit 64
trap 'rm -rf "$work"' EXIT
cd "$root" || exit 64

export PYTHONUNBUFFERED=1
export PYTHONDONTWRITEBYTECODE=1
# The built package comes first, so that nothing of the source tree or of another installation is tested.
export PYTHONPATH="$work/site${PYTHONPATH:+:$PYTHONPATH}"
# nvcc is often installed where PATH does not look.
if ! command -v nvcc >/dev/null && [ -x "${CUDA_HOME:-/usr/local/cuda}/bin/nvcc" ]; then
  export PATH="${CUDA_HOME:-/usr/local/cuda}/bin:$PATH"
fi

failed=0
summary="$out/summary.txt"
: >"$summary"

note() { # NAME RESULT SECONDS DETAIL
  printf '%-12s %-8s %5ss  %s\n' "$1" "$2" "$3" "$4" | tee -a "$summary"
}

# stage NAME LIMIT COMMAND...: runs it with its output in OUTDIR/NAME.log.
stage() {
  local name="$1" limit="$2" started="$SECONDS" status left
  shift 2
  left=$((TOTAL_SECONDS - SECONDS))
  if [ "$left" -lt 5 ]; then
    failed=$((failed + 1))
    note "$name" FAILED 0 "no time left of $TOTAL_SECONDS s"
    return 1
  fi
  if [ "$limit" -gt "$left" ]; then limit="$left"; fi
  echo "--- $name (at most $limit s): $*"
  # An interrupt first, so that pytest and the benchmark still write what they have.
  timeout --signal=INT --kill-after=5 "$limit" "$@" 2>&1 | tee "$out/$name.log"
  status="${PIPESTATUS[0]}"
  if [ "$status" -eq 0 ]; then
    note "$name" ok "$((SECONDS - started))" ""
    return 0
  fi
  failed=$((failed + 1))
  if [ "$status" -eq 124 ] || [ "$status" -eq 137 ]; then
    note "$name" FAILED "$((SECONDS - started))" "ran into its limit of $limit s (see $name.log)"
  else
    note "$name" FAILED "$((SECONDS - started))" "exit status $status (see $name.log)"
  fi
  return 1
}

skip() { # NAME REASON
  note "$1" skipped 0 "$2"
}

environment() {
  date -u +%Y-%m-%dT%H:%M:%SZ
  echo "commit: $(git rev-parse HEAD 2>/dev/null || echo 'not a git checkout')"
  git status --short 2>/dev/null
  uname -a
  nvidia-smi
  nvcc --version
  "$python" --version
  "$python" -m cmake --version 2>/dev/null || cmake --version
  "${CXX:-c++}" --version
  "$python" - <<'PY'
import importlib.metadata as metadata

for name in ("torch", "numpy", "pybind11", "scikit-build-core", "apache-tvm-ffi", "pytest",
             "hypothesis", "ninja", "rich", "triton"):
    try:
        print(f"{name} {metadata.version(name)}")
    except metadata.PackageNotFoundError:
        print(f"{name} missing")
import torch

if not torch.cuda.is_available():
    raise SystemExit("torch sees no CUDA device")
print(torch.cuda.get_device_properties(0))
PY
}

build() {
  "$python" -m pip install --no-build-isolation --no-deps --no-index --disable-pip-version-check \
    --target "$work/site" --verbose \
    "-Cbuild-dir=$work/build" \
    -Ccmake.define.FUSEREG_CUDA=ON \
    -Ccmake.define.CMAKE_CUDA_ARCHITECTURES=native \
    "$root"
}

info() {
  "$python" -m fusereg info &&
    "$python" -m fusereg info --json >"$out/info.json"
}

# -p no:cacheprovider: the checkout stays as it was.
suite() {
  "$python" -m pytest -p no:cacheprovider --junitxml="$out/tests.xml" --durations=20
}

gpu_tests() {
  "$python" -m pytest -p no:cacheprovider --junitxml="$out/tests-gpu.xml" -m gpu --durations=10
}

# Without torch's caching allocator each tensor is an allocation of its own, so that a read past its end
# is one for memcheck too. Only this project's kernels are watched: torch's have hazards of their own.
sanitizer() { # TOOL
  PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool "$1" --error-exitcode 77 \
    --target-processes all --kernel-name kns=fusereg \
    "$python" -m pytest -p no:cacheprovider -x -m sanitizer
}

measure() {
  "$python" -m fusereg bench --all --device cuda --report "$out/bench"
}

export -f environment build info suite gpu_tests sanitizer measure
export python out work root

in_bash() { # NAME LIMIT FUNCTION [ARGUMENT...]
  local name="$1" limit="$2"
  shift 2
  # shellcheck disable=SC2016  # expanded by the inner shell, from its arguments
  stage "$name" "$limit" bash -c 'set -u -o pipefail; "$@"' "$name" "$@"
}

in_bash environment 30 environment
if in_bash build 240 build; then
  in_bash info 45 info
  in_bash gpu_tests 120 gpu_tests
  in_bash bench 150 measure
  if command -v compute-sanitizer >/dev/null; then
    in_bash memcheck 75 sanitizer memcheck
    in_bash racecheck 75 sanitizer racecheck
  else
    skip memcheck "compute-sanitizer is not on PATH"
    skip racecheck "compute-sanitizer is not on PATH"
  fi
  # Last, since it is the longest and most of it needs no GPU: it gets all the time that is left.
  in_bash tests "$TOTAL_SECONDS" suite
else
  for name in info gpu_tests bench memcheck racecheck tests; do
    skip "$name" "there is no build"
  done
fi

echo
echo "=== $failed failed, $SECONDS s, results in $out"
cat "$summary"
exit "$failed"
