#!/usr/bin/env bash
# The tests. Arguments go to pytest: ./launch/test.sh tests/test_plan.py -k cut
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source launch/environment.sh
environment requirements-dev.txt

export OMP_NUM_THREADS=1
exec .venv/bin/python -m pytest -n "${WORKERS:-2}" "$@"
