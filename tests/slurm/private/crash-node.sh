#!/usr/bin/env bash
# "Power off" one node of the private cluster: KILL its slurmd, its step daemons and all they started (by pid).
#   crash-node.sh DIR NODE        bring it back: up.sh --dir DIR ...
set -euo pipefail
DIR="$(cd "$1" && pwd)"; N="$2"; P="$(cat "$DIR/run/slurmd.$N.pid")"
grep -qz -- "$N" "/proc/$P/cmdline" || { echo "slurmd $N is not running" >&2; exit 1; }
tree() { local c; for c in $(cat /proc/"$1"/task/*/children 2>/dev/null); do tree "$c"; done; echo "$1"; }
VICTIMS="$P"
for d in /proc/[0-9]*; do p="${d#/proc/}"
  case "$( { tr '\0' ' ' < "$d/cmdline"; } 2>/dev/null)" in "slurmstepd: "*) ;; *) continue;; esac
  t="$(tree "$p")"; mine=0
  for c in $t; do { tr '\0' '\n' < "/proc/$c/environ"; } 2>/dev/null | grep -qx "SLURMD_NODENAME=$N" && { tr '\0' '\n' < "/proc/$c/environ"; } 2>/dev/null | grep -qx "SLURM_CONF=$DIR/conf/slurm.conf" && mine=1; done
  [ $mine = 1 ] && VICTIMS="$VICTIMS $t"
done
kill -KILL $VICTIMS 2>/dev/null || true
echo "crashed $N: $VICTIMS" | tr '\n' ' '; echo
