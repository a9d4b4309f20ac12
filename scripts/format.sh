#!/usr/bin/env bash
# Formats and lints: ruff for Python, clang-format for C++ and CUDA, in the versions of constraints.txt.
set -euo pipefail
cd "$(dirname "$0")/.."
. scripts/steps.sh
export PATH="$PWD/.venv/bin:$PATH"

mapfile -t cpp_files < <(git ls-files --cached --others --exclude-standard '*.cpp' '*.h' '*.cu' '*.cuh')

step "clang-format" clang-format -i --style=file "${cpp_files[@]}"
step "ruff format" ruff format .
step "ruff check" ruff check --fix . || fail "ruff names above what only a person can put right."
