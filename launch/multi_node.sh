#!/usr/bin/env bash
# dist-infer on several machines: the same line on each, HEAD being the name of one of them, where they meet.
#   NNODES=2 HEAD=machine1 ./launch/multi_node.sh sweep configs/sweeps/quickstart.yaml output=/shared/quickstart
# May be given: RANKS of each machine (one a GPU), PORT (29400), JOB (a name, where several runs share a head). In a SLURM job all is known:
#   srun --ntasks-per-node=1 launch/multi_node.sh generate ...
set -euo pipefail
venv=$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")/../.venv
[[ -n ${VIRTUAL_ENV:-} || ! -f $venv/bin/activate ]] || source "$venv/bin/activate"

if [[ -n ${SLURM_JOB_ID:-} ]]; then
    attempt=${SLURM_RESTART_COUNT:-0} # must not meet what may be left of the one before
    HEAD=${HEAD:-$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)}
    NNODES=${NNODES:-$SLURM_JOB_NUM_NODES}
    JOB=${JOB:-$SLURM_JOB_ID.$attempt}
    PORT=${PORT:-$((15000 + (SLURM_JOB_ID * 31 + attempt) % 16000))}
fi
: "${NNODES:?is not set: how many machines there are}" "${HEAD:?is not set: the name of one of the machines, where they meet}"

gpus=$(nvidia-smi --list-gpus 2>/dev/null | grep -c ^GPU || true)
ranks=${RANKS:-$((gpus > 0 ? gpus : 1))}
cores=$(nproc)
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((cores > ranks ? cores / ranks : 1))}
stop=("--signals-to-handle=SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1" --shutdown-timeout=100) # passed on to the ranks, which then stop between two steps

exec torchrun --nnodes="$NNODES" --nproc-per-node="$ranks" --max-restarts=0 "${stop[@]}" \
    --rdzv-backend=c10d --rdzv-endpoint="$HEAD:${PORT:-29400}" --rdzv-id="${JOB:-dist_infer}" -m dist_infer "$@"
