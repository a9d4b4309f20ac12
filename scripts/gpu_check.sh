#!/usr/bin/env bash
# Tier 4: all that needs a GPU, in one call, with this machine's own torch; nothing is fetched. Every stage has a time
# limit of its own and a verdict (passed, FAILED, TIMED OUT, or SKIPPED with the reason), and none ends the check. Two
# reports, gpu_check-<GPU>.md and .json, say how far it came; they are written anew after each stage. The exit status
# is 0 if nothing failed.
#
#   scripts/gpu_check.sh [--quick] [FOLDER]   the reports go to FOLDER, benchmarks/results if none is named
#
# Limits are in seconds, for 16 cores and a GPU of the size of an H100; stages of one line run at the same time. They
# add up to 530 s; what would begin later than 535 s after the start is skipped by name, and what runs then is ended.
#
#   machine                  20  versions
#   build                   190  the library, for this GPU's architecture alone. How long nvcc takes there is unknown
#                                until it is done: TORCHQAT_LIBRARY=<libtorchqat.so> names one that is built already
#   operators               110  tests/test_gpu.py: agreement with the CPU, repeatability, no waiting for the device
#   graphs_and_streams           of the same file: every operator and a whole training step captured in a CUDA graph
#                                and replayed, on another stream, and on two streams at once
#   pytest_gpu                   every other test that takes a device, on the GPU (marker `gpu`)
#   kernels                      tests/cpp/test_*_kernels.cpp compiled by nvcc and run on the device
#   memcheck racecheck       90  compute-sanitizer over the operators in fewer cases (marker `sanitizer`)
#   initcheck synccheck
#   kernels_memcheck             and over the tests of the kernels, without torch
#   kernels_racecheck
#   benchmarks               85  benchmarks/run.py --device cuda, with floors, the most telling cases first
#   ncu                      35  Nsight Compute's metrics of each kernel, at sizes that fill a GPU
#   pytest_host                  last, in the time that is left: the other tests, on the CPU with this torch
#
# Left out of both pytest stages are the tests of builds, of consumers, of examples, of scripts and of C++ beside Python:
# they start compilers and training runs, and say nothing of a GPU; `make test` runs them. --quick runs small benchmarks, of the sanitizer's
# tools memcheck alone, and no tests on the CPU. GoogleTest is the installed one, or a checkout of it in
# build-gpu/googletest; without one the stages named kernels are skipped.
#
# PYTHON names another Python than python3; TORCHQAT_JOBS how many processes run at once. For tests,
# TORCHQAT_GPU_CHECK_LIMITS="build=2 total=9" sets limits.
set -uo pipefail

# usage STATUS PROBLEM
usage() {
  exec 1>&$(($1 ? 2 : 1))
  [ -z "${2:-}" ] || echo "torchqat: $2"
  echo "gpu_check.sh [--quick] [FOLDER]: checks all that needs a GPU; reports go to FOLDER or benchmarks/results"
  exit "$1"
}

folder=
quick=
for word in "$@"; do
  case $word in
    --quick) quick=--quick ;;
    -h | --help) usage 0 ;;
    -*) usage 2 "unknown option $word" ;;
    *)
      [ -z "$folder" ] || usage 2 "one folder, got $folder and $word"
      folder=$(realpath -m -- "$word")
      ;;
  esac
done
cd "$(dirname "$0")/.." || exit
folder=${folder:-$PWD/benchmarks/results}
. scripts/steps.sh

declare -A limits=([machine]=20 [build]=190 [operators]=110 [graphs_and_streams]=110 [pytest_gpu]=110 [kernels]=110
  [memcheck]=90 [racecheck]=90 [initcheck]=90 [synccheck]=90 [kernels_memcheck]=90 [kernels_racecheck]=90
  [benchmarks]=85 [ncu]=35 [pytest_host]=400 [total]=535)
