"""Commands that train or probe: a job started on this machine, and one worker of a job."""

import json
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from dist_finetune.cli.options import Config, Fresh, Gpus, Overrides, Processes, RunFolder, load
from dist_finetune.errors import UserError
from dist_finetune.launchers.environment import GPUS_PER_NODE, refuse_run_in_many, world_from_environment
from dist_finetune.launchers.local import count_gpus, launch_local, num_workers
from dist_finetune.signals import follow_launcher, hold_back_signals, let_signals_through
from dist_finetune.verdict import tell_job_script

if TYPE_CHECKING:
    from dist_finetune.spec import Spec


def run(
    config: Config,
    overrides: Overrides = None,
    gpus: Gpus = None,
    processes: Processes = None,
    fresh: Fresh = False,
) -> None:
    """Train on this machine: all visible GPUs, or CPU processes where there are none."""
    from dist_finetune.run_folder import folder_of  # with the models of the config, as in `load`

    spec = load(config, overrides)
    folder = folder_of(spec)
    arguments = [config, *(overrides or ())]
    raise typer.Exit(_launch(arguments, spec, folder, gpus, processes, fresh))


def resume(
    run_folder: RunFolder,
    overrides: Overrides = None,
    gpus: Gpus = None,
    processes: Processes = None,
    allow: Annotated[bool, typer.Option("--allow", help="Also accept other epochs, rates or precision.")] = False,
) -> None:
    """Go on from a run's newest good checkpoint, with any strategy and any number of processes."""
    config = run_folder / "config.yaml"
    if not config.exists():
        raise UserError(
            f"{run_folder} is no run of this tool: it has no config.yaml. Name the folder that `run` printed."
        )
    for word in overrides or ():
        if word.partition("=")[0] in ("name", "output"):
            raise UserError(
                f"{word} has no effect: resume goes on in {run_folder}; for another run start `run` with it"
            )
    # The folder may have moved since, so where it is now counts, not what its config says.
    moved = [
        f"output={json.dumps(str(run_folder.absolute().parent))}",
        f"name={json.dumps(run_folder.absolute().name)}",
    ]
    arguments = [str(config), *(overrides or ()), *moved]
    spec = load(arguments[0], arguments[1:])
    changes = ["--changes", "allow" if allow else "layout"]
    raise typer.Exit(_launch([*arguments, *changes], spec, run_folder, gpus, processes, False))


def train(
    config: Config,
    overrides: Overrides = None,
    fresh: Fresh = False,
    changes: Annotated[
        Literal["none", "layout", "allow"], typer.Option(hidden=True, help="What may differ from the run that goes on.")
    ] = "none",
) -> None:
    """Be one worker of the job that torchrun, accelerate launch, deepspeed or srun started; alone, a job of one."""
    follow_launcher()
    spec = load(config, overrides)
    world = world_from_environment(os.environ)
    if spec.task != "features" and spec.strategy != "auto":
        hold_back_signals()  # until training can answer them with a checkpoint
        if world.rank == 0:
            tell_job_script("running")
    else:
        let_signals_through()
    from torch.distributed.elastic.multiprocessing.errors import record

    from dist_finetune.worker import run_task

    # record: torchrun shows the error of the rank that failed first, last
    record(run_task)(spec, fresh=fresh, changes=changes)


def features(
    config: Config,
    overrides: Overrides = None,
    gpus: Gpus = None,
    processes: Processes = None,
    fresh: Fresh = False,
) -> None:
    """Extract features at several depths and compare softmax and SVM heads on them; no layer is trained."""
    from dist_finetune.features.bare import without_activations
    from dist_finetune.run_folder import folder_of

    arguments = [config, *(overrides or ())]
    spec = load(config, overrides)
    if spec.task != "features":
        # A config for training can be used as it is: what only training needs is set aside, in a folder of its own.
        name = f"name={json.dumps(f'{spec.name}-features')}"
        cache = json.dumps(without_activations(spec.cache).model_dump(mode="json"))
        aside = ["freeze=none", "phases=[]", "strategy=null", "data.augment=false", f"cache={cache}"]
        arguments += ["task=features", name, *aside]
        spec = load(config, arguments[1:])
    folder = folder_of(spec)
    raise typer.Exit(_launch(arguments, spec, folder, gpus, processes, fresh))


def advise(config: Config, overrides: Overrides = None) -> None:
    """Measure by probes whether to extract features or to fine-tune, and what; print the config that follows."""
    spec = load(config, overrides)
    import torch

    from dist_finetune.features.accelerate import accelerate_heads

    accelerate_heads(torch.cuda.is_available())
    from dist_finetune.advise.run import advise as advise_rank

    advise_rank(spec)


def selfcheck(
    config: Config,
    overrides: Overrides = None,
    gpus: Annotated[int | None, typer.Option(help="Compare one GPU with so many; left out: all visible ones.")] = None,
    processes: Annotated[
        int | None, typer.Option(help="Compare one process with so many; without GPUs the default is 2.")
    ] = None,
    steps: Annotated[int, typer.Option(min=1, help="Optimizer steps to compare.")] = 20,
) -> None:
    """Train a config's first steps on one process and on several, and say whether the numbers are the same."""
    from dist_finetune.selfcheck import check_config

    found = check_config(config, overrides or (), gpus, processes, steps)
    typer.echo(found.lines())
    raise typer.Exit(0 if found.parted is None else 1)


def _launch(
    arguments: list[str], spec: "Spec", folder: Path, gpus: int | None, processes: int | None, fresh: bool
) -> int:
    """Starts the workers of a run on this machine and returns their exit code."""
    refuse_run_in_many(os.environ)
    available = count_gpus()
    world_size = num_workers(gpus, processes, available)
    if spec.task != "features":
        spec.train.rows_per_process(world_size)  # told before so many processes import all that they need to tell it
    # where torch sees none of them, workers say so instead of training on the CPU
    env = {**os.environ, GPUS_PER_NODE: str(world_size)} if available else os.environ
    before = _identity(folder) if fresh else None

    def folder_ready() -> bool:
        return os.access(folder / "config.yaml", os.F_OK) and _identity(folder) != before

    debug, anew = ["--debug"] if "--debug" in sys.argv else [], ["--fresh"] if fresh else []
    worker = [sys.executable, "-m", "dist_finetune", *debug, "train", *arguments, *anew]
    return launch_local(worker, world_size, folder / "logs", folder_ready, env, spec.launch.max_restarts)


def _identity(folder: Path) -> int | None:
    """Tells a folder from another that took its name."""
    return folder.stat().st_ino if os.access(folder, os.F_OK) else None
