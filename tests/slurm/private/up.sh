#!/usr/bin/env bash
# Start a private, throw-away SLURM cluster (munged + slurmctld + N slurmd [+ mariadbd + slurmdbd])
# on this one host, for the current user, in one directory. Idempotent: a second call on a healthy
# cluster changes nothing. Needs Debian packages: slurmctld slurmd slurm-client munge
# (and for --acct dbd: slurmdbd slurm-wlm-mysql-plugin mariadb-server-core mariadb-client-core).
#
#   up.sh [--dir DIR] [--nodes N] [--cpus C] [--gpus G] [--mem MB] [--acct dbd|squeue|none]
#               [--names ip|host] [--no-user-signal] [--grace SECONDS] [--kill-invalid-depend] [--cred-expire SECONDS] [--port P]
#   source DIR/env.sh      # SLURM_CONF, SLURM_TEST_DIR (and PATH with --acct squeue)
# --acct dbd    real accounting (mariadbd + slurmdbd): sacct, GPU-seconds, history of requeues. ~7 s first start.
# --acct squeue no accounting; a `sacct` stand-in on PATH answers submitit's one query from squeue. ~0.5 s.
# --names ip    nodes are called 127.0.0.11, 127.0.0.12: they resolve without /etc/hosts and without root
# --names host  nodes are called tn1, tn2; root only: each slurmd gets its own UTS + mount namespace, so that
#               socket.gethostname() in a job is the node's name, as on a real cluster (/etc/hosts outside is untouched)
set -euo pipefail
DIR="${SLURM_TEST_DIR:-/tmp/slurm-test-$(id -u)}"; NODES=2; CPUS=4; GPUS=2; MEM=8000; ACCT="${SLURM_TEST_ACCT:-dbd}"
NAMES=ip; USERSIG=1; GRACE=10; CRED=5; KILLDEP=0; PORT="${SLURM_TEST_PORT:-}"
while [ $# -gt 0 ]; do case "$1" in
  --dir) DIR="$2"; shift 2;; --nodes) NODES="$2"; shift 2;; --cpus) CPUS="$2"; shift 2;;
  --gpus) GPUS="$2"; shift 2;; --mem) MEM="$2"; shift 2;; --acct) ACCT="$2"; shift 2;;
  --names) NAMES="$2"; shift 2;; --no-user-signal) USERSIG=0; shift;; --kill-invalid-depend) KILLDEP=1; shift;; --grace) GRACE="$2"; shift 2;;
  --cred-expire) CRED="$2"; shift 2;; --port) PORT="$2"; shift 2;;
  *) echo "unknown option $1" >&2; exit 2;; esac; done
export PATH="$PATH:/usr/sbin:/sbin"
ME="$(id -un)"; HOST="$(hostname -s)"
say() { echo "[slurm-up] $*" >&2; }
die() { say "ERROR: $*"; exit 1; }
for b in munged slurmctld slurmd srun; do command -v $b >/dev/null || die "$b is not installed"; done
[ "$ACCT" = dbd ] && for b in mariadbd slurmdbd mariadb-install-db; do command -v $b >/dev/null || die "$b is not installed (or use --acct none)"; done
mkdir -p "$DIR"; chmod 755 "$DIR"; DIR="$(cd "$DIR" && pwd)"; cd "$DIR"
exec 9>"$DIR/lock"; flock 9           # two callers never race
mkdir -p munge run log state spool conf; chmod 711 munge; chmod 755 run log state spool conf

# -- a daemon is alive when its pid file names a live process whose command is the one expected
alive() { local p; p="$(cat "run/$1.pid" 2>/dev/null)" || return 1; [ -n "$p" ] && [ -d "/proc/$p" ] && grep -qz -- "$2" "/proc/$p/cmdline" 2>/dev/null; }
wait_for() { local n=$1; shift; for _ in $(seq "$n"); do "$@" >/dev/null 2>&1 && return 0; sleep 0.1; done; return 1; }

# -- ports: fixed once per directory; a free block is found the first time
if [ ! -s conf/ports ]; then
  python3 - "$NODES" "${PORT:-0}" > conf/ports <<'PY'
