"""Task files for rented machines: SkyPilot, dstack and Kubernetes, each as a pure function of the job.

All start the same worker: on each machine one torchrun, with the machine's rank from the tool's own variables.
Secrets are named, never written. Where a machine is taken away another one comes, and the run goes on from its
checkpoint.
"""

import shlex
from io import StringIO
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML

from dist_finetune.errors import UserError
from dist_finetune.launchers.cloud_job import (
    CONFIG_ON_MACHINE,
    RUNS,
    CloudJob,
    kept,
    memory_gb,
    resource_name,
    script,
    torchrun_lines,
    variables,
)
from dist_finetune.launchers.kubernetes import kubernetes_documents
from dist_finetune.spec_launch import CloudSpec

TOOLS = ("skypilot", "dstack", "kubernetes")
IDLE = {
    "spot": ("kubernetes", "its nodes are spot machines or not"),
    "autostop": ("kubernetes", "pods give their GPUs back when they end"),
    "disk_gb": ("kubernetes", "the size of a volume is its claim's"),
}


def render_cloud(tool: str, job: CloudJob) -> str:
    """The task file of `tool` (one of TOOLS). Raises UserError for what the tool can't do."""
    if job.cloud.storage and job.cloud.volume:
        raise UserError("launch.cloud has both storage and volume; keep the one that should hold the run folder")
    _refuse_idle_settings(tool, job.cloud)
    if tool == "skypilot":
        documents = [_skypilot(job)]
    elif tool == "dstack":
        documents = [_dstack(job)]
    else:
        documents = kubernetes_documents(job)
    out = StringIO()
    yaml = YAML()
    yaml.default_flow_style = False
    yaml.width = 1000
    yaml.explicit_start = len(documents) > 1
    yaml.representer.ignore_aliases = lambda data: True
    yaml.dump_all(documents, out)
    return f"# Written by `dist-finetune submit --to {tool}`.\n{out.getvalue()}"


def _refuse_idle_settings(tool: str, cloud: CloudSpec) -> None:
    """Settings that the user wrote and this tool has no place for. Those named after another tool are its own."""
    for name, (idle_with, why) in IDLE.items():
        if name in cloud.model_fields_set and idle_with == tool:
            raise UserError(f"launch.cloud.{name} has no effect on {tool}: {why}; leave it out")


def cloud_commands(tool: str, path: Path, cloud: CloudSpec) -> list[str]:
    """Lines that tell how to start, watch and stop the task of a written file. The tools log in by themselves."""
    file, job = shlex.quote(str(path)), resource_name(path.parent.name)
    if tool == "skypilot":
        secrets = "".join(f" --secret {name}" for name in cloud.secrets)
        if cloud.spot:
            start, then = f"sky jobs launch {file}", f"sky jobs logs -n {job}      stop:  sky jobs cancel -n {job}"
        else:
            start, then = f"sky launch -c {job} {file}", f"sky logs {job}      stop:  sky down {job}"
        return [f"start:   {start}{secrets}", f"watch:   {then}"]
    if tool == "dstack":
        return [f"start:   dstack apply -f {file}", f"watch:   dstack logs {job}      stop:  dstack stop {job}"]
    lines = [f"start:   kubectl apply -f {file}", f"watch:   kubectl logs -f -l dist-finetune/run={job} --prefix"]
    if cloud.secrets:
        literals = " ".join(f'--from-literal={name}="${name}"' for name in cloud.secrets)
        lines.insert(0, f"once:    kubectl create secret generic {cloud.kubernetes_secret} {literals}")
    return [*lines, f"stop:    kubectl delete -f {file}"]


def _skypilot(job: CloudJob) -> dict[str, Any]:
    cloud = job.cloud
    resources: dict[str, Any] = {"use_spot": cloud.spot, "disk_size": cloud.disk_gb}
    if job.gpus_per_node:
        resources["accelerators"] = f"{cloud.gpu or f'{memory_gb(job)}GB+'}:{job.gpus_per_node}"
    resources["autostop"] = {"idle_minutes": cloud.autostop, "down": True}
    if cloud.spot:
        resources["job_recovery"] = {"strategy": "EAGER_NEXT_REGION"}
    if "image" in cloud.model_fields_set:  # else the tool's own machine image, which has drivers and starts sooner
        resources["image_id"] = f"docker:{cloud.image}"
    task: dict[str, Any] = {
        "name": resource_name(job.name),
        "num_nodes": job.num_nodes,
        "workdir": ".",
        "resources": resources,
        "envs": variables(job),
    }
    if cloud.secrets:
        task["secrets"] = dict.fromkeys(cloud.secrets)  # null: taken from the shell with --secret
    task["file_mounts"] = {"~/dist-finetune/config.yaml": str(job.config)}
    if cloud.volume:
        task["volumes"] = {RUNS: cloud.volume}
    limit = f"timeout --signal=TERM {round(cloud.max_hours * 3600)} " if cloud.max_hours else ""
    start = torchrun_lines(job, '"$SKYPILOT_NODE_RANK"', '"$(echo "$SKYPILOT_NODE_IPS" | head -n 1)"')
    start = [line.replace(CONFIG_ON_MACHINE, "~/dist-finetune/config.yaml") for line in start]
    start = kept(job, "SkyPilot", [limit + start[0], *start[1:]])
    runs = [] if cloud.volume else [f"sudo mkdir -p {RUNS} && sudo chown $(id -u) {RUNS}"]
    task["setup"] = script([*runs, cloud.install])
    task["run"] = script(start)
    return task


def _dstack(job: CloudJob) -> dict[str, Any]:
    cloud = job.cloud
    start = torchrun_lines(job, '"${DSTACK_NODE_RANK:-0}"', '"${DSTACK_MASTER_NODE_IP:-127.0.0.1}"')
    resources: dict[str, Any] = {"disk": f"{cloud.disk_gb}GB.."}
    if job.gpus_per_node:
        kind = {"name": cloud.gpu} if cloud.gpu else {"memory": f"{memory_gb(job)}GB.."}
        resources["gpu"] = {**kind, "count": job.gpus_per_node}
    task: dict[str, Any] = {
        "type": "task",
        "name": resource_name(job.name),
        "nodes": job.num_nodes,
        "image": cloud.image,
        # A bare name is taken from the shell that runs `dstack apply`.
        "env": [*(f"{name}={value}" for name, value in variables(job).items()), *cloud.secrets],
        # Not LOCAL:PATH, which a colon in a run's name would cut elsewhere.
        "files": [
            {"local_path": ".", "path": "/work"},
            {"local_path": str(job.config), "path": CONFIG_ON_MACHINE},
        ],
        "working_dir": "/work",
        "commands": [cloud.install, script(kept(job, "dstack", start))],
        "resources": resources,
        "spot_policy": "spot" if cloud.spot else "on-demand",
        "retry": {"on_events": ["no-capacity", "interruption"], "duration": "1d"},
        "idle_duration": f"{cloud.autostop}m",
    }
    if cloud.max_hours:
        task["max_duration"] = f"{round(cloud.max_hours * 60)}m"
    if cloud.volume:
        task["volumes"] = [f"{cloud.volume}:{RUNS}"]
    return task
