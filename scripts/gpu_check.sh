#!/usr/bin/env bash
# Tier 4: all that needs a GPU, in one call, with this machine's own torch; nothing is fetched. Builds in build-gpu,
# runs every Python test with the GPU added, the operators under compute-sanitizer, and the benchmarks. Writes one
# report, benchmarks/results/gpu_check-<GPU>.md, and the benchmarks' JSON and plots beside it. Goes on after a failure.
#
#   scripts/gpu_check.sh            all of it
#   scripts/gpu_check.sh --quick    small benchmarks, and of the sanitizer's tools memcheck alone
#
# PYTHON names another Python than python3; TORCHQAT_LIBRARY a library that is built already.
set -uo pipefail
cd "$(dirname "$0")/.." || exit
. scripts/steps.sh

python=${PYTHON:-python3}
quick=${1:-}
build=$PWD/build-gpu
failed=()
"$python" -c 'import torch, sys; sys.exit(not torch.cuda.is_available())' ||
  fail "$python has no torch that sees a GPU. PYTHON=<python> names another one."
for program in cmake ninja; do
  command -v "$program" >/dev/null || fail "$program is missing; install it (pip install cmake ninja)."
done

gpu=$("$python" -c 'import torch; print(torch.cuda.get_device_name().lower().replace(" ", "-"))')
architecture=$("$python" -c 'import torch; print("%d%d" % torch.cuda.get_device_capability())')
results=benchmarks/results
report=$results/gpu_check-$gpu.md
logs=$build/logs
mkdir -p "$results" "$logs"

# section NAME COMMAND...: runs it, shows its output, and keeps the output for the report.
section() {
  local name=$1 start=$SECONDS verdict=passed
  shift
  echo "==> $name"
  "$@" 2>&1 | tee "$logs/$name.log" || { verdict=FAILED && failed+=("$name"); }
  printf '| %s | %s | %s s |\n' "$name" "$verdict" "$((SECONDS - start))" | tee -a "$logs/summary"
}

machine() {
  nvidia-smi --query-gpu=name,driver_version,memory.total,clocks.max.sm --format=csv
  nvcc --version | tail -n 2
  "$python" -c 'import torch; print("torch", torch.__version__, "CUDA", torch.version.cuda)'
  git log -1 --format="commit %h, %cs" 2>/dev/null || true
}

compile() {
  cmake -S . -B "$build" -G Ninja -DPython_EXECUTABLE="$(command -v "$python")" -DTORCHQAT_CUDA=on \
    -DTORCHQAT_CUDA_ARCHITECTURES="$architecture" && cmake --build "$build"
}

sanitize() {
  PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool "$1" --error-exitcode 9 --target-processes all \
    "$python" -m pytest tests/test_gpu.py -q -k "agrees_with_the_cpu"
}

write_report() {
  {
    echo "# GPU check: $gpu"
    echo
    echo "Written by \`scripts/gpu_check.sh $quick\` on $(date -I)."
    printf '\n| section | | |\n| --- | --- | --- |\n'
    cat "$logs/summary"
    for name in "$@"; do
      [ -f "$logs/$name.log" ] || continue
      printf '\n## %s\n\n' "$name"
      [ "$name" = benchmarks ] || printf '```\n'
      tail -n 150 "$logs/$name.log"
      [ "$name" = benchmarks ] || printf '```\n'
    done
  } >"$report"
}

rm -f "$logs"/*
section machine machine
[ -n "${TORCHQAT_LIBRARY:-}" ] || section build compile
export TORCHQAT_LIBRARY=${TORCHQAT_LIBRARY:-$build/libtorchqat.so} PYTHONPATH=$PWD/python
section pytest "$python" -m pytest tests
tools=(memcheck)
[ "$quick" = --quick ] || tools+=(racecheck initcheck synccheck)
if command -v compute-sanitizer >/dev/null; then
  for tool in "${tools[@]}"; do section "$tool" sanitize "$tool"; done
else
  echo "| compute-sanitizer | SKIPPED: not installed | |" | tee -a "$logs/summary"
fi
# shellcheck disable=SC2086  # no word where $quick is empty
section benchmarks "$python" benchmarks/run.py --device cuda --json "$results/$gpu.json" $quick
write_report machine build pytest "${tools[@]}" benchmarks
echo "wrote $report"
[ ${#failed[@]} -eq 0 ] || fail "failed: ${failed[*]}"