import random, socket, sys
n, want = int(sys.argv[1]), int(sys.argv[2])
def free(p):
    with socket.socket() as s:
        s.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try: s.bind(("127.0.0.1", p)); return True
        except OSError: return False
while True:
    b = want or random.randrange(10000, 19000, 20)   # below the ephemeral range and submitit's 20000-60000
    if all(free(b + i) for i in range(n + 3)): print(b); break
    if want: sys.exit(f"ports from {want} are taken")
PY
fi
B="$(cat conf/ports)"; P_CTLD=$B; P_DBD=$((B+1)); P_SQL=$((B+2)); P_D=$((B+3))

# -- node names. "ip": 127.0.0.11, 127.0.0.12... resolve with no /etc/hosts and no root.
#                "host": tn1, tn2...; root only: each slurmd lives in its own UTS + mount namespace, with its own host
#                name and its own /etc/hosts. Nothing outside changes.
nodename() { if [ "$NAMES" = ip ]; then echo "127.0.0.$((10+$1))"; else echo "tn$1"; fi; }
if [ "$NAMES" = host ]; then
  [ "$(id -u)" = 0 ] && unshare --uts --mount true 2>/dev/null || die "--names host needs root and namespaces: use --names ip"
  { grep -v '^127\.0\.0\.1[1-9] tn' /etc/hosts; for i in $(seq "$NODES"); do echo "127.0.0.$((10+i)) tn$i"; done; } > conf/hosts
  mkdir -p bin; printf '#!/bin/sh\nn="$1"; shift; mount --bind "%s" /etc/hosts && hostname "$n" && exec "$@"\n' "$DIR/conf/hosts" > bin/as-host; chmod +x bin/as-host
fi
in_node() { [ "$NAMES" = host ] && echo "unshare --uts --mount $DIR/bin/as-host $1"; return 0; }

