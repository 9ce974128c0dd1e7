#!/usr/bin/env bash
# On a machine with a GPU: `benchmarks/gpu_check.sh [AREA [SET ...]]`. Without an area all of them, then all that a small run
# of the other tests leaves out, the counters of bank conflicts, and the benchmarks.
#
#   smoke      kernels of every feature against the reference, a minute; each other area takes less than four
#   forward    schedules, shapes, scores and states of torch
#   language   masks and scores, sorted tensors, random expressions
#   fp8        e4m3 inputs, and what quantises them
#   backward   gradients, autograd, training
#   ragged     sequences with lengths of their own, given blocks, sinks, keys in parts
#   serving    partial results merged, caches appended to
#   faces      calls as other libraries have them, models of Hugging Face, torch.compile
#   tests      the launcher, which runs alone, and the GPU tests of commands and fuzzing
#   fuzz       random specs: dense, ragged, with gradients
#   sanitize   memcheck on the sets of sanitize.py, or on those that are named; $TOOLS names other tools
#
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
mkdir -p "$results"

# GPU tests of these files, by as many processes as there are cores to compile with.
gpu_tests() { python3 -m pytest "$@" -m gpu -n 12 --timeout 120 -p no:cacheprovider; }
on_gpu() { gpu_tests "${@/#/tests/gpu/test_}"; }

smoke() {
  python3 benchmarks/sanitize.py --kinds auto pingpong # which judges results, with a sanitizer and without
}
forward() {
  on_gpu correctness.py grid_on_gpu.py huge_scores_on_gpu.py torch_state_on_gpu.py
}
language() {
  on_gpu language_on_gpu.py expressions.py sorted_on_gpu.py hidden_keys_on_gpu.py
  python3 -m tests.language --device cuda
}
fp8() {
  on_gpu fp8_on_gpu.py quantize_on_gpu.py cache_on_gpu.py
}
backward() {
  on_gpu backward_calls_on_gpu.py fused_lengths_on_gpu.py gradients_on_gpu.py gradient_properties_on_gpu.py
  on_gpu gradient_traps_on_gpu.py training_on_gpu.py
  python3 examples/train_tiny.py --out "$results"
}
ragged() {
  on_gpu ragged_on_gpu.py paged_on_gpu.py varlen_on_gpu.py blocks_on_gpu.py sink_on_gpu.py split_on_gpu.py
}
serving() {
  on_gpu append_on_gpu.py merge_on_gpu.py
}
faces() {
  on_gpu calls_on_gpu.py compile_on_gpu.py flash_attn_caches_on_gpu.py flash_attn_face_on_gpu.py
  on_gpu frameworks_on_gpu.py hf_on_gpu.py sdpa_on_gpu.py
}
tests() {
  gpu_tests tests/cli tests/fuzz
  python3 -m pytest tests/gpu/test_runtime.py -s --timeout 120 -p no:cacheprovider
}
fuzz() {
  local run status=0 runs=()
  python3 -m attngen fuzz --device cuda --minutes 3 &
  runs+=($!)
  python3 benchmarks/fuzz_ragged.py --device cuda --minutes 2 --out "$results" &
  runs+=($!)
  python3 benchmarks/fuzz_gradients.py --device cuda --minutes 2 --out "$results" &
  runs+=($!)
  for run in "${runs[@]}"; do
    wait "$run" || status=1
  done
  return "$status"
}
# Sets run side by side, since each keeps one core busy and the GPU hardly. Without torch's cache of memory a tensor ends
# where its allocation does, so that memcheck sees what runs past it.
sanitize() {
  local sets=("$@") tool status=0
  [ ${#sets[@]} -gt 0 ] || mapfile -t sets < <(python3 benchmarks/sanitize.py --list)
  for tool in ${TOOLS:-memcheck}; do
    printf '%s\n' "${sets[@]}" | PYTORCH_NO_CUDA_MEMORY_CACHING=1 xargs -P 5 -I SET sh -c "
      timeout 220 compute-sanitizer --tool $tool --error-exitcode 9 --report-api-errors no \
        --kernel-name kernel_substring=attn_ python3 benchmarks/sanitize.py SET >'$results/$tool.SET.log' 2>&1
      code=\$?; echo \"== $tool SET: exit code \$code\"; tail -n 4 '$results/$tool.SET.log'; exit \$code" || status=1
  done
  return "$status"
}
everything() {
  local area
  for area in forward language fp8 backward ragged serving faces tests; do
    "$area" 2>&1 | tee "$results/$area.log"
  done
  ATTNGEN_TESTS=large python3 -m pytest tests -m "not gpu and (exhaustive or hypothesis)" -n 12 -p no:cacheprovider 2>&1 |
    tee "$results/large_tests.log"
  python3 -m attngen fuzz --device cuda --examples 500 2>&1 | tee "$results/fuzz.log"
  python3 benchmarks/fuzz_ragged.py --device cuda --cases 1000 --out "$results"
  python3 benchmarks/fuzz_gradients.py --device cuda --cases 1000 --out "$results"
  python3 benchmarks/bench_hopper.py --out "$results" | tee "$results/hopper.log"
  python3 benchmarks/bench_fp8.py --out "$results" | tee "$results/fp8_speed.log" # wants nvidia-cudnn-frontend
  python3 benchmarks/fp8_error.py --out "$results" | tee "$results/fp8_error.log"
  python3 benchmarks/bench_language.py --out "$results" | tee "$results/language_speed.log"
  python3 benchmarks/bench_ragged.py --out "$results" | tee "$results/ragged_speed.log" # FA3 names FlashAttention-3's library
  python3 benchmarks/bench_decode.py --out "$results" | tee "$results/decode_speed.log" # likewise
  python3 benchmarks/bench_hf.py --out "$results" | tee "$results/models_speed.log" # wants transformers
  python3 benchmarks/bench_quantize.py --out "$results" | tee "$results/quantize.log"
  python3 benchmarks/bench_fa2.py --out "$results" | tee "$results/fa2_vs_flash.log"
  TOOLS="memcheck racecheck synccheck" sanitize 2>&1 | tee "$results/sanitizer.log"
  conflicts=l1tex__data_bank_conflicts_pipe_lsu_mem_shared
  timeout 150 ncu --clock-control none --kernel-name regex:attn_fwd --metrics \
    "${conflicts}_op_ld.sum,${conflicts}_op_st.sum,smsp__inst_executed_op_ldsm.sum" \
    python3 benchmarks/sanitize.py plain language fp8 2>&1 | grep -E "attn_fwd|conflicts|ldsm|right" |
    tee "$results/bank_conflicts.log" | tail -12
}

area="${1:-everything}"
case "$area" in
  everything) everything ;;
  smoke | forward | language | fp8 | backward | ragged | serving | faces | tests | fuzz | sanitize)
    shift
    "$area" "$@" 2>&1 | tee "$results/$area.log"
    ;;
  *)
    echo "gpu_check.sh: no area $area; there are smoke forward language fp8 backward ragged serving faces tests fuzz sanitize" >&2
    exit 2
    ;;
esac
