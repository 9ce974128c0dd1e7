#!/usr/bin/env bash
# On a machine with a GPU: the GPU tests, then the benchmark. Results go to $OUT, or to benchmarks/results.
# Packages that the machine's Python lacks may lie as wheels in .whl (not committed).
set -euo pipefail
cd "$(dirname "$0")/.."
if ls .whl/*.whl >/dev/null 2>&1; then
  python3 -m pip install -q --no-index --no-deps --no-compile --no-cache-dir --upgrade --target /tmp/site .whl/*.whl
  export PYTHONPATH="/tmp/site:${PYTHONPATH:-}"
fi
export PYTHONPATH="$PWD:${PYTHONPATH:-}"
results="${OUT:-benchmarks/results}"
python3 -m pytest -m gpu tests --timeout 120 2>&1 | tee "$results/gpu_tests.log"
python3 benchmarks/bench_fa2.py --out "$results"
