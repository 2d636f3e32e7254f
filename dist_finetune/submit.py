"""From a config to a submitted job: plan, show, write into the run folder, hand over to SLURM or a cloud tool."""

import difflib
import json
import os
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from dist_finetune.data.tables import Tables, read_tables
from dist_finetune.errors import PlanError, UserError
from dist_finetune.hold import Hold
from dist_finetune.launchers.cloud import cloud_commands, render_cloud
from dist_finetune.launchers.cloud_files import refuse_what_stays_here
from dist_finetune.launchers.cloud_job import CloudJob
from dist_finetune.launchers.request import Request
from dist_finetune.launchers.slurm import SlurmJob, grace_s, render_job
from dist_finetune.launchers.sweep import sweep_trials
from dist_finetune.plan import Plan, for_planning, plan_run
from dist_finetune.plan_text import plan_lines, plan_notes
from dist_finetune.price import GpuPrice, cost_lines, read_prices
from dist_finetune.run_folder import (
    LOGS,
    check_run_folder,
    enter_run_folder,
    folder_of,
    json_row,
    start_run_folder,
    write_text,
)
from dist_finetune.spec import Spec
from dist_finetune.spec_file import load_spec, resolved_yaml
from dist_finetune.topology import Topology

JOB_FILES = {"slurm": "job.sbatch", "skypilot": "skypilot.yaml", "dstack": "dstack.yaml", "kubernetes": "k8s.yaml"}
SBATCH_TIMEOUT_S = 120
SQUEUE_TIMEOUT_S = 30
SUBMISSIONS = "submissions.jsonl"


def submit(config: str, overrides: Sequence[str], request: Request, say: Callable[[str], None]) -> list[Plan]:
    """Plans and shows the job, and unless it is a dry run writes and submits it. Returns the plans, one for each run.

    Raises UserError for wrong input, PlanError where a run does not fit; nothing is written then. Raises UserError also
    for what sbatch refuses; the written job stays, to be looked at.
    """
    specs = _specs(config, overrides, request)
    prices = read_prices(Path(request.price)) if request.price else None
    plans = _plans(specs, request)
    to_train = [number for number, plan in enumerate(plans) if _show_plan(plan, prices, len(plans) > 1, request, say)]
    folder = folder_of(specs[0]).absolute() if len(specs) == 1 else folder_of(specs[0]).absolute().parent
    if not to_train:
        raise UserError(f"{folder} is finished; --fresh trains it again, name=... makes another run")
    if prices and len(plans) > 1:
        say("\n# all runs of the sweep, one after the other")
        say("\n".join(cost_lines([plans[number] for number in to_train], prices)))
    text = _text(folder, specs, plans, to_train, request)
    path = folder / JOB_FILES[request.to]
    say(f"\n# {path}\n{text}")
    _show_difference(path, text, say)
    if request.dry_run:
        say("dry run: nothing was written or submitted")
        return plans
    if request.to == "slurm" and shutil.which("sbatch") is None:
        raise UserError("there is no sbatch here: submit on a login node of the cluster, or look with --dry-run")
    if request.to == "slurm":
        _refuse_second_job(folder)
    _write(folder, path, text, [specs[number] for number in to_train], request.fresh, say)
    if request.to == "slurm":
        _submit_slurm(path, folder, to_train[0] if len(specs) > 1 else None, say)
    else:
        cloud = specs[0].launch.cloud
        if not (cloud.storage or cloud.volume):
            say("note: checkpoints go with the machine; launch.cloud.storage or launch.cloud.volume keeps them")
        for line in cloud_commands(request.to, path, cloud):
            say(line)
    return plans


def _show_plan(
    plan: Plan,
    prices: Mapping[str, GpuPrice] | None,
    is_one_of_many: bool,
    request: Request,
    say: Callable[[str], None],
) -> bool:
    """Says what one run would do, and returns False where it is finished; raises where it can't be done."""
    spec = plan.spec
    is_finished = check_run_folder(spec, request.fresh, "layout") == "finished"
    if is_one_of_many:
        say(f"\n# {spec.name}{' is finished, and left out' if is_finished else ''}")
    if is_finished:
        return False
    say(plan_lines(plan))
    for line in [f"note: {note}" for note in plan_notes(plan)] + (cost_lines([plan], prices) if prices else []):
        say(line)
    if plan.misfit:
        raise PlanError(f"{spec.name}: {plan.misfit}")
    return True


