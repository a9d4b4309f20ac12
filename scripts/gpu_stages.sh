#!/usr/bin/env bash
# What each stage of scripts/gpu_check.sh runs, which says what they are and sets what they read:
#
#   scripts/gpu_stages.sh STAGE
#
# The last line of output is the reason where a stage fails, or is skipped (exit status 77).
set -uo pipefail
cd "$(dirname "$0")/.." || exit
. scripts/steps.sh
exec {GPU_CHECK_LOCK}>&- # held by the check and by `timeout` of each stage, not by what a stage leaves behind
python=$GPU_CHECK_PYTHON
build=$GPU_CHECK_BUILD
logs=$GPU_CHECK_LOGS
kernel_tests=${TORCHQAT_KERNEL_TESTS:-$build/tests/cpp/on_device/test_kernels_on_device}

# These say nothing of a GPU: they start compilers, training runs and scripts, or compare C++ with Python.
host_tests=(build bindings consumers cpp_training distill_classifier examples_cpp faults gpu_check instruction_sets mirror
  oracle_values readme reproduce_ste_mnist train_classifier)

skip() {
  echo "$*"
  exit 77
}
need() { command -v "$1" >/dev/null || skip "$1 is not installed"; }
need_library() { [ -f "$TORCHQAT_LIBRARY" ] || skip "there is no library: see the stage build"; }

machine() {
  nvidia-smi --query-gpu=name,driver_version,memory.total,clocks.max.sm --format=csv
  nvcc --version | tail -n 2
  "$python" -c 'import torch; print("torch", torch.__version__, "CUDA", torch.version.cuda)' || return
  echo "$TORCHQAT_JOBS processes at once; $(uname -sr)"
  git log -1 --format="commit %h, %cs" 2>/dev/null || true
}

# GIT_ALLOW_PROTOCOL: GoogleTest is not fetched.
configure() {
  env GIT_ALLOW_PROTOCOL=file cmake -S . -B "$build" -G Ninja -DPython_EXECUTABLE="$(command -v "$python")" \
    -DTORCHQAT_CUDA=on -DTORCHQAT_CUDA_ARCHITECTURES="$GPU_CHECK_ARCHITECTURE-real" "$@"
}

build() {
  [ -z "$GPU_CHECK_GIVEN" ] || skip "TORCHQAT_LIBRARY=$GPU_CHECK_GIVEN"
  command -v cmake >/dev/null || fail "cmake is missing; install it (pip install cmake ninja)."
  command -v ninja >/dev/null || fail "ninja is missing; install it (pip install cmake ninja)."
  configure -DTORCHQAT_TESTS=OFF && cmake --build "$build" --parallel "$TORCHQAT_JOBS" --target torchqat_python
}

kernels() {
  if [ -z "${TORCHQAT_KERNEL_TESTS:-}" ]; then
    need cmake
    need ninja
    configure -DTORCHQAT_TESTS=ON -DTORCHQAT_DEVICE_TESTS=ON || return
    grep -q "^test_kernels_on_device:" <<<"$(cmake --build "$build" --target help)" ||
      skip "no GoogleTest: it is not installed, and not in $build/googletest"
    cmake --build "$build" --parallel "$TORCHQAT_JOBS" --target test_kernels_on_device || return
  fi
  shards kernels ""
}

# shards NAME FILTER COMMAND...: the tests of the kernels in four processes, started by COMMAND.
shards() {
  local name=$1 filter=$2 shard processes=() failed=0
  shift 2
  for shard in 0 1 2 3; do
    GTEST_TOTAL_SHARDS=4 GTEST_SHARD_INDEX=$shard "$@" "$kernel_tests" --gtest_brief=1 --gtest_filter="*$filter" \
      >"$logs/$name-$shard.log" 2>&1 &
    processes+=($!)
  done
  for shard in 0 1 2 3; do
    if wait "${processes[$shard]}"; then
      tail -n 2 "$logs/$name-$shard.log"
    else
      failed=1
      grep -v '^$' "$logs/$name-$shard.log" | head -n 60
    fi
  done
  return "$failed"
}

# pytest_files MARKS FILE...: each file in a process of its own, so that no plugin is needed, and a verdict for each.
pytest_files() {
  local marks=$1
  shift
  echo "$# files, $TORCHQAT_JOBS at once: $*"
  printf '%s\n' "$@" | xargs -P "$TORCHQAT_JOBS" -I{} bash "$0" one_file "$marks" {}
}

one_file() {
  local log start=$SECONDS code
  log=$logs/pytest-${1// /-}-$(basename "$2" .py).log
  OMP_NUM_THREADS=2 "$python" -m pytest -q -p no:cacheprovider -m "$1" "$2" >"$log" 2>&1
  code=$?
  case $code in
    0) echo "passed $2: $(tail -n 1 "$log")" ;;
    5) echo "nothing to run in $2" && return ;;
    *)
      echo "FAILED $2 after $((SECONDS - start)) s: $(tail -n 1 "$log")"
      grep -E '^(FAILED|ERROR|E  )' "$log" | head -n 30
      ;;
  esac
  return "$code"
}

