#!/usr/bin/env bash
# On a machine with a GPU: the GPU tests, all that a small run of the others leaves out, the sanitizers, the counters of bank conflicts, then the benchmark.
# Results go to $OUT, or to benchmarks/results. Packages that Python lacks there may lie as wheels in .whl.
set -euo pipefail
cd "$(dirname "$0")/.."
if ls .whl/*.whl >/dev/null 2>&1; then
  site="$(mktemp -d)"
  trap 'rm -rf "$site"' EXIT
  python3 -m pip install -q --no-index --no-deps --no-compile --no-cache-dir --upgrade --target "$site" .whl/*.whl
  export PYTHONPATH="$site:${PYTHONPATH:-}"
fi
export PYTHONPATH="$PWD:${PYTHONPATH:-}"
results="${OUT:-benchmarks/results}"

python3 -m pytest tests -m gpu --ignore tests/gpu/test_runtime.py -n 8 -p no:cacheprovider 2>&1 | tee "$results/gpu_tests.log"
python3 -m pytest tests/gpu/test_runtime.py -s -p no:cacheprovider 2>&1 | tee -a "$results/gpu_tests.log"
ATTNGEN_TESTS=large python3 -m pytest tests -m "not gpu and (exhaustive or hypothesis)" -n 8 -p no:cacheprovider 2>&1 |
  tee "$results/large_tests.log"
python3 -m attngen fuzz --device cuda --examples 500 2>&1 | tee "$results/fuzz.log"
python3 -m tests.language --device cuda 2>&1 | tee "$results/fuzz_expressions.log"
python3 benchmarks/bench_hopper.py --out "$results" | tee "$results/hopper.log"
python3 benchmarks/bench_fp8.py --out "$results" | tee "$results/fp8.log"  # wants nvidia-cudnn-frontend
python3 benchmarks/fp8_error.py --out "$results" | tee "$results/fp8_error.log"
python3 benchmarks/bench_language.py --out "$results" | tee "$results/language.log"
python3 benchmarks/bench_quantize.py --out "$results" | tee "$results/quantize.log"
python3 benchmarks/bench_fa2.py --out "$results" | tee "$results/fa2_vs_flash.log"
python3 examples/train_tiny.py --out "$results" | tee "$results/train_tiny.log"
for tool in memcheck racecheck synccheck; do
  echo "== compute-sanitizer $tool"
  timeout 300 compute-sanitizer --tool "$tool" --report-api-errors no --kernel-name kernel_substring=attn_fwd python3 benchmarks/sanitize.py
done 2>&1 | tee "$results/sanitizer.log"
conflicts=l1tex__data_bank_conflicts_pipe_lsu_mem_shared
timeout 150 ncu --clock-control none --kernel-name regex:attn_fwd --metrics \
  "${conflicts}_op_ld.sum,${conflicts}_op_st.sum,smsp__inst_executed_op_ldsm.sum" \
  python3 benchmarks/sanitize.py 2>&1 | grep -E "attn_fwd|conflicts|ldsm|right" | tee "$results/bank_conflicts.log" | tail -12
