"""Task files for rented machines: the same bytes for the same job, and what each tool's own loader says of them."""

import json
import os
import re
import shlex
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import fsspec
import pytest
from fsspec.implementations.local import LocalFileSystem
from ruamel.yaml import YAML

from dist_finetune.errors import UserError
from dist_finetune.launchers.cloud import TOOLS, cloud_commands, render_cloud
from dist_finetune.launchers.cloud_files import refuse_what_stays_here
from dist_finetune.launchers.cloud_job import CloudJob, resource_name
from dist_finetune.spec_file import load_spec
from dist_finetune.spec_launch import CloudSpec
from dist_finetune.storage import keep, main, probe, pull, push

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
ONE = replace(JOB, num_nodes=1, cloud=CLOUD.model_copy(update={"gpu": None, "storage": "s3://bucket/it's"}))
ON_DEMAND = replace(ONE, cloud=ONE.cloud.model_copy(update={"spot": False}))
IMAGE = {"image": "registry.example/dist-finetune:0.1"}
PODS = replace(JOB, cloud=JOB.cloud.model_copy(update=IMAGE))
ONE_POD = replace(ONE, cloud=ONE.cloud.model_copy(update=IMAGE))
KUBEFLOW = {
    kind: replace(PODS, cloud=PODS.cloud.model_copy(update={"kubernetes_kind": kind}))
    for kind in ("trainjob", "pytorchjob")
}
FILES = {
    "skypilot": (JOB, "skypilot"),
    "skypilot_storage": (ON_DEMAND, "skypilot"),
    "dstack": (JOB, "dstack"),
    "dstack_storage": (ON_DEMAND, "dstack"),
    "kubernetes": (PODS, "kubernetes"),
    "kubernetes_storage": (ONE_POD, "kubernetes"),
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
    ("file", "name", "gpu"),
    [
        ("skypilot.yaml", "skypilot", "A100-80GB"),
        ("dstack.yaml", "dstack", "A100-80GB"),
        ("k8s_job.yaml", "kubernetes", "NVIDIA-A100-SXM4-80GB"),
        ("k8s_trainjob.yaml", "kubernetes_trainjob", "NVIDIA-A100-SXM4-80GB"),
        ("k8s_pytorchjob.yaml", "kubernetes_pytorchjob", "NVIDIA-A100-SXM4-80GB"),
    ],
)
def test_files_for_starting_by_hand_are_what_submit_writes(file: str, name: str, gpu: str) -> None:
    job, tool = FILES[name]
    cloud = job.cloud.model_copy(update={"secrets": ("WANDB_API_KEY",), "gpu": gpu, "max_hours": None})
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
    pod = documents(rendered("kubernetes_storage"))[-1]["spec"]["template"]["spec"]
    assert "nodeSelector" not in pod
    (wish,) = pod["affinity"]["nodeAffinity"]["preferredDuringSchedulingIgnoredDuringExecution"]
    assert wish["preference"]["matchExpressions"][0] == {
        "key": "nvidia.com/gpu.memory",
        "operator": "Gt",
        "values": ["12000"],
    }
    for name in ("kubernetes", "kubernetes_pytorchjob", "kubernetes_trainjob"):
        assert "nvidia.com/gpu.product: A100-80GB" in rendered(name)
        assert "activeDeadlineSeconds: 43200" in rendered(name)
    cpu = replace(ONE_POD, gpus_per_node=0, processes_per_node=2)
    assert all("gpu" not in render_cloud(tool, cpu) for tool in ("dstack", "kubernetes"))


