"""Task files for rented machines: the same bytes for the same job, and what each tool's own loader says of them."""

import json
import os
import shlex
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from ruamel.yaml import YAML

from dist_finetune.errors import UserError
from dist_finetune.launchers.cloud import TOOLS, CloudJob, cloud_commands, render_cloud, resource_name
from dist_finetune.spec_file import load_spec
from dist_finetune.spec_launch import CloudSpec
from dist_finetune.storage import keep, main, pull, push

REPOSITORY = Path(__file__).parents[2]
GOLDEN = REPOSITORY / "tests" / "golden"
CLOUD = CloudSpec(gpu="A100-80GB", secrets=("WANDB_API_KEY", "HF_TOKEN"), max_hours=12)
JOB = CloudJob(
    name="Bert topics",
    cloud=CLOUD.model_copy(update={"volume": "runs"}),
    num_nodes=2,
    gpus_per_node=8,
    processes_per_node=8,
    needed_bytes=9 * 2**30,
    gpu_memory_bytes=None,
    config=Path("/data/runs/Bert topics/config.yaml"),
    config_text="model: {name: bert-base-uncased}\nname: Bert topics\n",
)
ONE = replace(
    JOB, num_nodes=1, cloud=CLOUD.model_copy(update={"gpu": None, "storage": "s3://bucket/it's", "spot": False})
)
KUBEFLOW = {
    kind: replace(JOB, cloud=JOB.cloud.model_copy(update={"kubernetes_kind": kind}))
    for kind in ("trainjob", "pytorchjob")
}
FILES = {
    "skypilot": (replace(JOB, cloud=CLOUD.model_copy(update={"storage": "s3://bucket/runs"})), "skypilot"),
    "dstack": (JOB, "dstack"),
    "dstack_storage": (ONE, "dstack"),
    "kubernetes": (JOB, "kubernetes"),
    "kubernetes_storage": (ONE, "kubernetes"),
    "kubernetes_trainjob": (KUBEFLOW["trainjob"], "kubernetes"),
    "kubernetes_pytorchjob": (KUBEFLOW["pytorchjob"], "kubernetes"),
}


def rendered(name: str) -> str:
    job, tool = FILES[name]
    return render_cloud(tool, job)


def documents(text: str) -> list[dict[str, Any]]:
    return list(YAML(typ="safe").load_all(text))


@pytest.mark.parametrize("name", FILES)
def test_task_file_is_the_golden_one_byte_for_byte(name: str) -> None:
    path = GOLDEN / f"cloud_{name}.yaml"
    text = rendered(name)
    if os.environ.get("UPDATE_GOLDEN"):
        path.write_text(text, encoding="utf-8")
    assert text == path.read_text(encoding="utf-8")


def test_every_golden_file_is_compared() -> None:
    assert sorted(p.name for p in GOLDEN.glob("cloud_*")) == sorted(f"cloud_{name}.yaml" for name in FILES)


@pytest.mark.parametrize(
    ("file", "name"),
    [
        ("skypilot.yaml", "skypilot"),
        ("dstack.yaml", "dstack"),
        ("k8s_job.yaml", "kubernetes"),
        ("k8s_trainjob.yaml", "kubernetes_trainjob"),
        ("k8s_pytorchjob.yaml", "kubernetes_pytorchjob"),
    ],
)
def test_files_for_starting_by_hand_are_what_submit_writes(file: str, name: str) -> None:
    job, tool = FILES[name]
    cloud = job.cloud.model_copy(update={"secrets": ("WANDB_API_KEY",), "gpu": "A100-80GB", "max_hours": None})
    config = REPOSITORY / "configs" / "bert_large_sst2.yaml"
    by_hand = replace(
        job, name=config.stem, cloud=cloud, config=Path("configs") / config.name, config_text=config.read_text("utf-8")
    )
    text = render_cloud(tool, by_hand)
    path = REPOSITORY / "launch" / file
    if os.environ.get("UPDATE_GOLDEN"):
        path.write_text(text, encoding="utf-8")
    assert text == path.read_text(encoding="utf-8")


@pytest.mark.parametrize("name", FILES)
def test_secrets_are_named_and_never_written(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "0123456789abcdef")
    text = rendered(name)
    assert "WANDB_API_KEY" in text
    assert "0123456789abcdef" not in text


