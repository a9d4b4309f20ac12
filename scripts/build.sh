#!/usr/bin/env bash
# Sets up the virtual environment .venv of this checkout and builds torchqat into it. Run again, it does what is left
# to do. With --tests it builds the C++ tests too; with --packages nothing; with --kernels only the CUDA kernels, in
# build-kernels, for every architecture of kernel_architectures, and writes docs/cuda_kernels.md. What can be set: PYTHON,
# CXX, CUDACXX, TORCHQAT_CUDA (auto, on, off), TORCHQAT_CUDA_ARCHITECTURES, TORCHQAT_JOBS. The build folder remembers
# TORCHQAT_CUDA and TORCHQAT_CUDA_ARCHITECTURES until others are given.
set -euo pipefail
cd "$(dirname "$0")/.."
. scripts/steps.sh

check_machine() {
  [ "$(uname -s) $(uname -m)" = "Linux x86_64" ] ||
    fail "torchqat supports Linux on x86-64; this is $(uname -s) on $(uname -m)."
}

check_compiler() {
  local program='#include <concepts>
    template <std::integral T> T twice(T x) { return 2 * x; }
    int main() { return twice(0); }'
  "${CXX:-c++}" -std=c++20 -fopenmp -fsyntax-only -x c++ - <<<"$program" 2>/dev/null ||
    fail "no C++20 compiler with OpenMP: '${CXX:-c++}' is missing or too old. Install g++ 11 or newer" \
      "(apt install g++), or name one: CXX=<compiler> make ..."
}

# Prints a Python that is new enough; fails where there is none.
find_python() {
  local python
  for python in ${PYTHON:-python3 python3.13 python3.12 python3.11 python3.14}; do
    if "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
      echo "$python"
      return
    fi
  done
  fail "no Python 3.11 or newer${PYTHON:+; $PYTHON is missing or older}. Install one (apt install python3" \
    "python3-venv), or name one: PYTHON=<python> make ..."
}

make_venv() {
  local python
  python=$(find_python)
  "$python" -c 'import venv, ensurepip' 2>/dev/null ||
    fail "$python cannot make virtual environments. Install its venv module (apt install python3-venv)."
  step "virtual environment .venv of $("$python" --version)" "$python" -m venv .venv
}

# A step that was done with these very files is not done again: `current NAME FILE...`, `remember NAME FILE...`.
current() { cmp -s <(cat "${@:2}") ".venv/$1.done"; }
remember() { cat "${@:2}" >".venv/$1.done"; }

install_packages() {
  if ! current packages constraints.txt; then
    step "packages of constraints.txt (torch is several GB)" \
      .venv/bin/python -m pip install --quiet --progress-bar off -r constraints.txt ||
      fail "pip could not install the packages of constraints.txt (its message is above)." \
        "Is the network there, and enough disk (8 GB)?"
    remember packages constraints.txt
  fi
}

build() {
  step "configure" cmake -S . -B build -G Ninja -DPython_EXECUTABLE="$PWD/.venv/bin/python" \
    ${TORCHQAT_CUDA:+"-DTORCHQAT_CUDA=$TORCHQAT_CUDA"} \
    ${TORCHQAT_CUDA_ARCHITECTURES:+"-DTORCHQAT_CUDA_ARCHITECTURES=$TORCHQAT_CUDA_ARCHITECTURES"} \
    -DCMAKE_INSTALL_LIBDIR=lib -DTORCHQAT_ABSOLUTE_RPATH=ON "$@" ||
    fail "CMake could not configure the build (its message is above)."
  step "compile" cmake --build build --parallel "${TORCHQAT_JOBS:-$(nproc)}" ||
    fail "the build failed (the compiler's message is above)."
  step "install into python/torchqat" quietly cmake --install build --prefix python/torchqat
  quietly cmake --install build --prefix python/torchqat --component python
}

kernel_architectures=(80 90 100)

# Prints those of them that the nvcc knows, as CMake wants them.
known_architectures() {
  local codes known=()
  codes=$("$1" --list-gpu-code) || fail "$1 does not say which architectures it knows."
  for arch in "${kernel_architectures[@]}"; do
    if grep -qx "sm_$arch" <<<"$codes"; then known+=("$arch-real"); else
      echo "torchqat: $1 does not know sm_$arch; the report will do without it" >&2
    fi
  done
  (IFS=';' && echo "${known[*]}")
}

# The objects of cuda/ and nothing else of the library, and the page about them.
report_kernels() {
  local nvcc release archs objects
  nvcc=${CUDACXX:-$(PATH="$PATH:/usr/local/cuda/bin" command -v nvcc ||
    compgen -G "$PWD/.venv/lib/python3.*/site-packages/nvidia/cu*/bin/nvcc" | head -n 1 || true)}
  [ -x "$nvcc" ] || fail "the report of kernels needs nvcc. Install the CUDA toolkit, or its compiler from PyPI" \
    "(.venv/bin/python -m pip install 'cuda-toolkit[nvcc,cccl]' of torch's CUDA version), or name one: CUDACXX=<nvcc>."
  .venv/bin/python scripts/kernel_resources.py needs
  release=$("$nvcc" --version | sed -n 's/.*release \([0-9.]*\).*/\1/p')
  archs=$(known_architectures "$nvcc")
  mapfile -t objects < <(printf 'CMakeFiles/torchqat.dir/%s.o\n' cuda/*.cu)
  step "configure" cmake -S . -B build-kernels -G Ninja -DPython_EXECUTABLE="$PWD/.venv/bin/python" \
    -DTORCHQAT_CUDA=on -DCMAKE_CUDA_COMPILER="$nvcc" -DTORCHQAT_CUDA_ARCHITECTURES="$archs"
  step "compile the kernels" cmake --build build-kernels --parallel "${TORCHQAT_JOBS:-$(nproc)}" \
    --target "${objects[@]}"
  .venv/bin/python scripts/kernel_resources.py page build-kernels "$release" "${kernel_architectures[@]/#/sm_}" \
    >build-kernels/cuda_kernels.md
  mv build-kernels/cuda_kernels.md docs/cuda_kernels.md
  echo "wrote docs/cuda_kernels.md"
  step "spills and widths of memory accesses" .venv/bin/python scripts/kernel_resources.py check build-kernels
}

install_editable() {
  if ! current editable constraints.txt pyproject.toml setup.py; then
    step "editable install of the Python package" \
      .venv/bin/python -m pip install --quiet --no-build-isolation --no-deps --editable . ||
      fail "pip could not install the Python package (its message is above)."
    remember editable constraints.txt pyproject.toml setup.py
  fi
}

check_machine
check_compiler
if ! .venv/bin/python -c 'import pip, sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
  make_venv
fi
install_packages
export PATH="$PWD/.venv/bin:$PATH"
case "${1:-}" in
  --packages) exit ;;
  --kernels)
    report_kernels
    exit
    ;;
  --tests) build -DTORCHQAT_TESTS=ON ;;
  *) build -DTORCHQAT_TESTS=OFF ;;
esac
install_editable
step "what was built" .venv/bin/python -c 'import torchqat; print(torchqat.build_info())'
