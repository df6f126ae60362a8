#!/usr/bin/env bash
# Start a private, throw-away SLURM cluster on this machine, for the current user, in one folder: munged, slurmctld,
# several slurmd, and for accounting mariadbd and slurmdbd. A second call on a healthy cluster changes nothing but what
# its options say; any number of clusters can live side by side. Needs the packages that .ci/setup.sh installs.
#
#   up.sh [--dir DIR] [--nodes N] [--cpus C] [--gpus G] [--mem MB] [--acct dbd|none] [--names ip|host]
#         [--no-user-signal] [--grace SECONDS] [--kill-invalid-depend] [--cred-expire SECONDS]
#   source DIR/env.sh             # SLURM_CONF
#
# --names ip     nodes are 127.0.0.11, 127.0.0.12: names that resolve without root and /etc/hosts
# --names host   nodes are tn1, tn2, and so are host names within jobs, as on a real cluster. Root only: each slurmd gets
#                its own UTS and mount namespace; /etc/hosts outside is not touched
# --no-user-signal, --grace   the site's ways to preempt: without SIGUSR2 first, with so long between SIGTERM and SIGKILL
set -euo pipefail

dir=${SLURM_TEST_DIR:-/tmp/slurm-test-$(id -u)}
nodes=2 cpus=4 gpus=2 memory=8000 accounting=dbd names=ip
grace=10 expire=5 user_signal=yes kill_invalid_depend=
while [ $# -gt 0 ]; do
    case "$1" in
        --dir) dir=$2; shift 2 ;;
        --nodes) nodes=$2; shift 2 ;;
        --cpus) cpus=$2; shift 2 ;;
        --gpus) gpus=$2; shift 2 ;;
        --mem) memory=$2; shift 2 ;;
        --acct) accounting=$2; shift 2 ;;
        --names) names=$2; shift 2 ;;
        --grace) grace=$2; shift 2 ;;
        --cred-expire) expire=$2; shift 2 ;;
        --no-user-signal) user_signal=; shift ;;
        --kill-invalid-depend) kill_invalid_depend=yes; shift ;;
        *) echo "unknown option $1" >&2; exit 2 ;;
    esac
done
export PATH="$PATH:/usr/sbin:/sbin"
me=$(id -un) host=$(hostname -s)

say() { echo "slurm-up: $*" >&2; }
die() { say "ERROR: $*"; exit 1; }

require() {
    local program
    for program in "$@"; do
        command -v "$program" >/dev/null || die "$program is not installed"
    done
}

is_alive() {  # NAME WORD: the pid file names a live process whose command line has WORD
    local pid
    pid=$(cat "run/$1.pid" 2>/dev/null) && [ -n "$pid" ] && grep -qz -- "$2" "/proc/$pid/cmdline" 2>/dev/null
}

wait_for() {  # TENTHS COMMAND...
    local tenths=$1
    shift
    for _ in $(seq "$tenths"); do
        "$@" >/dev/null 2>&1 && return
        sleep 0.1
    done
    return 1
}

# Daemons get no standard streams (a test runner would wait for the pipe) and not the lock.
daemon() { "$@" </dev/null >>log/boot.log 2>&1 9>&-; }

last_lines() { tail -n 5 "$@" 2>/dev/null | tr '\n' ' '; }

node_name() { if [ "$names" = ip ]; then echo "127.0.0.$((10 + $1))"; else echo "tn$1"; fi; }

# ------------------------------------------------------------------------------------------------------ configuration

# Chosen once for the folder: a free block, below the ephemeral range.
choose_ports() {
    [ -s conf/ports ] && return
    python3 - "$nodes" >conf/ports <<'PY'
import random, socket, sys


def is_free(port):
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
    return True


while True:
    first = random.randrange(10000, 19000, 20)
    if all(is_free(first + i) for i in range(int(sys.argv[1]) + 3)):
        print(first)
        break
PY
}

# Ids from the clock: were they to begin at 1 in each cluster, submitit would find results of other jobs by their number.
choose_first_job() {
    [ -s conf/first_job ] || echo $((($(date +%s) / 10) % 6000000 * 10 + 1)) >conf/first_job
}

# How a slurmd becomes a host of its own.
prepare_host_names() {
    [ "$names" = host ] || return 0
    [ "$(id -u)" = 0 ] && unshare --uts --mount true 2>/dev/null || die "--names host needs root and namespaces: use ip"
    {
        grep -v '^127\.0\.0\.1[1-9] tn' /etc/hosts
        for i in $(seq "$nodes"); do echo "127.0.0.$((10 + i)) tn$i"; done
    } >conf/hosts
    mkdir -p bin
    printf '#!/bin/sh\nname="$1"; shift; mount --bind "%s" /etc/hosts && hostname "$name" && exec "$@"\n' \
        "$dir/conf/hosts" >bin/as-host
    chmod +x bin/as-host
}

