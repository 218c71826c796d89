#!/usr/bin/env bash
# Checks and measures the CUDA kernels on a machine with a GPU. Each stage takes at most four minutes:
#
#   bench/gpu.sh check OUT     every operation against the CPU, CUDA graphs and streams, the suite's
#                              CUDA tests, compute-sanitizer
#   bench/gpu.sh measure OUT   times beside eager torch and a copy, then a few beside torch.compile, the
#                              profiler's counters, and a table of what was predicted and measured
#   bench/gpu.sh build OUT     only builds fusereg for this GPU, in build/gpu; the others do so if need be
#
# OUT gets STAGE.txt (a line for each part) and STAGE.tar.gz (logs and reports), and of `measure` also
# measure.json and measure.md. Variables: WHEEL=FILE.whl installs that instead of building; PYTHON names
# another interpreter than python3; LIMIT is a stage's seconds (235; more are for its parts too);
# CASES=REGEX measures only such cases; DEVICE=cpu tries the script without a GPU.
#
# Needs python3 with torch, pytest, pytest-xdist, hypothesis, numpy and rich; to build also pybind11,
# scikit-build-core, cmake, ninja, nvcc and a C++17 compiler. Downloads nothing and installs nothing for
# good. Every part has its own time limit, and one that fails does not stop the others, except that
# nothing runs without fusereg. Exit status: the number of parts that failed.
# shellcheck disable=SC2329  # the parts' functions are called by name, in a shell of their own
set -u -o pipefail

stage="${1:-}"
case "$stage $#" in
  "build 2" | "check 2" | "measure 2") ;;
  *)
    echo "usage: bench/gpu.sh build|check|measure OUT" >&2
    exit 64
    ;;
esac

root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)" || exit 64
mkdir -p "$2" || exit 64
out="$(cd "$2" && pwd)" || exit 64
limit="${LIMIT:-235}"
python="${PYTHON:-python3}"
device="${DEVICE:-cuda}"
wheel="${WHEEL:+$(realpath "$WHEEL")}"
work="$(mktemp -d)" || exit 64
built="${BUILD:-$root/build/gpu}"
logs="$work/$stage"
summary="$out/$stage.txt"
mkdir -p "$logs" "$built"
: >"$summary"
cd "$root" || exit 64

export PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1
# What is installed here comes first: neither the source tree nor another installation is tested.
export PYTHONPATH="$built/site${PYTHONPATH:+:$PYTHONPATH}"
# nvcc and its companions are often installed where PATH does not look.
export PATH="$PATH:${CUDA_HOME:-/usr/local/cuda}/bin"

pack() {
  tar -czf "$out/.$stage.tar.gz" -C "$work" "$stage" && mv "$out/.$stage.tar.gz" "$out/$stage.tar.gz"
}
trap 'pack; rm -rf "$work"' EXIT
trap 'exit 130' INT TERM

note() { # NAME RESULT SECONDS DETAIL
  printf '%-12s %-8s %5ss  %s\n' "$1" "$2" "$3" "$4" | tee -a "$summary"
}

# part NAME LIMIT FUNCTION [ARGUMENT...]: runs it in a shell of its own, with its output in NAME.log.
part() {
  local name="$1" seconds="$2" started="$SECONDS" left status
  shift 2
  if [ "$limit" -gt 235 ]; then seconds=$((seconds * limit / 235)); fi
  left=$((limit - SECONDS))
  if [ "$left" -lt 5 ]; then
    note "$name" FAILED 0 "no time left of $limit s"
    return 1
  fi
  if [ "$seconds" -gt "$left" ]; then seconds="$left"; fi
  # An interrupt first, so that pytest and the benchmark still write what they have; without `env`,
  # parts in the background would ignore it.
  # shellcheck disable=SC2016  # expanded by the inner shell, from its arguments
  env --default-signal=INT timeout --signal=INT --kill-after=5 "$seconds" \
    bash -c 'set -u -o pipefail; "$@"' "$name" "$@" >"$logs/$name.log" 2>&1 </dev/null
  status="$?"
  if [ "$status" -eq 0 ]; then
    note "$name" ok "$((SECONDS - started))" "$(tail -n 1 "$logs/$name.log" | cut -c 1-100)"
    return 0
  fi
  if [ "$status" -eq 124 ] || [ "$status" -eq 137 ]; then
    note "$name" FAILED "$((SECONDS - started))" "took longer than $seconds s"
  else
    note "$name" FAILED "$((SECONDS - started))" "exit status $status"
  fi
  tail -n 12 "$logs/$name.log" | sed "s/^/    $name: /"
  return 1
}

skip() { # NAME REASON
  note "$1" skipped 0 "$2"
}

# --- parts ------------------------------------------------------------------------------------------

versions() {
  date -u +%Y-%m-%dT%H:%M:%SZ
  echo "commit: $(git rev-parse HEAD 2>/dev/null || echo 'not a git checkout')"
  git status --short 2>/dev/null
  uname -a
  nvcc --version
  "${CXX:-c++}" --version | head -n 1
  ncu --version
  compute-sanitizer --version
  nvidia-smi
  "$python" bench/gpu.py versions "$device"
}

