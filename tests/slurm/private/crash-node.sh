#!/usr/bin/env bash
# "Power off" a node of the private cluster: kill its slurmd, the daemons of its job steps and all that they started.
#   crash-node.sh DIR NODE        up.sh --dir DIR brings it back
#
# All at once, as with the power, else those that are left act: a job's script goes on to its supervisor, srun asks the
# controller for its step's end (which is passed on a minute later to a node that is back, and hits the next start). So
# all are stopped first, parents before children; and killed children first, since the kernel wakes stopped ones
# (SIGHUP, SIGCONT) whose parent dies.
set -euo pipefail
dir=$(cd "$1" && pwd) node=$2

job_processes() {  # of the node in this cluster, and the daemons of their steps; the younger, children, first
    local tasks
    tasks=$({ grep -lzxF -- "SLURMD_NODENAME=$node" /proc/[0-9]*/environ |
        xargs -r grep -lzxF -- "SLURM_CONF=$dir/conf/slurm.conf" | grep -o '[0-9]*'; } 2>/dev/null || true)
    [ -n "$tasks" ] || return 0
    { echo "$tasks" && ps -o pid=,args= -p "$(ps -o ppid= -p "${tasks//$'\n'/,}" | paste -sd, | tr -d ' ')" |
        awk '$2 == "slurmstepd:" { print $1 }' || true; } | sort -rnu  # ps fails for one that has ended meanwhile
}

daemon=$(cat "$dir/run/slurmd.$node.pid")
grep -qz -- "$node" "/proc/$daemon/cmdline" || { echo "slurmd of $node is not running" >&2; exit 1; }
kill -STOP "$daemon"
stopped=
while victims=$(job_processes) && [ "$victims" != "$stopped" ]; do  # some were started since
    kill -STOP $(sort -n <<<"$victims") 2>/dev/null || true
    stopped=$victims
done
kill -KILL $victims "$daemon" 2>/dev/null || true
while left=$(job_processes) && [ -n "$left" ]; do
    kill -KILL $left 2>/dev/null || true
done
echo "crashed $node: $daemon" $victims