def test_scripts_in_the_files_are_valid_shell() -> None:
    scripts = []
    for name in FILES:
        for document in documents(rendered(name)):
            scripts += list(_scripts(document))
    assert len(scripts) >= 10
    for script in scripts:
        done = subprocess.run(["bash", "-n"], input=script, text=True, capture_output=True, timeout=20)
        assert done.returncode == 0, f"{script}\n{done.stderr}"


def _scripts(node: Any) -> Any:
    if isinstance(node, dict):
        for key, value in node.items():
            if key in ("run", "setup"):
                yield value
            elif key == "commands":
                yield from value
            elif key == "command":
                yield value[-1]
            else:
                yield from _scripts(value)
    elif isinstance(node, list):
        for item in node:
            yield from _scripts(item)


def test_every_machine_starts_one_torchrun_of_the_same_worker() -> None:
    for name in FILES:
        starts = [s for d in documents(rendered(name)) for s in _scripts(d) if "torch.distributed.run" in s]
        assert len(starts) == (2 if name.endswith("pytorchjob") else 1), name
        for start in starts:
            words = shlex.split(start.replace("\\\n", " "), comments=True)
            worker = words[words.index("-m", words.index("torch.distributed.run")) :]
            assert worker[:3] == ["-m", "dist_finetune", "train"]
            if not name.endswith(("trainjob", "pytorchjob")):
                assert f"--nnodes={FILES[name][0].num_nodes}" in words
                assert "--nproc-per-node=8" in words


def test_memory_comes_from_the_plan_where_no_gpu_is_named() -> None:
    assert documents(rendered("dstack_storage"))[0]["resources"]["gpu"] == {"memory": "12GB..", "count": 8}
    asked = render_cloud("skypilot", replace(ONE, gpu_memory_bytes=40 * 2**30))
    assert documents(asked)[0]["resources"]["accelerators"] == "40GB+:8"
    cpu = replace(ONE, gpus_per_node=0, processes_per_node=2)
    assert all("gpu" not in render_cloud(tool, cpu) for tool in ("dstack", "kubernetes"))


@pytest.mark.parametrize(
    ("tool", "job", "words"),
    [
        ("skypilot", JOB, "launch.cloud.volume has no meaning for SkyPilot"),
        ("dstack", replace(ONE, num_nodes=2), "give launch.cloud.volume"),
        ("kubernetes", replace(JOB, cloud=CLOUD), "ReadWriteMany"),
        ("dstack", replace(JOB, cloud=CLOUD.model_copy(update={"storage": "s3://b", "volume": "v"})), "keep the one"),
    ],
)
def test_what_a_tool_can_not_do_is_refused(tool: str, job: CloudJob, words: str) -> None:
    with pytest.raises(UserError, match=words):
        render_cloud(tool, job)


@pytest.mark.parametrize(
    ("cloud", "words"),
    [
        ({"secrets": ["WANDB_API_KEY=abc"]}, "takes names of variables"),
        ({"env": {"AWS_SECRET_ACCESS_KEY": "x"}}, "looks like a secret"),
        ({"gpu": "A100; rm"}, "launch.cloud.gpu"),
        ({"kubernetes_secret": "Not Allowed"}, "launch.cloud.kubernetes_secret"),
        ({"storge": "s3://x"}, "Did you mean storage"),
    ],
)
def test_wrong_settings_are_refused_where_the_config_is_read(cloud: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words) as refused:
        load_spec({"name": "x", "model": {"name": "m"}, "data": {"train": "d"}, "launch": {"cloud": cloud}})
    assert "=abc" not in str(refused.value).replace("'WANDB_API_KEY=abc'", "")


@pytest.mark.parametrize(
    ("name", "resource"),
    [("Bert topics", "bert-topics"), ("3rd", "run-3rd"), ("ü", "run"), ("a" * 60, "a" * 40), ("$(x)", "x")],
)
def test_names_as_clouds_allow_them(name: str, resource: str) -> None:
    assert resource_name(name) == resource


@pytest.mark.parametrize("tool", TOOLS)
def test_commands_to_start_watch_and_stop(tool: str) -> None:
    said = "\n".join(cloud_commands(tool, Path("/a b/run/file.yaml"), CLOUD))
    assert "'/a b/run/file.yaml'" in said
    assert all(word in said for word in ("start:", "watch:", "stop:"))


# --- storage ---------------------------------------------------------------------------------------------------------


def checkpoint(run: Path, step: int, complete: bool = True) -> None:
    folder = run / "checkpoints" / f"step-{step:06}"
    folder.mkdir(parents=True)
    (folder / "rank-00000.safetensors").write_bytes(b"x" * step)
    if complete:
        (folder / "COMPLETE").write_text("{}")


