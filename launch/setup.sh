#!/usr/bin/env bash
# Create or repair .venv with the CPU stack, pinned. A second call returns at once; an interrupted one is taken up again.
#
#   bash launch/setup.sh
#
# PYTHON           the interpreter to use (default: the first of python3.11, 3.12, 3.13 and python3 that is 3.11 or newer)
# TORCH_INDEX_URL  the package index for torch alone. PyPI's own torch for Linux is the CUDA build, several GB more than this stack
#                  needs; https://download.pytorch.org/whl/cpu has the CPU build.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

torch=2.13.0
stamp=.venv/setup.stamp
# What the environment was made from; it is bound to this folder, too.
wanted="$(pwd) torch==$torch $(cat launch/requirements-cpu.txt launch/requirements-nodeps.txt setup.py | sha256sum)"
complete() { [ -f "$stamp" ] && [ "$(cat "$stamp")" = "$wanted" ]; }

usable() { "$1" -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1; }

find_python() {
  if [ -n "${PYTHON:-}" ]; then
    usable "$PYTHON" || { echo "setup: PYTHON=$PYTHON is not a Python of version 3.11 or newer" >&2; return 1; }
    echo "$PYTHON"
    return
  fi
  for candidate in python3.11 python3.12 python3.13 python3; do
    if usable "$candidate"; then
      echo "$candidate"
      return
    fi
  done
  echo "setup: no Python of version 3.11 or newer found; set PYTHON to one" >&2
  return 1
}

# phase NAME COMMAND...: one line with the seconds it took; the command's own words only when it fails.
phase() {
  local name="$1" start=$SECONDS
  shift
  printf 'setup: %-42s' "$name"
  if ! "$@" >"$log" 2>&1; then
    printf 'failed after %d s\n' $((SECONDS - start))
    tail -n 20 "$log" >&2
    echo "setup: $name failed; the same command goes on from here" >&2
    exit 1
  fi
  printf '%4d s\n' $((SECONDS - start))
}

install() { .venv/bin/python -m pip install --no-input --disable-pip-version-check --progress-bar off "$@"; }

# The sandbox of the code verifier, a system package. Nothing else needs it, and that verifier says so where it is missing.
install_bubblewrap() {
  if command -v bwrap; then return; fi
  if [ "$(id -u)" != 0 ] || ! command -v apt-get; then return 1; fi
  apt-get install -y --no-install-recommends bubblewrap ||
    { apt-get update && apt-get install -y --no-install-recommends bubblewrap; }
}

make_venv() {
  # pip writes RECORD last: a package without one was cut off half-way, yet pip would count it as installed.
  for info in .venv/lib/python3*/site-packages/*.dist-info; do
    [ ! -d "$info" ] || [ -f "$info/RECORD" ] || rm -r "$info"
  done
  { usable .venv/bin/python && .venv/bin/python -m pip --version; } || "$python" -m venv --clear .venv
}

if complete; then exit 0; fi
python="$(find_python)"
exec 9<launch/setup.sh
flock 9 # a second set-up of this folder waits for the first
if complete; then exit 0; fi
rm -f "$stamp"
log="$(mktemp)"
trap 'rm -f "$log"' EXIT

phase "environment" make_venv
phase "torch $torch" install ${TORCH_INDEX_URL:+--index-url "$TORCH_INDEX_URL"} "torch==$torch"
phase "requirements" install -r launch/requirements-cpu.txt
phase "megatron-core and sglang" install --no-deps -r launch/requirements-nodeps.txt
phase "megatron_rl" install --no-deps --no-build-isolation -e .
DEBIAN_FRONTEND=noninteractive install_bubblewrap >"$log" 2>&1 </dev/null ||
  echo "setup: bubblewrap could not be installed; without it (apt-get install bubblewrap) the code verifier runs no program" >&2
echo "$wanted" >"$stamp"
