#!/usr/bin/env bash
# On a machine with a GPU: build, test and measure in one call. Results go to the folder given, or
# to benchmarks/results.
set -euo pipefail
cd "$(dirname "$0")/.."
out=${1:-benchmarks/results}

nvidia-smi --query-gpu=name,driver_version --format=csv,noheader
EWC_FAST_CUDA=ON python3 -m pip install -q --no-deps -e .
python3 -m ewc_fast
python3 -m pytest -q tests/test_cuda.py tests/test_functional.py tests/test_plan.py
python3 benchmarks/run.py --out "$out"
