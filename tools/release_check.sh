#!/usr/bin/env bash
# tools/release_check.sh WHEEL: install it beside the oldest and the newest torch and see whether it works there.
# Not part of CI: a torch for CUDA takes gigabytes. PYTHON must be the wheel's; TORCHES lists versions; WORK keeps the environments.
set -euo pipefail
wheel=$(realpath "$1")
tools=$(dirname "$(realpath "$0")")
work=${WORK:-$(mktemp -d)}
for version in ${TORCHES:-2.6.0 2.13.0}; do
  environment=$work/torch-$version
  test -x "$environment/bin/python" || "${PYTHON:-python3}" -m venv "$environment"
  "$environment/bin/python" -m pip install --quiet --no-compile "torch==$version" numpy pyyaml rich typer
  "$environment/bin/python" -m pip install --quiet --force-reinstall --no-deps "$wheel"
  "$environment/bin/python" -m pip install --quiet "$wheel"
  echo "== torch $version"
  (
    cd "$work"
    unset PYTHONPATH
    "$environment/bin/python" "$tools/check_install.py"
    COLUMNS=160 "$environment/bin/lora-kernels" doctor
  )
done
