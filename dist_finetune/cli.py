"""The command line. Heavy imports stay inside the commands, so that `--help` and a wrong config answer at once."""

import gc
import json
import logging
import os
import re
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from dist_finetune import __version__, cli_model, cli_report
from dist_finetune.errors import DistFinetuneError, PlanError, UserError
from dist_finetune.launchers.brought import brought_settings
from dist_finetune.launchers.environment import refuse_run_in_many, world_from_environment
from dist_finetune.launchers.local import count_gpus, launch_local, num_workers
from dist_finetune.signals import follow_launcher, hold_back_signals

if TYPE_CHECKING:
    from dist_finetune.spec import Spec

GC_THRESHOLDS = (100_000, 50, 100)  # Python's own look for cycles every 700 objects takes a tenth of a start's time
LOCAL_RANK_FLAG = re.compile(r"--local[_-]rank(=\d+)?")
app = typer.Typer(
    help="Fine-tune large BERTs and CNNs over many GPUs, with the frozen layers truly frozen.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)

Config = Annotated[str, typer.Argument(metavar="CONFIG", help="The config file (YAML).", show_default=False)]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="KEY=VALUE", help="Overrides by dotted key, such as train.lr=3e-5.", show_default=False),
]
Gpus = Annotated[int | None, typer.Option(help="Use so many GPUs; left out: all visible ones.")]
Processes = Annotated[
    int | None, typer.Option(help="Start so many processes; with GPUs each has one, without any the default is 1.")
]
Fresh = Annotated[bool, typer.Option("--fresh", help="Start anew; a run folder of the same name is kept aside.")]


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the command and ends the process: exit code 0 done, 1 failed, 2 wrong input, 75 stopped and resumable."""
    gc.set_threshold(*GC_THRESHOLDS)
    try:
        _main(arguments)
    except SystemExit as end:
        leave_at_once(end.code)
        raise


def leave_at_once(code: object) -> None:
    """Ends a rank of several whose work is done. Threads of torch, DeepSpeed and gloo now and then abort ("terminate
    called without an active exception") or hang while the interpreter takes itself apart, and hold the job."""
    try:
        is_one_of_several = world_from_environment(os.environ).world_size > 1
    except UserError:
        return  # which has been said
    if is_one_of_several and "torch" in sys.modules and isinstance(code, int | None):
        sys.stdout.flush()
        sys.stderr.flush()
        logging.shutdown()
        os._exit(code or 0)


def _main(arguments: Sequence[str] | None) -> None:
    given = list(sys.argv[1:] if arguments is None else arguments)
    # Wherever it stands: who adds it repeats the last command.
    debug = ["--debug"] if "--debug" in given else []
    try:
        rest = _without_launcher_flags([word for word in given if word != "--debug"])
        app([*debug, *rest], prog_name="dist-finetune")
    except DistFinetuneError as error:
        if debug:
            traceback.print_exc()
        # One write, so that lines of several ranks on one terminal don't mix.
        sys.stderr.write(f"error: {error}\n")
        sys.stderr.flush()
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        sys.exit(130)


def _without_launcher_flags(arguments: list[str]) -> list[str]:
    """The user's own arguments: `deepspeed` puts --local_rank=N first, and sets LOCAL_RANK as well."""
    kept, words = [], iter(arguments)
    for word in words:
        found = LOCAL_RANK_FLAG.fullmatch(word)
        if not found:
            kept.append(word)
        elif not found[1]:
            next(words, None)
    brought = brought_settings({}, kept)
    if brought:
        flag, value = next(iter(brought.items()))
        raise UserError(
            f"{flag} {value}: DeepSpeed's settings follow from the config. Put extra keys under shard.deepspeed of the "
            "config, and leave the flag out."
        )
    return kept


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"dist-finetune {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version and exit.")
    ] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
) -> None:
    pass


@app.command()
def run(
    context: typer.Context,
    config: Config,
    overrides: Overrides = None,
    gpus: Gpus = None,
    processes: Processes = None,
    fresh: Fresh = False,
) -> None:
    """Train on this machine: all visible GPUs, or CPU processes where there are none."""
    spec = _load(config, overrides)
    folder = Path(spec.output) / spec.name
    arguments = [config, *(overrides or ()), *(["--fresh"] if fresh else [])]
    raise typer.Exit(_launch(arguments, folder, gpus, processes, fresh, spec.launch.max_restarts))


