#!/usr/bin/env bash
# Stop the private cluster that up.sh started. Ends only processes that its own pid files name (checked against their
# command lines), and job steps that run with its own configuration.
#   down.sh [--dir DIR] [--wipe]
set -uo pipefail
dir=${SLURM_TEST_DIR:-/tmp/slurm-test-$(id -u)}
wipe=
while [ $# -gt 0 ]; do
    case "$1" in
        --dir) dir=$2; shift 2 ;;
        --wipe) wipe=yes; shift ;;
        *) echo "unknown option $1" >&2; exit 2 ;;
    esac
done

say() { echo "slurm-down: $*" >&2; }

[ -d "$dir/run" ] || { say "nothing at $dir"; exit 0; }
dir=$(cd "$dir" && pwd)
cd "$dir"
export PATH="$PATH:/usr/sbin:/sbin" SLURM_CONF="$dir/conf/slurm.conf"
exec 9>lock
flock 9 # not while another call starts or stops it

pid_of() {  # NAME WORD: the live process of a pid file whose command line has WORD
    local pid
    pid=$(cat "run/$1.pid" 2>/dev/null) && [ -n "$pid" ] || return 1
    grep -qz -- "$2" "/proc/$pid/cmdline" 2>/dev/null && echo "$pid"
}

is_over() {  # a zombie is over too: not every container's first process collects its children
    [ ! -d "/proc/$1" ] || grep -q '^State:.*Z' "/proc/$1/status" 2>/dev/null
}

stop() {  # NAME WORD
    local pid
    if pid=$(pid_of "$1" "$2"); then
        kill -TERM "$pid" 2>/dev/null
        for _ in $(seq 100); do
            is_over "$pid" && break
            sleep 0.1
        done
        is_over "$pid" || { say "$1 ($pid) did not stop: killed"; kill -KILL "$pid" 2>/dev/null; }
    fi
    rm -f "run/$1.pid"
}

cancel_jobs() {  # first, so that no step outlives the daemons
    pid_of slurmctld slurmctld >/dev/null || return
    timeout 5 scancel --me --quiet 2>/dev/null
    for _ in $(seq 80); do
        [ -z "$(timeout 3 squeue -h 2>/dev/null)" ] && return
        sleep 0.1
    done
}

kill_left_steps() {
    local folder
    for folder in /proc/[0-9]*; do
        case "$({ tr '\0' ' ' <"$folder/cmdline"; } 2>/dev/null)" in *slurmstepd:*) ;; *) continue ;; esac
        { tr '\0' '\n' <"$folder/environ"; } 2>/dev/null | grep -qx "SLURM_CONF=$SLURM_CONF" || continue
        say "a job step was left: killed ${folder#/proc/}"
        kill -KILL "${folder#/proc/}" 2>/dev/null
    done
}

cancel_jobs
for file in run/slurmd.*.pid; do
    [ -e "$file" ] || continue
    daemon=$(basename "$file" .pid)
    stop "$daemon" "${daemon#slurmd.}"
done
stop slurmctld slurmctld
stop slurmdbd slurmdbd
stop mariadbd mariadbd
kill_left_steps
stop munged munged
[ -z "$wipe" ] || { cd / && rm -rf -- "$dir"; }
say "stopped"
