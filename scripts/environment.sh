# Sourced by scripts/demo and scripts/check: makes .venv and installs Pellucid into it, when needed.
#
# PYTHON=python3.12 chooses the interpreter of a new .venv. What is installed, and from where, is pip's business: its
# configuration and its PIP_* variables hold as always.

root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
venv="$root/.venv"
python="$venv/bin/python"

say() { printf '%s\n' "$*" >&2; }

make_venv() {
  local base="${PYTHON:-python3}"
  command -v "$base" >/dev/null || { say "No $base found: install Python 3.10 or later, or set PYTHON."; exit 2; }
  "$base" -c 'import sys; sys.exit(sys.version_info < (3, 10))' \
    || { say "$base is $("$base" --version 2>&1); Pellucid needs Python 3.10 or later. Set PYTHON to one."; exit 2; }
  say "Making .venv with $("$base" --version 2>&1)"
  # Some systems package venv without ensurepip; their own pip can install into the environment just as well.
  if "$base" -c 'import ensurepip' 2>/dev/null; then
    "$base" -m venv "$venv"
  else
    "$base" -m venv --without-pip "$venv"
  fi
}

run_pip() {
  if "$python" -c 'import pip' 2>/dev/null; then
    "$python" -m pip "$@" >&2
  else
    "${PYTHON:-python3}" -m pip --python "$python" "$@" >&2
  fi
}

# set_up runtime | set_up test: install unless this very pyproject.toml and constraints.txt were installed before.
set_up() {
  local wanted="$1" extras="" stamp
  [[ -x "$python" ]] || make_venv
  stamp="$("$python" - "$root/pyproject.toml" "$root/constraints.txt" <<'PY'
import hashlib, pathlib, sys
print(hashlib.sha256(b"".join(pathlib.Path(name).read_bytes() for name in sys.argv[1:])).hexdigest())
PY
)"
  # What the tests need includes what the demo needs.
  [[ -e "$venv/installed-test-$stamp" || -e "$venv/installed-$wanted-$stamp" ]] && return
  [[ "$wanted" == test ]] && extras="[test,peer,plots,neurons,datasets,distributed,docs]"
  [[ "$wanted" == runtime ]] && extras="[plots,neurons]" # what the commands of README.md need
  say "Installing into .venv (the first time takes a few minutes)"
  # Python 3.11 brings pip 23.2, which works 96 s of processor time where this one works 57.
  run_pip install -c "$root/constraints.txt" --upgrade pip || say "A newer pip cannot be had; this one is slower."
  run_pip install -c "$root/constraints.txt" torch==2.13.0
  run_pip install -c "$root/constraints.txt" -e "$root$extras"
  rm -f "$venv"/installed-*
  touch "$venv/installed-$wanted-$stamp"
}
