#!/usr/bin/env bash
# A real SLURM of two nodes, n1 and n2, on this machine, for the tests in this folder. Needs root and the packages
# slurmctld, slurmd, slurm-client and munge.
#
#   tests/slurm/cluster.sh start FOLDER     then: export SLURM_CONF=FOLDER/slurm.conf
#   tests/slurm/cluster.sh stop FOLDER
#   tests/slurm/cluster.sh lose-node FOLDER n2      as when its power goes: nothing answers any more, nothing is closed
#   tests/slurm/cluster.sh return-node FOLDER n2
#
# FOLDER holds the configuration, logs and state. Both nodes are this machine, so their names go into /etc/hosts while the
# cluster is up. Ports are derived from the shell's id, so that two clusters don't meet each other.
set -euo pipefail

hosts_mark="# dist-finetune test cluster"

start() {
    local folder=$1 host port
    host=$(hostname)
    port=$((17000 + $$ % 2000 * 3))
    mkdir -p "$folder"/{state,log,spool-n1,spool-n2}
    grep -q "$hosts_mark" /etc/hosts || printf '127.0.0.1 n1 n2 %s\n' "$hosts_mark" >> /etc/hosts
    cat > "$folder/slurm.conf" <<CONF
ClusterName=test
SlurmctldHost=$host(127.0.0.1)
SlurmctldPort=$port
AuthType=auth/munge
SlurmUser=root
SlurmdUser=root
StateSaveLocation=$folder/state
SlurmdSpoolDir=$folder/spool-%n
SlurmctldPidFile=$folder/slurmctld.pid
SlurmdPidFile=$folder/slurmd-%n.pid
SlurmctldLogFile=$folder/log/slurmctld.log
SlurmdLogFile=$folder/log/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SchedulerType=sched/backfill
SchedulerParameters=bf_interval=2,sched_interval=2
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
SlurmdParameters=config_overrides
ReturnToService=2
SlurmdTimeout=20
KillWait=30
MpiDefault=none
NodeName=n1 NodeHostname=$host NodeAddr=127.0.0.1 Port=$((port + 1)) CPUs=4 RealMemory=2000
NodeName=n2 NodeHostname=$host NodeAddr=127.0.0.1 Port=$((port + 2)) CPUs=4 RealMemory=2000
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE State=UP PriorityTier=1
PartitionName=urgent Nodes=ALL MaxTime=INFINITE State=UP PriorityTier=10 PreemptMode=OFF
CONF
    export SLURM_CONF=$folder/slurm.conf
    if ! munge -n > /dev/null 2>&1; then
        mkdir -p /run/munge
        chown munge /run/munge
        su -s /bin/sh munge -c munged
        touch "$folder/started-munged"
    fi
    slurmctld
    slurmd -N n1
    slurmd -N n2
    for _ in $(seq 60); do
        [ "$(sinfo --noheader --Node --partition=main --states=idle --format=%N 2> /dev/null | wc -l)" = 2 ] && return
        sleep 0.5
    done
    echo "the two nodes did not come up:" >&2
    tail -n 5 "$folder"/log/*.log >&2
    stop "$folder"
    exit 1
}

stop() {
    local folder=$1 name
    if [ -f "$folder/slurm.conf" ]; then
        SLURM_CONF=$folder/slurm.conf timeout 10 scancel --user="$(id -un)" > /dev/null 2>&1 || true
        sleep 1
    fi
    for name in slurmd-n1 slurmd-n2 slurmctld; do
        end_process "$folder/$name.pid"
    done
    [ ! -f "$folder/started-munged" ] || end_process /run/munge/munged.pid
    # /etc/hosts may be a mount, which can be written but not replaced.
    if grep -q "$hosts_mark" /etc/hosts; then
        local rest
        rest=$(grep -v "$hosts_mark" /etc/hosts)
        printf '%s\n' "$rest" > /etc/hosts
    fi
}

lose_node() {
    kill -KILL "$(cat "$1/slurmd-$2.pid")"
    for pid in $(processes_of "$2"); do
        kill -STOP "$pid" 2> /dev/null || true
    done
}

return_node() {
    for pid in $(processes_of "$2"); do
        kill -KILL "$pid" 2> /dev/null || true
    done
    export SLURM_CONF=$1/slurm.conf
    slurmd -N "$2"
    scontrol update NodeName="$2" State=RESUME || true
}

# The tasks of a node, and the slurmstepd above each.
processes_of() {
    local environ pid parent
    for environ in $(grep --files-with-matches --null-data --no-messages "^SLURMD_NODENAME=$1\$" /proc/[0-9]*/environ); do
        pid=${environ#/proc/}
        pid=${pid%/environ}
        echo "$pid"
        parent=$(awk '/^PPid:/ { print $2 }' "/proc/$pid/status" 2> /dev/null) || continue
        [ "$(cat "/proc/$parent/comm" 2> /dev/null)" != slurmstepd ] || echo "$parent"
    done | sort -u
}

end_process() {
    local pid
    [ -s "$1" ] || return 0
    pid=$(cat "$1")
    kill "$pid" 2> /dev/null || return 0
    for _ in $(seq 20); do
        kill -0 "$pid" 2> /dev/null || return 0
        sleep 0.25
    done
    kill -KILL "$pid" 2> /dev/null || true
}

case "${1:-}" in
    start | stop) [ -n "${2:-}" ] && "$1" "$(realpath -m "$2")" ;;
    lose-node) lose_node "$2" "$3" ;;
    return-node) return_node "$2" "$3" ;;
    *)
        grep '^#  ' "${BASH_SOURCE[0]}" >&2
        exit 2
        ;;
esac
