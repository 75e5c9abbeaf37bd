#!/usr/bin/env bash
# dist-infer on this machine with one rank a GPU, or RANKS ranks:
#   ./launch/single_node.sh sweep configs/sweeps/quickstart.yaml output=outputs/quickstart
#   RANKS=4 ./launch/single_node.sh generate model.path=runs input=prompts.jsonl output=texts.jsonl
set -euo pipefail
venv=$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")/../.venv
[[ -n ${VIRTUAL_ENV:-} || ! -f $venv/bin/activate ]] || source "$venv/bin/activate"

gpus=$(nvidia-smi --list-gpus 2>/dev/null | grep -c ^GPU || true)
ranks=${RANKS:-$((gpus > 0 ? gpus : 1))}
cores=$(nproc)
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((cores > ranks ? cores / ranks : 1))}
stop=("--signals-to-handle=SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1" --shutdown-timeout=100) # passed on to the ranks, which then stop between two steps

exec torchrun --standalone "${stop[@]}" --nproc-per-node="$ranks" -m dist_infer "$@"
