#!/usr/bin/env bash
# PID 1 of a host of the test cluster, in namespaces of its own: host.sh control|node DIR NAME ADDRESS
# Says "ready" when its cable can be plugged in, then waits for a line on stdin before it starts its daemons.
set -euo pipefail
role=$1 dir=$2 name=$3 address=$4

hostname "$name"
ip link set lo up
mount -t tmpfs tmpfs /dev/shm
mount --bind "$dir/boot/$name" /proc/sys/kernel/random/boot_id # a machine of its own, for whoever asks
if [[ $role == control ]]; then
    mount --bind "$dir/hosts" /etc/hosts
    mount --bind "$dir/nsswitch.conf" /etc/nsswitch.conf
    mount -t tmpfs -o size=256k tmpfs "$dir/small" # a disk that is soon full, the same on every node
    ip link add bridge0 type bridge
    ip address add "$address/24" dev bridge0
    ip link set bridge0 up
fi
echo ready
read -r
if [[ $role == control ]]; then
    munged --foreground --key-file="$dir/munge.key" --socket="$dir/run/munge" --pid-file="$dir/run/munged.pid" \
        --log-file="$dir/log/munged.log" --seed-file="$dir/run/munge.seed" &
    until [[ -S $dir/run/munge ]]; do sleep 0.02; done
    slurmctld -D -i &
else
    ip address add "$address/24" dev eth0
    ip link set eth0 up
    slurmd -D -N "$name" &
fi
sleep infinity &
wait
