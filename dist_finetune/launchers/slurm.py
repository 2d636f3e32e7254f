"""The text of a SLURM job script, as a pure function: the same job gives the same bytes.

The script starts one torchrun on each node, turns SLURM's early warning of the time limit into a saved checkpoint, and
queues itself again, a bounded number of times. Every value of the user's is quoted for the place where it stands.
"""

import math
import re
import shlex
from dataclasses import dataclass
from pathlib import Path

from dist_finetune.errors import UserError
from dist_finetune.launchers.environment import GPUS_PER_NODE
from dist_finetune.spec_launch import SlurmSpec

# The slowest shared disk to be ready for, and what ends before a save: the running step, an evaluation.
SAVE_BYTES_PER_S = 100e6
BEFORE_SAVE_S = 60
# SLURM takes a time limit's last seconds for itself; before them the job asks to be queued again, saved or not.
RESERVE_S = 15
# Rank 0 closes W&B (a minute at most) after the save; at a SIGTERM SLURM mostly leaves half a minute for everything.
LAST_WORDS_S, SHORT_WORDS_S = 90, 10
FIRST_PORT, NUM_PORTS = 10_000, 20_000
USAGE = "usage: sbatch {file} CONFIG [key=value ...]"


@dataclass(frozen=True)
class SlurmJob:
    """All that a job script depends on. Paths are absolute; `configs` has one entry for each task of a job array."""

    name: str
    site: SlurmSpec
    num_nodes: int
    gpus_per_node: int
    processes_per_node: int
    grace_s: int
    python: str = "python"
    time: str | None = None
    """None: as the site settings say; so for `partition`."""
    partition: str | None = None
    configs: tuple[Path, ...] = ()
    """Empty: the script takes the config as its first argument, for people who submit by hand."""
    tasks: tuple[int, ...] | None = None
    """Numbers of the `configs` that a job array trains; None: all of them."""
    folder: Path | None = None
    working_folder: Path | None = None
    by_hand_file: str = "slurm/train.sbatch"
    join_timeout_s: float | None = None
    """How long the first torchrun waits for those of the other nodes; None: torchrun's own ten minutes."""

    @property
    def is_array(self) -> bool:
        return len(self.configs) > 1


def grace_s(checkpoint_bytes: int, site: SlurmSpec) -> int:
    """Seconds before the time limit at which a run must begin to save."""
    if site.grace is not None:
        return math.ceil(site.grace)
    return BEFORE_SAVE_S + math.ceil(checkpoint_bytes / SAVE_BYTES_PER_S / 10) * 10


def limit_s(text: str) -> int:
    """Seconds of a SLURM time limit: MM:SS, HH:MM:SS, D-HH, D-HH:MM or D-HH:MM:SS."""
    days, dash, clock = text.rpartition("-")
    parts = [int(part) for part in clock.split(":")]
    # With days the first number is hours; without, two numbers are minutes and seconds.
    parts = [*parts, 0, 0][:3] if dash else [0, *parts][-3:]
    hours, minutes, seconds = parts
    return (int(days or 0) * 24 + hours) * 3600 + minutes * 60 + seconds


def render_job(job: SlurmJob) -> str:
    """The whole job script. Raises UserError for values that no job script can hold."""
    time = job.time or job.site.time
    if limit_s(time) < job.grace_s + 60:
        raise UserError(
            f"the time limit {time} leaves no time to train: saving begins {job.grace_s} s before it. Ask for more "
            "with --time, or set launch.slurm.grace where a checkpoint takes less"
        )
    lines = ["#!/usr/bin/env bash", *_introduction(job), *(_option(name, value) for name, value in _options(job, time))]
    lines += [f"#SBATCH {_in_comment(extra)}" for extra in job.site.extra]
    return "\n".join([*lines, "", *_environment(job), "", *_config(job), "", _body(job), ""])