def names(folder: Path) -> list[str]:
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file())


def test_a_run_folder_survives_its_machine(tmp_path: Path) -> None:
    first, second, url = tmp_path / "first", tmp_path / "second", f"file://{tmp_path}/bucket/run"
    checkpoint(first, 1)
    checkpoint(first, 2, complete=False)
    (first / "config.yaml").write_text("a: 1")
    sent: dict[str, tuple[int, int]] = {}
    assert push(url, first, sent) == 3
    assert names(tmp_path / "bucket" / "run") == [
        "checkpoints/step-000001/COMPLETE",
        "checkpoints/step-000001/rank-00000.safetensors",
        "config.yaml",
    ], "half a checkpoint stays here"
    assert push(url, first, sent) == 0
    assert pull(url, second) == 3
    assert pull(url, second) == 0
    assert (second / "checkpoints/step-000001/rank-00000.safetensors").read_bytes() == b"x"


def test_checkpoints_that_were_rotated_away_leave_the_storage(tmp_path: Path) -> None:
    run, url = tmp_path / "run", f"file://{tmp_path}/bucket"
    checkpoint(run, 1)
    push(url, run, {})
    for file in names(run):
        (run / file).unlink()
    (run / "checkpoints" / "step-000001").rmdir()
    checkpoint(run, 2)
    push(url, run, {})
    assert {n.split("/")[1] for n in names(tmp_path / "bucket")} == {"step-000002"}


def test_a_command_runs_between_pull_and_push(tmp_path: Path) -> None:
    run, url = tmp_path / "run", f"file://{tmp_path}/bucket"
    (tmp_path / "bucket").mkdir()
    (tmp_path / "bucket" / "before").write_text("b")
    script = "import os, sys; assert os.path.exists('before'); open('after', 'w').write('a'); sys.exit(75)"
    run.mkdir()
    assert keep(url, run, [sys.executable, "-c", f"import os; os.chdir({str(run)!r}); {script}"]) == 75
    assert (tmp_path / "bucket" / "after").read_text() == "a"
    assert main(["nothing"]) == 2