# The test files but for those named, large ones first.
test_files() {
  local file
  wc -c tests/test_*.py | sort -rn | while read -r _ file; do
    [ "$file" = total ] || [[ " $* " = *" $(basename "$file" .py) "* ]] || echo "$file"
  done
}

pytest_gpu() {
  need_library
  # shellcheck disable=SC2046  # names without spaces
  pytest_files gpu $(test_files test_gpu "${host_tests[@]/#/test_}")
}

pytest_host() {
  need_library
  # shellcheck disable=SC2046
  pytest_files "not gpu" $(test_files test_gpu "${host_tests[@]/#/test_}") python/torchqat
}

on_gpu() { "$python" -m pytest -q -p no:cacheprovider tests/test_gpu.py "$@"; }

# What the sanitizer says where it cannot work at all is no verdict on ours.
sanitized() {
  local tool=$1 log=$logs/$2.out code
  shift 2
  need compute-sanitizer
  "$@" 2>&1 | tee "$log"
  code=$?
  if ((code)) && grep -qE "Device not supported|Unable to find injection library" "$log" "${log%.out}"-*.log 2>/dev/null; then
    skip "compute-sanitizer refuses this device: $(grep -hoE 'Device not supported|Unable to find injection library' \
      "$log" "${log%.out}"-*.log 2>/dev/null | head -n 1)"
  fi
  ((code == 0)) || echo "$tool found errors, or the program failed under it"
  return "$code"
}

# However long the program takes to come to CUDA; and without reports of calls of CUDA that fail: torch looks for what
# a driver may lack, and checks its calls itself.
sanitizer=(compute-sanitizer --error-exitcode 9 --launch-timeout 0 --report-api-errors no --tool)

sanitize_python() {
  need_library
  sanitized "$1" "$1" env PYTORCH_NO_CUDA_MEMORY_CACHING=1 "${sanitizer[@]}" "$1" --target-processes all \
    "$python" -m pytest -q -p no:cacheprovider tests/test_gpu.py -m sanitizer -k test_the_gpu_agrees_with_the_cpu
}

sanitize_kernels() {
  need compute-sanitizer
  [ -x "$kernel_tests" ] || skip "there are no tests of the kernels: see the stage kernels"
  sanitized "$1" "kernels_$1" shards "kernels_$1" "$2" "${sanitizer[@]}" "$1"
}

# The cases in this order and then all others, so that the first are measured if time ends it; each is written out.
benchmarks() {
  need_library
  local cases
  cases=$(cd benchmarks && "$python" -c '
import cases
first = ["staircase_relu", "bcgd", "feature_affinity", "quantize_weight"]
print(*[name for name in first if name in cases.names()], *sorted(set(cases.names()) - set(first)))') || return
  # shellcheck disable=SC2086  # words
  "$python" benchmarks/run.py $cases --device cuda --json "$logs/benchmarks.json" $GPU_CHECK_QUICK \
    2>"$logs/benchmarks.err" && return
  tail -n 5 "$logs/benchmarks.err" # besides errors it has the progress
  return 1
}

# The clocks stay as they are. Counters are for users with a permission, and not everywhere.
ncu_metrics() {
  need ncu
  need_library
  local code
  ncu --csv --page raw --clock-control none --profile-from-start off --target-processes all \
    --kernel-name-base demangled --kernel-name 'regex:torchqat::cuda' --log-file "$logs/ncu.csv" --metrics \
    gpu__time_duration.sum,dram__throughput.avg.pct_of_peak_sustained_elapsed,sm__throughput.avg.pct_of_peak_sustained_elapsed,sm__warps_active.avg.pct_of_peak_sustained_active \
    "$python" scripts/profiled_kernels.py
  code=$?
  cat "$logs/ncu.csv" 2>/dev/null
  for refused in ERR_NVGPUCTRPERM LibraryNotLoaded "is not supported"; do
    if grep -qs "$refused" "$logs/ncu.csv" "$logs/ncu.log"; then skip "ncu is not allowed or not able here: $refused"; fi
  done
  ((code)) || grep -qs "torchqat::cuda" "$logs/ncu.csv" || fail "ncu saw no kernel of ours"
  return "$code"
}

case $1 in
  machine | build | kernels | pytest_gpu | pytest_host | benchmarks) "$1" ;;
  operators) need_library && on_gpu -k "not graph and not stream" ;;
  graphs_and_streams) need_library && on_gpu -k "graph or stream" ;;
  memcheck | racecheck | initcheck | synccheck) sanitize_python "$1" ;;
  # Tests that launch thousands of times, or far apart in memory, show no more.
  kernels_memcheck) sanitize_kernels memcheck "-*Big*" ;;
  kernels_racecheck) sanitize_kernels racecheck "-*Big*:*OfEverySteAndRule*:*Rules*:*MoreCodes*:*EverySize*" ;;
  ncu) ncu_metrics ;;
  one_file) one_file "$2" "$3" ;;
  *) fail "no stage $1" ;;
esac
