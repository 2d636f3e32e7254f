"""doctor and the preflight: what each line says where things are right, and where they are not."""

import argparse
import os
import re
import shutil
import socket
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import wandb
from harness import finish, free_port, start_apart
from job_process import PROGRAMS, accelerate_command, deepspeed_command, mpirun_command, needs_mpirun, torchrun_command

from dist_finetune.cache.decide import CacheDecision
from dist_finetune.cli import main
from dist_finetune.doctor import examine
from dist_finetune.doctor_local import (
    Finding,
    disk_finding,
    gpu_findings,
    hub_finding,
    most_cache_bytes,
    version_findings,
    wandb_finding,
)
from dist_finetune.doctor_ranks import agreement_findings
from dist_finetune.errors import UserError
from dist_finetune.plan import Plan
from dist_finetune.preflight import interface_to
from dist_finetune.price import GpuPrice, cost_lines, read_prices, run_costs
from dist_finetune.spec import LaunchSpec, Spec
from dist_finetune.spec_file import load_spec
from dist_finetune.world import World

CSV = "text,label\n" + "".join(f"word {i} good,a\nword {i} bad,b\n" for i in range(30))
JOIN = """
import sys
from dist_finetune.errors import UserError
from dist_finetune.spec import LaunchSpec
from dist_finetune.world import join_world
try:
    with join_world(LaunchSpec(join_timeout=4)):
        pass
except UserError as error:
    sys.exit(f"refused: {error}")
"""


# A rank on a machine of its own, as far as it can tell, on which something is wrong.
EXAMINE = """
import importlib.metadata, os, socket, sys, time
rank, own, *faults = int(os.environ["RANK"]), *sys.argv[1:]
os.chdir(own)
socket.gethostname = lambda: f"n{rank}"
if f"clock-{rank}" in faults:
    real_time = time.time
    time.time = lambda: real_time() - 5
if f"version-{rank}" in faults:
    real_version = importlib.metadata.version
    importlib.metadata.version = lambda name: "1.2.3" if name == "timm" else real_version(name)
import torch.distributed as dist
if f"sums-{rank}" in faults:
    real_sum = dist.all_reduce  # ranks that meet add up a single number
    dist.all_reduce = lambda values, *a, **k: (real_sum(values, *a, **k), values[1:2].add_(1))[0]
if f"slow-{rank}" in faults:
    real_send = dist.send
    dist.send = lambda *a, **k: (time.sleep(0.3), real_send(*a, **k))
from dist_finetune.doctor import examine
sys.exit(examine(None, print))
"""


def spec(**changes: Any) -> Spec:
    return load_spec({"name": "x", "model": {"name": "m"}, "data": {"train": "d"}, **changes})


MakePlan = Callable[..., Plan]


@pytest.fixture(scope="module")
def planning(tmp_path_factory: pytest.TempPathFactory) -> MakePlan:
    """Plans for MiniLM on two GPUs, with these sections of the config."""
    from dist_finetune.plan import for_planning, make_plan
    from dist_finetune.topology import Topology

    folder = tmp_path_factory.mktemp("data")
    (folder / "rows.csv").write_text(CSV)
    data = {"train": str(folder / "rows.csv"), "validation": 0.2}

    def plan(**changes: Any) -> Plan:
        wanted = {"name": "x", "model": {"name": "demo:minilm"}, "data": data, "output": str(folder / "runs")}
        return make_plan(for_planning(load_spec({**wanted, **changes}), 2), Topology(1, 2, "cuda"))

    return plan


@pytest.fixture(scope="module")
def planned(planning: MakePlan) -> Plan:
    return planning(freeze="backbone", cache="off")


