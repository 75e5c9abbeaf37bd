#!/usr/bin/env bash
# Text from the quickstart checkpoint on RANKS ranks (2). Arguments override the configuration:
#   ./launch/quickstart.sh 'prompts=["What is 12 + 7?"]' parallel.fsdp=2 parallel.tp=1
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source launch/environment.sh
environment requirements.txt

ranks=${RANKS:-2}
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$(threads_per_rank "$ranks")}
exec .venv/bin/torchrun --standalone --nproc-per-node="$ranks" -m dist_infer generate --config configs/quickstart.yaml "$@"
