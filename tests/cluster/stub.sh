#!/usr/bin/env bash
# Stands for dist-infer where only the scripts are tested. PLAN holds what each attempt is to do: "fail ok".
for argument in "$@"; do [[ $argument == status=* ]] && status=${argument#status=}; done
read -ra plan <<<"$PLAN"
attempt=${SLURM_RESTART_COUNT:-0}
echo "attempt $attempt rank $SLURM_PROCID of $SLURM_NTASKS on $(hostname) master $MASTER_ADDR cpus $OMP_NUM_THREADS: $*"

end() { # outcome, requeue, exit status
    [[ $SLURM_PROCID != 0 ]] || echo "{\"outcome\": \"$1\", \"requeue\": $2, \"error\": \"of attempt $attempt\"}" >"$status"
    exit "$3"
}

case ${plan[attempt]} in
ok) exit 0 ;;
fail) end failed false 1 ;;
mistake) end mistake false 2 ;;
stop) # when told to
    trap 'echo "rank $SLURM_PROCID stops"; end stopped true 75' USR1 TERM
    while :; do read -rt 1 <> <(:) || :; done ;;
hang) # one rank does not leave with the others
    ((SLURM_PROCID == 1)) || end failed false 1
    while :; do read -rt 1 <> <(:) || :; done ;;
esac