def test_one_machine_gets_a_line_for_each_question(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hub"))
    monkeypatch.setenv("WANDB_API_KEY", "0123456789abcdef")
    with pytest.raises(SystemExit) as ended:
        main(["doctor"])
    lines = capsys.readouterr().out.splitlines()
    assert ended.value.code == 0, lines
    about = [re.split(r"\s{2,}", line)[1] for line in lines if re.match(r"(ok|warn|fail)\s", line)]
    assert about[0].startswith("ranks")
    assert {"versions", "GPUs", "disk", "hub", "W&B", "run folder", "hub cache"} <= set(about)
    assert lines[-1].startswith("0 to mend")
    assert "0123456789abcdef" not in "\n".join(lines)
    assert list(tmp_path.iterdir()) == [], "it leaves no file and no folder behind"


def test_a_place_that_can_not_be_looked_at_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As another user's folder; a name that is too long does the same to root."""
    (tmp_path / "rows.csv").write_text(CSV)
    (tmp_path / "c.yaml").write_text("model: {name: demo:minilm}\ndata: {train: rows.csv}\ncache: off\n")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as ended:
        main(["doctor", "c.yaml", f"output={'x' * 300}"])
    out = capsys.readouterr().out
    assert ended.value.code == 1, out
    assert re.search(rf"^ok    disk +\S+ GiB free at {re.escape(str(tmp_path))}, ", out, re.MULTILINE), out
    assert re.search(r"^fail  run folder .* can't write there \(File name too long\)", out, re.MULTILINE), out


def test_a_wrong_config_is_a_failure_with_its_reason(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "c.yaml").write_text("model: {name: demo:minilm}\ndata: {train: nothing.csv}\n")
    with pytest.raises(SystemExit) as ended:
        main(["doctor", "c.yaml"])
    out = capsys.readouterr().out
    assert ended.value.code == 1
    assert re.search(r"^fail  config +.*nothing\.csv", out, re.MULTILINE), out


@pytest.mark.parametrize(
    ("more", "code", "line"),
    [("", 0, r"^ok    config +ddp, fp32;"), ("freeze: norms", 1, r"^fail  config +.*freeze would have no effect")],
)
def test_a_feature_run_is_looked_at_as_such(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], more: str, code: int, line: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "rows.csv").write_text(CSV)
    (tmp_path / "c.yaml").write_text(
        f"task: features\nmodel: {{name: demo:minilm}}\ndata: {{train: rows.csv}}\n{more}\n"
    )
    with pytest.raises(SystemExit) as ended:
        main(["doctor", "c.yaml"])
    out = capsys.readouterr().out
    assert ended.value.code == code, out
    assert re.search(line, out, re.MULTILINE), out


def test_versions_are_compared_with_what_the_package_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    assert [f.state for f in version_findings()] == ["ok"]
    real = __import__("importlib.metadata").metadata.version
    monkeypatch.setattr("importlib.metadata.version", lambda name: "4.50.0" if name == "transformers" else real(name))
    (finding,) = version_findings()
    assert (finding.state, finding.text) == ("fail", "transformers 4.50.0, needs transformers>=5")
    assert finding.todo == 'pip install "transformers>=5"'


def test_a_package_that_another_can_not_work_with_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    real = __import__("importlib.metadata").metadata.version
    monkeypatch.setattr("importlib.metadata.version", lambda name: "0.0.1" if name == "tokenizers" else real(name))
    found = [f for f in version_findings() if "transformers" in f.text]
    assert [(f.state, f.text.partition(", but ")[2]) for f in found] == [("warn", "tokenizers is 0.0.1")]
    assert "needs tokenizers" in found[0].text


def test_torchvision_of_another_torch_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.__version__", "2.9.0+cu128")
    found = [f for f in version_findings() if "torchvision" in f.text]
    assert len(found) == 1
    assert "is built for torch" in found[0].text


@pytest.mark.parametrize(
    ("present", "visible", "processes", "state", "words"),
    [
        (4, 0, 4, "fail", r"4 are there, but torch \S+ \(built for .*\) can use none"),
        (4, 2, 4, "fail", r"2 x H100, 80 GiB, but 4 were given to the job \(SLURM_GPUS_ON_NODE\)"),
        (4, 1, 4, "ok", r"1 x H100, 80 GiB"),  # as under srun --gpus-per-task=1
        (4, 4, 1, "warn", r"4 x H100, 80 GiB; processes on this machine: 1, a GPU each"),
        (4, 4, 4, "ok", r"4 x H100, 80 GiB"),
        (4, 4, None, "ok", r"4 x H100, 80 GiB"),
    ],
)
def test_gpus_are_told_against_those_given_and_the_processes(
    present: int, visible: int, processes: int | None, state: str, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible:  # with none of those that were given, the words are another test's
        monkeypatch.setenv("SLURM_GPUS_ON_NODE", "4")
    monkeypatch.setattr("dist_finetune.doctor_local.count_gpus", lambda: present)
    monkeypatch.setattr("torch.cuda.is_available", lambda: visible > 0)
    monkeypatch.setattr("torch.cuda.device_count", lambda: visible)
    monkeypatch.setattr("torch.cuda.get_device_name", lambda _: "H100")
    monkeypatch.setattr("torch.cuda.get_device_properties", lambda _: SimpleNamespace(total_memory=80 * 2**30))
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(2**40, 0, 2**40))
    (finding,) = gpu_findings(processes)
    assert (finding.state, finding.about) == (state, "GPUs")
    assert re.fullmatch(words, finding.text), finding.text
    assert bool(finding.todo) == (state != "ok")


