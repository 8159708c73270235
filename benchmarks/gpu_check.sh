#!/usr/bin/env bash
# On a machine with a GPU: build, test and measure, in one call of less than nine minutes.
#
#   bash benchmarks/gpu_check.sh [--dry] [--only STAGE,STAGE] [folder]
#
# Results go to the folder given, else to $OUT, else to benchmarks/results: log.txt (every stage's
# output), summary.json (every stage's exit status and seconds), and one file for each benchmark.
# A stage that fails does not stop those after it; the script's exit status is 1 then.
# --dry runs every stage on a CPU at small sizes: the reference instead of kernels, Triton in its
# interpreter, no nvcc, no sanitizer. Where the tree has no .git, EWC_FAST_COMMIT names its commit.
set -uo pipefail
cd "$(dirname "$0")/.."

dry='' only='' out=${OUT:-benchmarks/results}
while [ $# -gt 0 ]; do
  case $1 in
    --dry) dry=1 ;;
    --only) only=$2 && shift ;;
    --*) echo "unknown option $1" >&2 && exit 2 ;;
    *) out=$1 ;;
  esac
  shift
done
mkdir -p "$out"
out=$(cd "$out" && pwd)
python=${PYTHON:-python3}
deadline=525 # seconds; a stage gets its limit or what is left

log=$out/log.txt
summary=$out/summary.json
: >"$log"
stages=()
failed=0

# stage NAME LIMIT COMMAND...: runs a command, keeps its output, status and time
stage() {
  local name=$1 limit=$2 status=0 left=$((deadline - SECONDS)) began=$SECONDS
  shift 2
  if [ -n "$only" ] && [[ ",$only," != *",$name,"* ]]; then return 0; fi
  printf '\n=== %s (at %s s, limit %s s)\n' "$name" "$SECONDS" "$limit" | tee -a "$log"
  if [ "$left" -lt 5 ]; then
    echo "not run: time is up" | tee -a "$log"
    status=124
  else
    [ "$left" -lt "$limit" ] && limit=$left
    timeout --kill-after=5 "$limit" "$@" 2>&1 | tee -a "$log"
    status=${PIPESTATUS[0]}
  fi
  [ "$status" -eq 0 ] || failed=1
  printf -- '--- %s: exit status %s after %s s\n' "$name" "$status" $((SECONDS - began)) |
    tee -a "$log"
  stages+=("{\"stage\": \"$name\", \"exit_status\": $status, \"seconds\": $((SECONDS - began))}")
  write_summary
}

# skipped NAME WHY: notes a stage that this machine can't run
skipped() {
  if [ -n "$only" ] && [[ ",$only," != *",$1,"* ]]; then return 0; fi
  printf '\n=== %s: skipped, %s\n' "$1" "$2" | tee -a "$log"
  stages+=("{\"stage\": \"$1\", \"skipped\": \"$2\"}")
  write_summary
}

write_summary() {
  local IFS=,
  printf '{"dry": %s, "seconds": %s, "stages": [%s]}\n' \
    "$([ -n "$dry" ] && echo true || echo false)" "$SECONDS" "${stages[*]}" >"$summary"
}

has() { command -v "$1" >/dev/null; }

# An installation in the usual way, or the compilers alone where its tools are missing.
build() {
  if "$python" -c 'import scikit_build_core, pybind11' && has cmake && has ninja; then
    EWC_FAST_CUDA=$1 EWC_FAST_CUDA_ARCHITECTURES=$2 \
      "$python" -m pip install -q --no-build-isolation --no-deps -e .
  else
    echo "scikit-build-core, pybind11, cmake or ninja is missing: compiling directly"
    "$python" benchmarks/build_core.py --cuda "$1" --architectures "$2"
  fi
}

# Fails where a backend that should be there is not: its tests would skip, and all look well.
backends() {
  "$python" -m ewc_fast
  "$python" - "$1" <<'END'
import sys
from ewc_fast._native import cuda_unavailable
from ewc_fast._triton import unavailable
missing = {"triton": unavailable("cuda")}
if sys.argv[1] == "ON":
    missing["cuda"] = cuda_unavailable()
for backend, why in missing.items():
    print(f"{backend}: {why or 'available'}")
sys.exit(any(missing.values()))
END
}