# GPUs are character devices that only have to exist: CUDA_VISIBLE_DEVICES is then set as on a real cluster.
prepare_gpus() {
    : >conf/gres.conf
    [ "$gpus" -gt 0 ] || return 0
    mkdir -p dev
    for g in $(seq 0 $((gpus - 1))); do
        [ -e "dev/gpu$g" ] || mknod -m 666 "dev/gpu$g" c 1 3 2>/dev/null || ln -sf "/dev/tty$g" "dev/gpu$g"
    done
    for i in $(seq "$nodes"); do
        echo "NodeName=$(node_name "$i") Name=gpu File=$dir/dev/gpu[0-$((gpus - 1))]"
    done >conf/gres.conf
}

node_lines() {
    for i in $(seq "$nodes"); do
        echo "NodeName=$(node_name "$i") NodeHostname=$host NodeAddr=127.0.0.$((10 + i)) Port=$((first_port + 2 + i))" \
            "CPUs=$cpus RealMemory=$memory Gres=gpu:$gpus State=UNKNOWN"
    done
}

accounting_lines() {
    if [ "$accounting" != dbd ]; then
        echo "AccountingStorageType=accounting_storage/none"
        return
    fi
    cat <<CONF
AccountingStorageType=accounting_storage/slurmdbd
AccountingStorageHost=127.0.0.1
AccountingStoragePort=$((first_port + 1))
AccountingStoragePass=$dir/munge/munge.socket
AccountingStoreFlags=job_comment,job_env,job_script
AccountingStorageTRES=gres/gpu
CONF
}

slurm_conf() {
    local partition="Nodes=ALL MaxTime=INFINITE DefaultTime=10 State=UP OverSubscribe=NO"
    cat <<CONF
ClusterName=test
SlurmctldHost=$host(127.0.0.1)
SlurmctldPort=$first_port
SlurmUser=$me
SlurmdUser=$me
AuthType=auth/munge
CredType=cred/munge
# cred_expire is also how long a requeued job waits; the default is 120
AuthInfo=socket=$dir/munge/munge.socket,cred_expire=$expire
StateSaveLocation=$dir/state
SlurmdSpoolDir=$dir/spool/%n
SlurmctldPidFile=$dir/run/slurmctld.pid
SlurmdPidFile=$dir/run/slurmd.%n.pid
SlurmctldLogFile=$dir/log/slurmctld.log
SlurmdLogFile=$dir/log/slurmd.%n.log
SlurmctldDebug=verbose
SlurmdDebug=verbose
${user_signal:+SlurmctldParameters=preempt_send_user_signal}
# a node may claim more processors and memory than the machine has
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
${kill_invalid_depend:+DependencyParameters=kill_invalid_depend}
PriorityType=priority/basic
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
JobRequeue=1
# short timers: a dead node is noticed in half a minute (SlurmdTimeout is 300 by default)
SlurmctldTimeout=10
SlurmdTimeout=10
MessageTimeout=10
InactiveLimit=0
KillWait=30
MinJobAge=600
ReturnToService=2
BatchStartTimeout=10
UnkillableStepTimeout=20
GresTypes=gpu
$(accounting_lines)
JobCompType=jobcomp/filetxt
JobCompLoc=$dir/log/jobcomp.txt
$(node_lines)
PartitionName=low $partition Default=YES PriorityTier=1 PreemptMode=REQUEUE GraceTime=$grace
PartitionName=low0 $partition PriorityTier=1 PreemptMode=REQUEUE GraceTime=0
PartitionName=high $partition PriorityTier=10 PreemptMode=OFF
CONF
}

slurmdbd_conf() {
    cat <<CONF
AuthType=auth/munge
AuthInfo=socket=$dir/munge/munge.socket
DbdHost=$host
DbdAddr=127.0.0.1
DbdPort=$((first_port + 1))
SlurmUser=$me
LogFile=$dir/log/slurmdbd.log
PidFile=$dir/run/slurmdbd.pid
StorageType=accounting_storage/mysql
StorageHost=127.0.0.1
StoragePort=$((first_port + 2))
StorageUser=slurm
StoragePass=slurm
StorageLoc=slurm_acct_db
CONF
}

# ------------------------------------------------------------------------------------------------------------ daemons

start_munge() {
    [ -s munge/key ] || (umask 077 && head -c 1024 /dev/urandom >munge/key)
    is_alive munged munged && return
    rm -f munge/munge.socket*
    daemon munged --key-file="$dir/munge/key" --socket="$dir/munge/munge.socket" --pid-file="$dir/run/munged.pid" \
        --log-file="$dir/log/munged.log" --seed-file="$dir/munge/seed" --num-threads=2 ||
        die "munged: $(last_lines log/munged.log)"
    wait_for 100 test -S munge/munge.socket || die "munged gave no socket"
}