def test_cores_are_those_that_this_process_may_run_on(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a SLURM job, which has a part of its machine."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    cores = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(cores)})
    try:
        assert gpu_findings(1)[0].text == "none; training runs on 1 CPU core"
    finally:
        os.sched_setaffinity(0, cores)


def test_ranks_with_different_kinds_of_gpu_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    others = {"A100": "H100"}  # all else is the same on the other rank
    monkeypatch.setattr("torch.cuda.get_device_name", lambda _: "A100")
    monkeypatch.setattr(
        "dist_finetune.doctor_ranks.gather_objects", lambda mine: [mine, others[mine] if mine == "A100" else mine]
    )
    world = World("torchrun", 0, 0, 2, 2, torch.device("cuda", 0))
    (finding,) = agreement_findings(world)
    assert (finding.state, finding.text) == ("warn", "ranks have different ones: A100, H100")
    others["A100"] = "A100"
    assert agreement_findings(world) == []


def test_a_torchrun_that_sigusr1_kills_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """An older one, which knows no other signals: SLURM's warning would end it before anything is saved."""
    old = argparse.ArgumentParser()
    old.add_argument("training_script")
    monkeypatch.setattr("dist_finetune.doctor_local._torchrun_parser", lambda: old)
    (finding,) = version_findings()
    assert finding.state == "warn"
    assert re.fullmatch(r"torchrun of torch \S+ dies of SIGUSR1, by which SLURM warns of the time limit", finding.text)
    assert "--signals-to-handle" in finding.todo


def test_a_full_disk_is_told_against_the_plan(planned: Plan, monkeypatch: pytest.MonkeyPatch) -> None:
    assert disk_finding(planned.spec, planned).state == "ok"
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(2**30, 2**30 - 1000, 1000))
    finding = disk_finding(planned.spec, planned)
    assert finding.state == "fail"
    assert "2 checkpoints and the model" in finding.text


def test_the_cache_counts_where_it_is_on(planned: Plan, monkeypatch: pytest.MonkeyPatch) -> None:
    """60 rows (54 to train on, 6 held out) of up to 512 tokens, 384 numbers wide, in fp32."""
    most = 60 * planned.data.max_length * 384 * 4
    assert most_cache_bytes(planned) == most
    cached = replace(planned, cache=(CacheDecision(True, "asked for"),))
    finding = disk_finding(planned.spec, cached)
    assert finding.state == "ok"
    assert f"the cache takes at most {most / 2**30:.1f} GiB at" in finding.text
    model = planned.widest.manifest.num_trainable + planned.widest.manifest.num_frozen
    free = 4 * model + 3 * planned.costs.checkpoint_bytes + most // 2
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(2**40, 0, free))
    assert disk_finding(planned.spec, planned).state == "ok"
    finding = disk_finding(planned.spec, cached)
    assert (finding.state, "goes on without a cache" in finding.todo) == ("warn", True)


def test_a_text_model_without_vectors_may_fill_the_quota(planned: Plan) -> None:
    phase = planned.widest
    records = tuple(record for record in phase.manifest.records if len(record.shape) != 1)
    bare = replace(planned, phases=(replace(phase, manifest=replace(phase.manifest, records=records)),))
    assert most_cache_bytes(bare) == planned.spec.cache.quota


