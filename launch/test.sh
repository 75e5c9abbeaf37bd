#!/usr/bin/env bash
# The tests; with --all, first, the long ones too. Further arguments go to pytest: ./launch/test.sh tests/test_plan.py -k cut
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source launch/environment.sh
environment requirements-dev.txt

chosen=(-m "not long")
if [[ ${1:-} == --all ]]; then
    chosen=()
    shift
fi
export OMP_NUM_THREADS=1
exec .venv/bin/python -m pytest -n "${WORKERS:-2}" --dist loadgroup "${chosen[@]}" "$@"
