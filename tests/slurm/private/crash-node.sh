#!/usr/bin/env bash
# "Power off" a node of the private cluster: kill its slurmd, the daemons of its job steps and all that they started.
#   crash-node.sh DIR NODE        up.sh --dir DIR brings it back
set -euo pipefail
dir=$(cd "$1" && pwd) node=$2

process_tree() {  # parents first: a script whose child is gone would go on to its next line
    local child
    echo "$1"
    for child in $(cat "/proc/$1"/task/*/children 2>/dev/null); do process_tree "$child"; done
}

environment_has() {  # PID NAME=VALUE
    { tr '\0' '\n' <"/proc/$1/environ"; } 2>/dev/null | grep -qx -- "$2"
}

is_of_node() {  # any of the processes runs a job on the node, in this cluster
    local process
    for process in "$@"; do
        environment_has "$process" "SLURMD_NODENAME=$node" &&
            environment_has "$process" "SLURM_CONF=$dir/conf/slurm.conf" && return
    done
    return 1
}

daemon=$(cat "$dir/run/slurmd.$node.pid")
grep -qz -- "$node" "/proc/$daemon/cmdline" || { echo "slurmd of $node is not running" >&2; exit 1; }
victims=("$daemon")
for folder in /proc/[0-9]*; do
    case "$({ tr '\0' ' ' <"$folder/cmdline"; } 2>/dev/null)" in
        "slurmstepd: "*) mapfile -t step < <(process_tree "${folder#/proc/}") ;;
        *) continue ;;
    esac
    if is_of_node "${step[@]}"; then victims+=("${step[@]}"); fi
done
kill -STOP "${victims[@]}" 2>/dev/null || true  # all at once, as with the power
for folder in /proc/[0-9]*; do  # the lists of children may lack some, and others were started since: none goes on
    if is_of_node "${folder#/proc/}"; then
        kill -STOP "${folder#/proc/}" 2>/dev/null || true
        victims+=("${folder#/proc/}")
    fi
done
kill -KILL "${victims[@]}" 2>/dev/null || true
echo "crashed $node: ${victims[*]}"