def _write(folder: Path, path: Path, text: str, specs: Sequence[Spec], fresh: bool, say: Callable[[str], None]) -> None:
    """The run folders with their configs, and the job's file.

    The job trains from these copies, so that later edits of the user's config don't change a job that waits in the
    queue.
    """
    for spec in specs:
        with Hold(folder_of(spec), say) as hold:
            if enter_run_folder(spec, fresh, "layout", hold) == "new":
                start_run_folder(spec, fresh, step=0, evaluated=False, hold=hold)
            else:
                write_text(folder_of(spec) / "config.yaml", resolved_yaml(spec))
    (folder / LOGS).mkdir(parents=True, exist_ok=True)
    write_text(path, text)


def _specs(config: str, overrides: Sequence[str], request: Request) -> list[Spec]:
    """One spec, or those of a sweep, whose folders lie in the folder that the run itself would have had."""
    base = load_spec(config, overrides)
    for_planning(base, world_size=1)  # refuses what can't be planned before a sweep is unrolled
    trials = sweep_trials(request.sweep)
    specs = [
        load_spec(config, [*overrides, *trial.overrides]).model_copy(
            update={"name": trial.name, "output": str(Path(base.output) / base.name)}
        )
        for trial in trials
    ]
    return specs or [base]


def _plans(specs: Sequence[Spec], request: Request) -> list[Plan]:
    """Runs of a sweep mostly share their data, which is then read once."""
    topology = _topology(specs[0], request)
    # The model is run without data where that tells something: what a GPU must hold, or what the run costs.
    measure = request.price is not None or (request.to != "slurm" and request.gpus_per_node > 0) or None
    read: dict[str, Tables] = {}
    plans = []
    for spec in specs:
        key = f"{spec.data!r} {spec.train.seed} {spec.label_task}"
        if key not in read:
            read[key] = read_tables(spec.data, spec.train.seed, task=spec.label_task)
        plan = plan_run(for_planning(spec, topology.world_size), topology, read[key], measure=measure)
        plans.append(replace(plan, spec=spec))
    return plans


def _topology(spec: Spec, request: Request) -> Topology:
    if request.gpus_per_node == 0:
        return Topology(request.nodes, request.processes_per_node or 1, "cpu")
    memory = request.gpu_memory_bytes or (spec.launch.slurm.gpu_memory if request.to == "slurm" else None)
    return Topology(request.nodes, request.gpus_per_node, "cuda", memory, is_seen=False)


def _text(folder: Path, specs: Sequence[Spec], plans: Sequence[Plan], to_train: Sequence[int], request: Request) -> str:
    if request.to == "slurm":
        tasks = None if len(to_train) == len(specs) else tuple(to_train)
        return render_job(replace(slurm_job(folder, specs, plans, request, Path.cwd(), sys.executable), tasks=tasks))
    refuse_what_stays_here(request.to, specs[0], Path.cwd())
    kept = specs[0].launch.cloud.storage or specs[0].launch.cloud.volume
    if request.fresh and kept:
        raise UserError(f"--fresh does not reach the run that {kept} may hold, which would go on: use name=...")
    plan = plans[0]
    job = CloudJob(
        name=specs[0].name,
        cloud=specs[0].launch.cloud,
        num_nodes=request.nodes,
        gpus_per_node=request.gpus_per_node,
        processes_per_node=plan.topology.processes_per_node,
        needed_bytes=plan.memory[plan.strategy].needed,
        gpu_memory_bytes=request.gpu_memory_bytes,
        config=folder / "config.yaml",
        config_text=resolved_yaml(specs[0]),
    )
    return render_cloud(request.to, job)