export -f build backends has
export python PYTHONUNBUFFERED=1
# also where the package was compiled in place
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH}
# The plugin of the option in pyproject.toml may be missing here.
pytest=("$python" -m pytest -q -p no:cacheprovider -o addopts= --strict-markers)

# What runs kernels, and of the other tests those that also run on a GPU where there is one (the
# fixture "device" puts "cuda" into their names). The rest never leaves the CPU, where CI has run it.
# Nor does reading compiled kernels need a GPU.
kernels=(tests/test_cuda.py tests/test_cuda_steps.py tests/test_encoded.py)
for file in tests/test_triton_*.py; do
  [ -e "$file" ] && [[ $file != *_compiled.py ]] && kernels+=("$file")
done
devices=(tests/test_functional.py tests/test_squared_product.py tests/test_operations.py
  tests/test_architectures.py tests/test_storage.py tests/test_offload.py)
# Of the kernels' tests, under a sanitizer: tails, views, many rows, parts that are added up.
sanitized='misaligned or stacked or hundreds or strides or splits or shared_out'

quick=()
if [ -n "$dry" ]; then
  quick=(--quick)
  export TRITON_INTERPRET=1
  scratch=$(mktemp -d)
  trap 'rm -rf "$scratch"' EXIT
  skipped device dry
  stage build 300 "$python" benchmarks/build_core.py --cuda OFF --out "$scratch"
  stage backends 60 "$python" -m ewc_fast
  stage kernels 120 "${pytest[@]}" "${kernels[@]}" -k "stacked or shared_out"
  stage devices 120 "${pytest[@]}" "${devices[@]}" -k "odd_sizes and float32"
else
  stage device 20 nvidia-smi --format=csv \
    --query-gpu=name,driver_version,compute_cap,memory.total,clocks.max.sm
  cuda=OFF
  has nvcc && cuda=ON || echo "no nvcc on PATH: only Triton is checked" | tee -a "$log"
  capability=$(nvidia-smi --query-gpu=compute_cap --format=csv,noheader --id=0 2>/dev/null)
  capability=${capability//./}
  stage build 100 bash -c 'build "$@"' build "$cuda" "${capability:-90}"
  stage backends 40 bash -c 'backends "$@"' backends "$cuda"
  several=()
  "$python" -c 'import xdist' 2>/dev/null && several=(-n 8) # Triton compiles on the CPU
  stage kernels 120 "${pytest[@]}" "${several[@]}" "${kernels[@]}"
  stage devices 80 "${pytest[@]}" "${several[@]}" "${devices[@]}" -k cuda
fi

stage operations 90 "$python" benchmarks/run.py --gpu --only gpu_operations --seconds 65 \
  --out "$out" "${quick[@]}"
stage optimizer 60 "$python" benchmarks/run.py --gpu --only gpu_optimizer --seconds 45 \
  --out "$out" "${quick[@]}"
stage products 90 "$python" benchmarks/run.py --gpu --only gpu_products --seconds 65 \
  --out "$out" "${quick[@]}"
stage fisher 120 "$python" benchmarks/run.py --gpu --only gpu_fisher --seconds 60 \
  --out "$out" "${quick[@]}"

# Last, for they take what time is left. Without PyTorch's cache every tensor is an allocation of its
# own, so that an access one element beyond it is noticed.
for tool in memcheck racecheck; do
  if [ -n "$dry" ]; then
    skipped "$tool" dry
  elif has compute-sanitizer; then
    stage "$tool" 60 env PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool "$tool" \
      --error-exitcode 86 "${pytest[@]}" "${kernels[@]}" -k "$sanitized"
  else
    skipped "$tool" "compute-sanitizer is not on PATH"
  fi
done

write_summary
printf '\n%s\n' "$(cat "$summary")"
exit "$failed"