# The wheel, or a build: the same folder each time, so that only what changed is compiled.
package() {
  local from="$wheel" options=(--no-deps --no-index --disable-pip-version-check --upgrade)
  if [ -z "$wheel" ]; then
    from="$root"
    options+=(--no-build-isolation --verbose "-Cbuild-dir=$built/cmake"
      --config-settings=cmake.define.FUSEREG_ISAS=native)
    if [ "$device" = cpu ]; then
      options+=(--config-settings=cmake.define.FUSEREG_CUDA=OFF)
    else
      # One file's kernels are compiled side by side: the last file would else keep one core busy.
      options+=(--config-settings=cmake.define.FUSEREG_CUDA=ON
        --config-settings=cmake.define.CMAKE_CUDA_ARCHITECTURES=native
        --config-settings=cmake.define.CMAKE_CUDA_FLAGS=--split-compile=0)
    fi
  fi
  "$python" -m pip install "${options[@]}" --target "$built/site" "$from" && touch "$built/.installed"
}

installed() {
  [ -z "$wheel" ] && [ -e "$built/.installed" ] &&
    [ -z "$(find csrc python bench CMakeLists.txt pyproject.toml -newer "$built/.installed" -type f \
      ! -name '*.pyc' | head -n 1)" ]
}

info() {
  "$python" -m fusereg info --json "$logs/info.json" &&
    "$python" -c "import fusereg; print(fusereg.__version__, 'in', fusereg.__path__[0])"
}

# Every row of the inventory, forward and backward, small and large, with float64 on the CPU. On one GPU:
# `cuda` would be each of the machine's, one after the other.
operations() {
  "$python" -m fusereg verify --device "${device/#cuda/cuda:0}" --dtype float32,bfloat16 --json "$logs/operations.json"
}

tests() { # ARGUMENT...: pytest for the chosen backend alone; the checkout stays as it was
  "$python" -m pytest -q -p no:cacheprovider --continue-on-collection-errors \
    --only-backend "$backend" "$@"
}

surroundings() {
  tests --junitxml="$logs/surroundings.xml" -n "$((workers < 4 ? workers : 4))" tests/test_cuda_surroundings.py
}

suite() {
  local which="not slow"
  # Where there is no GPU, the rest has been run often enough.
  if [ "$device" = cpu ] || [ -n "${FUSEREG_TEST_STANDIN_MODULE:-}" ]; then which=sanitizer; fi
  tests --junitxml="$logs/suite.xml" -n "$workers" --dist worksteal -m "$which" --durations=10 \
    --ignore=tests/test_cuda_surroundings.py
}

# Without torch's caching allocator each tensor is an allocation of its own, so that a read past its end
# is one for memcheck too. Only this project's kernels are watched: torch's have hazards of their own.
memcheck() {
  PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool memcheck --error-exitcode 77 \
    --target-processes all --kernel-name kns=fusereg \
    "$python" -m pytest -q -p no:cacheprovider --only-backend "$backend" -x -m sanitizer
}

times() { # compile|no-compile
  "$python" bench/gpu.py times "$device" "$1" "$logs/$1.json"
}

# Each metric is one pass over a kernel or less; the clocks stay as they are.
counters() {
  local metrics
  metrics="$("$python" bench/gpu.py metrics)" &&
    ncu --metrics "$metrics" --clock-control none --profile-from-start off --nvtx --print-units base \
      --kernel-name-base demangled --kernel-name regex:fusereg --csv --page raw \
      --log-file "$logs/counters.csv" "$python" bench/gpu.py once "$device"
}

table() {
  "$python" bench/gpu.py table "$logs" --json "$out/measure.json" --markdown "$out/measure.md"
}

export -f versions package info operations tests surroundings suite memcheck times counters table
export python device wheel logs out root built

# --- the stages -------------------------------------------------------------------------------------

part versions 30 versions
pack
if installed; then
  skip package "what is in build/gpu is up to date"
elif ! part package 230 package; then
  skip others "there is no fusereg to run"
  limit=0
fi
pack

if [ "$limit" -gt 0 ] && [ "$stage" != build ]; then
  backend="$device"
  if [ "$device" = cpu ]; then
    backend="cpu_$("$python" -c 'from fusereg import _C; print(_C.cpu_isa())')"
  fi
  workers="$(nproc 2>/dev/null || echo 2)"
  workers="$((workers > 10 ? 8 : workers > 2 ? workers - 2 : 1))"
  export backend workers
  if [ "$stage" = check ]; then
    part info 60 info
    # Side by side: the host takes most of the time. Each ends with its own limit.
    part operations 150 operations &
    part suite 200 suite &
    if [ "$device" = cpu ]; then
      skip surroundings "needs a GPU"
    else
      part surroundings 200 surroundings &
    fi
    if command -v compute-sanitizer >/dev/null && [ "$device" != cpu ]; then
      part memcheck 200 memcheck &
    else
      skip memcheck "needs compute-sanitizer and a GPU"
    fi
    wait
  else
    part times 110 times no-compile
    pack
    part compiled 70 times compile
    pack
    if command -v ncu >/dev/null && [ "$device" != cpu ]; then
      part counters 90 counters
    else
      skip counters "needs ncu and a GPU"
    fi
    part table 30 table
  fi
fi

failed="$(grep -c '^[^ ]* *FAILED ' "$summary")"
echo
echo "=== $stage: $failed failed, $SECONDS s, results in $out"
cat "$summary"
exit "$failed"
