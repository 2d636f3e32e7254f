"""Kubernetes: an Indexed Job with a headless Service, or Kubeflow's TrainJob or PyTorchJob; each with a ConfigMap."""

import re
from pathlib import Path
from typing import Any

from dist_finetune.errors import UserError
from dist_finetune.launchers.cloud_job import (
    CONFIG_ON_MACHINE,
    PORT,
    RUNS,
    CloudJob,
    kept,
    memory_gb,
    resource_name,
    script,
    torchrun_lines,
    variables,
    worker_words,
)
from dist_finetune.spec_launch import CloudSpec

# Pods that lose their machine are replaced without being counted. These are for the other pods of a job, which fail
# with them; and a run that fails by itself must not hold GPUs for long.
MAX_RESTARTS = 20
MIB_OF_A_GB = 1000  # labels count MiB, and a GPU sold as 80 GB shows a little less than 80 GiB


def kubernetes_documents(job: CloudJob) -> list[dict[str, Any]]:
    """A ConfigMap with the config, and what runs it."""
    name = resource_name(job.name)
    config = {
        "apiVersion": "v1",
        "kind": "ConfigMap",
        "metadata": _metadata(job, f"{name}-config"),
        "data": {"config.yaml": script(job.config_text.rstrip("\n").split("\n"))},
    }
    if job.num_nodes > 1 and not job.cloud.volume:
        raise UserError(
            f"{job.num_nodes} pods write one run folder together: name a claim that all of them can mount "
            "(ReadWriteMany) in launch.cloud.volume, or use --nodes 1"
        )
    if not {"image", "install"} & job.cloud.model_fields_set:
        raise UserError(
            f"pods of {job.cloud.image} have no dist-finetune: name an image that has it in launch.cloud.image, or a "
            'command that installs it in launch.cloud.install, such as "pip install dist-finetune"'
        )
    if job.cloud.kubernetes_kind == "job":
        return [config, _headless_service(job, name), _indexed_job(job, name)]
    # Kubeflow's controllers set torchrun's own PET_ variables on each pod.
    start = [f"python -m torch.distributed.run {worker_words(job)}"]
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
        "podFailurePolicy": {"rules": [{"action": "Ignore", "onPodConditions": [{"type": "DisruptionTarget"}]}]},
        "template": {
            "metadata": {"labels": {"dist-finetune/run": name}},
            "spec": {
                "subdomain": name,
                "restartPolicy": "Never",  # as podFailurePolicy demands: the Job makes new pods
                "terminationGracePeriodSeconds": 120,
                **_pod(job, name, torchrun_lines(job, '"$JOB_COMPLETION_INDEX"', f"{name}-0.{name}")),
            },
        },
    }
    spec |= _deadline(job)
    return {"apiVersion": "batch/v1", "kind": "Job", "metadata": _metadata(job, name), "spec": spec}


def _pod(job: CloudJob, name: str, start: list[str], container: str = "train") -> dict[str, Any]:
    mounts = [{"name": "config", "mountPath": str(Path(CONFIG_ON_MACHINE).parent)}, {"name": "runs", "mountPath": RUNS}]
    mounts.append({"name": "shm", "mountPath": "/dev/shm"})
    lines = [*_pod_install(job.cloud), *kept(job, "Kubernetes", start)]
    runs = {"persistentVolumeClaim": {"claimName": job.cloud.volume}} if job.cloud.volume else {"emptyDir": {}}
    return {
        **_placement(job),
        "containers": [
            {
                "name": container,
                "image": job.cloud.image,
                "command": ["bash", "-euc", script(list(map(_literal, lines)))],
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


def _literal(text: str) -> str:
    """Text that Kubernetes leaves as it is, in commands and in values: it takes $(NAME) for a variable and $$ for $."""
    return re.sub(r"\$(?=[$(])", "$$", text)


def _pod_install(cloud: CloudSpec) -> list[str]:
    """Pods have no copy of the working folder to install from, so their image has the package unless told otherwise."""
    return [cloud.install] if "install" in cloud.model_fields_set else []


def _kubernetes_env(job: CloudJob) -> list[dict[str, Any]]:
    secret = job.cloud.kubernetes_secret
    return [
        *({"name": name, "value": _literal(value)} for name, value in variables(job).items()),
        *({"name": name, "valueFrom": {"secretKeyRef": {"name": secret, "key": name}}} for name in job.cloud.secrets),
    ]


def _kubernetes_resources(job: CloudJob) -> dict[str, Any]:
    return {"limits": {"nvidia.com/gpu": str(job.gpus_per_node)}} if job.gpus_per_node else {}


def _deadline(job: CloudJob) -> dict[str, int]:
    return {"activeDeadlineSeconds": round(job.cloud.max_hours * 3600)} if job.cloud.max_hours else {}


def _placement(job: CloudJob) -> dict[str, Any]:
    """Which nodes: those with the GPU that the user names, else better those whose GPUs have the memory that the plan
    needs. NVIDIA's feature discovery labels them, which not every cluster runs."""
    if not job.gpus_per_node:
        return {}
    if job.cloud.gpu:
        return {"nodeSelector": {"nvidia.com/gpu.product": job.cloud.gpu}}
    enough = {"key": "nvidia.com/gpu.memory", "operator": "Gt", "values": [str(memory_gb(job) * MIB_OF_A_GB)]}
    preferred = [{"weight": 100, "preference": {"matchExpressions": [enough]}}]
    return {"affinity": {"nodeAffinity": {"preferredDuringSchedulingIgnoredDuringExecution": preferred}}}


def _pytorch_job(job: CloudJob, name: str, start: list[str]) -> dict[str, Any]:
    template = {"spec": _pod(job, name, start, container="pytorch")}
    template["metadata"] = {"labels": {"dist-finetune/run": name}}
    replica = {"restartPolicy": "OnFailure", "template": template}
    replicas = {"Master": {"replicas": 1, **replica}}
    if job.num_nodes > 1:
        replicas["Worker"] = {"replicas": job.num_nodes - 1, **replica}
    policy = {"backoffLimit": MAX_RESTARTS, **_deadline(job)}
    return {
        "apiVersion": "kubeflow.org/v1",
        "kind": "PyTorchJob",
        "metadata": _metadata(job, name),
        "spec": {
            "nprocPerNode": str(job.processes_per_node),
            "runPolicy": policy,
            "pytorchReplicaSpecs": replicas,
        },
    }


def _train_job(job: CloudJob, name: str, start: list[str]) -> dict[str, Any]:
    pod = _pod(job, name, start, container="node")
    container = pod["containers"][0]
    patch = {
        **_placement(job),
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
            **_deadline(job),
            "runtimePatches": [{"manager": "dist-finetune/submit", "trainingRuntimeSpec": _patched("node", patch)}],
        },
    }


def _patched(replicated_job: str, pod: dict[str, Any]) -> dict[str, Any]:
    """A change of the pods of one job of a training runtime, in all that Kubeflow (from Trainer 2.3) wraps it in."""
    job = {"name": replicated_job, "template": {"spec": {"template": {"spec": pod}}}}
    return {"template": {"spec": {"replicatedJobs": [job]}}}