for word in ${TORCHQAT_GPU_CHECK_LIMITS:-}; do limits[${word%%=*}]=${word#*=}; done
rounds=(machine build "operators graphs_and_streams pytest_gpu kernels"
  "memcheck racecheck initcheck synccheck kernels_memcheck kernels_racecheck" benchmarks ncu pytest_host)
if [ -n "$quick" ]; then
  rounds=("${rounds[@]:0:3}" "memcheck kernels_memcheck" benchmarks ncu)
fi
least=5 # with less time left than this no stage begins

export PATH=$PATH:${CUDA_HOME:-/usr/local/cuda}/bin
export GPU_CHECK_PYTHON=${PYTHON:-python3} GPU_CHECK_QUICK=$quick GPU_CHECK_BUILD=$PWD/build-gpu
export GPU_CHECK_LOGS=$GPU_CHECK_BUILD/logs
export TORCHQAT_JOBS=${TORCHQAT_JOBS:-$(nproc)}
verdicts=$GPU_CHECK_LOGS/verdicts

command -v flock >/dev/null || fail "flock is not installed (apt install util-linux)"
{ mkdir -p "$GPU_CHECK_BUILD" && touch "$GPU_CHECK_BUILD/lock"; } || fail "cannot write to $GPU_CHECK_BUILD"
exec {GPU_CHECK_LOCK}>>"$GPU_CHECK_BUILD/lock"
flock --nonblock "$GPU_CHECK_LOCK" || fail "another gpu_check.sh, or what one has left, runs in this checkout"
export GPU_CHECK_LOCK
{ mkdir -p "$folder" && trial=$(mktemp "$folder/gpu_check.XXXXXX") && rm "$trial"; } || fail "cannot write to $folder"

command -v "$GPU_CHECK_PYTHON" >/dev/null || fail "there is no $GPU_CHECK_PYTHON. PYTHON=<python> names another Python."
probe='try: import torch
except ImportError as error: raise SystemExit(error)
if not torch.cuda.is_available(): raise SystemExit("torch.cuda.is_available() is False")
print(torch.cuda.get_device_name().lower().replace(" ", "-"), "%d%d" % torch.cuda.get_device_capability())'
seen=$(timeout --kill-after=5 60 "$GPU_CHECK_PYTHON" -c "$probe") ||
  fail "nothing was checked: $GPU_CHECK_PYTHON has no torch that sees a GPU." \
    "PYTHON=<python> names another one, as .venv/bin/python after make build."
read -r gpu GPU_CHECK_ARCHITECTURE <<<"$(tail -n 1 <<<"$seen")"
export GPU_CHECK_ARCHITECTURE
rm -rf "$GPU_CHECK_LOGS"
mkdir -p "$verdicts"

# Stages that run: process to name, and name to when it began and how long it may take.
declare -A running=() began=() allowed=()

# note STAGE VERDICT REASON: for the report.
note() {
  printf '%s\t%s\t%s\t%s\n' "$2" "$((SECONDS - ${began[$1]:-$SECONDS}))" "${allowed[$1]:-}" "$3" >"$verdicts/$1"
}

write_reports() {
  local names
  read -ra names <<<"${rounds[*]}"
  "$GPU_CHECK_PYTHON" -S scripts/gpu_report.py --folder "$folder" --gpu "$gpu" --logs "$GPU_CHECK_LOGS" \
    --command "scripts/gpu_check.sh${quick:+ $quick}" --seconds "$SECONDS" "${names[@]}"
}

# plan STAGE...: how long each may take; those for which no time is left are skipped.
plan() {
  local left=$((limits[total] - SECONDS))
  planned=()
  for name in "$@"; do
    if ((left < least && left < limits[$name])); then
      note "$name" SKIPPED "the ${limits[total]} s of the whole check are spent"
    else
      allowed[$name]=$((limits[$name] < left ? limits[$name] : left))
      note "$name" RUNNING "when this was written"
      planned+=("$name")
    fi
  done
}

begin() {
  echo "==> $1 (at most ${allowed[$1]} s)"
  began[$1]=$SECONDS
  timeout --kill-after=2 "${allowed[$1]}" bash scripts/gpu_stages.sh "$1" </dev/null >"$GPU_CHECK_LOGS/$1.log" 2>&1 &
  running[$!]=$1
}

# finish PROCESS STATUS
finish() {
  local name=${running[$1]} reason
  unset "running[$1]"
  kill -KILL -- "-$1" 2>/dev/null # what is left of its process group
  reason=$(grep -v '^[[:space:]]*$' "$GPU_CHECK_LOGS/$name.log" | tail -n 1 | cut -c 1-300 | tr '\t' ' ')
  local took=$((SECONDS - began[$name]))
  case $2 in
    0) note "$name" passed "" ;;
    77) note "$name" SKIPPED "$reason" ;;
    124) note "$name" "TIMED OUT" "after ${allowed[$name]} s" ;;
    137) if ((took >= allowed[$name])); then
      note "$name" "TIMED OUT" "after ${allowed[$name]} s, and had to be killed"
    else
      note "$name" FAILED "killed: $reason"
    fi ;;
    *) note "$name" FAILED "exit status $2: $reason" ;;
  esac
  case $2 in 0 | 77) ;; *) tail -n 12 "$GPU_CHECK_LOGS/$name.log" ;; esac
  echo "    $name: $(cut -f 1,4 "$verdicts/$name" | tr '\t' ' ') ($took s)"
}

interrupted() {
  trap '' INT TERM HUP
  local process
  for process in "${!running[@]}"; do
    kill -KILL -- "-$process" 2>/dev/null || kill -TERM "$process"
    note "${running[$process]}" FAILED "the check was interrupted"
  done
  write_reports
  echo "torchqat: interrupted; $folder/gpu_check-$gpu.md says how far it came" >&2
  exit 143
}
trap interrupted INT TERM HUP

export GPU_CHECK_GIVEN=${TORCHQAT_LIBRARY:-} PYTHONPATH=$PWD/python
export TORCHQAT_LIBRARY=${TORCHQAT_LIBRARY:-$GPU_CHECK_BUILD/libtorchqat.so}
for round in "${rounds[@]}"; do
  # shellcheck disable=SC2086  # names
  plan $round
  write_reports # so that one that ends the machine is named
  for name in "${planned[@]}"; do begin "$name"; done
  while ((${#running[@]})); do
    sleep 0.1
    for process in "${!running[@]}"; do
      kill -0 "$process" 2>/dev/null && continue
      wait "$process"
      finish "$process" $?
      write_reports
    done
  done
done
write_reports || fail "could not write the reports to $folder; the logs are in $GPU_CHECK_LOGS"
echo "wrote $folder/gpu_check-$gpu.md and .json"
failed=$(cd "$verdicts" && grep -lE '^(FAILED|TIMED OUT)' -- * | tr '\n' ' ')
[ -z "$failed" ] || fail "failed: $failed"