@pytest.mark.parametrize(
    ("tool", "job", "words"),
    [
        ("skypilot", replace(ONE, num_nodes=2), "with SkyPilot give launch.cloud.volume"),
        ("kubernetes", ON_DEMAND, "launch.cloud.spot has no effect on kubernetes: its nodes are spot machines or not"),
        ("dstack", replace(JOB, cloud=CLOUD), "with dstack give launch.cloud.volume"),
        ("kubernetes", replace(JOB, cloud=CloudSpec(volume="runs")), "have no dist-finetune: name an image"),
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
    [
        ("Bert topics", "bert-topics"),
        ("3rd", "run-3rd"),
        ("ü", "run-607474ca"),
        ("a" * 40, "a" * 40),
        ("a" * 60, "a" * 31 + "-11ee3912"),
        ("3" * 60, "run-" + "3" * 27 + "-752e5a54"),
        ("$(x)", "x"),
    ],
)
def test_names_as_clouds_allow_them(name: str, resource: str) -> None:
    assert resource_name(name) == resource


def test_names_that_clouds_would_cut_stay_apart() -> None:
    """Else the second run's ConfigMap would take the place of the first one's."""
    names = [f"bert-large-uncased-sst2-first-12-frozen-lr-{lr}" for lr in ("1e-5", "3e-5")] + ["文", "书"]
    assert len({resource_name(name) for name in names}) == 4
    assert max(len(resource_name(name)) for name in names) <= 40


def test_hostile_names_reach_the_machines_as_they_are() -> None:
    """dstack cuts LOCAL:PATH at colons, and Kubernetes puts the secret for $(HF_TOKEN), $ for $$."""
    name = "a:b $(HF_TOKEN) $$x '$"
    cloud = ONE.cloud.model_copy(update={"spot": True, "storage": "s3://bucket", "env": {"WORDS": name}})
    job = replace(ONE, name=name, cloud=cloud, config=Path("/data/runs") / name / "config.yaml")
    (task,) = documents(render_cloud("dstack", job))
    assert task["files"][1] == {"local_path": str(job.config), "path": "/etc/dist-finetune/config.yaml"}
    cloud = CloudSpec(image="i", storage="s3://bucket", env={"WORDS": name}, secrets=("HF_TOKEN",))
    container = documents(render_cloud("kubernetes", replace(job, cloud=cloud)))[-1]["spec"]["template"]["spec"]
    (container,) = container["containers"]
    command, value = container["command"][-1], next(e["value"] for e in container["env"] if e["name"] == "WORDS")
    assert as_kubernetes_reads(value, {"HF_TOKEN": "0123"}) == name
    words = shlex.split(as_kubernetes_reads(command, {"HF_TOKEN": "0123"}).replace("\\\n", " "))
    assert f"/runs/{name}" in words
    assert f"s3://bucket/{name}" in words
    assert '--node-rank="$JOB_COMPLETION_INDEX"' in command


def as_kubernetes_reads(text: str, env: dict[str, str]) -> str:
    """Its expansion of commands and values (third_party/forked/golang/expansion): $(NAME), and $$ for one $."""

    def expand(found: re.Match[str]) -> str:
        return "$" if found[0] == "$$" else env.get(found[1], found[0])

    return re.sub(r"\$\$|\$\(([^)]*)\)", expand, text)


@pytest.mark.parametrize(
    ("tool", "changes", "words"),
    [
        ("skypilot", {}, None),
        ("kubernetes", {}, r"rows.csv: a file of this machine .*\(only the config is taken there\)"),
        ("kubernetes", {"data": {"train": "some/hub-data"}}, None),
        ("dstack", {"data": {"train": "ABSOLUTE"}}, "rows.csv: .* is uploaded"),
        ("skypilot", {"data": {"train": "../outside.csv"}}, "outside.csv: a file"),
        ("skypilot", {"model": {"name": "demo:minilm", "weights": "ABSOLUTE"}}, "rows.csv: a file"),
        ("kubernetes", {"data": {"train": "*.csv"}}, r"\*.csv: a file of this machine"),
        ("skypilot", {"data": {"train": "*.csv"}}, None),
        ("skypilot", {"data": {"train": "../*.csv"}}, r"\*.csv: a file"),
        ("skypilot", {"data": {"train": "~/rows.csv"}}, "~/rows.csv: a file"),
        ("kubernetes", {"data": {"train": "saved[train]"}}, r"saved\[train\]: a file"),
        ("dstack", {"data": {"train": "saved[train]"}}, None),
        ("dstack", {"launch": {"cloud": {"volume": "v"}}}, "no pyproject.toml or setup.py: submit from a copy"),
    ],
)
def test_what_no_machine_would_find_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tool: str, changes: dict[str, Any], words: str | None
) -> None:
    folder = tmp_path / "work"
    for name in ("saved", "pretrained"):
        (folder / name).mkdir(parents=True)
    monkeypatch.setenv("HOME", str(folder))  # which the machines have another of
    for file in (folder / "rows.csv", tmp_path / "outside.csv"):
        file.write_text("text,label\n")
    base = {"name": "x", "model": {"name": "demo:minilm"}, "data": {"train": "rows.csv"}}
    cloud = {"launch": {"cloud": {"install": "pip install dist-finetune"}}}
    text = json.dumps({**base, **cloud, **changes}).replace("ABSOLUTE", str(folder / "rows.csv"))
    spec = load_spec(json.loads(text))
    if words is None:
        refuse_what_stays_here(tool, spec, folder)
        return
    with pytest.raises(UserError, match=words):
        refuse_what_stays_here(tool, spec, folder)


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
    pulled: dict[str, tuple[int, int]] = {}
    assert pull(url, second, pulled) == 3
    assert pull(url, second) == 0
    assert push(url, second, pulled) == 0, "what came from the storage is not sent back"
    assert (second / "checkpoints/step-000001/rank-00000.safetensors").read_bytes() == b"x"


