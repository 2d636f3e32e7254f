"""Task files for rented machines: SkyPilot, dstack and Kubernetes, each as a pure function of the job.

All start the same worker: on each machine one torchrun, with the machine's rank from the tool's own variables.
Secrets are named, never written. Where a machine is taken away another one comes, and the run goes on from its
checkpoint.
"""

import math
import re
import shlex
from dataclasses import dataclass
from io import StringIO
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.scalarstring import LiteralScalarString

from dist_finetune.errors import UserError
from dist_finetune.spec_launch import CloudSpec

TOOLS = ("skypilot", "dstack", "kubernetes")
RUNS = "/runs"  # where the machines keep run folders
CONFIG_ON_MACHINE = "/etc/dist-finetune/config.yaml"
PORT = 29511  # these machines run nothing else
USABLE_SHARE = 0.8  # of a GPU's memory; the driver and the allocator take the rest
MAX_RESTARTS = 100


@dataclass(frozen=True)
class CloudJob:
    """All that a task file depends on. `config` is the resolved config's path here, `config_text` its content."""

    name: str
    cloud: CloudSpec
    num_nodes: int
    gpus_per_node: int
    processes_per_node: int
    needed_bytes: int
    """What a rank needs at its peak, by the plan."""
    gpu_memory_bytes: int | None
    """Memory that the user asked a GPU to have; None: what the plan needs, and a share to spare."""
    config: Path
    config_text: str


def render_cloud(tool: str, job: CloudJob) -> str:
    """The task file of `tool` (one of TOOLS). Raises UserError for what the tool can't do."""
    if job.cloud.storage and job.cloud.volume:
        raise UserError("launch.cloud has both storage and volume; keep the one that should hold the run folder")
    if tool == "skypilot":
        documents = [_skypilot(job)]
    elif tool == "dstack":
        documents = [_dstack(job)]
    else:
        documents = _kubernetes(job)
    out = StringIO()
    yaml = YAML()
    yaml.default_flow_style = False
    yaml.width = 1000
    yaml.explicit_start = len(documents) > 1
    yaml.representer.ignore_aliases = lambda data: True
    yaml.dump_all(documents, out)
    return f"# Written by `dist-finetune submit --to {tool}`.\n{out.getvalue()}"


def cloud_commands(tool: str, path: Path, cloud: CloudSpec) -> list[str]:
    """Lines that tell how to start, watch and stop the task of a written file. The tools log in by themselves."""
    file, job = shlex.quote(str(path)), resource_name(path.parent.name)
    if tool == "skypilot":
        secrets = "".join(f" --secret {name}" for name in cloud.secrets)
        kind = "jobs " if cloud.spot else ""
        return [f"start:   sky {kind}launch {file}{secrets}", f"watch:   sky {kind}logs      stop:  sky {kind}cancel"]
    if tool == "dstack":
        return [f"start:   dstack apply -f {file}", f"watch:   dstack logs {job}      stop:  dstack stop {job}"]
    lines = [f"start:   kubectl apply -f {file}", f"watch:   kubectl logs -f -l dist-finetune/run={job} --prefix"]
    if cloud.secrets:
        literals = " ".join(f'--from-literal={name}="${name}"' for name in cloud.secrets)
        lines.insert(0, f"once:    kubectl create secret generic {cloud.kubernetes_secret} {literals}")
    return [*lines, f"stop:    kubectl delete -f {file}"]


def resource_name(name: str) -> str:
    """A run's name as clouds allow one: lower-case ASCII letters, digits and hyphens, at most 40, a letter first."""
    cleaned = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")[:40].rstrip("-")
    return cleaned if cleaned[:1].isalpha() else f"run-{cleaned}".rstrip("-")


def _memory_gb(job: CloudJob) -> int:
    wanted = job.gpu_memory_bytes or job.needed_bytes / USABLE_SHARE
    return max(8, math.ceil(wanted / 2**30))


def _torchrun(job: CloudJob, node_rank: str, master: str) -> list[str]:
    return [
        f"python -m torch.distributed.run --nnodes={job.num_nodes} --nproc-per-node={job.processes_per_node} \\",
        f"  --node-rank={node_rank} --master-addr={master} --master-port={PORT} \\",
        f"  {_worker(job)}",
    ]


def _worker(job: CloudJob) -> str:
    return f"-m dist_finetune train {CONFIG_ON_MACHINE} output={RUNS}"


def _kept(job: CloudJob, tool: str, start: list[str]) -> list[str]:
    """The command, with its run folder kept in launch.cloud.storage where nothing mounts that for us."""
    if not job.cloud.storage:
        return start
    if job.num_nodes > 1:
        raise UserError(
            f"launch.cloud.storage is copied by one machine, but {job.num_nodes} machines share a run folder: "
            f"with {tool} give launch.cloud.volume, a volume that all of them mount, or use --nodes 1"
        )
    folder = shlex.quote(f"{RUNS}/{job.name}")
    url = shlex.quote(f"{job.cloud.storage.rstrip('/')}/{job.name}")
    return [f"python -m dist_finetune.storage {url} {folder} -- \\", *(f"  {line}" for line in start)]


