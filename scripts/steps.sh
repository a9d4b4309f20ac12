# shellcheck shell=bash
# For scripts to source: steps that say what they do and how long it took, and errors of one line.

fail() {
  echo "torchqat: $*" >&2
  exit 1
}

# step TITLE COMMAND...
step() {
  local title=$1 start=$SECONDS
  shift
  echo "==> $title"
  "$@" || return
  echo "    $title: $((SECONDS - start)) s"
}

quietly() { "$@" >/dev/null; }