def test_what_was_written_last_is_kept_on_a_disk_that_outlives_a_restart(tmp_path: Path) -> None:
    """Not all had gone out; and where another machine took over meanwhile, the storage has the newer."""
    run, bucket, url = tmp_path / "run", tmp_path / "bucket", f"file://{tmp_path}/bucket"
    run.mkdir()
    (run / "metrics.jsonl").write_text("1\n")
    push(url, run, {})
    sent = (bucket / "metrics.jsonl").stat().st_mtime
    (run / "metrics.jsonl").write_text("1\n2\n")
    os.utime(run / "metrics.jsonl", (sent + 5, sent + 5))
    assert pull(url, run) == 0
    assert (run / "metrics.jsonl").read_text() == "1\n2\n"
    (bucket / "metrics.jsonl").write_text("1\n2\n3\n")
    os.utime(bucket / "metrics.jsonl", (sent + 9, sent + 9))
    assert pull(url, run) == 1
    assert (run / "metrics.jsonl").read_text() == "1\n2\n3\n"
    assert names(run) == ["metrics.jsonl"]


def test_half_a_copy_is_no_newer_file(tmp_path: Path) -> None:
    """Of a machine that is lost while it copies the run folder in."""

    class Breaks(LocalFileSystem):
        protocol = "breaks"

        def get_file(self, path: str, target: str) -> None:  # type: ignore[override]
            Path(target).write_bytes(Path(path).read_bytes()[:1])
            raise ConnectionResetError("the machine is lost")

    fsspec.register_implementation("breaks", Breaks, clobber=True)
    checkpoint(tmp_path / "bucket", 5)
    with pytest.raises(UserError, match="the machine is lost"):
        pull(f"breaks://{tmp_path}/bucket", tmp_path / "run")
    assert pull(f"file://{tmp_path}/bucket", tmp_path / "run") == 2
    assert (tmp_path / "run/checkpoints/step-000005/rank-00000.safetensors").read_bytes() == b"x" * 5