def slurm_job(
    folder: Path, specs: Sequence[Spec], plans: Sequence[Plan], request: Request, working_folder: Path, python: str
) -> SlurmJob:
    """The job of one run, or of a sweep's runs, in `folder`."""
    launch, site = specs[0].launch, specs[0].launch.slurm
    largest = max(plan.costs.checkpoint_bytes for plan in plans)
    return SlurmJob(
        name=specs[0].name if len(specs) == 1 else folder.name,
        site=site,
        num_nodes=request.nodes,
        gpus_per_node=request.gpus_per_node,
        processes_per_node=plans[0].topology.processes_per_node,
        grace_s=grace_s(largest, site),
        python=site.python or ("python" if site.container else python),
        time=request.time,
        partition=request.partition,
        configs=tuple((working_folder / folder_of(spec) / "config.yaml") for spec in specs),
        folder=folder,
        working_folder=working_folder,
        # Where a container must be fetched first, nodes start minutes apart: only who asks for it has a shorter time.
        join_timeout_s=launch.join_timeout if "join_timeout" in launch.model_fields_set else None,
    )


def _show_difference(path: Path, text: str, say: Callable[[str], None]) -> None:
    if not path.exists():
        return
    before = path.read_text(encoding="utf-8").splitlines()
    changes = list(difflib.unified_diff(before, text.splitlines(), "last submission", "this one", lineterm="", n=0))
    say("\n".join(["# differs from the last submission:", *changes[2:]] if changes else ["# as submitted last"]))


def _refuse_second_job(folder: Path) -> None:
    """Two jobs would write one run folder. Asks squeue for the last one; where there is no answer there is none."""
    file = folder / SUBMISSIONS
    if not file.exists() or shutil.which("squeue") is None:
        return
    job = _last_job(file)
    if job is None:
        return
    command = ["squeue", "--noheader", f"--jobs={job}", "--format=%T"]
    try:
        # Of a job that has gone, squeue says nothing or that it knows no such job.
        asked = subprocess.run(command, capture_output=True, text=True, timeout=SQUEUE_TIMEOUT_S, check=False)
    except subprocess.TimeoutExpired:
        raise UserError(f"squeue gave no answer for {SQUEUE_TIMEOUT_S} s, and job {job} may still be there") from None
    states = sorted(set(asked.stdout.split())) if asked.returncode == 0 else []
    if states:
        raise UserError(
            f"job {job} of {folder} is still there ({', '.join(states)}), and a second one would write the same run: "
            f"wait for it, end it first (scancel {job}), or make another run with name=..."
        )


def _last_job(file: Path) -> str | None:
    """The last job that a file of submissions names."""
    rows = map(json_row, reversed(file.read_text(encoding="utf-8").splitlines()))
    return next((str(row["job"]) for row in rows if row and "job" in row), None)


def _submit_slurm(path: Path, folder: Path, first_task: int | None, say: Callable[[str], None]) -> None:
    """`first_task` is a job array's first number."""
    # Inside another job, SLURM's variables would become options of this one.
    env = {k: v for k, v in os.environ.items() if not k.startswith(("SLURM_", "SBATCH_")) or k == "SLURM_CONF"}
    try:
        done = subprocess.run(
            ["sbatch", "--parsable", str(path)],
            capture_output=True,
            text=True,
            timeout=SBATCH_TIMEOUT_S,
            check=False,
            env=env,
        )
    except subprocess.TimeoutExpired:
        raise UserError(
            f"sbatch gave no answer for {SBATCH_TIMEOUT_S} s; see with squeue whether the job is there"
        ) from None
    if done.returncode != 0:
        reason = (done.stderr or done.stdout).strip()
        raise UserError(f"sbatch refused {path}: {reason}\nCorrect the flags or launch.slurm of the config")
    job = done.stdout.strip().partition(";")[0]
    if not job.isdigit():
        said = (done.stdout + done.stderr).strip() or "nothing"
        raise UserError(f"sbatch named no job, but said {said!r}; see with squeue whether {path} was submitted")
    record: dict[str, Any] = {"time": time.strftime("%Y-%m-%dT%H:%M:%S%z"), "to": "slurm", "job": job}
    with (folder / SUBMISSIONS).open("a", encoding="utf-8") as file:
        file.write(json.dumps(record) + "\n")
    log = folder / LOGS / (f"slurm-{job}.out" if first_task is None else f"slurm-{job}_{first_task}.out")
    say(f"submitted job {job}")
    say(f"watch:   squeue -j {job}; tail -F {shlex.quote(str(log))}")
    say(f"save and stop:  scancel --signal=USR1 {job}      stop:  scancel {job}")
    say("resume:  the same `submit` command; it goes on from the newest checkpoint")