sql() { mariadb --no-defaults --socket="$dir/run/sql.socket" -uroot -e "$1"; }

start_database() {
    is_alive mariadbd mariadbd && return
    if [ ! -d sql/mysql ]; then
        mariadb-install-db --no-defaults --datadir="$dir/sql" --auth-root-authentication-method=normal --skip-test-db \
            --user="$me" >log/mariadb-install.log 2>&1 || die "mariadb-install-db: $(last_lines log/mariadb-install.log)"
    fi
    setsid mariadbd --no-defaults --user="$me" --datadir="$dir/sql" --socket="$dir/run/sql.socket" \
        --pid-file="$dir/run/mariadbd.pid" --port=$((first_port + 2)) --bind-address=127.0.0.1 --skip-name-resolve \
        --innodb-buffer-pool-size=32M --innodb-log-file-size=16M --innodb-lock-wait-timeout=900 \
        --innodb-flush-log-at-trx-commit=0 --performance-schema=OFF --log-error="$dir/log/mariadbd.log" \
        </dev/null >/dev/null 2>&1 9>&- &
    wait_for 600 sql "select 1" || die "mariadbd does not answer: $(last_lines log/mariadbd.log)"
    sql "CREATE USER IF NOT EXISTS 'slurm'@'127.0.0.1' IDENTIFIED BY 'slurm';
         GRANT ALL ON slurm_acct_db.* TO 'slurm'@'127.0.0.1';"
}

start_accounting() {
    (umask 077 && slurmdbd_conf >conf/slurmdbd.conf)
    if ! is_alive slurmdbd slurmdbd; then
        rm -f run/slurmdbd.pid
        daemon slurmdbd || die "slurmdbd: $(last_lines log/boot.log)"
        wait_for 600 sacctmgr -n list cluster || die "slurmdbd does not answer: $(last_lines log/slurmdbd.log)"
    fi
    sacctmgr -n -P list cluster format=cluster 2>/dev/null | grep -qx test || sacctmgr -i add cluster test >/dev/null || true
}

controller_answers() { scontrol ping | grep -q UP; }

start_controller() {
    is_alive slurmctld slurmctld || daemon slurmctld || die "slurmctld: $(last_lines log/boot.log)"
    wait_for 300 controller_answers || die "slurmctld does not answer: $(last_lines log/slurmctld.log)"
}

start_nodes() {
    local i node namespace=()
    for i in $(seq "$nodes"); do
        node=$(node_name "$i")
        mkdir -p "spool/$node"
        if [ "$names" = host ]; then namespace=(unshare --uts --mount "$dir/bin/as-host" "$node"); fi
        is_alive "slurmd.$node" "$node" || daemon "${namespace[@]}" slurmd -N "$node" ||
            die "slurmd $node: $(last_lines "log/slurmd.$node.log")"
    done
}

are_nodes_ready() {
    [ "$(sinfo -h -N -p low -t idle,mixed,allocated -o %N 2>/dev/null | sort -u | wc -l)" -ge "$nodes" ]
}

wait_for_nodes() {
    wait_for 100 are_nodes_ready && return
    for i in $(seq "$nodes"); do scontrol update nodename="$(node_name "$i")" state=resume >/dev/null 2>&1 || true; done
    wait_for 200 are_nodes_ready || { sinfo -N -l >&2; die "nodes are not ready"; }
}

require munged slurmctld slurmd srun
if [ "$accounting" = dbd ]; then require mariadbd slurmdbd mariadb-install-db; fi
mkdir -p "$dir"
dir=$(cd "$dir" && pwd)
cd "$dir"
chmod 755 .
exec 9>lock
flock 9 # two callers never race
mkdir -p munge run log state spool conf
chmod 711 munge
chmod 755 run log state spool conf

choose_ports
first_port=$(cat conf/ports)
choose_first_job
prepare_host_names
prepare_gpus
slurm_conf >conf/slurm.conf.new
is_changed=
cmp -s conf/slurm.conf.new conf/slurm.conf || is_changed=yes
mv conf/slurm.conf.new conf/slurm.conf
echo "export SLURM_TEST_DIR=$dir SLURM_CONF=$dir/conf/slurm.conf" >env.sh
export SLURM_CONF="$dir/conf/slurm.conf"

start_munge
if [ "$accounting" = dbd ]; then
    start_database
    start_accounting
fi
start_controller
start_nodes
if [ -n "$is_changed" ]; then scontrol reconfigure; fi # options may change on a live cluster
wait_for_nodes
say "ready: $nodes nodes, accounting $accounting; source $dir/env.sh"
