# Shared by the scripts: where the repository is, and a virtual environment of its own in .venv, made once.
# Source it; then call ensure_venv and use "$PYTHON". The versions of all packages are those of constraints.txt.
# A stamp of pyproject.toml and constraints.txt says whether .venv is up to date.

set -euo pipefail
ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
PYTHON="$ROOT/.venv/bin/python"

say() { printf '==> %s\n' "$*" >&2; }

find_python() { # the first interpreter of version 3.11 or later
    local candidate
    for candidate in "${ELASTIC_MOE_PYTHON:-}" python3 python3.13 python3.12 python3.11 python; do
        if [ -n "$candidate" ] && "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
            echo "$candidate"
            return
        fi
    done
    say "Python 3.11 or later is needed; set ELASTIC_MOE_PYTHON to one."
    return 1
}

torch_pin() { # the line of pyproject.toml that pins torch, as pip takes it
    sed -n 's/^ *"\(torch==[^"]*\)".*/\1/p' "$ROOT/pyproject.toml" | head -n 1
}

ensure_venv() {
    local base stamp="$ROOT/.venv/.stamp.sha256" hash pip
    base="$(find_python)"
    hash="$(cat "$ROOT/pyproject.toml" "$ROOT/constraints.txt" | "$base" -c 'import hashlib, sys; print(hashlib.sha256(sys.stdin.buffer.read()).hexdigest())')"
    if [ -x "$PYTHON" ] && [ "$(cat "$stamp" 2>/dev/null)" = "$hash" ]; then
        return
    fi
    if [ ! -x "$PYTHON" ]; then
        say "making a virtual environment in $ROOT/.venv"
        "$base" -m venv "$ROOT/.venv"
    fi
    pip=("$PYTHON" -m pip install --quiet --disable-pip-version-check --constraint "$ROOT/constraints.txt")
    say "installing $(torch_pin) (the first time takes minutes)"
    "${pip[@]}" "$(torch_pin)"
    say "installing elastic_moe and its other dependencies"
    (cd "$ROOT" && "${pip[@]}" -e '.[dev]')
    say "compiling the planner"
    "$PYTHON" -m elastic_moe.plan.warm
    printf '%s\n' "$hash" >"$stamp"
}
