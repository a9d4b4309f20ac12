#!/usr/bin/env bash
# All tests of the built checkout: C++ and emulated kernels (ctest), then Python with the documentation's examples.
set -euo pipefail
cd "$(dirname "$0")/.."
. scripts/steps.sh
export PATH="$PWD/.venv/bin:$PATH"

failed=()
step "C++ tests and emulated kernels" ctest --test-dir build --output-on-failure --parallel "${TORCHQAT_JOBS:-$(nproc)}" ||
  failed+=("ctest")
step "Python tests" python -m pytest "$@" || failed+=("pytest")
[ ${#failed[@]} -eq 0 ] || fail "tests failed: ${failed[*]}"