def test_signals_reach_the_command_and_files_go_out_meanwhile(tmp_path: Path) -> None:
    url = f"file://{tmp_path}/bucket"
    run = tmp_path / "run"
    worker = (
        "import signal,sys,time\n"
        f"signal.signal(signal.SIGUSR1, lambda *_: (open({str(run)!r}+'/saved','w').write('s'), sys.exit(75)))\n"
        f"open({str(run)!r}+'/started','w').write('s')\n"
        "time.sleep(50)\n"
    )
    code = (
        "import sys; from pathlib import Path; from dist_finetune.storage import keep\n"
        f"sys.exit(keep({url!r}, Path({str(run)!r}), [sys.executable, '-c', {worker!r}], push_every_s=0.1))"
    )
    process = subprocess.Popen([sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": str(REPOSITORY)})
    try:
        deadline = time.monotonic() + 30
        while not (tmp_path / "bucket" / "started").exists():
            assert time.monotonic() < deadline
            time.sleep(0.05)
        process.send_signal(10)
        assert process.wait(timeout=30) == 75
    finally:
        process.kill()
        process.wait()
    assert (tmp_path / "bucket" / "saved").exists()


def test_a_storage_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="nosuch://x"):
        pull("nosuch://x", tmp_path)


# --- the tools' own loaders ------------------------------------------------------------------------------------------

LOADERS = {
    "skypilot": (
        ["skypilot"],
        """
import sys, json, yaml
config = yaml.safe_load(open(sys.argv[1]))
from sky.utils import schemas, common_utils
common_utils.validate_schema(config, schemas.get_task_schema(), "invalid: ")
import sky
secrets = [(name, "value") for name in config.get("secrets") or {}]
task = sky.Task.from_yaml_config(config, secrets_overrides=secrets)
resources = list(task.resources)[0]
print(json.dumps({"nodes": task.num_nodes, "gpus": resources.accelerators, "spot": resources.use_spot}))
""",
    ),
    "dstack": (
        ["dstack"],
        """
import sys, json, yaml
from dstack._internal.core.models.configurations import parse_run_configuration
task = parse_run_configuration(yaml.safe_load(open(sys.argv[1])))
gpu = task.resources.gpu
print(json.dumps({"nodes": task.nodes, "gpus": {gpu.name[0]: gpu.count.max}, "spot": task.spot_policy.value == "spot"}))
""",
    ),
    "kubernetes": (
        ["kubernetes", "kubeflow-trainer-api", "pyyaml"],
        """
import sys, json, yaml
from kubernetes import client

KINDS = {"ConfigMap": "V1ConfigMap", "Service": "V1Service", "Job": "V1Job"}
api = client.ApiClient()


class Response:
    def __init__(self, data):
        self.data = json.dumps(data)


def same(given, read, where):
    # The client drops keys that it does not know, so what comes back must be what went in.
    if isinstance(given, dict):
        for key, value in given.items():
            assert isinstance(read, dict) and key in read, f"unknown key {where}.{key}"
            same(value, read[key], f"{where}.{key}")
    elif isinstance(given, list):
        for i, value in enumerate(given):
            same(value, read[i], f"{where}[{i}]")


def check(kind, data, where):
    same(data, api.sanitize_for_serialization(api.deserialize(Response(data), kind)), where)


nodes = gpus = None
for document in yaml.safe_load_all(open(sys.argv[1])):
    kind = document["kind"]
    if kind == "TrainJob":
        from kubeflow_trainer_api import models
        read = models.TrainerV1alpha1TrainJob.from_dict(document)
        same(document, read.to_dict(), kind)
        nodes, gpus = read.spec.trainer.num_nodes, document["spec"]["trainer"]["resourcesPerNode"]["limits"]
    elif kind == "PyTorchJob":
        replicas = document["spec"]["pytorchReplicaSpecs"]
        assert set(replicas) <= {"Master", "Worker"} and replicas["Master"]["replicas"] == 1
        assert set(document["spec"]) <= {"nprocPerNode", "runPolicy", "pytorchReplicaSpecs", "elasticPolicy"}
        for replica in replicas.values():
            assert set(replica) == {"replicas", "restartPolicy", "template"}
            assert [c["name"] for c in replica["template"]["spec"]["containers"]] == ["pytorch"]
            check("V1PodTemplateSpec", replica["template"], kind)
        nodes = sum(replica["replicas"] for replica in replicas.values())
        gpus = replicas["Master"]["template"]["spec"]["containers"][0]["resources"]["limits"]
    else:
        check(KINDS[kind], document, kind)
        if kind == "Job":
            nodes = document["spec"]["completions"]
            gpus = document["spec"]["template"]["spec"]["containers"][0]["resources"]["limits"]
print(json.dumps({"nodes": nodes, "gpus": gpus, "spot": None}))
""",
    ),
}


@pytest.fixture(scope="session")
def loader_python(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The Python of an environment that has one tool; they can't all live in one. Kept for the next test run."""

    def python(tool: str) -> Path:
        folder = Path(os.environ.get("TOOL_ENVIRONMENTS", Path.home() / ".cache" / "dist-finetune-tests")) / tool
        if not (folder / "complete").exists():
            packages = LOADERS[tool][0]
            command = [
                folder / "bin" / "python",
                "-m",
                "pip",
                "install",
                "-q",
                "--disable-pip-version-check",
                *packages,
            ]
            try:
                subprocess.run([sys.executable, "-m", "venv", "--clear", folder], check=True, timeout=120)
                subprocess.run(command, check=True, timeout=600, capture_output=True)
            except (subprocess.CalledProcessError, subprocess.TimeoutExpired) as error:
                pytest.skip(f"{' '.join(packages)} can't be installed here: {error}")
            (folder / "complete").touch()
        return folder / "bin" / "python"

    return python


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in FILES if name != "dstack_storage"])
def test_the_tool_itself_reads_the_file(name: str, loader_python: Any, tmp_path: Path) -> None:
    job, tool = FILES[name]
    config = tmp_path / "config.yaml"
    config.write_text(job.config_text)
    path = tmp_path / "task.yaml"
    path.write_text(render_cloud(tool, replace(job, config=config)), encoding="utf-8")
    script = LOADERS[tool][1]
    env = {"PATH": os.environ["PATH"], "HOME": str(tmp_path)}
    command = [loader_python(tool), "-c", script, str(path)]
    done = subprocess.run(command, cwd=tmp_path, env=env, text=True, capture_output=True, timeout=120)
    assert done.returncode == 0, done.stderr[-3000:]
    read = json.loads(done.stdout.strip().splitlines()[-1])
    assert read["nodes"] == job.num_nodes
    assert list(read["gpus"].values()) in ([8], ["8"])
    assert read["spot"] in (job.cloud.spot, None)