def test_a_run_that_is_kept_is_not_started_over(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run, url = tmp_path / "run", f"file://{tmp_path}/bucket"
    checkpoint(tmp_path / "bucket", 5)
    assert main([url, str(run), "--", "dist-finetune", "train", "c.yaml", "--fresh"]) == 2
    assert f"--fresh would remove the checkpoints of the run that {url} may hold" in capsys.readouterr().err
    assert len(names(tmp_path / "bucket")) == 2


def test_a_checkpoint_without_its_name_stays_here(tmp_path: Path) -> None:
    """It is complete for a moment before it gets it, and again while it is deleted."""
    checkpoint(tmp_path / "run", 1)
    (tmp_path / "run/checkpoints/step-000001").rename(tmp_path / "run/checkpoints/.step-000001.old")
    assert push(f"file://{tmp_path}/bucket", tmp_path / "run", {}) == 0


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


def test_a_storage_that_can_not_be_written_stops_before_the_command(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A file where the bucket should be: nothing runs whose result would be lost."""
    (tmp_path / "bucket").write_text("no folder")
    command = [sys.executable, "-c", f"open({str(tmp_path / 'ran')!r}, 'w')"]
    assert main([f"file://{tmp_path}/bucket/run", str(tmp_path / "run"), "--", *command]) == 2
    said = capsys.readouterr().err
    assert f"file://{tmp_path}/bucket/run can't be written: " in said
    assert "Nothing was started" in said
    assert not (tmp_path / "ran").exists()


def test_a_storage_that_goes_away_is_no_file_that_was_rotated_away(tmp_path: Path) -> None:
    """fsspec says FileNotFoundError for both; only a file that has gone here may be left out."""

    class Gone(LocalFileSystem):
        """Says what s3fs says of a bucket that is not there."""

        protocol = "gone"

        def makedirs(self, path: str, exist_ok: bool = False) -> None:
            raise FileNotFoundError("the bucket does not exist")

    fsspec.register_implementation("gone", Gone, clobber=True)
    run = tmp_path / "run"
    run.mkdir()
    (run / "config.yaml").write_text("a: 1")
    sent: dict[str, tuple[int, int]] = {}
    with pytest.raises(UserError, match="the bucket does not exist"):
        push(f"gone://{tmp_path}/bucket", run, sent)
    assert sent == {}


def test_the_probe_leaves_nothing_behind(tmp_path: Path) -> None:
    probe(f"file://{tmp_path}/bucket/run")
    assert list((tmp_path / "bucket" / "run").iterdir()) == []


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
count = list(resources.accelerators.values())[0]
print(json.dumps({"nodes": task.num_nodes, "gpus": count, "spot": resources.use_spot}))
""",
    ),
    "dstack": (
        ["dstack"],
        """
import sys, json, yaml
from dstack._internal.core.models.configurations import parse_run_configuration
task = parse_run_configuration(yaml.safe_load(open(sys.argv[1])))
gpu = task.resources.gpu
print(json.dumps({"nodes": task.nodes, "gpus": gpu.count.max, "spot": task.spot_policy.value == "spot"}))
""",
    ),
    "kubernetes": (
        ["kubernetes>=37", "kubeflow-trainer-api>=2.3", "pyyaml"],
        """
import sys, json, yaml
from kubernetes import client

api = client.ApiClient()
KINDS = {"ConfigMap": client.V1ConfigMap, "Service": client.V1Service, "Job": client.V1Job}


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
    same(data, api.sanitize_for_serialization(kind.from_dict(data)), where)


nodes = gpus = None
for document in yaml.safe_load_all(open(sys.argv[1])):
    kind = document["kind"]
    if kind == "TrainJob":
        from kubeflow_trainer_api import models
        read = models.TrainerV1alpha1TrainJob.from_dict(document)
        same(document, read.to_dict(), kind)
        pod = document["spec"]["runtimePatches"][0]["trainingRuntimeSpec"]["template"]["spec"]["replicatedJobs"][0]
        assert pod["template"]["spec"]["template"]["spec"]["nodeSelector"]
        nodes, gpus = read.spec.trainer.num_nodes, document["spec"]["trainer"]["resourcesPerNode"]["limits"]
    else:
        check(KINDS[kind], document, kind)
        if kind == "Job":
            nodes = document["spec"]["completions"]
            gpus = document["spec"]["template"]["spec"]["containers"][0]["resources"]["limits"]
print(json.dumps({"nodes": nodes, "gpus": gpus["nvidia.com/gpu"], "spot": None}))
""",
    ),
    "kubeflow-v1": (
        ["kubeflow-training>=1.9", "pyyaml"],
        """
import sys, json, yaml
from kubeflow.training import models
from kubernetes import client


def check(kind, given, where):
    # Its models, and those of the Kubernetes client that it came with, name the type of each key.
    if kind.startswith("list["):
        for i, value in enumerate(given):
            check(kind[5:-1], value, f"{where}[{i}]")
    elif kind.startswith("dict("):
        for key, value in given.items():
            check(kind[5:-1].partition(", ")[2], value, f"{where}.{key}")
    elif model := getattr(models, kind, None) or getattr(client, kind, None):
        kinds = {model.attribute_map[name]: type_ for name, type_ in model.openapi_types.items()}
        for key, value in given.items():
            assert key in kinds, f"unknown key {where}.{key}"
            check(kinds[key], value, f"{where}.{key}")
    else:
        types = {"str": str, "int": int, "bool": bool, "object": object}
        assert isinstance(given, types[kind]), f"{where} is {given!r}, no {kind}"


config, document = yaml.safe_load_all(open(sys.argv[1]))
check("V1ConfigMap", config, "ConfigMap")
check("KubeflowOrgV1PyTorchJob", document, "PyTorchJob")
replicas = document["spec"]["pytorchReplicaSpecs"]
assert replicas["Master"]["replicas"] == 1
pods = [replica["template"]["spec"] for replica in replicas.values()]
assert [c["name"] for pod in pods for c in pod["containers"]] == ["pytorch"] * len(pods)
nodes = sum(replica["replicas"] for replica in replicas.values())
limits = pods[0]["containers"][0]["resources"]["limits"]
print(json.dumps({"nodes": nodes, "gpus": limits["nvidia.com/gpu"], "spot": None}))
""",
    ),
}