def _introduction(job: SlurmJob) -> list[str]:
    if job.configs:
        return ["# Written by `dist-finetune submit`, each time anew; settings of the site belong in launch.slurm."]
    return [
        "# The script that `dist-finetune submit` writes, for submitting by hand from the folder of the configs:",
        "#",
        f"#   sbatch {job.by_hand_file} CONFIG [key=value ...]",
        "#",
        "# Options of sbatch win over the lines below, but nodes and processes are also in `srun` and `torchrun`.",
    ]


def _options(job: SlurmJob, time: str) -> list[tuple[str, str]]:
    site = job.site
    gpus = f"{site.gpu_type}:{job.gpus_per_node}" if site.gpu_type else str(job.gpus_per_node)
    log = "slurm-%A_%a.out" if job.is_array else "slurm-%j.out"
    options: list[tuple[str, str | None]] = [
        ("job-name", job.name),
        ("nodes", str(job.num_nodes)),
        ("ntasks-per-node", "1"),
        ("gpus-per-node", gpus if job.gpus_per_node else None),
        ("cpus-per-task", str(_cpus_per_task(job))),
        ("time", time),
        ("partition", job.partition or site.partition),
        ("account", site.account),
        ("qos", site.qos),
        ("constraint", site.constraint),
        ("array", _tasks(job) if job.is_array else None),
        ("signal", f"B:USR1@{job.grace_s}"),
        ("requeue", "") if site.max_requeues else ("no-requeue", ""),
        ("open-mode", "append"),
        ("chdir", _path(job.working_folder) if job.working_folder else None),
        ("output", f"{_path(job.folder).replace('%', '%%')}/logs/{log}" if job.folder else "%x-%j.out"),
    ]
    return [(name, value) for name, value in options if value is not None]


def _tasks(job: SlurmJob) -> str:
    return f"0-{len(job.configs) - 1}" if job.tasks is None else ",".join(map(str, job.tasks))


def _option(name: str, value: str) -> str:
    return f"#SBATCH --{name}={_in_comment(value)}" if value else f"#SBATCH --{name}"


def _in_comment(value: str) -> str:
    """A word as sbatch reads it from a script: quotes and backslashes work, and a bare # would end the line."""
    _require_one_line(value)
    if re.fullmatch(r"[\w.,:/@%=+-]+", value, re.ASCII):
        return value
    return '"' + value.replace("\\", "\\\\").replace('"', '\\"') + '"'


def _path(path: Path) -> str:
    """sbatch drops backslashes of a log file's name, so that such a folder can't hold one."""
    if "\\" in str(path):
        raise UserError(f"{path}: SLURM can't write a log into a folder with a backslash in its path; choose another")
    return str(path)


def _require_one_line(value: str) -> None:
    if any(ord(c) < 32 or ord(c) == 127 for c in value):
        raise UserError(f"{value!r} has a line break or a control character, which a job script can't hold; rename it")


def _cpus_per_task(job: SlurmJob) -> int:
    return job.site.cpus_per_process * job.processes_per_node


def _environment(job: SlurmJob) -> list[str]:
    """Modules come before `set -u`, since their shell functions read unset variables."""
    lines = [f"module load {_quote(module)}" for module in job.site.modules]
    lines += ["set -uo pipefail", "", "export PYTHONUNBUFFERED=1"]
    lines.append(f"export {GPUS_PER_NODE}={job.gpus_per_node}")
    lines += [f"export {name}={_quote(value)}" for name, value in job.site.env.items()]
    if job.site.offline:
        lines.append("export HF_HUB_OFFLINE=1          # only what `dist-finetune prepare` fetched")
    if job.is_array:
        lines.append(f"export WANDB_RUN_GROUP={_quote(job.name)}")
    return [
        *lines,
        "# torchrun would die of SIGUSR1 and leave its workers behind; so it tells them, and waits while they save.",
        "export PET_SIGNALS_TO_HANDLE=SIGTERM,SIGINT,SIGUSR1",
        f"export PET_SHUTDOWN_TIMEOUT={job.grace_s}",
    ]