gen_conf() {
cat <<CONF
ClusterName=test
SlurmctldHost=$HOST(127.0.0.1)
SlurmctldPort=$P_CTLD
SlurmUser=$ME
SlurmdUser=$ME
AuthType=auth/munge
CredType=cred/munge
AuthInfo=socket=$DIR/munge/munge.socket,cred_expire=$CRED
StateSaveLocation=$DIR/state
SlurmdSpoolDir=$DIR/spool/%n
SlurmctldPidFile=$DIR/run/slurmctld.pid
SlurmdPidFile=$DIR/run/slurmd.%n.pid
SlurmctldLogFile=$DIR/log/slurmctld.log
SlurmdLogFile=$DIR/log/slurmd.%n.log
SlurmctldDebug=verbose
SlurmdDebug=verbose
$( [ $USERSIG = 1 ] && echo SlurmctldParameters=preempt_send_user_signal)
SlurmdParameters=config_overrides
# no cgroups, no systemd
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/linux
JobAcctGatherFrequency=task=5
MailProg=/bin/true
MpiDefault=none
SwitchType=switch/none
# scheduling: quick
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU_Memory
DefMemPerCPU=100
SchedulerType=sched/backfill
SchedulerParameters=sched_interval=2,sched_min_interval=100000,bf_interval=1,batch_sched_delay=0
FirstJobId=$(cat conf/first_job)
$( [ $KILLDEP = 1 ] && echo DependencyParameters=kill_invalid_depend)
PriorityType=priority/basic
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
JobRequeue=1
# short timers (SlurmdTimeout=10: NODE_FAIL 25-31 s after a node dies; defaults: 300, KillWait 30 (a busy machine needs more than 5 for a step and a save), cred_expire 120)
SlurmctldTimeout=10
SlurmdTimeout=10
MessageTimeout=10
InactiveLimit=0
KillWait=15
MinJobAge=600
ReturnToService=2
BatchStartTimeout=10
UnkillableStepTimeout=20
GresTypes=gpu
$( if [ "$ACCT" = dbd ]; then echo "AccountingStorageType=accounting_storage/slurmdbd
AccountingStorageHost=127.0.0.1
AccountingStoragePort=$P_DBD
AccountingStoragePass=$DIR/munge/munge.socket
AccountingStoreFlags=job_comment,job_env,job_script
AccountingStorageTRES=gres/gpu"; else echo "AccountingStorageType=accounting_storage/none"; fi )
JobCompType=jobcomp/filetxt
JobCompLoc=$DIR/log/jobcomp.txt
$( for i in $(seq "$NODES"); do echo "NodeName=$(nodename $i) NodeHostname=$HOST NodeAddr=127.0.0.$((10+i)) Port=$((P_D+i-1)) CPUs=$CPUS RealMemory=$MEM Gres=gpu:$GPUS State=UNKNOWN"; done )
PartitionName=low  Nodes=ALL Default=YES MaxTime=INFINITE DefaultTime=10 State=UP PriorityTier=1  PreemptMode=REQUEUE GraceTime=$GRACE OverSubscribe=NO
PartitionName=low0 Nodes=ALL MaxTime=INFINITE DefaultTime=10 State=UP PriorityTier=1  PreemptMode=REQUEUE GraceTime=0 OverSubscribe=NO
PartitionName=high Nodes=ALL MaxTime=INFINITE DefaultTime=10 State=UP PriorityTier=10 PreemptMode=OFF OverSubscribe=NO
CONF
}
[ -s conf/first_job ] || echo $(( ($(date +%s) / 10) % 6000000 * 10 + 1 )) > conf/first_job   # ids are never reused between clusters
gen_conf > conf/slurm.conf.new; CHANGED=0
if ! cmp -s conf/slurm.conf.new conf/slurm.conf; then CHANGED=1; fi; mv conf/slurm.conf.new conf/slurm.conf
# fake GPUs: character devices that only have to exist (root: clones of /dev/null; else ttys);
# CUDA_VISIBLE_DEVICES is then set per job and step as on a real cluster
: > conf/gres.conf
if [ "$GPUS" -gt 0 ]; then mkdir -p dev
  for g in $(seq 0 $((GPUS-1))); do [ -e "dev/gpu$g" ] || mknod -m 666 "dev/gpu$g" c 1 3 2>/dev/null || ln -sf "/dev/tty$g" "dev/gpu$g"; done
  for i in $(seq "$NODES"); do echo "NodeName=$(nodename $i) Name=gpu File=$DIR/dev/gpu[0-$((GPUS-1))]"; done > conf/gres.conf; fi
echo "export SLURM_TEST_DIR=$DIR SLURM_CONF=$DIR/conf/slurm.conf" > env.sh
if [ "$ACCT" = squeue ]; then mkdir -p bin; cat > bin/sacct <<'SH'
#!/usr/bin/env bash
# stand-in for: sacct -o JobID,State,NodeList --parsable2 -j 1 -j 2 ...   (all that submitit asks)
ids=""; while [ $# -gt 0 ]; do case "$1" in -j) ids="$ids,$2"; shift 2;; *) shift;; esac; done
echo "JobID|State|NodeList"; squeue -h -r -t all ${ids:+-j "${ids#,}"} -o "%i|%T|%N"
SH
chmod +x bin/sacct; echo "case \":\$PATH:\" in *:$DIR/bin:*) ;; *) export PATH=$DIR/bin:\$PATH;; esac" >> env.sh; fi
export SLURM_CONF="$DIR/conf/slurm.conf"

# -- munged
if [ ! -s munge/key ]; then (umask 077; head -c 1024 /dev/urandom > munge/key); fi
if ! alive munged munged; then
  rm -f munge/munge.socket*; munged --key-file="$DIR/munge/key" --socket="$DIR/munge/munge.socket" --pid-file="$DIR/run/munged.pid" \
    --log-file="$DIR/log/munged.log" --seed-file="$DIR/munge/seed" --num-threads=2 </dev/null >>log/boot.log 2>&1 9>&- || die "munged: $(tail -3 log/munged.log)"
  wait_for 50 test -S munge/munge.socket || die "munged gave no socket"
fi

# -- accounting
if [ "$ACCT" = dbd ]; then
  if ! alive mariadbd mariadbd; then
    if [ ! -d sql/mysql ]; then say "creating the accounting database"; mariadb-install-db --no-defaults --datadir="$DIR/sql" --auth-root-authentication-method=normal --skip-test-db --user="$ME" > log/mariadb-install.log 2>&1 || die "mariadb-install-db: see $DIR/log/mariadb-install.log"; fi
    setsid mariadbd --no-defaults --user="$ME" --datadir="$DIR/sql" --socket="$DIR/run/sql.socket" --pid-file="$DIR/run/mariadbd.pid" \
      --port=$P_SQL --bind-address=127.0.0.1 --skip-name-resolve --innodb-buffer-pool-size=32M --innodb-log-file-size=16M \
      --innodb-lock-wait-timeout=900 --innodb-flush-log-at-trx-commit=0 --performance-schema=OFF --log-error="$DIR/log/mariadbd.log" </dev/null >/dev/null 2>&1 9>&- &
    wait_for 300 test -S run/sql.socket || die "mariadbd: $(tail -3 log/mariadbd.log)"
    wait_for 300 mariadb --no-defaults --socket="$DIR/run/sql.socket" -uroot -e "select 1" || die "mariadbd does not answer"
    mariadb --no-defaults --socket="$DIR/run/sql.socket" -uroot -e "CREATE USER IF NOT EXISTS 'slurm'@'127.0.0.1' IDENTIFIED BY 'slurm'; GRANT ALL ON slurm_acct_db.* TO 'slurm'@'127.0.0.1';"
  fi
  (umask 077; cat > conf/slurmdbd.conf <<CONF
AuthType=auth/munge
AuthInfo=socket=$DIR/munge/munge.socket
DbdHost=$HOST
DbdAddr=127.0.0.1
DbdPort=$P_DBD
SlurmUser=$ME
LogFile=$DIR/log/slurmdbd.log
PidFile=$DIR/run/slurmdbd.pid
StorageType=accounting_storage/mysql
StorageHost=127.0.0.1
StoragePort=$P_SQL
StorageUser=slurm
StoragePass=slurm
StorageLoc=slurm_acct_db
CONF
  )
  if ! alive slurmdbd slurmdbd; then
    rm -f run/slurmdbd.pid; slurmdbd </dev/null >>log/boot.log 2>&1 9>&- || die "slurmdbd: $(tail -3 log/slurmdbd.log)"
    wait_for 100 sh -c "sacctmgr -n list cluster" || die "slurmdbd does not answer: $(tail -3 log/slurmdbd.log)"
  fi
  sacctmgr -n -P list cluster format=cluster 2>/dev/null | grep -qx test || sacctmgr -i add cluster test >/dev/null || true
fi

# -- slurmctld, slurmd
if ! alive slurmctld slurmctld; then slurmctld </dev/null >>log/boot.log 2>&1 9>&- || die "slurmctld: $(tail -3 log/boot.log log/slurmctld.log 2>/dev/null)"; fi
wait_for 150 sh -c 'scontrol ping | grep -q UP' || die "slurmctld does not answer: $(tail -5 log/slurmctld.log)"
for i in $(seq "$NODES"); do n="$(nodename $i)"; mkdir -p "spool/$n"
  if ! alive "slurmd.$n" "$n"; then $(in_node "$n") slurmd -N "$n" </dev/null >>log/boot.log 2>&1 9>&- || die "slurmd $n: $(tail -3 "log/slurmd.$n.log")"; fi
done
if [ $CHANGED = 1 ]; then scontrol reconfigure; fi   # options may change on a live cluster
ready() { [ "$(sinfo -h -N -p low -t idle,mixed,allocated -o %N 2>/dev/null | sort -u | wc -l)" -ge "$NODES" ]; }
if ! wait_for 100 ready; then
  for i in $(seq "$NODES"); do scontrol update nodename="$(nodename $i)" state=resume >/dev/null 2>&1 || true; done
  wait_for 100 ready || { sinfo -N -l >&2; die "nodes are not ready"; }
fi
say "ready: $NODES nodes, accounting=$ACCT; source $DIR/env.sh"