def loader_of(name: str) -> str:
    return "kubeflow-v1" if name.endswith("pytorchjob") else FILES[name][1]


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
@pytest.mark.parametrize("name", list(FILES))
def test_the_tool_itself_reads_the_file(name: str, loader_python: Any, tmp_path: Path) -> None:
    job, tool = FILES[name]
    done = loaded(name, loader_python(loader_of(name)), tmp_path)
    if tool == "skypilot" and not job.cloud.gpu and "raw.githubusercontent.com" in done.stderr:
        pytest.skip("SkyPilot's list of GPUs by memory can't be fetched here; its schema was checked")
    assert done.returncode == 0, done.stderr[-3000:]
    read = json.loads(done.stdout.strip().splitlines()[-1])
    assert read["nodes"] == job.num_nodes
    assert int(read["gpus"]) == 8
    assert read["spot"] in (job.cloud.spot, None)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "key", "misspelt"),
    [
        ("skypilot", "use_spot", "use_spt"),
        ("dstack", "spot_policy", "spot_polcy"),
        ("kubernetes", "podFailurePolicy", "podFailPolicy"),
        ("kubernetes_trainjob", "numProcPerNode", "numProcsPerNode"),
        ("kubernetes_pytorchjob", "runPolicy", "runPolcy"),
        ("kubernetes_pytorchjob", "volumeMounts", "volumeMount"),
    ],
)
def test_the_tool_refuses_a_key_that_it_does_not_know(
    name: str, key: str, misspelt: str, loader_python: Any, tmp_path: Path
) -> None:
    done = loaded(name, loader_python(loader_of(name)), tmp_path, (f"{key}:", f"{misspelt}:"))
    assert done.returncode != 0
    assert misspelt in done.stderr or key in done.stderr


def loaded(
    name: str, python: Path, folder: Path, replaced: tuple[str, str] = ("", "")
) -> subprocess.CompletedProcess[str]:
    """What a tool's own loader says of one of FILES, in which a text may be `replaced` by another."""
    job, tool = FILES[name]
    config, path = folder / "config.yaml", folder / "task.yaml"
    config.write_text(job.config_text)
    path.write_text(render_cloud(tool, replace(job, config=config)).replace(*replaced), encoding="utf-8")
    env = {"PATH": os.environ["PATH"], "HOME": str(folder)}
    command = [str(python), "-c", LOADERS[loader_of(name)][1], str(path)]
    return subprocess.run(command, cwd=folder, env=env, text=True, capture_output=True, timeout=120)