def test_hub_and_wandb_state(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("WANDB_API_KEY", "WANDB_MODE", "HF_HUB_OFFLINE", "HTTPS_PROXY", "https_proxy", "WANDB_BASE_URL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("WANDB_CONFIG_DIR", str(tmp_path))
    (tmp_path / "settings").write_text("[default]\nbase_url = http://wandb.site:8080\n")  # by `wandb login --host`
    wandb.teardown()  # it remembers its settings
    assert wandb_finding(spec(track={"wandb": "online"})).state == "fail"
    assert wandb_finding(spec(track={"wandb": "off"})).state == "ok"
    assert wandb_finding(None).state == "warn"
    monkeypatch.setenv("WANDB_MODE", "disabled")
    assert wandb_finding(None) == Finding("ok", "W&B", "off (WANDB_MODE)")
    monkeypatch.delenv("WANDB_MODE")
    (tmp_path / "netrc").write_text(f"machine wandb.site:8080 login user password {'a' * 40}\n")
    (tmp_path / "netrc").chmod(0o600)
    assert wandb_finding(spec(track={"wandb": "online"})) == Finding("ok", "W&B", "logged in")
    monkeypatch.setenv("WANDB_MODE", "offline")
    assert wandb_finding(None) == Finding("ok", "W&B", "offline; upload later with `wandb sync`")
    assert wandb_finding(spec(track={"wandb": "online"})).text == "logged in", "the config is asked first, as in a run"
    wandb.teardown()
    with socket.create_server(("127.0.0.1", 0)) as server:
        monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{server.getsockname()[1]}")
        assert hub_finding() == Finding("ok", "hub", "127.0.0.1 can be reached")
        monkeypatch.setenv("HTTPS_PROXY", f"127.0.0.1:{server.getsockname()[1]}")
        assert hub_finding() == Finding("ok", "hub", "127.0.0.1 can be reached"), "a proxy without http://"
    assert "can't be reached from here by the proxy of HTTPS_PROXY (" in hub_finding().text
    monkeypatch.setenv("HTTPS_PROXY", "http://proxy:port")
    assert hub_finding().state == "warn"
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert hub_finding().state == "ok"


def test_the_interface_that_reaches_a_host_is_named() -> None:
    assert interface_to("127.0.0.1") == "lo (127.0.0.1)"
    assert "not found" in interface_to("no.such.host.invalid")


def test_a_task_that_can_not_go_on_gives_its_own_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    """srun and mpirun set no RANK, and a second task of a machine doesn't look at it again."""
    for name, value in {"RANK": 1, "SIZE": 2, "LOCAL_RANK": 1, "LOCAL_SIZE": 2}.items():
        monkeypatch.setenv(f"OMPI_COMM_WORLD_{name}", str(value))
    for name, value in {"MASTER_ADDR": "n1", "MASTER_PORT": "29511"}.items():
        monkeypatch.setenv(name, value)
    for error, words in ((RuntimeError("Timed out"), "rank 1 on .* could not go on"), (UserError("absent"), "absent")):

        def fail(_: LaunchSpec, error: Exception = error) -> None:
            raise error

        monkeypatch.setattr("dist_finetune.doctor.join_world", fail)
        said: list[str] = []
        assert examine(None, said.append) == 1
        assert re.match(f"fail  ranks +{words}", said[0]), said


def test_alone_it_looks_at_what_run_would_start_here(planned: Plan, monkeypatch: pytest.MonkeyPatch) -> None:
    """A process for each GPU: that doctor itself is one process is no fault of the machine."""
    seen: list[tuple[int, int | None]] = []

    def local_findings(spec: Spec, plan: Plan, local_world_size: int | None) -> list[Finding]:
        seen.append((plan.topology.world_size, local_world_size))
        return []

    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    monkeypatch.setattr("dist_finetune.doctor.visible_gpus", lambda: 4)
    monkeypatch.setattr("dist_finetune.doctor.local_findings", local_findings)
    said: list[str] = []
    assert examine(planned.spec, said.append) == 0, said
    assert seen == [(4, None)]
    assert re.search(
        r"^ok    config +ddp, fp32 on 4 GPUs; Accelerate sees one process too$", "\n".join(said), re.MULTILINE
    )


@pytest.mark.dist
def test_absent_ranks_are_named_by_those_that_are_there(tmp_path: Path) -> None:
    port = free_port()
    for machine in [start_apart(rank, 3, port, JOIN, tmp_path / f"n{rank}") for rank in (0, 2)]:
        assert "refused: rank 1 of 3 did not arrive within 4 s (node 1, counted from 0)" in machine.end(90).stderr


@pytest.mark.dist
def test_a_first_rank_that_is_absent_is_named(tmp_path: Path) -> None:
    done = start_apart(1, 2, free_port(), JOIN, tmp_path).end(90)
    assert done.returncode == 1
    assert "found nobody at 127.0.0.1:" in done.stderr
    assert "rank 0 is absent" in done.stderr


@pytest.mark.dist
@pytest.mark.parametrize(
    ("command", "launcher"),
    [
        (torchrun_command, "torchrun"),
        pytest.param(accelerate_command, "accelerate launch", marks=pytest.mark.slow),
        pytest.param(deepspeed_command, "deepspeed", marks=pytest.mark.slow),
        pytest.param(mpirun_command, "mpirun", marks=[pytest.mark.slow, needs_mpirun]),
    ],
)
def test_two_ranks_are_examined_together(tmp_path: Path, command: Callable[[Path], list[str]], launcher: str) -> None:
    (tmp_path / "rows.csv").write_text(CSV)
    config = "model: {name: demo:minilm}\ndata: {train: rows.csv}\nfreeze: backbone\ntrack: {wandb: off}\n"
    path = tmp_path / "c.yaml"
    path.write_text(config + "shard: {strategy: zero2}\ntrain: {global_batch_size: 8}\n")
    *launch, train, _ = command(path)
    assert train == "train"
    done = finish([*launch, "doctor", str(path)], 150, tmp_path, HF_HOME=str(tmp_path / "hub"), PATH=PROGRAMS)
    out = done.stdout
    assert done.returncode == 0, out + done.stderr
    assert re.search(rf"^ok    ranks +2 ranks by {launcher} on 1 machine", out, re.MULTILINE), out
    assert re.search(r"^ok    all-reduce +sums are right, \d+\.\d\d GB/s", out, re.MULTILINE)
    assert re.search(r"^ok    slowest rank slowest is rank 1 on .*GB/s", out, re.MULTILINE)
    assert re.search(r"^ok    clocks +within 0\.\d+ s", out, re.MULTILINE)
    assert re.search(r"^ok    config +zero2, fp32; Accelerate and DeepSpeed see 2 processes too$", out, re.MULTILINE)
    assert out.count("versions") == 1, "both ranks say the same, once"


def examined(folder: Path, faults: Sequence[str], shared: bool) -> tuple[list[int], str]:
    """Exit codes of a doctor on three ranks, each on a machine of its own, and what rank 0 said."""
    port, machines = free_port(), []
    for rank in range(3):
        own = folder if shared else folder / f"n{rank}"
        own.mkdir(exist_ok=True)
        if f"blocked-{rank}" in faults:
            (own / "runs").write_text("a file where the folder should be")
        env = {"HF_HUB_OFFLINE": "1", "WANDB_MODE": "offline", "HF_HOME": str(own / "hub")}
        machines.append(start_apart(rank, 3, port, EXAMINE, folder / f"output{rank}", [own, *faults], **env))
    done = [machine.end(120) for machine in machines]
    assert not any(rank.stdout for rank in done[1:]), "rank 0 speaks for all"
    return [rank.returncode for rank in done], done[0].stdout + done[0].stderr


@pytest.mark.dist
def test_what_is_wrong_on_one_of_three_machines_is_named(tmp_path: Path) -> None:
    codes, out = examined(tmp_path, ["clock-1", "version-1", "slow-2", "sums-1"], shared=False)
    assert codes == [1, 1, 1], out
    assert re.search(r"^ok    ranks +3 ranks by variables on 3 machines \(n0, n1, n2\), cpu", out, re.MULTILINE), out
    assert re.search(r"^fail  versions +timm is \S+ on rank 0 and 1\.2\.3 on rank 1$", out, re.MULTILINE), out
    assert re.search(r"^fail  all-reduce +ranks \[1\] got wrong sums$", out, re.MULTILINE), out
    assert re.search(r"^warn  slowest rank slowest is rank 2 on n2, 0\.\d+ GB/s to and from rank 0", out, re.MULTILINE)
    assert re.search(r"^warn  clocks +rank 1's clock is [45]\.\d s behind rank [02]'s", out, re.MULTILINE), out
    assert re.search(r"^fail  run folder +\S+/runs is another folder on each machine$", out, re.MULTILINE), out
    assert re.search(r"^ok    hub cache +\S+ is local to each machine: each fetches", out, re.MULTILINE), out
    assert out.count("-> ") >= 4, "each comes with what to do"


@pytest.mark.dist
def test_shared_folders_are_told_from_those_that_one_machine_can_not_write(tmp_path: Path) -> None:
    codes, out = examined(tmp_path, [], shared=True)
    assert codes == [0, 0, 0], out
    assert re.search(r"^ok    run folder +\S+/runs is shared by all machines$", out, re.MULTILINE), out
    assert re.search(r"^ok    hub cache +\S+/hub is shared by all machines$", out, re.MULTILINE), out
    assert not (tmp_path / "runs").exists(), "it leaves nothing behind"
    codes, out = examined(tmp_path, ["blocked-2"], shared=False)
    assert codes == [1, 1, 1]
    assert re.search(r"^fail  run folder +\S+: rank 2 on n2 can't write there \(File exists\)$", out, re.MULTILINE), out


# --- prices ----------------------------------------------------------------------------------------------------------


def test_hours_and_price_follow_from_the_operations(planned: Plan) -> None:
    prices = {"slow": GpuPrice(per_hour=1, tflops=10, efficiency=0.5), "fast": GpuPrice(per_hour=1, tflops=100)}
    fast, slow = run_costs(planned, prices)
    assert (fast.gpu, slow.gpu) == ("fast", "slow")
    assert slow.hours == pytest.approx(fast.hours * 100 * 0.35 / (10 * 0.5))
    assert fast.price == pytest.approx(fast.hours * 2), "two GPUs"
    assert planned.costs.forecast is not None
    rows, forecast, epochs = planned.data.num_rows, planned.costs.forecast, planned.spec.train.epochs
    operations = epochs * rows["train"] * forecast.frozen_flops
    operations += (1 + epochs) * rows["validation"] * forecast.forward_flops  # also before the first step
    assert fast.hours * 3600 * 100e12 * 0.35 * 2 == pytest.approx(operations)
    prices = {"dear": GpuPrice(per_hour=1000, tflops=0.0001), "cheap": GpuPrice(per_hour=0.5, tflops=100)}
    for plans in ([planned], [planned] * 3):
        hours, price = (sum(getattr(run_costs(plan, prices)[1], name) for plan in plans) for name in ("hours", "price"))
        runs = " for all 3 runs" if len(plans) == 3 else ""
        cheap, dear = cost_lines(plans, prices)
        assert dear == f"price     dear x 2: {hours:,.2f} h, {price:,.2f}{runs}"
        assert re.fullmatch(rf"price     cheap x 2: \d+\.\d min, 0\.\d\d{runs}", cheap)


def test_a_cached_prefix_is_paid_for_once(planning: MakePlan) -> None:
    """10 passes over 80 % of the rows, each with an evaluation of the rest."""
    prices = {"gpu": GpuPrice(per_hour=1, tflops=0.001, efficiency=1)}
    head = {"freeze": "backbone", "train": {"epochs": 10, "skip_unread": False}}  # features are of all tokens
    (off,), (on,), (features,) = (
        run_costs(planning(**changes), prices)
        for changes in ({**head, "cache": "off"}, {**head, "cache": "on"}, {"task": "features"})
    )
    assert on.hours == pytest.approx(off.hours / 10, rel=0.1), "the head itself is next to nothing"
    assert features.hours == pytest.approx(on.hours, rel=0.01), "each row once through the model"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[1]", "has an entry for each GPU"),
        ("a: {per_hour: 1}\nb: {per_hour: -1, tflops: 2}", "tflops"),
        ("T4: {tflops: 2}\nT4: {tflops: 2}", 'yaml:2:1: not valid YAML: found duplicate key "T4"'),
        ("a: {per_hour: 1\nb: {", "yaml:2:2: not valid YAML: expected ',' or '}'"),
        ("T4: {per_hour: 1, tflops: 2, efficency: 1}", "efficency"),
    ],
)
def test_wrong_price_lists(tmp_path: Path, text: str, words: str) -> None:
    (tmp_path / "p.yaml").write_text(text)
    with pytest.raises(UserError, match=words):
        read_prices(tmp_path / "p.yaml")
    with pytest.raises(UserError, match="no price list"):
        read_prices(tmp_path / "absent.yaml")
