#!/usr/bin/env bash
# Makes .venv in the repository and installs the project into it. `tools/bootstrap.sh dev` adds what the tests
# need. Runs in a moment when nothing has changed since the last time; says what is missing and how to get it.
set -euo pipefail

repository=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
venv=$repository/.venv
extras=${1:-}

say() { printf '%s\n' "$*" >&2; }
fail() { say "bootstrap: $*"; exit 1; }

case $extras in
  '' | dev) ;;
  *) fail "unknown argument '$extras'; use: tools/bootstrap.sh [dev]" ;;
esac

# Two runs at once (tests beside a demo) must not install into the same folder.
if command -v flock >/dev/null; then
  mkdir -p "$repository/.cache"
  exec 9>"$repository/.cache/bootstrap.lock"
  flock 9
fi

new_enough() { "$1" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; }

find_python() {
  local name
  for name in python3 python3.14 python3.13 python3.12 python3.11; do
    if command -v "$name" >/dev/null && new_enough "$name"; then
      command -v "$name"
      return
    fi
  done
  return 1
}

# What is installed now is named by a stamp; another one means: install again. A run with `dev` serves one without.
# The compiler belongs to it: once there is one, what was left out for want of it is built.
inputs=$(
  {
    cat "$repository"/{pyproject.toml,setup.py,MANIFEST.in} "$repository"/requirements/*.txt "$repository"/native/*.c
    command -v "${CC:-cc}" || true
  } | cksum
)
stamp_of() { printf '%s%s' "$inputs" "${1:+ $1}"; }
installed=$(cat "$venv/.bootstrap-stamp" 2>/dev/null || true)
if [ -x "$venv/bin/python" ] && new_enough "$venv/bin/python"; then
  [ "$installed" = "$(stamp_of "$extras")" ] && exit 0
  [ "$installed" = "$(stamp_of dev)" ] && exit 0
fi

if ! { [ -x "$venv/bin/python" ] && new_enough "$venv/bin/python" && "$venv/bin/python" -c 'import pip' 2>/dev/null; }; then
  python=$(find_python) || fail "Python 3.11 or newer is missing (looked for python3, python3.11 to python3.14).
  Debian, Ubuntu: apt-get install python3.11 python3.11-venv   (or python3 python3-venv where that is new enough)
  Fedora:         dnf install python3.11"
  version=$("$python" -c 'import sys; print("%d.%d" % sys.version_info[:2])')
  "$python" -c 'import venv, ensurepip' 2>/dev/null || fail "$python has no venv module.
  Debian, Ubuntu: apt-get install python3-venv   (or python$version-venv)"
  say "bootstrap: making .venv with Python $version …"
  "$python" -m venv --clear "$venv" || fail "$python -m venv failed (see above).
  Debian, Ubuntu: apt-get install python3-venv   (or python$version-venv)"
fi

say "bootstrap: installing the project${extras:+ with its $extras extras} into .venv …"
progress=off
[ -t 2 ] && progress=on
rm -f "$venv/.bootstrap-stamp"
pip() { "$venv/bin/python" -m pip --disable-pip-version-check --quiet "$@" >&2; }
{
  pip install --progress-bar "$progress" --require-hashes --requirement "$repository/requirements/${extras:-run}.txt" &&
    pip install --no-deps --no-build-isolation --config-settings editable_mode=compat --editable "$repository" &&
    "$venv/bin/python" -m compileall -q "$repository/wrapper"
} || fail "pip could not install the project's dependencies (see above): is the package index reachable?"
stamp_of "$extras" >"$venv/.bootstrap-stamp"
say "bootstrap: done"