def _config(job: SlurmJob) -> list[str]:
    if not job.configs:
        usage = USAGE.format(file=job.by_hand_file)
        return [f"python={_quote(job.python)}", f"config=${{1:?{usage}}}", "shift"]
    for path in job.configs:
        _path(path)
    lines = [f"python={_quote(job.python)}"]
    if not job.is_array:
        return [*lines, f"config={_quote(str(job.configs[0]))}"]
    return [
        *lines,
        "configs=(",
        *(f"    {_quote(str(path))}" for path in job.configs),
        ")",
        "config=${configs[$SLURM_ARRAY_TASK_ID]}",
    ]


def _quote(value: str) -> str:
    _require_one_line(value)
    return shlex.quote(value)


def _body(job: SlurmJob) -> str:
    container = [f"--container-image={_quote(job.site.container)}"] if job.site.container else []
    if job.site.container_mounts:
        container.append(f"--container-mounts={_quote(','.join(job.site.container_mounts))}")
    values = {
        "NUM_NODES": str(job.num_nodes),
        "PROCESSES": str(job.processes_per_node),
        "CPUS": str(_cpus_per_task(job)),
        "MAX_ATTEMPTS": str(job.site.max_requeues + 1),
        "GIVE_UP": str(max(1, job.grace_s - RESERVE_S)),
        "LAST_WORDS": str(LAST_WORDS_S),
        "SHORT_WORDS": str(SHORT_WORDS_S),
        "FIRST_PORT": str(FIRST_PORT),
        "NUM_PORTS": str(NUM_PORTS),
        "CONTAINER": "".join(f" {flag}" for flag in container),
        "JOIN": f" --rdzv-conf=timeout={math.ceil(job.join_timeout_s)}" if job.join_timeout_s else "",
        "NOTES": '"${config%/*}/.job-$job"' if job.configs else '"$PWD/.dist-finetune-job-$job"',
        "OVERRIDES": "" if job.configs else ' "$@"',
    }
    return re.sub(r"@([A-Z_]+)@", lambda found: values[found[1]], BODY).rstrip()


