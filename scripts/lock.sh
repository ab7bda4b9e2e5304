#!/usr/bin/env bash
# Write constraints.txt anew: the exact version of every package that the pins of pyproject.toml bring in.
# Run it after a pin has changed. It installs into a fresh temporary environment, so it takes minutes.
. "$(dirname "${BASH_SOURCE[0]}")/lib.sh"

fresh="$(mktemp -d)"
trap 'rm -rf "$fresh"' EXIT
"$(find_python)" -m venv "$fresh/venv"
say "installing into a fresh environment"
(cd "$ROOT" && "$fresh/venv/bin/python" -m pip install --quiet "$(torch_pin)" && "$fresh/venv/bin/python" -m pip install --quiet '.[dev,gpu]')
{
    echo "# Every package of a complete environment with its exact version; scripts/lock.sh writes this file."
    echo "# scripts/quickstart.sh and scripts/test.sh install with it. For your own: pip install -c constraints.txt ."
    # The CUDA packages are pinned by torch itself and differ by platform; so does the suffix of torch's version.
    "$fresh/venv/bin/python" -m pip freeze --exclude elastic_moe | grep '==' | grep -viE '^(nvidia-(cu|nccl|nv)|cuda-)' | sed 's/+[a-z0-9.]*$//' | sort -f
} >"$ROOT/constraints.txt"
say "wrote constraints.txt: $(grep -c == "$ROOT/constraints.txt") packages"