@app.command()
def resume(
    run_folder: Annotated[Path, typer.Argument(metavar="RUN", help="The run's folder.", show_default=False)],
    overrides: Overrides = None,
    gpus: Gpus = None,
    processes: Processes = None,
    allow: Annotated[bool, typer.Option("--allow", help="Also accept other epochs or learning rates.")] = False,
) -> None:
    """Go on from a run's newest good checkpoint, with any strategy and any number of processes."""
    config = run_folder / "config.yaml"
    if not config.exists():
        raise UserError(
            f"{run_folder} is no run of this tool: it has no config.yaml. Name the folder that `run` printed."
        )
    # The folder may have moved since, so where it is now counts, not what its config says.
    moved = [
        f"output={json.dumps(str(run_folder.absolute().parent))}",
        f"name={json.dumps(run_folder.absolute().name)}",
    ]
    arguments = [str(config), *(overrides or ()), *moved]
    spec = _load(arguments[0], arguments[1:])
    changes = ["--changes", "allow" if allow else "layout"]
    max_restarts = spec.launch.max_restarts
    raise typer.Exit(_launch([*arguments, *changes], run_folder, gpus, processes, False, max_restarts))


@app.command()
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

    _load(config, overrides)
    found = check_config(config, overrides or (), gpus, processes, steps)
    typer.echo(found.lines())
    raise typer.Exit(0 if found.parted is None else 1)


def _launch(
    arguments: list[str], folder: Path, gpus: int | None, processes: int | None, fresh: bool, max_restarts: int
) -> int:
    """Starts the workers of a run on this machine and returns their exit code."""
    refuse_run_in_many(os.environ)
    world_size = num_workers(gpus, processes, count_gpus())
    before = _identity(folder) if fresh else None

    def folder_ready() -> bool:
        return (folder / "config.yaml").exists() and _identity(folder) != before

    debug = ["--debug"] if "--debug" in sys.argv else []
    worker = [sys.executable, "-m", "dist_finetune", *debug, "train", *arguments]
    return launch_local(worker, world_size, folder / "logs", folder_ready, max_restarts=max_restarts)


def _identity(folder: Path) -> int | None:
    """Tells a folder from another that took its name."""
    return folder.stat().st_ino if folder.exists() else None


@app.command()
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
    spec = _load(config, overrides)
    if spec.task != "features" and spec.strategy != "auto":
        hold_back_signals()  # until training can answer them with a checkpoint
    from torch.distributed.elastic.multiprocessing.errors import record

    from dist_finetune.worker import run_task

    # record: torchrun shows the error of the rank that failed first, last
    record(run_task)(spec, fresh=fresh, changes=changes)


@app.command()
def features(
    config: Config,
    overrides: Overrides = None,
    gpus: Gpus = None,
    processes: Processes = None,
    fresh: Fresh = False,
) -> None:
    """Extract features at several depths and compare softmax and SVM heads on them; no layer is trained."""
    arguments = [config, *(overrides or ())]
    spec = _load(config, overrides)
    if spec.task != "features":
        # A config for training can be used as it is: what only training needs is set aside, in a folder of its own.
        name = f"name={json.dumps(f'{spec.name}-features')}"
        aside = ["freeze=none", "phases=[]", "strategy=null", "data.augment=false"]
        arguments += ["task=features", name, *aside]
        spec = _load(config, arguments[1:])
    folder = Path(spec.output) / spec.name
    arguments += ["--fresh"] if fresh else []
    raise typer.Exit(_launch(arguments, folder, gpus, processes, fresh, spec.launch.max_restarts))


@app.command()
def advise(config: Config, overrides: Overrides = None) -> None:
    """Measure by probes whether to extract features or to fine-tune, and what; print the config that follows."""
    spec = _load(config, overrides)
    from dist_finetune.advise.run import advise as advise_rank

    advise_rank(spec)