def _script(lines: list[str]) -> str:
    return LiteralScalarString("\n".join(lines) + "\n")


def _variables(job: CloudJob) -> dict[str, str]:
    return {"PYTHONUNBUFFERED": "1", "PET_SIGNALS_TO_HANDLE": "SIGTERM,SIGINT,SIGUSR1", **job.cloud.env}


def _skypilot(job: CloudJob) -> dict[str, Any]:
    cloud = job.cloud
    if cloud.volume:
        raise UserError("launch.cloud.volume has no meaning for SkyPilot; give launch.cloud.storage, a bucket's URL")
    resources: dict[str, Any] = {"use_spot": cloud.spot, "disk_size": cloud.disk_gb}
    if job.gpus_per_node:
        resources["accelerators"] = f"{cloud.gpu or f'{_memory_gb(job)}GB+'}:{job.gpus_per_node}"
    resources["autostop"] = {"idle_minutes": cloud.autostop, "down": True}
    if cloud.spot:
        resources["job_recovery"] = {"strategy": "EAGER_NEXT_REGION"}
    task: dict[str, Any] = {
        "name": resource_name(job.name),
        "num_nodes": job.num_nodes,
        "workdir": ".",
        "resources": resources,
        "envs": _variables(job),
    }
    if cloud.secrets:
        task["secrets"] = dict.fromkeys(cloud.secrets)  # null: taken from the shell with --secret
    task["file_mounts"] = {"~/dist-finetune/config.yaml": str(job.config)}
    if cloud.storage:
        task["file_mounts"][RUNS] = {"source": cloud.storage, "mode": "MOUNT"}
    limit = f"timeout --signal=TERM {round(cloud.max_hours * 3600)} " if cloud.max_hours else ""
    start = _torchrun(job, '"$SKYPILOT_NODE_RANK"', '"$(echo "$SKYPILOT_NODE_IPS" | head -n 1)"')
    start = [line.replace(CONFIG_ON_MACHINE, "~/dist-finetune/config.yaml") for line in start]
    runs = [] if cloud.storage else [f"sudo mkdir -p {RUNS} && sudo chown $(id -u) {RUNS}"]
    task["setup"] = _script([*runs, cloud.install])
    task["run"] = _script([limit + start[0], *start[1:]])
    return task


