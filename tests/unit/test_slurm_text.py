"""The job script as text: the same bytes for the same job, values that can't break out, and what is refused."""

import os
import shlex
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest

from dist_finetune.errors import UserError
from dist_finetune.launchers.request import check_request
from dist_finetune.launchers.slurm import SlurmJob, grace_s, limit_s, render_job
from dist_finetune.launchers.sweep import sweep_trials
from dist_finetune.spec import Spec
from dist_finetune.spec_file import load_spec
from dist_finetune.spec_launch import SlurmSpec, slurm_time

REPOSITORY = Path(__file__).parents[2]
GOLDEN = REPOSITORY / "tests" / "golden"
PLAIN = SlurmJob(
    name="bert-topics",
    site=SlurmSpec(),
    num_nodes=2,
    gpus_per_node=8,
    processes_per_node=8,
    grace_s=70,
    python="/opt/env/bin/python",
    configs=(Path("/data/runs/bert-topics/config.yaml"),),
    folder=Path("/data/runs/bert-topics"),
    working_folder=Path("/data"),
)
SITE = SlurmSpec(
    time="1-12:00:00",
    partition="gpu",
    account="proj 7",
    qos="long",
    constraint="a100&ib",
    gpu_type="a100",
    cpus_per_process=12,
    modules=("cuda/12.8", "gcc"),
    env={"NCCL_SOCKET_IFNAME": "ib0"},
    container="registry/img:1",
    container_mounts=("/data:/data",),
    offline=True,
    max_requeues=5,
    extra=("--reservation=course one", "--exclusive"),
)
HOSTILE = 'it\'s "a" $(touch BROKE) `touch BROKE` #x; touch BROKE & ü%j | >BROKE'
JOBS = {
    "plain": PLAIN,
    "site": replace(PLAIN, site=SITE, time="02:00:00", partition="debug"),
    "cpu": replace(PLAIN, gpus_per_node=0, processes_per_node=2, site=SlurmSpec(max_requeues=0, cpus_per_process=1)),
    "sweep": replace(
        PLAIN, configs=tuple(Path(f"/data/runs/bert-topics/{t}/config.yaml") for t in ("000-lr=1e-5", "001-lr=3e-5"))
    ),
    "hostile": replace(
        PLAIN,
        name=HOSTILE,
        folder=Path("/data") / HOSTILE,
        working_folder=Path("/data/it's"),
        configs=(Path("/data") / HOSTILE / "config.yaml",),
    ),
}


@pytest.mark.parametrize("name", JOBS)
def test_job_script_is_the_golden_one_byte_for_byte(name: str) -> None:
    path = GOLDEN / f"job_{name}.sbatch"
    text = render_job(JOBS[name])
    if os.environ.get("UPDATE_GOLDEN"):
        path.write_text(text, encoding="utf-8")
    assert text == path.read_text(encoding="utf-8")


def test_every_golden_script_is_compared() -> None:
    assert sorted(path.name for path in GOLDEN.glob("job_*.sbatch")) == sorted(f"job_{name}.sbatch" for name in JOBS)


@pytest.mark.parametrize(
    ("file", "job"),
    [
        ("train.sbatch", SlurmJob("dist-finetune", SlurmSpec(), 2, 8, 8, 120)),
        ("train_1node.sbatch", SlurmJob("dist-finetune", SlurmSpec(), 1, 8, 8, 120)),
        ("train_cpu.sbatch", SlurmJob("dist-finetune", SlurmSpec(cpus_per_process=1), 2, 0, 1, 120)),
    ],
)
def test_scripts_for_submitting_by_hand_are_what_submit_writes(file: str, job: SlurmJob) -> None:
    path = REPOSITORY / "slurm" / file
    text = render_job(replace(job, by_hand_file=f"slurm/{file}"))
    if os.environ.get("UPDATE_GOLDEN"):
        path.write_text(text, encoding="utf-8")
    assert text == path.read_text(encoding="utf-8")


def test_folder_of_scripts_holds_no_other() -> None:
    found = sorted(path.name for path in (REPOSITORY / "slurm").glob("*.sbatch"))
    assert found == ["train.sbatch", "train_1node.sbatch", "train_cpu.sbatch"]