@app.command()
def plan(
    config: Config,
    overrides: Overrides = None,
    nodes: Annotated[int, typer.Option(min=1, help="Number of machines.")] = 1,
    gpus_per_node: Annotated[int | None, typer.Option(min=1, help="GPUs of each machine.")] = None,
    gpu_memory: Annotated[str | None, typer.Option(help="Memory of a GPU, such as 80GiB.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the whole plan as JSON.")] = False,
    params: Annotated[bool, typer.Option("--params", help="List every parameter.")] = False,
) -> None:
    """Show what a run would freeze, train and need, without GPU and weights; exit code 1 if it doesn't fit."""
    spec = _load(config, overrides)
    memory = _parse_bytes(gpu_memory) if gpu_memory else None
    from dist_finetune.plan import Topology, local_topology, make_plan
    from dist_finetune.plan_text import render_plan
    from dist_finetune.worker import for_planning

    here = local_topology(gpus_per_node or 1, nodes)
    asks_for_gpus = gpus_per_node is not None or memory is not None
    topology = (
        Topology(nodes, gpus_per_node or 1, "cuda", memory or here.device_memory_bytes) if asks_for_gpus else here
    )
    planned = make_plan(for_planning(spec), topology)
    if as_json:
        typer.echo(json.dumps(planned.to_json(), indent=1))
    else:
        cli_model.show(render_plan(planned, params=params))
    if planned.misfit:
        raise PlanError(planned.misfit)


@app.command()
def submit(
    config: Config,
    overrides: Overrides = None,
    nodes: Annotated[int, typer.Option(min=1, help="Number of machines.")] = 1,
    gpus_per_node: Annotated[int, typer.Option(min=0, help="GPUs of each machine; 0 trains on CPUs.")] = 1,
    processes_per_node: Annotated[
        int | None, typer.Option(min=1, help="With no GPUs: processes on each machine, default 1.")
    ] = None,
    time: Annotated[str | None, typer.Option(help="Time limit of one attempt, such as 04:00:00 or '90 min'.")] = None,
    partition: Annotated[str | None, typer.Option(help="SLURM partition.")] = None,
    gpu_memory: Annotated[str | None, typer.Option(help="Memory of a GPU, such as 80GiB.")] = None,
    to: Annotated[str, typer.Option(help="slurm, skypilot, dstack or kubernetes.")] = "slurm",
    sweep: Annotated[
        list[str] | None, typer.Option(help="key=a,b: a run for each value, and for each combination of several.")
    ] = None,
    price: Annotated[str | None, typer.Option(help="A price list (YAML); shows hours and cost.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only show the job.")] = False,
    fresh: Fresh = False,
) -> None:
    """Plan, show, write and submit a job that saves at its time limit, queues itself again and goes on."""
    from dist_finetune.launchers.request import check_request

    request = check_request(
        to=to,
        nodes=nodes,
        gpus_per_node=gpus_per_node,
        processes_per_node=processes_per_node,
        gpu_memory_bytes=_parse_bytes(gpu_memory) if gpu_memory else None,
        time=time,
        partition=partition,
        sweep=tuple(sweep or ()),
        price=price,
        dry_run=dry_run,
        fresh=fresh,
    )
    _load(config, overrides)
    from dist_finetune.submit import submit as submit_job

    submit_job(config, overrides or (), request, typer.echo)


@app.command()
def doctor(
    config: Annotated[str | None, typer.Argument(metavar="[CONFIG]", help="Also check what this config needs.")] = None,
    overrides: Overrides = None,
) -> None:
    """Check versions, GPUs, ranks, network, disks, hub, W&B: alone or under any launcher; exit code 1 if one fails."""
    spec = _load(config, overrides) if config else None
    from dist_finetune.doctor import examine

    raise typer.Exit(examine(spec, typer.echo))


@app.command()
def schema() -> None:
    """Print the JSON Schema of the config, for completion in an editor."""
    from dist_finetune.spec import Spec

    content = Spec.model_json_schema()
    # A file without a name takes its own.
    content["required"] = [key for key in content["required"] if key != "name"]
    typer.echo(json.dumps({"$schema": "https://json-schema.org/draft/2020-12/schema", **content}, indent=2))


for command in (
    cli_model.evaluate,
    cli_model.predict,
    cli_model.export,
    cli_model.verify,
    cli_model.inspect,
    cli_model.cache,
    cli_report.report,
    cli_report.prepare,
):
    app.command()(command)


def _load(config: str, overrides: Sequence[str] | None) -> "Spec":
    # Building the models of the config takes half of what `--help` may take.
    from dist_finetune.spec_file import load_spec

    return load_spec(config, overrides or ())


def _parse_bytes(text: str) -> int:
    from dist_finetune.durations import parse_bytes

    try:
        number: int = parse_bytes(text)
    except ValueError as error:
        raise UserError(f"--gpu-memory: {error}") from None
    return number
