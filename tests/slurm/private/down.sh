#!/usr/bin/env bash
# Stop the private SLURM cluster of up.sh. Ends only processes named by its own pid files
# (checked against their command lines) and the job steps under its own spool directories.
#   down.sh [--dir DIR] [--wipe]
set -uo pipefail
DIR="${SLURM_TEST_DIR:-/tmp/slurm-test-$(id -u)}"; WIPE=0
while [ $# -gt 0 ]; do case "$1" in --dir) DIR="$2"; shift 2;; --wipe) WIPE=1; shift;; *) echo "unknown option $1" >&2; exit 2;; esac; done
[ -d "$DIR/run" ] || { echo "[slurm-down] nothing at $DIR" >&2; exit 0; }
DIR="$(cd "$DIR" && pwd)"; cd "$DIR"; export PATH="$PATH:/usr/sbin:/sbin" SLURM_CONF="$DIR/conf/slurm.conf"
exec 9>"$DIR/lock"; flock 9
say() { echo "[slurm-down] $*" >&2; }
pid_of() { local p; p="$(cat "run/$1.pid" 2>/dev/null)" || return 1; [ -n "$p" ] && [ -d "/proc/$p" ] && grep -qz -- "$2" "/proc/$p/cmdline" 2>/dev/null && echo "$p"; }
stop() { # stop NAME MATCH SIGNAL: by pid file, wait, then KILL
  local p; p="$(pid_of "$1" "$2")" || { rm -f "run/$1.pid"; return 0; }
  kill -"${3:-TERM}" "$p" 2>/dev/null
  for _ in $(seq 100); do [ -d "/proc/$p" ] && ! grep -q '^State:.*Z' "/proc/$p/status" 2>/dev/null || { rm -f "run/$1.pid"; return 0; }; sleep 0.1; done
  say "$1 ($p) did not stop: KILL"; kill -KILL "$p" 2>/dev/null; rm -f "run/$1.pid"
}
# cancel what runs, so that no step outlives the daemons
if pid_of slurmctld slurmctld >/dev/null; then
  timeout 5 scancel --me --quiet 2>/dev/null
  for _ in $(seq 80); do [ -z "$(timeout 3 squeue -h 2>/dev/null)" ] && break; sleep 0.1; done
fi
for f in run/slurmd.*.pid; do [ -e "$f" ] || continue; n="$(basename "$f" .pid)"; stop "$n" "${n#slurmd.}"; done
stop slurmctld slurmctld; stop slurmdbd slurmdbd; stop mariadbd mariadbd
# job steps that are still there: only those started with this cluster's configuration
for d in /proc/[0-9]*; do p="${d#/proc/}"
  case "$( { tr '\0' ' ' < "$d/cmdline"; } 2>/dev/null)" in *slurmstepd:*)
    { tr '\0' '\n' < "$d/environ"; } 2>/dev/null | grep -qx "SLURM_CONF=$DIR/conf/slurm.conf" && { say "left-over step $p"; kill -KILL "$p" 2>/dev/null; };; esac
done
stop munged munged
if [ $WIPE = 1 ]; then cd /; rm -rf -- "$DIR"; fi
say "stopped"