BODY = r"""max_attempts=@MAX_ATTEMPTS@
attempt=$((${SLURM_RESTART_COUNT:-0} + 1))
# A task of an array is named by its number in it: the id of one of them is also that of the whole array.
job=${SLURM_ARRAY_JOB_ID:+${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID}
job=${job:-$SLURM_JOB_ID}
say() {
    printf '%s job %s, attempt %s of %s: %s\n' "$(date +%FT%T)" "$job" "$attempt" "$max_attempts" "$1"
}
if [ "$attempt" -gt "$max_attempts" ]; then
    say "was queued again as often as launch.slurm.max_requeues allows; submit it again to go on"
    exit 1
fi

# All nodes meet on the first one, at a port of this job's own. Each task of an array has a job id of its own too.
first_host=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
port=$((@FIRST_PORT@ + SLURM_JOB_ID * 8 % @NUM_PORTS@))
while timeout 2 bash -c "exec 3<> /dev/tcp/$first_host/$port" 2> /dev/null; do
    port=$((port + 1))           # somebody answers there
done
say "$SLURM_JOB_NUM_NODES nodes ($SLURM_JOB_NODELIST) meet at $first_host:$port"

# torchrun turns every exit code into 1, so the first rank leaves a word: only a run that saved is queued again.
verdict=@NOTES@.verdict
# Why the attempt before ended: its own word, else what slurmstepd wrote into this log, such as DUE TO PREEMPTION.
why=@NOTES@.why
if [ "$attempt" -gt 1 ]; then
    after=$(cat "$why" 2> /dev/null)
    [ -n "$after" ] || after=$(
        sed -n "/job $job, attempt $((attempt - 1)) of .* meet at/,\$p" "/proc/$$/fd/1" 2> /dev/null |
            grep -o ' CANCELLED AT .* DUE TO [A-Z ]*[A-Z]' | tail -n 1 |
            sed 's/.* DUE TO //; s/^JOB REQUEUE$/scontrol requeue/'
    )
    export DIST_FINETUNE_AFTER="${after:-a reason that SLURM did not write here}"
    say "goes on after $DIST_FINETUNE_AFTER"
fi
rm -f "$verdict" "$why"
export DIST_FINETUNE_VERDICT=$verdict

stopped=
signalled=
watchdog=
on_time_limit() {
    stopped="time limit" signalled=1
    say "the time limit is near: the workers save"
    kill -USR1 "$step"
    # A save that takes longer than planned must not end in TIMEOUT, from which SLURM does not come back.
    if [ "$attempt" -lt "$max_attempts" ]; then
        {
            for ((i = 0; i < @GIVE_UP@; i++)); do sleep 1; done
            echo "the time limit, before it had saved" > "$why"
            scontrol requeue "$job"
        } &
        watchdog=$!
    fi
}
on_sigterm() {
    stopped="SIGTERM" signalled=1
    say "SIGTERM: cancelled, preempted, or queued again by hand (the lines of slurmstepd say which): the workers save"
}
trap on_time_limit USR1
trap on_sigterm TERM

# One launcher a node. Its rank is read there: in this shell $SLURM_NODEID is always 0.
# Told to stop, the first node ends first, which ends the others: rank 0 still has its logs and trackers to close.
# A SIGTERM after that tells of its end. A node that stayed on would be told again, minutes later, in the next attempt.
node='
last_words_s=0
trap "last_words_s=@LAST_WORDS@" USR1
trap "last_words_s=\$((last_words_s ? 0 : @SHORT_WORDS@))" TERM
"$0" -m torch.distributed.run --node-rank="$SLURM_NODEID" "$@"
code=$?
[ "$code" -lt 128 ] || code=1
if [ "$code" -ne 0 ] && [ "$SLURM_NODEID" -ne 0 ]; then
    while [ "$((last_words_s--))" -gt 0 ]; do sleep 1; done # one long sleep would keep the trap waiting
fi
exit "$code"'

# A rank that fails ends the job on all nodes, rather than holding them until the time limit.
srun --nodes=@NUM_NODES@ --ntasks=@NUM_NODES@ --ntasks-per-node=1 --cpus-per-task=@CPUS@ \
    --kill-on-bad-exit=1 --input=none@CONTAINER@ \
    bash -c "$node" "$python" \
    --nnodes=@NUM_NODES@ --nproc-per-node=@PROCESSES@ --master-addr="$first_host" --master-port="$port"@JOIN@ \
    -m dist_finetune train "$config"@OVERRIDES@ &
step=$!
while true; do                   # a signal ends `wait` early
    signalled=
    wait "$step"
    code=$?
    [ -n "$signalled" ] || break
done
[ -z "$watchdog" ] || kill "$watchdog" 2> /dev/null
word=$(cat "$verdict" 2> /dev/null)
[ -e "$verdict" ] || word="not begun"
rm -f "$verdict"
if [ "$code" -ne 0 ]; then
    case $word in
        stopped) code=75 ;;
        "not begun") [ -z "$stopped" ] || code=75 ;;
        *) stopped= code=1 ;;    # a save that failed, or a rank that died, and would again
    esac
fi

if [ "$code" -eq 0 ]; then
    say "finished"
elif [ "$stopped" = "time limit" ] && [ "$attempt" -lt "$max_attempts" ]; then
    say "stopped at the time limit; queued again to go on from the newest checkpoint"
    trap '' TERM
    echo "the time limit" > "$why"
    scontrol requeue "$job"
elif [ -n "$stopped" ] || [ "$code" -eq 75 ]; then
    say "stopped by ${stopped:-a signal or the file STOP}; submit it again to go on from the newest checkpoint"
else
    say "failed, exit code $code; the message is above"
fi
exit "$code"
"""
