"""`submit` from the command line to the files of a run, with a stand-in for sbatch; the real one is in tests/slurm."""

import json
import math
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from transformers import BertConfig

from dist_finetune.cli import main
from dist_finetune.launchers.request import check_request
from dist_finetune.run_folder import resume_command
from dist_finetune.spec_file import load_spec
from dist_finetune.submit import submit as submit_job

CONFIG = """
model: {name: demo:minilm}
data: {train: rows.csv}
freeze: backbone
train: {global_batch_size: 16}
launch: {slurm: {partition: gpu, gpu_memory: 80GiB}, cloud: {gpu: A100-80GB, secrets: [WANDB_API_KEY]}}
"""
SBATCH = """#!/bin/sh
printf "%s\\n" "$@" > "$0.arguments"
env > "$0.env"
echo "4711;main"
"""


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a config and data, and an sbatch that only writes down what it was given."""
    (tmp_path / "rows.csv").write_text(
        "text,label\n" + "".join(f"word {i} good,a\nword {i} bad,b\n" for i in range(30))
    )
    (tmp_path / "topics.yaml").write_text(CONFIG)
    programs = tmp_path / "bin"
    programs.mkdir()
    (programs / "sbatch").write_text(SBATCH)
    (programs / "squeue").write_text("#!/bin/sh\necho 'slurm_load_jobs error: Invalid job id specified' >&2\nexit 1\n")
    for name in ("sbatch", "squeue"):
        (programs / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{programs}:/usr/bin:/bin")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def submit(*arguments: str) -> None:
    main(["submit", "topics.yaml", *arguments])


def refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[object, str]:
    with pytest.raises(SystemExit) as ended:
        submit(*arguments)
    return ended.value.code, capsys.readouterr().err


def run(*arguments: str) -> None:
    with pytest.raises(SystemExit) as ended:
        submit(*arguments)
    assert ended.value.code in (0, None)


def test_a_dry_run_shows_everything_and_writes_nothing(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run("--nodes", "2", "--gpus-per-node", "4", "--dry-run")
    out = capsys.readouterr().out
    assert "batch     16 = 2 x 1 accumulated x 8 processes" in out
    assert "#SBATCH --partition=gpu" in out
    assert "--nnodes=2 --nproc-per-node=4" in out
    assert "nothing was written or submitted" in out
    assert not (place / "runs").exists()
    assert not (place / "bin" / "sbatch.arguments").exists()


def test_features_are_submitted_as_a_training_is(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, said = refused(capsys, "task=features", "--dry-run")
    assert code == 2
    assert "freeze would have no effect" in said
    run("task=features", "freeze=none", "--nodes", "2", "--gpus-per-node", "4", "--dry-run")
    out = capsys.readouterr().out
    assert "note: task: features: no layer is trained; each row is run through the model once" in out
    assert "pass      one: each row once, shared out over 8 processes" in out
    assert "features  at every depth, pool auto, heads softmax, svm, rbf-svm" in out
    assert not re.search(r"^(freeze|batch|steps|strategy|cache) ", out, re.MULTILINE), "words about training"
    assert "--nnodes=2 --nproc-per-node=4" in out
    assert not (place / "runs").exists()


def test_a_submission_leaves_its_files_and_tells_what_to_do_next(
    place: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SBATCH_PARTITION", "elsewhere")
    monkeypatch.setenv("SLURM_JOB_ID", "1")
    run("--gpus-per-node", "2", "--time", "90 min")
    out = capsys.readouterr().out
    folder = place / "runs" / "topics"
    assert (place / "bin" / "sbatch.arguments").read_text().splitlines() == ["--parsable", str(folder / "job.sbatch")]
    env = (place / "bin" / "sbatch.env").read_text()
    assert "SBATCH_PARTITION" not in env
    assert "SLURM_JOB_ID" not in env
    assert load_spec(folder / "config.yaml") == load_spec(place / "topics.yaml")
    assert (folder / "job.sbatch").read_text() in out
    assert (folder / "logs").is_dir(), "SLURM does not make the folder of the log"
    assert json.loads((folder / "submissions.jsonl").read_text())["job"] == "4711"
    for words in ("submitted job 4711", "squeue -j 4711", "scancel 4711", "scancel --signal=USR1 4711", "resume:"):
        assert words in out


def test_a_hostile_name_can_be_pasted(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    name = "it's $(touch BROKE)`touch BROKE`;touch BROKE"
    run("--gpus-per-node", "2", f"name={json.dumps(name)}")
    out = capsys.readouterr().out
    watch = next(line for line in out.splitlines() if line.startswith("watch:")).removeprefix("watch:")
    for program in ("squeue", "tail"):
        (place / "bin" / program).write_text('#!/bin/sh\nprintf "%s\\n" "$@" > "$0.arguments"\n')
        (place / "bin" / program).chmod(0o755)
    subprocess.run(["bash", "-c", watch], cwd=place, check=True, timeout=20)
    log = place / "runs" / name / "logs" / "slurm-4711.out"
    assert (place / "bin" / "tail.arguments").read_text().splitlines() == ["-F", str(log)]
    assert not list(place.rglob("BROKE*"))
    assert shlex.split(resume_command(place / name)) == ["dist-finetune", "resume", str(place / name)]


def test_the_difference_from_the_last_submission_is_shown(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run("--gpus-per-node", "2")
    assert "last submission" not in capsys.readouterr().out
    run("--gpus-per-node", "2")
    assert "# as submitted last" in capsys.readouterr().out
    run("--gpus-per-node", "2", "--time", "2 h", "launch.slurm.qos=long", "launch.join_timeout=90 s")
    out = capsys.readouterr().out
    shown = out.split("# differs from the last submission:")[1].splitlines()
    changes = [line for line in shown if line.startswith(("+", "-"))]
    assert changes[:3] == ["-#SBATCH --time=04:00:00", "+#SBATCH --time=02:00:00", "+#SBATCH --qos=long"]
    assert changes[-1].endswith(' --master-port="$port" --rdzv-conf=timeout=90 \\'), (
        "nodes wait no longer for an absent one"
    )
    assert load_spec(place / "runs/topics/config.yaml").launch.slurm.qos == "long"
    code, said = refused(capsys, "--gpus-per-node", "2", "train.lr=1e-5", "freeze=none")
    assert code == 2
    assert "another config" in said


def test_a_run_whose_job_is_still_there_is_not_submitted_again(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run("--gpus-per-node", "2")
    squeue = place / "bin" / "squeue"
    squeue.write_text('#!/bin/sh\nprintf "%s\\n" "$@" > "$0.arguments"\necho PENDING\n')
    for more in ([], ["--fresh"]):
        code, said = refused(capsys, "--gpus-per-node", "2", *more)
        assert code == 2
        assert "job 4711 of" in said
        assert "is still there (PENDING)" in said
        assert "scancel 4711" in said
    assert "--jobs=4711" in squeue.with_name("squeue.arguments").read_text().splitlines()
    submissions = place / "runs" / "topics" / "submissions.jsonl"
    assert len(submissions.read_text().splitlines()) == 1
    for cut in ('{"time": "2026', "\n\n", "[]"):  # by a full disk
        submissions.write_text(submissions.read_text() + cut)
        assert "job 4711 of" in refused(capsys, "--gpus-per-node", "2")[1]
    submissions.write_text("")
    run("--gpus-per-node", "2")
    squeue.write_text("#!/bin/sh\n")
    run("--gpus-per-node", "2")


def test_a_sweep_has_a_folder_for_each_run(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run("--gpus-per-node", "2", "--sweep", "train.lr=1e-5,3e-5", "--sweep", "freeze=backbone,none")
    folder = place / "runs" / "topics"
    configs = sorted(folder.glob("*/config.yaml"))
    assert [c.parent.name for c in configs] == [
        "000-lr=1e-5,freeze=backbone",
        "001-lr=1e-5,freeze=none",
        "002-lr=3e-5,freeze=backbone",
        "003-lr=3e-5,freeze=none",
    ]
    assert [load_spec(c).train.lr for c in configs] == [1e-5, 1e-5, 3e-5, 3e-5]
    script = (folder / "job.sbatch").read_text()
    assert "#SBATCH --array=0-3" in script
    assert "export WANDB_RUN_GROUP=topics" in script
    assert all(f"'{c}'" in script or str(c) in script for c in configs)
    code, said = refused(capsys, "--sweep", "train.lr=1e-5,fast", "name=other")
    assert code == 2
    assert "train.lr can't be 'fast'" in said
    assert not (place / "runs" / "other").exists(), "nothing of a sweep is written where one run is wrong"


def test_what_does_not_fit_or_is_refused_is_not_submitted(
    place: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    code, said = refused(capsys, "--gpus-per-node", "2", "--gpu-memory", "64MiB", "shard.strategy=ddp")
    assert code == 1
    assert "GiB" in said
    assert refused(capsys, "--gpus-per-node", "2", "launch.slurm.gpu_memory=64MiB", "shard.strategy=ddp")[0] == 1
    assert not (place / "runs").exists()
    (place / "bin" / "sbatch").write_text("#!/bin/sh\necho 'invalid partition specified: gpu' >&2\nexit 1\n")
    code, said = refused(capsys, "--gpus-per-node", "2")
    assert code == 2
    assert "invalid partition specified: gpu" in said
    (place / "bin" / "sbatch").write_text("#!/bin/sh\necho 'sbatch: Job 3 to start at noon' >&2\n")
    code, said = refused(capsys, "--gpus-per-node", "2")
    assert code == 2
    assert "sbatch named no job, but said 'sbatch: Job 3 to start at noon'" in said
    monkeypatch.setenv("PATH", str(place))
    code, said = refused(capsys, "--gpus-per-node", "2")
    assert code == 2
    assert "there is no sbatch here" in said


def test_a_finished_run_is_not_submitted_again(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run("--gpus-per-node", "2")
    (place / "runs" / "topics" / "summary.json").write_text('{"status": "finished"}')
    code, said = refused(capsys, "--gpus-per-node", "2")
    assert code == 2
    assert "--fresh trains it again" in said
    run("--gpus-per-node", "2", "--fresh")
    assert not (place / "runs" / "topics" / "summary.json").exists()
    assert len(list((place / "runs").iterdir())) == 2, "the old one is kept aside"


def test_a_changed_config_is_refused_with_ways_out_that_there_are(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """`submit` has no --allow of its own."""
    run("--gpus-per-node", "2")
    code, said = refused(capsys, "--gpus-per-node", "2", "train.lr=1e-4")
    assert code == 2
    assert "train.lr: None before, 0.0001 now" in said
    assert f"`dist-finetune resume {Path('runs') / 'topics'} --allow ...`" in said


def test_a_sweep_goes_on_without_its_finished_runs(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sweep = ("--gpus-per-node", "2", "--sweep", "train.lr=1e-5,3e-5,5e-5")
    run(*sweep)
    folders = sorted((place / "runs" / "topics").glob("0*"))
    (folders[0] / "summary.json").write_text('{"status": "finished"}')
    capsys.readouterr()
    run(*sweep)
    out = capsys.readouterr().out
    assert "# 000-lr=1e-5 is finished, and left out" in out
    assert "#SBATCH --array=1,2\n" in (place / "runs" / "topics" / "job.sbatch").read_text()
    assert "slurm-4711_1.out" in out
    for folder in folders[1:]:
        (folder / "summary.json").write_text('{"status": "finished"}')
    code, said = refused(capsys, *sweep)
    assert code == 2
    assert "topics is finished; --fresh trains it again" in said


@pytest.mark.parametrize(
    ("tool", "file", "command"),
    [
        ("skypilot", "skypilot.yaml", "sky jobs launch"),
        ("dstack", "dstack.yaml", "dstack apply -f"),
        ("kubernetes", "k8s.yaml", "kubectl apply -f"),
    ],
)
def test_files_for_rented_machines(
    place: Path, capsys: pytest.CaptureFixture[str], tool: str, file: str, command: str
) -> None:
    (place / "pyproject.toml").write_text("")
    if tool == "kubernetes":
        config = CONFIG.replace("rows.csv", "builtin:topics").replace("cloud: {", "cloud: {image: mine, ")
        (place / "topics.yaml").write_text(config)
    (place / "prices.yaml").write_text("A100-80GB: {per_hour: 2.0, tflops: 312}\n")
    run("--gpus-per-node", "2", "--to", tool, "--price", "prices.yaml")
    out = capsys.readouterr().out
    assert re.search(r"^price     A100-80GB x 2: \d+\.\d min, \d+\.\d\d$", out, re.MULTILINE), out
    assert command in out
    assert "note: checkpoints go with the machine" in out
    assert (place / "runs" / "topics" / file).read_text() in out
    assert not (place / "bin" / "sbatch.arguments").exists()


def test_a_run_kept_elsewhere_is_not_said_to_start_anew(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (place / "pyproject.toml").write_text("")
    code, said = refused(capsys, "--to", "dstack", "--fresh", "launch.cloud.storage=s3://b/runs")
    assert code == 2
    assert "--fresh does not reach the run that s3://b/runs may hold" in said
    run("--to", "dstack", "--fresh")


def test_a_machine_whose_gpu_is_not_named_has_the_memory_of_the_plan(place: Path) -> None:
    """A BERT of two blocks, too wide for the smallest GPU that is ever asked for."""
    wide = BertConfig(hidden_size=4096, num_hidden_layers=2, num_attention_heads=32, intermediate_size=16384)
    wide.update({"architectures": ["BertForMaskedLM"]})
    wide.save_pretrained(place / "wide")
    config = CONFIG.replace("demo:minilm", "wide").replace("freeze: backbone", "shard: {strategy: ddp}")
    (place / "topics.yaml").write_text(config.replace("gpu: A100-80GB, ", ""))
    (place / "pyproject.toml").write_text("")
    (plan,) = submit_job("topics.yaml", [], check_request(to="dstack", gpus_per_node=2), [].append)
    needed = plan.memory["ddp"].needed
    assert needed > 16 * plan.widest.manifest.num_trainable > 8 * 2**30, "fp32 weights, gradients, Adam's moments"
    task = yaml.safe_load((place / "runs" / "topics" / "dstack.yaml").read_text())
    assert task["resources"]["gpu"] == {"memory": f"{math.ceil(needed / 0.8 / 2**30)}GB..", "count": 2}


def test_wrong_flags_are_told_before_anything_heavy_is_imported(place: Path) -> None:
    code = (
        "import sys\nfrom dist_finetune.cli import main\n"
        "try:\n    main(['submit', 'topics.yaml', '--to', 'slrum'])\n"
        "except SystemExit as ended:\n    assert ended.code == 2\n"
        "assert 'torch' not in sys.modules"
    )
    repository = str(Path(__file__).parents[2])
    done = subprocess.run(
        [sys.executable, "-c", code], env={"PYTHONPATH": repository}, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    assert "Did you mean slurm?" in done.stderr