def _dstack(job: CloudJob) -> dict[str, Any]:
    cloud = job.cloud
    start = _torchrun(job, '"${DSTACK_NODE_RANK:-0}"', '"${DSTACK_MASTER_NODE_IP:-127.0.0.1}"')
    resources: dict[str, Any] = {"disk": f"{cloud.disk_gb}GB.."}
    if job.gpus_per_node:
        kind = {"name": cloud.gpu} if cloud.gpu else {"memory": f"{_memory_gb(job)}GB.."}
        resources["gpu"] = {**kind, "count": job.gpus_per_node}
    task: dict[str, Any] = {
        "type": "task",
        "name": resource_name(job.name),
        "nodes": job.num_nodes,
        "image": cloud.image,
        # A bare name is taken from the shell that runs `dstack apply`.
        "env": [*(f"{name}={value}" for name, value in _variables(job).items()), *cloud.secrets],
        "files": [".:/work", f"{job.config}:{CONFIG_ON_MACHINE}"],
        "working_dir": "/work",
        "commands": [cloud.install, _script(_kept(job, "dstack", start))],
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


def _kubernetes(job: CloudJob) -> list[dict[str, Any]]:
    """A ConfigMap with the config, and what runs it."""
    name = resource_name(job.name)
    config = {
        "apiVersion": "v1",
        "kind": "ConfigMap",
        "metadata": _metadata(job, f"{name}-config"),
        "data": {"config.yaml": _script(job.config_text.rstrip("\n").split("\n"))},
    }
    if job.num_nodes > 1 and not job.cloud.volume:
        raise UserError(
            f"{job.num_nodes} pods write one run folder together: name a claim that all of them can mount "
            "(ReadWriteMany) in launch.cloud.volume, or use --nodes 1"
        )
    if job.cloud.kubernetes_kind == "job":
        return [config, _headless_service(job, name), _indexed_job(job, name)]
    # Kubeflow's controllers set torchrun's own PET_ variables on each pod.
    start = [f"python -m torch.distributed.run {_worker(job)}"]
    if job.cloud.kubernetes_kind == "pytorchjob":
        return [config, _pytorch_job(job, name, start)]
    return [config, _train_job(job, name, start)]


def _metadata(job: CloudJob, name: str) -> dict[str, Any]:
    return {"name": name, "labels": {"dist-finetune/run": resource_name(job.name)}}


def _headless_service(job: CloudJob, name: str) -> dict[str, Any]:
    """Gives the first pod a name that the others find before it is ready."""
    return {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": _metadata(job, name),
        "spec": {
            "clusterIP": "None",
            "publishNotReadyAddresses": True,
            "selector": {"dist-finetune/run": name},
            "ports": [{"name": "rendezvous", "port": PORT}],
        },
    }


def _indexed_job(job: CloudJob, name: str) -> dict[str, Any]:
    spec: dict[str, Any] = {
        "completionMode": "Indexed",
        "completions": job.num_nodes,
        "parallelism": job.num_nodes,
        "backoffLimit": MAX_RESTARTS,
        "template": {
            "metadata": {"labels": {"dist-finetune/run": name}},
            "spec": {
                "subdomain": name,
                "restartPolicy": "OnFailure",
                "terminationGracePeriodSeconds": 120,
                **_pod(job, name, _torchrun(job, '"$JOB_COMPLETION_INDEX"', f"{name}-0.{name}")),
            },
        },
    }
    if job.cloud.max_hours:
        spec["activeDeadlineSeconds"] = round(job.cloud.max_hours * 3600)
    return {"apiVersion": "batch/v1", "kind": "Job", "metadata": _metadata(job, name), "spec": spec}


def _pod(job: CloudJob, name: str, start: list[str], container: str = "train") -> dict[str, Any]:
    mounts = [{"name": "config", "mountPath": str(Path(CONFIG_ON_MACHINE).parent)}, {"name": "runs", "mountPath": RUNS}]
    mounts.append({"name": "shm", "mountPath": "/dev/shm"})
    runs = {"persistentVolumeClaim": {"claimName": job.cloud.volume}} if job.cloud.volume else {"emptyDir": {}}
    return {
        "containers": [
            {
                "name": container,
                "image": job.cloud.image,
                "command": ["bash", "-euc", _script([*_pod_install(job.cloud), *_kept(job, "Kubernetes", start)])],
                "env": _kubernetes_env(job),
                "resources": _kubernetes_resources(job),
                "volumeMounts": mounts,
            }
        ],
        "volumes": [
            {"name": "config", "configMap": {"name": f"{name}-config"}},
            {"name": "runs", **runs},
            # Loader processes hand batches over through shared memory, of which containers have 64 MiB.
            {"name": "shm", "emptyDir": {"medium": "Memory"}},
        ],
    }


def _pod_install(cloud: CloudSpec) -> list[str]:
    """Pods have no copy of the working folder to install from, so their image has the package unless told otherwise."""
    return [cloud.install] if "install" in cloud.model_fields_set else []


def _kubernetes_env(job: CloudJob) -> list[dict[str, Any]]:
    secret = job.cloud.kubernetes_secret
    return [
        *({"name": name, "value": value} for name, value in _variables(job).items()),
        *({"name": name, "valueFrom": {"secretKeyRef": {"name": secret, "key": name}}} for name in job.cloud.secrets),
    ]


def _kubernetes_resources(job: CloudJob) -> dict[str, Any]:
    return {"limits": {"nvidia.com/gpu": str(job.gpus_per_node)}} if job.gpus_per_node else {}


def _pytorch_job(job: CloudJob, name: str, start: list[str]) -> dict[str, Any]:
    template = {"spec": _pod(job, name, start, container="pytorch")}
    template["metadata"] = {"labels": {"dist-finetune/run": name}}
    replica = {"restartPolicy": "OnFailure", "template": template}
    replicas = {"Master": {"replicas": 1, **replica}}
    if job.num_nodes > 1:
        replicas["Worker"] = {"replicas": job.num_nodes - 1, **replica}
    return {
        "apiVersion": "kubeflow.org/v1",
        "kind": "PyTorchJob",
        "metadata": _metadata(job, name),
        "spec": {
            "nprocPerNode": str(job.processes_per_node),
            "runPolicy": {"backoffLimit": MAX_RESTARTS},
            "pytorchReplicaSpecs": replicas,
        },
    }


def _train_job(job: CloudJob, name: str, start: list[str]) -> dict[str, Any]:
    pod = _pod(job, name, start, container="node")
    container = pod["containers"][0]
    patch = {
        "volumes": pod["volumes"],
        "containers": [{"name": "node", "volumeMounts": container["volumeMounts"]}],
    }
    return {
        "apiVersion": "trainer.kubeflow.org/v1alpha1",
        "kind": "TrainJob",
        "metadata": _metadata(job, name),
        "spec": {
            "runtimeRef": {"name": "torch-distributed"},
            "trainer": {
                "image": container["image"],
                "command": container["command"],
                "env": container["env"],
                "numNodes": job.num_nodes,
                "numProcPerNode": job.processes_per_node,
                "resourcesPerNode": container["resources"],
            },
            "runtimePatches": [{"manager": "dist-finetune/submit", "trainingRuntimeSpec": _patched("node", patch)}],
        },
    }


def _patched(replicated_job: str, pod: dict[str, Any]) -> dict[str, Any]:
    """A change of the pods of one job of a training runtime, in all that Kubeflow (from Trainer 2.3) wraps it in."""
    job = {"name": replicated_job, "template": {"spec": {"template": {"spec": pod}}}}
    return {"template": {"spec": {"replicatedJobs": [job]}}}