@pytest.mark.parametrize("name", JOBS)
def test_job_script_is_valid_shell(name: str) -> None:
    done = subprocess.run(["bash", "-n"], input=render_job(JOBS[name]), text=True, capture_output=True, timeout=20)
    assert (done.returncode, done.stderr) == (0, "")


def test_no_value_breaks_out_of_the_script(tmp_path: Path) -> None:
    """Runs the hostile script with stand-ins for the site's programs: what they are given is what the user wrote.

    Lines for sbatch, which are comments to the shell, quote as shlex reads them; tests/slurm has sbatch itself.
    """
    for program in ("module", "srun", "scontrol"):
        path = tmp_path / "bin" / program
        path.parent.mkdir(exist_ok=True)
        path.write_text('#!/bin/sh\nprintf "%s\\n" "$@" > "$0.arguments"\n')
        path.chmod(0o755)
    names = ("partition", "account", "qos", "constraint")
    site = SlurmSpec(
        **dict.fromkeys(names, HOSTILE),
        modules=(HOSTILE,),
        extra=(f"--comment={HOSTILE}",),
        env={"WORDS": HOSTILE},
        container=HOSTILE,
        container_mounts=(HOSTILE,),
    )
    script = render_job(replace(JOBS["hostile"], site=site, python=HOSTILE))
    env = {"PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}", "SLURM_JOB_ID": "3", "SLURM_JOB_NODELIST": "n1"}
    done = subprocess.run(
        ["bash", "-c", script + "\n"],
        cwd=tmp_path,
        env={**env, "SLURM_JOB_NUM_NODES": "2"},
        text=True,
        capture_output=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    given = (tmp_path / "bin" / "srun.arguments").read_text().splitlines()
    assert given[-1] == f"/data/{HOSTILE}/config.yaml"
    assert f"--container-image={HOSTILE}" in given
    assert f"--container-mounts={HOSTILE}" in given
    assert HOSTILE in given
    assert (tmp_path / "bin" / "module.arguments").read_text().splitlines() == ["load", HOSTILE]
    options = [shlex.split(line)[1:] for line in script.splitlines() if line.startswith("#SBATCH")]
    for name in (*names, "comment"):
        assert [f"--{name}={HOSTILE}"] in options
    assert all(len(option) == 1 for option in options)
    assert not list(tmp_path.rglob("BROKE*"))


def test_every_value_with_a_line_break_is_refused() -> None:
    for job in (
        replace(PLAIN, name="a\nb"),
        replace(PLAIN, partition="a\n#SBATCH --x"),
        replace(PLAIN, folder=Path("/a\nb")),
        replace(PLAIN, configs=(Path("/a\nb/config.yaml"),)),
        replace(PLAIN, python="p\nq"),
    ):
        with pytest.raises(UserError, match="line break"):
            render_job(job)
    with pytest.raises(UserError, match="backslash"):
        render_job(replace(PLAIN, folder=Path("/a\\b")))


def spec(**slurm: object) -> Spec:
    return load_spec({"name": "x", "model": {"name": "m"}, "data": {"train": "d"}, "launch": {"slurm": slurm}})


@pytest.mark.parametrize(
    ("slurm", "words"),
    [
        ({"partition": "a\nrm -rf /"}, "line break or a control character"),
        ({"extra": ["rm -rf /"]}, "is no sbatch option"),
        ({"extra": ["--nodes=4"]}, "--nodes is written by submit itself"),
        ({"extra": "-p debug"}, "--partition is written by submit itself"),
        ({"extra": "--ntask=2"}, "--ntasks is written by submit itself"),
        ({"extra": "--wrap=touch x"}, "would not just submit"),
        ({"extra": "-W"}, "would not just submit"),
        ({"extra": "--test-only"}, "would not just submit"),
        ({"env": {"A B": "1"}}, "is no name of an environment variable"),
        ({"env": {"WANDB_API_KEY": "k"}}, "looks like a secret"),
        ({"env": {"HF_TOKEN": "k"}}, "looks like a secret"),
        ({"time": 90}, 'write "90 min", "90 h" or 04:00:00'),
        ({"time": "soon"}, "no duration"),
        ({"partitoin": "x"}, "Did you mean partition"),
        ({"gpu_type": "a100; rm"}, "launch.slurm.gpu_type"),
        ({"modules": [""]}, "at least 1 character"),
    ],
)
def test_wrong_site_settings_are_refused_where_the_config_is_read(slurm: dict[str, object], words: str) -> None:
    with pytest.raises(UserError) as refused:
        spec(**slurm)
    assert words in str(refused.value)


@pytest.mark.parametrize(
    ("written", "read", "seconds"),
    [
        ("04:00:00", "04:00:00", 14400),
        ("90 min", "01:30:00", 5400),
        ("2 days", "2-00:00:00", 172800),
        ("1-12", "1-12", 129600),
        ("30:00", "30:00", 1800),
        ("1-00:30", "1-00:30", 88200),
        ("1.5 h", "01:30:00", 5400),
    ],
)
def test_time_limits(written: str, read: str, seconds: int) -> None:
    assert slurm_time(written) == read
    assert limit_s(read) == seconds


def test_saving_begins_early_enough_for_the_checkpoint() -> None:
    assert grace_s(0, SlurmSpec()) == 60
    assert grace_s(300_000_000 * 12, SlurmSpec()) == 100
    assert grace_s(10**12, SlurmSpec(grace="2 min")) == 120
    assert "--signal=B:USR1@100\n" in render_job(replace(PLAIN, grace_s=100))
    with pytest.raises(UserError, match="leaves no time to train"):
        render_job(replace(PLAIN, time="00:02:00"))


def test_sweeps_make_every_combination() -> None:
    trials = sweep_trials(["train.lr=1e-5,3e-5", 'freeze.layers=0-3,"1,2,3"'])
    assert [t.overrides for t in trials] == [
        ("train.lr=1e-5", "freeze.layers=0-3"),
        ("train.lr=1e-5", "freeze.layers=1,2,3"),
        ("train.lr=3e-5", "freeze.layers=0-3"),
        ("train.lr=3e-5", "freeze.layers=1,2,3"),
    ]
    assert [t.name for t in trials][:2] == ["000-lr=1e-5,layers=0-3", "001-lr=1e-5,layers=1,2,3"]
    assert sweep_trials(["model.name=a/b,c d"])[0].name == "000-name=a_b"
    assert [t.overrides for t in sweep_trials(["train.lr=1e-5,\n3e-5"])] == [("train.lr=1e-5",), ("train.lr=3e-5",)]
    assert sweep_trials([]) == ()


@pytest.mark.parametrize(
    ("sweeps", "words"),
    [
        (["train.lr"], "write key=value,value"),
        (["train.lr="], "write key=value,value"),
        (["train.lr=1,,2"], "write key=value,value"),
        (["name=a,b"], "can't be swept"),
        (["train.lr=1,2", "train.lr=3"], "given twice"),
        (["train.lr=1e-5,3e-5,1e-5"], "1e-5 is given twice"),
        (["launch.slurm.partition=a,b"], "all runs of a sweep are one job"),
        ([f"train.seed={','.join(map(str, range(40)))}", f"train.lr={','.join(map(str, range(40)))}"], "1600 runs"),
    ],
)
def test_wrong_sweeps(sweeps: list[str], words: str) -> None:
    with pytest.raises(UserError, match=words):
        sweep_trials(sweeps)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"to": "slrum"}, "Did you mean slurm?"),
        ({"gpus_per_node": 2, "processes_per_node": 4}, "--gpus-per-node 0 trains on CPUs"),
        ({"gpus_per_node": 0, "gpu_memory_bytes": 1}, "--gpu-memory has no effect"),
        ({"to": "dstack", "time": "4 h"}, "--time is SLURM's"),
        ({"to": "kubernetes", "sweep": ("a=1",)}, "--sweep is SLURM's"),
        ({"time": "90"}, "has no unit"),
        ({"price": "/nowhere.yaml"}, "no such file"),
        ({"price": "/nowhere.yaml", "gpus_per_node": 0}, "a price list is of GPUs"),
    ],
)
def test_wrong_flags(options: dict[str, object], words: str) -> None:
    with pytest.raises(UserError, match=words):
        check_request(**options)


def test_flags_are_read_as_slurm_writes_them() -> None:
    assert check_request(time="90 min", partition="p").time == "01:30:00"


def test_quoting_is_undone_by_the_shell() -> None:
    line = next(line for line in render_job(JOBS["hostile"]).splitlines() if line.startswith("config="))
    assert shlex.split(line) == [f"config=/data/{HOSTILE}/config.yaml"]
